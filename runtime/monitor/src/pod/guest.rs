//! The pod in a VM: its agent carries out what callers ask for.

use std::time::Duration;

use podvisor_monitor::fd_socket::Token;
use podvisor_monitor::fd_table::FdTable;
use podvisor_oci::stdio::{Streams, Wanted};
use podvisor_proto::agent::{
    self, ExecRequest, PortForwardRequest, ResizeRequest, ResolvedUser, SampleResponse,
    SignalRequest, StartContainerRequest,
};
use podvisor_proto::monitor::{
    ConfigureRequest, CreateContainerRequest, SandboxState, VmStatsResponse,
};
use podvisor_vmm::{FsHandle, SegmentMap, Vmm};
use tokio::net::UnixStream;
use tokio::sync::watch;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use tonic::Code;
use tracing::{info, warn};

use super::PodError;
use super::block_devices::BlockDevices;
use super::create::all_layers;
use super::layers::Layers;
use super::streams::{Dial, Tokens, connect};
use super::vm_facts::VmFacts;
use crate::agent::{Agent, AgentError};
use crate::console::Console;
use crate::state::{State, now_ns};

/// How long an agent whose connection broke may take to dial again.
const AGENT_RETURN: Duration = Duration::from_secs(10);

/// The parts that a VM's pod is made of.
pub struct VmParts {
    /// The guest's console.
    pub console: Console,
    /// The pod's disk.
    pub disk: SegmentMap,
    /// The VM's device for volumes.
    pub fs: FsHandle,
    /// The disk's writable segment.
    pub scratch: agent::Segment,
    /// Connects to a port of the guest.
    pub dial: Dial,
    /// Virtual CPUs of the VM.
    pub vcpus: u32,
    /// Its memory.
    pub memory_bytes: u64,
    /// What that may get to.
    pub max_memory_bytes: u64,
}

/// The guest.
pub struct Guest {
    console: Console,
    state: State,
    fds: FdTable,
    layers: Layers,
    block_devices: BlockDevices,
    fs: FsHandle,
    scratch: agent::Segment,
    dial: Dial,
    facts: VmFacts,
    agent: watch::Sender<Option<Agent>>,
    /// Asks `vm.rs` to end the VM.
    kill: CancellationToken,
    /// Cancelled when the VM is gone.
    gone: CancellationToken,
}

impl Guest {
    /// Of a VM that is about to boot.
    pub fn new(parts: VmParts, state: State, fds: FdTable, gone: CancellationToken) -> Self {
        Self {
            console: parts.console,
            state,
            fds,
            layers: Layers::new(parts.disk.clone()),
            block_devices: BlockDevices::new(parts.disk),
            fs: parts.fs,
            scratch: parts.scratch,
            dial: parts.dial,
            facts: VmFacts::new(parts.vcpus, parts.memory_bytes),
            agent: watch::Sender::new(None),
            kill: CancellationToken::new(),
            gone,
        }
    }

    /// The guest's console.
    pub fn console(&self) -> &Console {
        &self.console
    }

    /// Cancelled when the VM shall end.
    pub fn kill(&self) -> &CancellationToken {
        &self.kill
    }

    /// The VM runs: from now on its counters can be asked for.
    pub fn set_running(&self, vm: &dyn Vmm) {
        self.facts.set_running(vm);
    }

    /// Bytes of memory that the VM has.
    pub fn memory_bytes(&self) -> u64 {
        self.facts.memory_bytes()
    }

    /// Counters of the VM. `None`: it never ran.
    pub fn stats(&self) -> Option<VmStatsResponse> {
        self.facts.stats()
    }

    /// The agent is there, or gone.
    pub fn set_agent(&self, agent: Option<Agent>) {
        self.agent.send_replace(agent);
    }

    /// Ends when the agent is there.
    pub async fn agent_ready(&self) {
        // Fails only when the sender is gone, and `self` holds it.
        let _ = self.agent.subscribe().wait_for(Option::is_some).await;
    }

    /// Ends when it is not.
    #[cfg(test)]
    pub async fn agent_gone(&self) {
        let _ = self.agent.subscribe().wait_for(Option::is_none).await;
    }

    /// The agent, in any state of the sandbox.
    fn agent(&self) -> Result<Agent, PodError> {
        let unavailable = || AgentError::Failed {
            code: Code::Unavailable,
            message: "the agent's connection is broken".to_owned(),
        };
        Ok(self.agent.borrow().clone().ok_or_else(unavailable)?)
    }

