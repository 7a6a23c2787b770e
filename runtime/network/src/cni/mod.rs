//! CNI's runtime side, <https://github.com/containernetworking/cni/blob/spec-v1.0.0/SPEC.md>.
//!
//! - [`config`]: network configurations of the conf folder.
//! - [`exec`]: one plugin, run once.
//! - [`result`]: what plugins answer, in all versions of the spec.
//! - [`cache`]: what is remembered of an attachment, so that DEL undoes what ADD did, whatever
//!   happened to the conf folder or to us in between.

pub mod error;

use std::path::PathBuf;
use std::time::Duration;

pub use error::CniError;

use crate::types::{Attachment, PodNetwork};

/// Where CNI's things are.
#[derive(Debug, Clone)]
pub struct CniConfig {
    /// Network configurations: `*.conflist`, `*.conf`, `*.json`; the first valid one by name.
    pub conf_dir: PathBuf,
    /// Searched in this order.
    pub plugin_dirs: Vec<PathBuf>,
    /// One file per attachment.
    pub cache_dir: PathBuf,
    /// For one run of one plugin.
    pub plugin_timeout: Duration,
}

/// The network that new pods get.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetworkStatus {
    /// The network's name.
    pub name: String,
    /// The file that defines it.
    pub file: PathBuf,
    /// Files before it that could not be used, with the reason.
    pub ignored: Vec<String>,
}

/// Attaches pods to the node's network. A cheap handle.
#[derive(Debug, Clone)]
pub struct Cni {}

impl Cni {
    /// Reads nothing yet; all folders may appear later.
    pub fn new(config: CniConfig) -> Self {
        let _ = config;
        Self {}
    }

    /// The network of new pods, or why there is none: CRI's NetworkReady. Cheap.
    pub async fn status(&self) -> Result<NetworkStatus, CniError> {
        Err(CniError::InvalidAttachment("not written yet".into()))
    }

    /// ADD. On an error DEL has been run and nothing is left.
    pub async fn add(&self, attachment: &Attachment) -> Result<PodNetwork, CniError> {
        Err(CniError::InvalidAttachment(attachment.sandbox_id.clone()))
    }

    /// CHECK of a pod that was added. OK without asking when the configuration says so.
    pub async fn check(&self, sandbox_id: &str) -> Result<(), CniError> {
        Err(CniError::InvalidAttachment(sandbox_id.to_owned()))
    }

    /// DEL. OK for a pod that was never added or is deleted already, and when its namespace is gone.
    pub async fn del(&self, sandbox_id: &str) -> Result<(), CniError> {
        Err(CniError::InvalidAttachment(sandbox_id.to_owned()))
    }
}
