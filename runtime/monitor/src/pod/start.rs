//! StartContainer.

use std::io;
use std::sync::Arc;

use podvisor_proto::agent::{SignalRequest, StartContainerRequest, StartContainerResponse};
use podvisor_proto::monitor::ContainerState;
use tracing::{info, warn};

use super::container::{self, Container};
use super::streams::{Streams, Tokens, Wanted};
use super::{Pod, PodError};
use crate::agent::{Agent, AgentError};
use crate::log::Pump;
use crate::log::format::Stream;
use crate::state::now_ns;

impl Pod {
    /// Starts a container's process. When the guest cannot, the container has ended (128,
    /// StartError) and this is no error.
    pub async fn start(self: &Arc<Self>, id: &str) -> Result<(), PodError> {
        let agent = self.agent()?;
        let container = self.container(id)?;
        let _operation = container.operation.lock().await;
        match self.state.container_state(id) {
            None => return Err(PodError::NotFound(id.to_owned())),
            // A retry, perhaps of a start whose process has ended since.
            Some(ContainerState::Running | ContainerState::Exited) => return Ok(()),
            Some(ContainerState::Created) => {}
        }
        match self.start_in_guest(&agent, &container).await {
            Ok(started) => self.record_started(&container, started.pid),
            Err(error) => self.record_start_error(&agent, &container, error).await,
        }
        Ok(())
    }

    /// Opens the streams and asks the agent, at the same time: it waits for the streams it is told.
    async fn start_in_guest(
        &self,
        agent: &Agent,
        container: &Container,
    ) -> Result<StartContainerResponse, PodError> {
        let tokens = Tokens::new(Wanted {
            stdin: container.stdin,
            terminal: container.terminal,
        });
        container.set_starting();
        let request = StartContainerRequest {
            id: container.id.clone(),
            stdio: Some(tokens.stdio()),
        };
        let connect = async {
            let streams = tokens.open(&self.dial).await?;
            connect_log(container, streams)
        };
        // Not try_join: the agent's answer is worth having also when a stream fails.
        let (connected, started) = tokio::join!(connect, agent.start_container(request));
        connected.map_err(PodError::Stream)?;
        Ok(started?)
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

    async fn record_start_error(&self, agent: &Agent, container: &Container, error: PodError) {
        warn!(container = container.id, %error, "cannot be started");
        // An agent that refuses has left no process; one that did not answer may have.
        if !matches!(error, PodError::Agent(AgentError::Failed { .. })) {
            let kill = SignalRequest {
                container_id: container.id.clone(),
                exec_id: String::new(),
                signal: libc::SIGKILL as u32,
                all: true,
            };
            if let Err(error) = agent.signal(kill).await {
                warn!(container = container.id, %error, "cannot be killed either");
            }
        }
        container.set_start_failed();
        if let Some(pump) = container.take_pump() {
            pump.cut().await;
        }
        self.state.update_container(&container.id, |entry| {
            if entry.state() == ContainerState::Exited {
                return false; // The VM is gone.
            }
            container::set_start_error(entry, error.to_string());
            true
        });
    }
}

/// Starts to move the container's output into its log.
fn connect_log(container: &Container, streams: Streams) -> io::Result<()> {
    let mut outputs = Vec::with_capacity(2);
    if let Some(stdout) = streams.stdout {
        outputs.push((Stream::Stdout, stdout.into_std()?));
    }
    if let Some(stderr) = streams.stderr {
        outputs.push((Stream::Stderr, stderr.into_std()?));
    }
    let pump = Pump::start(outputs, Arc::clone(&container.log))?;
    container.set_streams(Some(pump), streams.stdin);
    Ok(())
}