    /// Ends when the agent is there, or will not come any more.
    pub async fn booted(&self) {
        // The boot has its own deadline; an agent that was there and is gone is given some time.
        let agent_lost = async {
            self.state.wait_for(|s| !s.agent_version.is_empty()).await;
            sleep(AGENT_RETURN).await;
        };
        tokio::select! {
            () = self.agent_ready() => {}
            () = self.gone.cancelled() => {}
            () = agent_lost => {}
        }
    }

    /// Sets what all containers share, and the network.
    pub async fn configure(&self, request: ConfigureRequest) -> Result<(), PodError> {
        let agent = self.agent()?;
        let mut sandbox = request.sandbox.unwrap_or_default();
        sandbox.scratch = Some(self.scratch);
        sandbox.time_ns = now_ns();
        // The network namespace that a user namespace owns comes with the sandbox.
        let in_turn = sandbox.user_namespace.is_some();
        let network = async {
            match request.network {
                Some(network) => agent.configure_network(network).await,
                None => Ok(()),
            }
        };
        if in_turn {
            agent.configure_sandbox(sandbox).await?;
            network.await?;
        } else {
            tokio::try_join!(agent.configure_sandbox(sandbox), network)?;
        }
        Ok(())
    }

    /// Assembles a container.
    pub async fn create(
        &self,
        request: &CreateContainerRequest,
    ) -> Result<Option<ResolvedUser>, PodError> {
        let agent = self.agent()?;
        if !request.volumes_fd_token.is_empty() {
            let socket = self.fds.take(&request.volumes_fd_token);
            let socket =
                socket.ok_or_else(|| PodError::State("no socket for volumes came".to_owned()))?;
            self.fs.connect(socket.into());
        }
        let block_devices = self.block_devices.map(&request.block_devices, &self.fds)?;
        let layers: Vec<_> = all_layers(request).cloned().collect();
        let segments = self.layers.acquire(&layers, &self.fds).inspect_err(|_| {
            // The guest has not heard of them.
            let devices = block_devices.iter();
            let segments: Vec<_> = devices.filter_map(|device| device.segment).collect();
            self.block_devices.unmap(&segments);
        });
        let mut segments = segments?.into_iter();
        // As many as were asked for, in the same order.
        let mut take = |count| segments.by_ref().take(count).collect();
        let created = agent
            .create_container(agent::CreateContainerRequest {
                id: request.id.clone(),
                layers: take(request.layers.len()),
                spec: request.spec.clone(),
                user: request.user.clone(),
                image_volumes: request
                    .image_volumes
                    .iter()
                    .map(|volume| agent::ImageVolume {
                        layers: take(volume.layers.len()),
                        sub_path: volume.sub_path.clone(),
                    })
                    .collect(),
                block_devices: block_devices.clone(),
                guest_devices: request.guest_devices,
                seccomp: request.seccomp.clone(),
            })
            .await;
        match created {
            Ok(created) => Ok(created.user),
            Err(error) => {
                self.undo_create(&agent, request).await;
                // An agent that has refused has none of them: it says so for those that it had.
                let devices = block_devices.iter();
                let segments: Vec<_> = devices.filter_map(|device| device.segment).collect();
                if matches!(error, AgentError::Failed { .. }) {
                    self.block_devices.unmap(&segments);
                }
                Err(error.into())
            }
        }
    }

    /// Takes a container that could not be created out of the guest.
    async fn undo_create(&self, agent: &Agent, request: &CreateContainerRequest) {
        let diff_ids: Vec<String> = all_layers(request).map(|l| l.diff_id.clone()).collect();
        self.layers.release(&diff_ids);
        match agent.remove_container(&request.id).await {
            Ok(removed) => {
                self.layers.unmap(&removed.released);
                self.block_devices.unmap(&removed.released);
            }
            Err(error) => {
                warn!(container = request.id, %error, "a failed create could not be undone");
            }
        }
    }

