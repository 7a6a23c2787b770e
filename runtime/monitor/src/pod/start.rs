//! StartContainer.

use std::fs::File;
use std::io;
use std::sync::Arc;

use podvisor_oci::stdio::{Streams, Wanted};
use podvisor_proto::monitor::ContainerState;
use tracing::{info, warn};

use super::attach::Input;
use super::container::{self, Container};
use super::{Pod, PodError};
use crate::log::Pump;
use crate::log::format::Stream;
use crate::state::now_ns;

impl Pod {
    /// Starts a container's process. When that fails, the container has ended (128, StartError) and
    /// this is no error.
    pub async fn start(self: &Arc<Self>, id: &str) -> Result<(), PodError> {
        let runner = self.ready_runner()?;
        let container = self.container(id)?;
        let _operation = container.operation.lock().await;
        match self.state.container_state(id) {
            None => return Err(PodError::NotFound(id.to_owned())),
            // A retry, perhaps of a start whose process has ended since.
            Some(ContainerState::Running | ContainerState::Exited) => return Ok(()),
            Some(ContainerState::Created) => {}
        }
        container.set_starting();
        let wanted = Wanted {
            stdin: container.stdin,
            terminal: container.terminal,
        };
        match runner.start(id, wanted).await {
            Ok((pid, streams)) => {
                if let Err(error) = connect_log(&container, streams) {
                    // It runs, and waits when its pipes are full.
                    warn!(container = id, %error, "its output cannot be logged");
                }
                self.record_started(&container, pid);
            }
            Err(error) => self.record_start_error(&container, &error),
        }
        Ok(())
    }

    fn record_started(self: &Arc<Self>, container: &Arc<Container>, pid: u32) {
        info!(container = container.id, pid, "started");
        self.state.update_container(&container.id, |entry| {
            if entry.state() != ContainerState::Created {
                return false; // The VM is gone.
            }
            entry.set_state(ContainerState::Running);
            entry.started_ns = now_ns();
            entry.pid = pid;
            true
        });
        if container.set_started() {
            tokio::spawn(container::finish(Arc::clone(self), Arc::clone(container)));
        }
    }

    fn record_start_error(&self, container: &Container, error: &PodError) {
        warn!(container = container.id, %error, "cannot be started");
        container.set_start_failed();
        self.state.update_container(&container.id, |entry| {
            if entry.state() == ContainerState::Exited {
                return false; // The VM is gone.
            }
            container::set_start_error(entry, error.to_string());
            true
        });
    }
}

/// Starts to move the container's output into its log, and keeps its input for callers.
fn connect_log(container: &Container, streams: Streams) -> io::Result<()> {
    let stdin = match &streams.stdout {
        Some(terminal) if container.terminal && container.stdin => Some(terminal.try_clone()?),
        _ => streams.stdin,
    };
    let input = |stdin| Input::new(stdin, container.stdin_once, container.terminal);
    let stdin = stdin.map(input).transpose()?;
    let mut outputs = Vec::with_capacity(2);
    if let Some(stdout) = streams.stdout {
        outputs.push((Stream::Stdout, File::from(stdout)));
    }
    if let Some(stderr) = streams.stderr {
        outputs.push((Stream::Stderr, File::from(stderr)));
    }
    let pump = Pump::start(outputs, Arc::clone(&container.log))?;
    container.set_streams(pump, stdin);
    Ok(())
}
