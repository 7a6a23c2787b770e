//! The pod and its containers.
//!
//! - `mod.rs`: the sandbox: its start, events, its end
//! - [`runner`]: who runs the containers: [`guest`], the agent in a VM, or [`host`], an OCI runtime
//! - [`container`]: what is kept of one container, and how it ends
//! - [`create`], [`start`], [`stop`], [`exec`], [`attach`], [`port_forward`], [`shutdown`]: what callers
//!   ask for
//! - [`block_devices`]: block devices of the host on the pod's disk
//! - [`layers`]: image layers on the pod's disk
//! - [`sample`]: what containers use
//! - [`relay`]: bytes between a process and streams of a caller's
//! - [`vm_facts`]: what is known of the VM, for who inspects it
//! - [`streams`]: byte streams between a process and the monitor
//!
//! Facts for callers are in [`State`]; what only the monitor needs is in [`Container`]. Both change
//! under short locks, never held across an await. Callers' requests that change something run as
//! tasks of their own (see `service.rs`): a caller that goes away does not leave half of it.

mod attach;
mod block_devices;
pub mod container;
mod create;
mod exec;
mod follow;
pub mod guest;
pub mod host;
pub mod layers;
mod port_forward;
mod relay;
mod runner;
mod sample;
mod shutdown;
mod start;
mod stop;
mod streams;
#[cfg(test)]
mod tests;
mod vm_facts;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use podvisor_monitor::fd_table::FdTable;
use podvisor_proto::agent::{Event, HelloResponse, event};
use podvisor_proto::monitor::{
    ConfigureRequest, ContainerState, SandboxState, Snapshot, TimelineEntry,
};
use podvisor_vmm::GrowError;
use thiserror::Error;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tonic::{Code, Status};
use tracing::{debug, info, warn};

use crate::agent::{Agent, AgentError, Observer};
use crate::state::{State, now_ns};
use block_devices::BlockDeviceError;
use container::Container;
use exec::Execs;
use guest::{Guest, VmParts};
use host::{Host, HostError};
use layers::LayerError;
use runner::Runner;

/// Execs at a time: each may keep its output in our memory.
const MAX_EXECS: usize = 64;

/// Execs and attaches with streams of their callers, at a time: they keep nothing, but each has descriptors and is a call
/// of podvisord's. Below the agent's own limit, which is each container's.
const MAX_SESSIONS: usize = 250;

/// How long the streams of a VM that is gone may take to end.
const VM_GONE_DRAIN: Duration = Duration::from_millis(500);

