//! CNI's runtime side, <https://github.com/containernetworking/cni/blob/spec-v1.0.0/SPEC.md>.
//!
//! - `config`: the networks of the conf folder.
//! - `request`: what a plugin gets on its stdin and in `CNI_ARGS`.
//! - `exec`: one plugin, run once.
//! - `result`: what plugins answer, in all versions of the spec.
//! - `cache`: what is remembered of an attachment, so that DEL undoes what ADD did, whatever
//!   happened to the conf folder or to us in between.
//! - `operations`: ADD, CHECK and DEL of a whole network.
//! - `locks`: one operation at a time on one sandbox.

mod cache;
mod config;
mod error;
mod exec;
mod locks;
mod operations;
mod request;
mod result;

use std::convert::Infallible;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::oneshot;

use crate::types::{Attachment, PodNetwork};
pub use error::CniError;
use exec::Verb;
use operations::Operations;

/// Where CNI's things are.
#[derive(Debug, Clone)]
pub struct CniConfig {
    /// Network configurations: `*.conflist`, `*.conf`, `*.json`; the first valid one by name.
    pub conf_dir: PathBuf,
    /// Searched in this order.
    pub plugin_dirs: Vec<PathBuf>,
    /// One file per attachment, named after the sandbox.
    pub cache_dir: PathBuf,
    /// For one run of one plugin; see [`DEFAULT_PLUGIN_TIMEOUT`].
    pub plugin_timeout: Duration,
}

/// Plugins of cloud networks may wait for an API; a kubelet gives RunPodSandbox four minutes.
pub const DEFAULT_PLUGIN_TIMEOUT: Duration = Duration::from_mins(1);

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
///
/// ADD, CHECK and DEL of one sandbox never overlap; those of different sandboxes run in parallel
/// (plugins have locks of their own). Once begun they end, also when the caller goes away: an ADD
/// that nobody waits for any more stops and is undone.
#[derive(Debug, Clone)]
pub struct Cni {
    operations: Arc<Operations>,
}

impl Cni {
    /// Reads nothing yet: all folders may appear later.
    pub fn new(config: CniConfig) -> Self {
        Self {
            operations: Arc::new(Operations::new(config)),
        }
    }

    /// The network of new pods: CRI's NetworkReady. Costs a look at the conf folder and at the
    /// plugins' binaries.
    ///
    /// # Errors
    /// [`CniError::NoNetwork`] or [`CniError::PluginMissing`]: the message is the condition's.
    pub async fn status(&self) -> Result<NetworkStatus, CniError> {
        let chosen = self.operations.ready_network().await?;
        Ok(NetworkStatus {
            name: chosen.network.name.clone(),
            file: chosen.file,
            ignored: chosen.ignored,
        })
    }

    /// ADD: attaches a pod to the node's network.
    ///
    /// # Errors
    /// The first plugin's that failed. DEL has been run then; if that failed too, the attachment is
    /// still in [`Cni::attachments`] and [`Cni::del`] may be tried again.
    pub async fn add(&self, attachment: &Attachment) -> Result<PodNetwork, CniError> {
        request::check_id(&attachment.sandbox_id)?;
        let operations = Arc::clone(&self.operations);
        // Dropped with this call: the task's sign that nobody waits.
        let (_caller, gone) = oneshot::channel::<Infallible>();
        let (reply, answer) = oneshot::channel();
        let attachment = attachment.clone();
        tokio::spawn(async move {
            let id = attachment.sandbox_id.clone();
            let _guard = operations.lock(&id).await;
            let result = operations.add(attachment, gone).await;
            if let Err(Ok(_attached)) = reply.send(result) {
                operations.undo(&id).await;
            }
        });
        answer.await.map_err(|_| CniError::Aborted)?
    }

    /// CHECK: the plugins look whether an attachment is still as they made it. OK without asking
    /// when its configuration says so, or has a version of the spec without CHECK.
    ///
    /// # Errors
    /// The first plugin's that is not content, or the sandbox is not attached.
    pub async fn check(&self, sandbox_id: &str) -> Result<(), CniError> {
        self.to_the_end(sandbox_id, Verb::Check).await
    }

    /// DEL: detaches a pod, with the configuration it was attached with. OK for a pod that is not
    /// attached, and when its namespace is gone.
    ///
    /// # Errors
    /// The first plugin's that failed; the others have run nevertheless. May be tried again.
    pub async fn del(&self, sandbox_id: &str) -> Result<(), CniError> {
        self.to_the_end(sandbox_id, Verb::Del).await
    }

    /// Sandboxes that are attached, or whose ADD or DEL has not ended.
    ///
    /// # Errors
    /// The cache folder cannot be read.
    pub async fn attachments(&self) -> Result<Vec<String>, CniError> {
        self.operations.attachments().await
    }

    /// Runs the operation alone on the sandbox, and to its end, whether or not the caller waits.
    async fn to_the_end(&self, sandbox_id: &str, verb: Verb) -> Result<(), CniError> {
        request::check_id(sandbox_id)?;
        let (operations, id) = (Arc::clone(&self.operations), sandbox_id.to_owned());
        let task = tokio::spawn(async move {
            let _guard = operations.lock(&id).await;
            match verb {
                Verb::Check => operations.check(&id).await,
                Verb::Add | Verb::Del => operations.del(&id).await,
            }
        });
        task.await.map_err(|_| CniError::Aborted)?
    }
}
