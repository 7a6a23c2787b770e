//! The daemon's parts, and what all RPCs share: places on the host, watching monitors, waiting.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use podvisor_image::ImageStore;
use podvisor_monitor::{agent_calls, snapshots};
use podvisor_network::Cni;
use podvisor_node::backend;
use podvisor_node::config::Config;
use podvisor_node::inventory::Places;
use podvisor_oci::rootfs::Layers;
use tokio_util::sync::CancellationToken;
use tonic::{Response, Status};
use tracing::{debug, info, warn};

use crate::error::{Error, Result};
use crate::ids::Names;
use crate::metrics::Metrics;
use crate::monitor::{Monitor, read_state_file};
use crate::pod::{Pod, Pods};
use crate::store::Store;
use crate::trace;

/// Pause between two attempts to reach a monitor whose process lives.
const RECONNECT: Duration = Duration::from_millis(500);

/// podvisord.
pub struct Daemon {
    /// As read at start.
    pub config: Config,
    /// What VMs run on.
    pub vmm: backend::Choice,
    /// Facts an operator should know, repeated by Status.
    pub warnings: Vec<String>,
    /// Records.
    pub store: Store,
    /// Images.
    pub images: ImageStore,
    /// Their layers, mounted for pods on the host.
    pub layers: Arc<Layers>,
    /// CNI.
    pub cni: Cni,
    /// Pods and containers.
    pub pods: Pods,
    /// Sandbox names in use.
    pub sandbox_names: Names,
    /// Container names in use.
    pub container_names: Names,
    /// What is counted.
    pub metrics: Metrics,
    /// What UpdateRuntimeConfig said last: shown by Status, used by nobody.
    pub pod_cidr: Mutex<String>,
    /// Cancelled when podvisord ends: streams to clients that have no end of their own end then.
    pub ending: CancellationToken,
}

impl std::fmt::Debug for Daemon {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Daemon")
            .field("config", &self.config)
            .finish_non_exhaustive()
    }
}

impl Daemon {
    /// The sandbox's folder.
    pub fn sandbox_dir(&self, id: &str) -> PathBuf {
        self.config.run_dir.join("sandboxes").join(id)
    }

    /// The pod's network namespace, as a bind mount.
    pub fn netns_path(&self, id: &str) -> PathBuf {
        self.config.run_dir.join("netns").join(id)
    }

    /// The pod's writable disk.
    pub fn scratch_path(&self, id: &str) -> PathBuf {
        self.config
            .data_dir
            .join("scratch")
            .join(format!("{id}.img"))
    }

    /// Where images are.
    pub fn images_dir(&self) -> PathBuf {
        self.config.data_dir.join("images")
    }

    /// What UpdateRuntimeConfig said last; empty: nothing.
    pub fn pod_cidr(&self) -> MutexGuard<'_, String> {
        self.pod_cidr.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where the host's resources of this instance are found.
    pub fn places(&self) -> Places {
        Places {
            run_dir: self.config.run_dir.clone(),
            data_dir: self.config.data_dir.clone(),
            cni_cache_dir: self.config.cni_cache_dir(),
        }
    }

    /// Follows a pod's monitor until the pod is removed or the monitor dies.
    pub fn watch(self: &Arc<Self>, pod: &Arc<Pod>) {
        let Some(monitor) = pod.monitor() else { return };
        let daemon = Arc::clone(self);
        let pod = Arc::downgrade(pod);
        tokio::spawn(async move {
            tokio::select! {
                () = monitor.died() => {}
                () = daemon.follow(&monitor, &pod) => return,
                () = daemon.keep_sampling(&monitor, &pod) => return,
            }
            let Some(pod) = pod.upgrade() else { return };
            // A monitor that was told to shut down ends too: that is no news.
            if pod.monitor().is_some() {
                daemon.monitor_died(&pod).await;
            }
        });
    }

    /// Rule 2 of the design: a monitor's death is one pod's death, reported at once.
    pub async fn monitor_died(&self, pod: &Arc<Pod>) {
        let last = read_state_file(&self.sandbox_dir(&pod.id));
        let why = "the pod's monitor died";
        let record = self.pods.monitor_gone(pod, last, why, now_ns());
        warn!(sandbox = pod.id, "monitor died: the pod is dead");
        if Self::is_on_host(&record) {
            // With a VM, its containers are dead too.
            self.kill_processes(&record).await;
        }
        if let Err(error) = self.store.put_sandbox(record).await {
            warn!(sandbox = pod.id, %error, "cannot record the pod's death");
        }
    }

    /// Copies states from the monitor to the pod. Ends when the pod is forgotten. A monitor that does
    /// not answer while its process lives is retried for ever and never killed: it may only be busy.
    async fn follow(&self, monitor: &Monitor, pod: &std::sync::Weak<Pod>) {
        loop {
            if let Err(error) = self.follow_once(monitor, pod).await {
                info!(pid = monitor.pid(), %error, "monitor does not answer, trying again");
            }
            if pod.strong_count() == 0 {
                return;
            }
            tokio::time::sleep(RECONNECT).await;
        }
    }

    async fn follow_once(&self, monitor: &Monitor, pod: &std::sync::Weak<Pod>) -> Result<()> {
        let mut stream = monitor.follow().await?;
        let broken = |error| Error::io("the stream of its states")(error);
        while let Some(snapshot) = snapshots::read(&mut stream).await.map_err(broken)? {
            let Some(pod) = pod.upgrade() else { break };
            debug!(
                sandbox = pod.id,
                revision = snapshot.revision,
                "state from the monitor"
            );
            self.pods.apply(&pod, Some(snapshot));
        }
        Ok(())
    }
}

/// Wall clock, nanoseconds since the epoch.
pub fn now_ns() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_nanos() as u64)
}

/// The monitor's RPC `what`, but not longer than `limit`.
///
/// # Errors
/// What the monitor said; UNAVAILABLE after the deadline.
pub async fn within<T>(
    limit: Duration,
    what: &'static str,
    call: impl Future<Output = std::result::Result<Response<T>, Status>>,
) -> Result<T> {
    let answer = async {
        match tokio::time::timeout(limit, call).await {
            Ok(answer) => {
                let told = answer
                    .as_ref()
                    .map_or_else(Status::metadata, Response::metadata);
                trace::agent_calls(&agent_calls::read(told));
                Ok(answer?.into_inner())
            }
            Err(_) => Err(Error::MonitorUnreachable(format!(
                "{what} took longer than {} s",
                limit.as_secs()
            ))),
        }
    };
    trace::monitor_call(what, answer).await
}

/// `work` that waits for the disk or the kernel, where that holds up nobody else.
///
/// # Errors
/// Its own; CANCELLED when podvisord ends.
pub async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|_| Error::Cancelled)?
}