/// Why a request of a caller fails.
#[derive(Debug, Error)]
pub enum PodError {
    /// No container of this id.
    #[error("container {0} not found")]
    NotFound(String),
    /// The request makes no sense.
    #[error("{0}")]
    Invalid(String),
    /// The same id was used for something else.
    #[error("container {0} exists and is another one")]
    Exists(String),
    /// Not in this state.
    #[error("{0}")]
    State(String),
    /// The VM did not boot in time, or a process does not end.
    #[error("{0}")]
    Deadline(String),
    /// The caller went away.
    #[error("cancelled")]
    Cancelled,
    /// Too many execs.
    #[error("{0} commands or clients are there already")]
    TooManyExecs(usize),
    /// More memory.
    #[error(transparent)]
    Grow(#[from] GrowError),
    /// An OCI runtime.
    #[error(transparent)]
    Host(#[from] HostError),
    /// Layers.
    #[error(transparent)]
    Layer(#[from] LayerError),
    /// Block devices.
    #[error(transparent)]
    BlockDevice(#[from] BlockDeviceError),
    /// The agent.
    #[error(transparent)]
    Agent(#[from] AgentError),
    /// A stream to the guest.
    #[error("a stream to the guest: {0}")]
    Stream(#[source] std::io::Error),
    /// A task of ours ended early.
    #[error("internal error: {0}")]
    Internal(String),
}

impl From<PodError> for Status {
    fn from(error: PodError) -> Self {
        let code = match &error {
            PodError::NotFound(_) => Code::NotFound,
            PodError::Invalid(_) | PodError::Layer(LayerError::TooMany(_)) => Code::InvalidArgument,
            PodError::Exists(_) => Code::AlreadyExists,
            PodError::State(_)
            | PodError::Grow(GrowError::TooMuch { .. })
            | PodError::Layer(LayerError::NoFile(_))
            | PodError::BlockDevice(BlockDeviceError::NoFile(_)) => Code::FailedPrecondition,
            PodError::Deadline(_) | PodError::Agent(AgentError::Deadline { .. }) => {
                Code::DeadlineExceeded
            }
            PodError::Cancelled => Code::Cancelled,
            PodError::Host(error) => error.code(),
            PodError::TooManyExecs(_)
            | PodError::Grow(GrowError::Host(_))
            | PodError::Layer(LayerError::Disk { .. })
            | PodError::BlockDevice(BlockDeviceError::Disk { .. }) => Code::ResourceExhausted,
            PodError::Agent(AgentError::Failed { code, .. }) => agent_code(*code),
            PodError::Agent(AgentError::Connect(_)) | PodError::Stream(_) => Code::Unavailable,
            PodError::Agent(AgentError::Version(_)) | PodError::Internal(_) => Code::Internal,
        };
        Status::new(code, error.to_string())
    }
}

/// Codes of the agent that mean to our caller what they mean to us.
fn agent_code(code: Code) -> Code {
    match code {
        Code::NotFound
        | Code::FailedPrecondition
        | Code::InvalidArgument
        | Code::AlreadyExists
        | Code::ResourceExhausted
        | Code::Unavailable => code,
        _ => Code::Internal,
    }
}

/// The pod.
pub struct Pod {
    state: State,
    fds: FdTable,
    runner: Runner,
    requested_ns: u64,
    containers: Mutex<HashMap<String, Arc<Container>>>,
    execs: Execs,
    exec_slots: Arc<Semaphore>,
    session_slots: Arc<Semaphore>,
    /// Serialises Configure.
    configuring: tokio::sync::Mutex<()>,
    /// Serialises Grow.
    growing: tokio::sync::Mutex<()>,
    /// The VM is gone, or what the host had of the pod.
    gone: CancellationToken,
    shutting_down: CancellationToken,
    /// Shutdown is complete: the process may end.
    finished: CancellationToken,
}

impl Pod {
    /// A pod whose VM is about to boot. `requested_ns`: zero of the timeline, nanoseconds since the epoch. `fds`:
    /// descriptors that wait for the request that names them.
    pub fn in_vm(state: State, fds: FdTable, requested_ns: u64, vm: VmParts) -> Arc<Self> {
        let gone = CancellationToken::new();
        state.update(|snapshot| {
            snapshot.memory_bytes = vm.memory_bytes;
            snapshot.max_memory_bytes = vm.max_memory_bytes.max(vm.memory_bytes);
        });
        let guest = Guest::new(vm, state.clone(), fds.clone(), gone.clone());
        Self::new(state, fds, requested_ns, Runner::Guest(guest), gone)
    }

    /// A pod of the host's own.
    pub fn on_host(state: State, fds: FdTable, requested_ns: u64, host: Host) -> Arc<Self> {
        let gone = CancellationToken::new();
        Self::new(state, fds, requested_ns, Runner::Host(host), gone)
    }

    fn new(
        state: State,
        fds: FdTable,
        requested_ns: u64,
        runner: Runner,
        gone: CancellationToken,
    ) -> Arc<Self> {
        Arc::new(Self {
            state,
            fds,
            runner,
            requested_ns,
            containers: Mutex::default(),
            execs: Execs::default(),
            exec_slots: Arc::new(Semaphore::new(MAX_EXECS)),
            session_slots: Arc::new(Semaphore::new(MAX_SESSIONS)),
            configuring: tokio::sync::Mutex::default(),
            growing: tokio::sync::Mutex::default(),
            gone,
            shutting_down: CancellationToken::new(),
            finished: CancellationToken::new(),
        })
    }

    /// The VM's side. `None`: a pod of the host's own.
    pub fn guest(&self) -> Option<&Guest> {
        match &self.runner {
            Runner::Guest(guest) => Some(guest),
            Runner::Host(_) => None,
        }
    }

    /// What is known of the pod.
    pub fn state(&self) -> &State {
        &self.state
    }

    /// Cancelled when [`Pod::shutdown`] is complete.
    pub fn finished(&self) -> &CancellationToken {
        &self.finished
    }

    /// Whether the end of the VM is wanted.
    pub fn is_shutting_down(&self) -> bool {
        self.shutting_down.is_cancelled()
    }

    /// Adds a phase to the timeline, from `start_ns` to `end_ns` (host clock).
    pub fn add_phase(&self, phase: &str, start_ns: u64, end_ns: u64) {
        let entry = TimelineEntry {
            phase: phase.to_owned(),
            start_ns: start_ns.saturating_sub(self.requested_ns),
            end_ns: end_ns.saturating_sub(self.requested_ns),
        };
        self.state.update(|snapshot| snapshot.timeline.push(entry));
    }

    /// Sets the sandbox and its network, once whoever runs its containers is there.
    pub async fn configure(&self, request: ConfigureRequest) -> Result<(), PodError> {
        let _one_at_a_time = self.configuring.lock().await;
        self.runner.booted().await;
        match self.state.sandbox_state() {
            SandboxState::Ready => return Ok(()),
            SandboxState::Stopped => return Err(self.stopped_error()),
            SandboxState::Booting => {}
        }
        let start_ns = now_ns();
        self.runner.configure(request).await?;
        self.add_phase("configure", start_ns, now_ns());
        self.state.update(|snapshot| {
            // The VM may have ended meanwhile.
            if snapshot.state() == SandboxState::Booting {
                snapshot.set_state(SandboxState::Ready);
            }
        });
        info!("ready");
        Ok(())
    }

    /// Gives the VM memory until it has at least `bytes`.
    pub async fn grow(&self, bytes: u64) -> Result<(), PodError> {
        let _one_at_a_time = self.growing.lock().await;
        let Runner::Guest(guest) = self.ready_runner()? else {
            let text = "the pod is one of the host's own: it has no VM";
            return Err(PodError::State(text.to_owned()));
        };
        if self.state.snapshot().memory_bytes >= bytes {
            return Ok(());
        }
        let total = guest.grow(bytes).await?;
        let given = guest.memory_bytes();
        self.state.update(|snapshot| {
            snapshot.memory_bytes = given;
            snapshot.guest_memory_total_bytes = total;
        });
        info!(bytes = given, "the VM has more memory");
        Ok(())
    }

    /// The VM is gone, or what the host had of the pod, for `reason` (one word).
    pub async fn set_gone(&self, reason: &str, message: String) {
        info!(reason, message, "the pod has ended");
        if let Some(guest) = self.guest() {
            guest.set_agent(None);
        }
        self.execs.clear();
        let containers: Vec<Arc<Container>> = self.containers().values().cloned().collect();
        let drains = containers
            .iter()
            .filter_map(|container| container.take_pump());
        // The device has closed the streams; what had arrived is on its way to the logs.
        futures_util::future::join_all(drains.map(|pump| pump.drain_for(VM_GONE_DRAIN))).await;

        let finished_ns = now_ns();
        self.state.update(|snapshot| {
            snapshot.set_state(SandboxState::Stopped);
            reason.clone_into(&mut snapshot.reason);
            message.clone_into(&mut snapshot.message);
            for entry in &mut snapshot.containers {
                if entry.state() == ContainerState::Exited {
                    continue;
                }
                // One that had ended before keeps its own exit code.
                let own = containers.iter().find(|container| container.id == entry.id);
                match own.and_then(|container| container.exit_code()) {
                    Some(code) => container::set_exited(entry, code, finished_ns),
                    None => container::set_killed(entry, reason, finished_ns),
                }
            }
        });
        self.gone.cancel();
    }

    /// Who runs the containers, when the pod is ready for them.
    fn ready_runner(&self) -> Result<&Runner, PodError> {
        if self.shutting_down.is_cancelled() {
            return Err(PodError::State("the sandbox is shutting down".to_owned()));
        }
        match self.state.sandbox_state() {
            SandboxState::Booting => Err(PodError::State("the sandbox is not ready".to_owned())),
            SandboxState::Stopped => Err(PodError::State("the sandbox is stopped".to_owned())),
            SandboxState::Ready => Ok(&self.runner),
        }
    }

    fn container(&self, id: &str) -> Result<Arc<Container>, PodError> {
        let found = self.containers().get(id).cloned();
        found.ok_or_else(|| PodError::NotFound(id.to_owned()))
    }

    fn running_container(&self, id: &str) -> Result<Arc<Container>, PodError> {
        let container = self.container(id)?;
        if self.state.container_state(id) != Some(ContainerState::Running) {
            return Err(PodError::State(format!("container {id} is not running")));
        }
        Ok(container)
    }

    fn containers(&self) -> MutexGuard<'_, HashMap<String, Arc<Container>>> {
        // Whole entries are inserted and removed: a panic elsewhere leaves the map sound.
        self.containers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// For a caller that waited for a sandbox that never came up.
    fn stopped_error(&self) -> PodError {
        let Snapshot {
            reason, message, ..
        } = self.state.snapshot();
        let text = format!("{reason}: {message}");
        if reason == "BootTimeout" {
            PodError::Deadline(text)
        } else {
            PodError::State(text)
        }
    }
}

impl Observer for Arc<Pod> {
    fn connected(&self, agent: Agent, hello: &HelloResponse, dialled_ns: u64) {
        self.state.update(|snapshot| {
            hello.agent_version.clone_into(&mut snapshot.agent_version);
            hello
                .kernel_release
                .clone_into(&mut snapshot.kernel_release);
            snapshot.guest_memory_total_bytes = hello.memory_total_bytes;
            snapshot.guest_memory_available_bytes = hello.memory_available_bytes;
            let ready_ns = dialled_ns.saturating_sub(self.requested_ns);
            complete_boot_timeline(snapshot, hello, ready_ns);
        });
        info!(version = hello.agent_version, "the agent is there");
        if let Some(guest) = self.guest() {
            guest.set_agent(Some(agent));
        }
    }

    fn disconnected(&self) {
        if let Some(guest) = self.guest() {
            guest.set_agent(None);
        }
    }

    fn event(&self, event: Event) {
        match event.kind {
            Some(event::Kind::Exit(exit)) if exit.exec_id.is_empty() => {
                container::on_exit(self, &exit);
            }
            Some(event::Kind::Exit(exit)) => self.execs.on_exit(&exit),
            Some(event::Kind::OutOfMemory(event)) => {
                if let Some(container) = self.containers().get(&event.container_id) {
                    warn!(container = container.id, "out of memory");
                    container.set_out_of_memory();
                }
            }
            None => debug!("an event of a kind that is not known here"),
        }
    }
}

/// Name of the phase from QEMU's start to the first instruction of the guest's kernel.
pub const PHASE_VM_START: &str = "vm start";

/// The phase after it.
const PHASE_GUEST_KERNEL: &str = "guest kernel";

/// Splits the time from the VM's start to the agent's readiness (`ready_ns`, on the timeline) by the
/// guest's own clock, which started with its kernel. The guest may say anything: phases stay in
/// order and within that time. Does nothing the second time.
fn complete_boot_timeline(snapshot: &mut Snapshot, hello: &HelloResponse, ready_ns: u64) {
    let mut phases = snapshot.timeline.iter();
    if phases.any(|entry| entry.phase == PHASE_GUEST_KERNEL) {
        return;
    }
    let mut phases = snapshot.timeline.iter_mut();
    let Some(vm_start) = phases.find(|entry| entry.phase == PHASE_VM_START) else {
        return;
    };
    let longest = ready_ns.saturating_sub(vm_start.start_ns);
    let ready = hello.ready_ns.min(longest);
    let init_started = hello.init_started_ns.min(ready);
    let kernel_start_ns = ready_ns - ready;
    let init_ns = kernel_start_ns + init_started;
    vm_start.end_ns = kernel_start_ns;
    for (phase, start_ns, end_ns) in [
        (PHASE_GUEST_KERNEL, kernel_start_ns, init_ns),
        ("agent", init_ns, ready_ns),
    ] {
        snapshot.timeline.push(TimelineEntry {
            phase: phase.to_owned(),
            start_ns,
            end_ns,
        });
    }
}