    /// Starts a container's process: its number and its streams. After an error none is left.
    pub async fn start(&self, id: &str, wanted: Wanted) -> Result<(u32, Streams), PodError> {
        let agent = self.agent()?;
        let tokens = Tokens::new(wanted);
        let request = StartContainerRequest {
            id: id.to_owned(),
            stdio: Some(tokens.stdio()),
        };
        // At the same time: the agent waits for the streams it is told. Not try_join: its answer is
        // worth having also when a stream fails.
        let (streams, started) =
            tokio::join!(tokens.open(&self.dial), agent.start_container(request));
        match (streams, started) {
            (Ok(streams), Ok(started)) => Ok((started.pid, streams)),
            // An agent that refuses has left no process.
            (_, Err(error @ AgentError::Failed { .. })) => Err(error.into()),
            (streams, started) => {
                self.signal(kill_all(id, "")).await.unwrap_or_else(|error| {
                    warn!(container = id, %error, "cannot be killed either");
                });
                started?;
                streams.map_err(PodError::Stream)?;
                Err(PodError::Internal("no failure".to_owned()))
            }
        }
    }

    /// Starts one more process in a container. Not to be dropped halfway: nobody would know whether
    /// it runs.
    pub async fn exec(
        &self,
        container_id: &str,
        exec_id: &str,
        args: &[String],
        wanted: Wanted,
    ) -> Result<Streams, PodError> {
        let agent = self.agent()?;
        let tokens = Tokens::new(wanted);
        let request = ExecRequest {
            container_id: container_id.to_owned(),
            exec_id: exec_id.to_owned(),
            args: args.to_vec(),
            stdio: Some(tokens.stdio()),
            ..ExecRequest::default()
        };
        let (streams, started) = tokio::join!(tokens.open(&self.dial), agent.exec(request));
        started?;
        streams.map_err(PodError::Stream)
    }

    /// Sends a signal.
    pub async fn signal(&self, request: SignalRequest) -> Result<(), PodError> {
        Ok(self.agent()?.signal(request).await?)
    }

    /// Sets the size of a terminal.
    pub async fn resize(&self, request: ResizeRequest) -> Result<(), PodError> {
        Ok(self.agent()?.resize(request).await?)
    }

    /// What the pod uses, as the guest says.
    pub async fn sample(&self) -> Result<SampleResponse, PodError> {
        Ok(self.agent()?.sample().await?)
    }

    /// A stream to a port of the pod's loopback interface.
    pub async fn port_forward(&self, port: u32) -> Result<UnixStream, PodError> {
        let agent = self.agent()?;
        let token = Token::random();
        let request = PortForwardRequest {
            port,
            stream: token.to_vec(),
        };
        let (stream, accepted) =
            tokio::join!(connect(&self.dial, token), agent.port_forward(request));
        accepted?;
        stream.map_err(PodError::Stream)
    }

    /// Sets a container's limits.
    pub async fn update(&self, id: &str, resources: Vec<u8>) -> Result<(), PodError> {
        let request = agent::UpdateContainerRequest {
            id: id.to_owned(),
            resources,
        };
        Ok(self.agent()?.update_container(request).await?)
    }

    /// Gives the guest memory until it has at least `bytes`. Returns what its kernel says it has then.
    pub async fn grow(&self, bytes: u64) -> Result<u64, PodError> {
        let agent = self.agent()?;
        let ram = self.facts.ram();
        let ram = ram.ok_or_else(|| PodError::State("the VM does not run".to_owned()))?;
        let ranges = ram
            .grow(bytes)?
            .into_iter()
            .map(|range| agent::MemoryRange {
                start: range.start,
                length: range.end - range.start,
            });
        let request = agent::AddMemoryRequest {
            ranges: ranges.collect(),
        };
        Ok(agent.add_memory(request).await?.memory_total_bytes)
    }

    /// Takes a container out of the guest.
    pub async fn remove(&self, id: &str, diff_ids: &[String]) -> Result<(), PodError> {
        // With the VM, all is gone that there was.
        if self.state.sandbox_state() != SandboxState::Stopped {
            let removed = self.agent()?.remove_container(id).await?;
            self.layers.release(diff_ids);
            self.layers.unmap(&removed.released);
            self.block_devices.unmap(&removed.released);
        }
        Ok(())
    }

    /// Lets a guest that answers write everything to its disks and volumes, then ends the VM in any case.
    pub async fn end(&self, answers: bool) {
        if let (true, Ok(agent)) = (answers, self.agent()) {
            let asked = agent.shutdown().await;
            info!(?asked, "asked the guest to write everything");
        }
        self.kill.cancel();
    }
}

/// SIGKILL for all processes of a container, or of an exec in it.
pub fn kill_all(container_id: &str, exec_id: &str) -> SignalRequest {
    SignalRequest {
        container_id: container_id.to_owned(),
        exec_id: exec_id.to_owned(),
        signal: libc::SIGKILL as u32,
        all: true,
    }
}
