//! StopContainer.

use std::time::Duration;

use podvisor_proto::agent::SignalRequest;
use podvisor_proto::monitor::ContainerState;
use tokio::time::timeout;
use tracing::{info, warn};

use super::{Pod, PodError};

/// How long a container may take to end after SIGKILL.
const KILL_DEADLINE: Duration = Duration::from_secs(20);

impl Pod {
    /// Ends a container: `signal`, up to `grace` for it to end, SIGKILL for all its processes. When
    /// this returns its end has been recorded. Any number of callers may do it at a time.
    pub async fn stop(&self, id: &str, signal: u32, grace: Duration) -> Result<(), PodError> {
        let container = self.container(id)?;
        // A start that is under way decides first.
        drop(container.operation.lock().await);
        if self.state.container_state(id) != Some(ContainerState::Running) {
            return Ok(());
        }
        if !grace.is_zero() && self.signal_to_stop(id, signal).await {
            let exited = self.state.wait_exited(id);
            if timeout(grace, exited).await.is_ok() {
                return Ok(());
            }
            info!(container = id, "did not end in time: SIGKILL");
        }
        self.kill(id).await
    }

    /// Kills all processes of a container and waits until its end has been recorded.
    pub(super) async fn kill(&self, id: &str) -> Result<(), PodError> {
        if let Err(error) = self.signal(id, libc::SIGKILL as u32, true).await {
            // With the VM or just before, the container may end without our help.
            warn!(container = id, %error, "SIGKILL was not delivered");
        }
        timeout(KILL_DEADLINE, self.state.wait_exited(id))
            .await
            .map_err(|_| PodError::Deadline(format!("container {id} does not end")))
    }

    /// Sends `signal` to the first process, unless a stop before has. False when it cannot be sent.
    async fn signal_to_stop(&self, id: &str, signal: u32) -> bool {
        let Ok(container) = self.container(id) else {
            return false;
        };
        if !container.note_stop_signal(signal) {
            return true;
        }
        let sent = self.signal(id, signal, false).await;
        if let Err(error) = &sent {
            warn!(container = id, signal, %error, "the signal was not delivered");
        }
        sent.is_ok()
    }

    async fn signal(&self, id: &str, signal: u32, all: bool) -> Result<(), PodError> {
        let request = SignalRequest {
            container_id: id.to_owned(),
            exec_id: String::new(),
            signal,
            all,
        };
        self.runner.signal(request).await
    }
}
