//! What can go wrong between us and the plugins.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use crate::link::LinkError;

/// An operation on a pod's attachment failed. Messages are complete: they name network, plugin and
/// command, and fit for CRI conditions and gRPC errors.
#[derive(Debug, thiserror::Error)]
pub enum CniError {
    /// No usable network configuration: NetworkReady is false.
    #[error("no network configuration in {}: {reason}", dir.display())]
    NoNetwork {
        /// The conf folder.
        dir: PathBuf,
        /// Empty folder, or what is wrong with each file.
        reason: String,
    },
    /// A plugin's binary is in none of the plugin folders.
    #[error("network {network}: plugin {plugin} is not in {dirs}")]
    PluginMissing {
        /// The network's name.
        network: String,
        /// The plugin's type.
        plugin: String,
        /// Folders searched.
        dirs: String,
    },
    /// A plugin said no, in CNI's words.
    #[error("network {network}: plugin {plugin}, {command}: {message} (CNI error {code})")]
    Refused {
        /// The network's name.
        network: String,
        /// The plugin's type.
        plugin: String,
        /// ADD, CHECK, DEL.
        command: &'static str,
        /// <https://github.com/containernetworking/cni/blob/spec-v1.0.0/SPEC.md#error>
        code: u32,
        /// `msg` and `details`.
        message: String,
    },
    /// A plugin did not behave like one: a crash, no JSON, too much of it.
    #[error("network {network}: plugin {plugin}, {command}: {message}")]
    Broken {
        /// The network's name.
        network: String,
        /// The plugin's type.
        plugin: String,
        /// ADD, CHECK, DEL.
        command: &'static str,
        /// What it did, with the end of its stderr.
        message: String,
    },
    /// A plugin took too long; it and its children were killed.
    #[error("network {network}: plugin {plugin}, {command}: no answer within {} s", timeout.as_secs())]
    Timeout {
        /// The network's name.
        network: String,
        /// The plugin's type.
        plugin: String,
        /// ADD, CHECK, DEL.
        command: &'static str,
        /// What it was given.
        timeout: Duration,
    },
    /// The pod's own data cannot be given to plugins.
    #[error("invalid network attachment: {0}")]
    InvalidAttachment(String),
    /// The plugins succeeded, but did not leave what they should.
    #[error("network {network}: after ADD: {source}")]
    Interface {
        /// The network's name.
        network: String,
        /// What is missing.
        source: LinkError,
    },
    /// The file that remembers the attachment.
    #[error("{}: {source}", path.display())]
    Cache {
        /// The file.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// The task that worked on the attachment died.
    #[error("the attachment's task ended without a result")]
    Aborted,
}
