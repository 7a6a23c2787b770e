//! Shutdown: the end of the pod.

use std::sync::Arc;
use std::time::Duration;

use podvisor_proto::monitor::{ContainerState, Snapshot};
use tokio::time::timeout;
use tracing::{error, info, warn};

use super::Pod;

/// How long containers may take to die after their grace. The VM's end is theirs in any case: a guest that does not
/// answer is not waited for.
const STOP_DEADLINE: Duration = Duration::from_secs(6);

/// How long the VMM may take to die.
const VM_KILL_DEADLINE: Duration = Duration::from_secs(10);

impl Pod {
    /// Ends the pod and returns its last state, which is then also in the state file. Callers after
    /// the first wait for the first one's end.
    pub async fn shutdown(self: &Arc<Self>, grace: Duration) -> Snapshot {
        if !self.shutting_down.is_cancelled() {
            self.shutting_down.cancel();
            tokio::spawn(Arc::clone(self).end(grace));
        }
        self.finished.cancelled().await;
        self.state.snapshot()
    }

    async fn end(self: Arc<Self>, grace: Duration) {
        info!(?grace, "shutting down");
        let stopped = timeout(grace + STOP_DEADLINE, self.stop_containers(grace)).await;
        if !self.gone.is_cancelled() {
            self.end_all(stopped.is_ok()).await;
        }
        if let Err(error) = self.state.saved().await {
            error!(%error, "the last state is not in its file");
        }
        self.finished.cancel();
    }

    async fn stop_containers(&self, grace: Duration) {
        let running: Vec<String> = self.state.read(|snapshot| {
            let containers = snapshot.containers.iter();
            containers
                .filter(|container| container.state() == ContainerState::Running)
                .map(|container| container.id.clone())
                .collect()
        });
        let stops = running.iter().map(|id| async move {
            if let Err(error) = self.stop(id, libc::SIGTERM as u32, grace).await {
                warn!(container = id, %error, "ends with the pod");
            }
        });
        futures_util::future::join_all(stops).await;
    }

    /// Ends the VM, or what the host has of the pod.
    async fn end_all(&self, answers: bool) {
        self.runner.end(answers).await;
        if self.guest().is_none() {
            self.set_gone("Shutdown", String::new()).await;
        }
        if timeout(VM_KILL_DEADLINE, self.gone.cancelled())
            .await
            .is_err()
        {
            error!("the VMM does not die");
            self.set_gone("Shutdown", "the VMM does not die".to_owned())
                .await;
        }
    }
}
