//! The pod of the host's own: an OCI runtime makes its containers, this process is the parent of what the
//! runtime leaves.
//!
//! - [`bundle`]: what a container's specification leaves to who runs it
//! - [`sample`]: what containers use
//! - [`out_of_memory`]: whether the kernel killed for want of memory
//!
//! podvisord has mounted a container's root in `bundles/ID/rootfs` of the sandbox's folder before it asks for the
//! container, and takes it away when the container is gone.

mod bundle;
mod out_of_memory;
mod sample;

use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::sched::{CloneFlags, unshare};
use oci_spec::runtime::{LinuxNamespaceType, Process as ProcessSpec, Spec};
use podvisor_oci::children::{Awaited, Children};
use podvisor_oci::pause;
use podvisor_oci::process::Process;
use podvisor_oci::runtime::{Runtime, RuntimeError, Started};
use podvisor_oci::stdio::{Streams, Terminal, Wanted};
use podvisor_proto::agent::{
    ConfigureSandboxRequest, Event, Exit, OutOfMemory, ResizeRequest, ResolvedUser, SignalRequest,
    event,
};
use podvisor_proto::monitor::CreateContainerRequest;
use podvisor_root::user::UserError;
use podvisor_usage::writable::WritableLayers;
use thiserror::Error;
use tokio::sync::{OnceCell, mpsc};
use tonic::Code;
use tracing::warn;

use crate::state::now_ns;
use bundle::Namespaces;

/// What the OCI runtime is kept in, below the sandbox's folder.
const RUNTIME_DIR: &str = "oci";

/// Exit code of a process whose end was not seen.
const UNKNOWN: u32 = 255;

/// Why a request fails.
#[derive(Debug, Error)]
pub enum HostError {
    /// The OCI runtime.
    #[error(transparent)]
    Runtime(#[from] RuntimeError),
    /// Its user is not the image's.
    #[error(transparent)]
    User(#[from] UserError),
    /// The specification is not one that was meant for us.
    #[error("the container's specification: {0}")]
    Spec(String),
    /// Not here.
    #[error("container {0} not found")]
    NotFound(String),
    /// The kernel refuses.
    #[error("{action}: {source}")]
    Kernel {
        /// What was tried.
        action: &'static str,
        /// Why.
        source: io::Error,
    },
}

impl HostError {
    /// As callers are told.
    pub fn code(&self) -> Code {
        match self {
            Self::User(UserError::Read(_))
            | Self::Kernel { .. }
            | Self::Runtime(RuntimeError::Io(..)) => Code::Internal,
            Self::User(_) | Self::Spec(_) => Code::InvalidArgument,
            Self::NotFound(_) => Code::NotFound,
            Self::Runtime(RuntimeError::Deadline { .. }) => Code::DeadlineExceeded,
            Self::Runtime(RuntimeError::Failed(_)) => Code::FailedPrecondition,
        }
    }
}

fn kernel(action: &'static str) -> impl FnOnce(io::Error) -> HostError {
    move |source| HostError::Kernel { action, source }
}

/// The pod.
pub struct Host {
    runtime: Arc<Runtime>,
    /// The sandbox's folder.
    dir: PathBuf,
    /// See [`Dirs::writable`].
    writable_dir: PathBuf,
    writable_layers: Arc<WritableLayers>,
    /// It has host name and IPC objects of its own.
    own: OwnNamespaces,
    children: Children,
    /// The first process of the pid namespace that containers share, once one does.
    pause: Mutex<Option<(u32, Awaited)>>,
    containers: Mutex<HashMap<String, Arc<HostContainer>>>,
    events: mpsc::UnboundedSender<Event>,
}

/// Folders of the pod.
#[derive(Debug)]
pub struct Dirs {
    /// The sandbox's.
    pub sandbox: PathBuf,
    /// The writable layer of container ID is in `ID/upper` of it.
    pub writable: PathBuf,
}

/// Which namespaces a pod does not share with the host.
#[derive(Clone, Copy, Debug)]
pub struct OwnNamespaces {
    /// Host name.
    pub uts: bool,
    /// System V IPC and POSIX message queues.
    pub ipc: bool,
}

struct HostContainer {
    /// Of its first process: others differ in their arguments.
    process_spec: ProcessSpec,
    /// The kernel ends its other processes with the first.
    own_pids: bool,
    /// Below the roots of the hierarchies.
    cgroup: PathBuf,
    processes: Mutex<HashMap<String, Arc<Process>>>,
    /// Of those that have one.
    terminals: Mutex<HashMap<String, Terminal>>,
    /// Set when the runtime has forgotten it.
    deleted: OnceCell<()>,
}

impl HostContainer {
    /// By exec id; the container's first has none.
    fn processes(&self) -> MutexGuard<'_, HashMap<String, Arc<Process>>> {
        self.processes
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// By exec id as well.
    fn terminals(&self) -> MutexGuard<'_, HashMap<String, Terminal>> {
        self.terminals
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps the terminal of a process, if it has one, for its size.
    fn keep_terminal(
        &self,
        exec_id: &str,
        wanted: Wanted,
        streams: &Streams,
    ) -> Result<(), HostError> {
        if wanted.terminal
            && let Some(terminal) = &streams.stdout
        {
            let terminal = Terminal::of(terminal).map_err(kernel("a terminal"))?;
            self.terminals().insert(exec_id.to_owned(), terminal);
        }
        Ok(())
    }

    /// Lets the runtime forget the container, and kill what is left of it; once.
    async fn delete(&self, runtime: &Runtime, id: &str) -> Result<(), RuntimeError> {
        self.deleted.get_or_try_init(|| runtime.delete(id)).await?;
        Ok(())
    }
}

impl Host {
    /// Leaves the host's namespaces, as the pod does. To be called on the main thread: it is the one whose
    /// namespaces `/proc/PID/ns` shows.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn new(
        binary: PathBuf,
        dirs: Dirs,
        own: OwnNamespaces,
        children: Children,
        events: mpsc::UnboundedSender<Event>,
    ) -> io::Result<Self> {
        let mut flags = CloneFlags::empty();
        flags.set(CloneFlags::CLONE_NEWUTS, own.uts);
        flags.set(CloneFlags::CLONE_NEWIPC, own.ipc);
        unshare(flags)?;
        let runtime = Runtime::new(binary, dirs.sandbox.join(RUNTIME_DIR), children.clone())?;
        Ok(Self {
            runtime: Arc::new(runtime),
            dir: dirs.sandbox,
            writable_dir: dirs.writable,
            writable_layers: Arc::default(),
            own,
            children,
            pause: Mutex::default(),
            containers: Mutex::default(),
            events,
        })
    }

    /// Sets what all containers share.
    pub fn configure(&self, sandbox: ConfigureSandboxRequest) -> Result<(), HostError> {
        if self.own.uts {
            let set = nix::unistd::sethostname(&sandbox.hostname);
            set.map_err(|error| kernel("setting the host name")(error.into()))?;
        }
        let hostname = sandbox.hostname + "\n";
        for (name, content) in [
            ("hostname", hostname),
            ("hosts", sandbox.hosts),
            ("resolv.conf", sandbox.resolv_conf),
        ] {
            fs::write(self.dir.join(name), content).map_err(kernel("writing the pod's files"))?;
        }
        Ok(())
    }

    /// Completes a container's bundle.
    pub fn create(&self, request: &CreateContainerRequest) -> Result<ResolvedUser, HostError> {
        let spec: Spec = serde_json::from_slice(&request.spec)
            .map_err(|error| HostError::Spec(error.to_string()))?;
        let own_pids = bundle::is_own(&spec, LinuxNamespaceType::Pid);
        let bundle = self.bundle(&request.id);
        let user = request.user.clone().unwrap_or_default();
        let (spec, user) = bundle::complete(spec, &bundle, &self.dir, &user, self)?;
        bundle::write(&bundle, &spec)?;
        let missing = || HostError::Spec("no process, or no control group".to_owned());
        let linux = spec.linux().as_ref().ok_or_else(missing)?;
        let container = HostContainer {
            process_spec: spec.process().clone().ok_or_else(missing)?,
            own_pids,
            cgroup: linux.cgroups_path().clone().ok_or_else(missing)?,
            processes: Mutex::default(),
            terminals: Mutex::default(),
            deleted: OnceCell::new(),
        };
        self.containers()
            .insert(request.id.clone(), container.into());
        Ok(user)
    }

    /// Starts a container's process. After an error none is left.
    pub async fn start(&self, id: &str, wanted: Wanted) -> Result<(u32, Streams), HostError> {
        let container = self.container(id)?;
        let started = self.runtime.run(id, &self.bundle(id), wanted).await?;
        container.keep_terminal("", wanted, &started.streams)?;
        Ok(self.follow(&container, id, "", started))
    }

    /// Starts one more process in a container.
    pub async fn exec(
        &self,
        container_id: &str,
        exec_id: &str,
        args: &[String],
        wanted: Wanted,
    ) -> Result<Streams, HostError> {
        let container = self.container(container_id)?;
        let mut process = container.process_spec.clone();
        process.set_args(Some(args.to_vec()));
        process.set_terminal(Some(wanted.terminal));
        let mut env = process.env().clone().unwrap_or_default();
        if wanted.terminal && !env.iter().any(|entry| entry.starts_with("TERM=")) {
            env.push("TERM=xterm".to_owned());
        }
        process.set_env(Some(env));
        let started = self
            .runtime
            .exec(container_id, exec_id, &process, wanted)
            .await?;
        container.keep_terminal(exec_id, wanted, &started.streams)?;
        Ok(self.follow(&container, container_id, exec_id, started).1)
    }

    /// Waits for the end of a process that was started, and tells of it.
    fn follow(
        &self,
        container: &Arc<HostContainer>,
        container_id: &str,
        exec_id: &str,
        started: Started,
    ) -> (u32, Streams) {
        let process = Arc::new(started.process);
        let pid = process.pid();
        container
            .processes()
            .insert(exec_id.to_owned(), Arc::clone(&process));
        let (runtime, events) = (Arc::clone(&self.runtime), self.events.clone());
        let (container, awaited) = (Arc::clone(container), started.awaited);
        let mut exit = Exit {
            container_id: container_id.to_owned(),
            exec_id: exec_id.to_owned(),
            ..Exit::default()
        };
        tokio::spawn(async move {
            exit.code = process.exited().await.unwrap_or_else(|error| {
                warn!(pid, %error, "the end of a process was not seen");
                UNKNOWN
            });
            // Before another process can have its number.
            container.processes().remove(&exit.exec_id);
            container.terminals().remove(&exit.exec_id);
            drop(awaited);
            exit.time_ns = now_ns();
            let is_first = exit.exec_id.is_empty();
            if is_first
                && !container.own_pids
                && let Err(error) = runtime.kill_all(&exit.container_id).await
            {
                warn!(container = exit.container_id, %error, "its other processes were not killed");
            }
            // Nobody listens any more when the pod has ended.
            if is_first && out_of_memory::happened(&container.cgroup) {
                let kind = event::Kind::OutOfMemory(OutOfMemory {
                    container_id: exit.container_id.clone(),
                });
                let _ = events.send(news(kind));
            }
            let _ = events.send(news(event::Kind::Exit(exit.clone())));
            if is_first && let Err(error) = container.delete(&runtime, &exit.container_id).await {
                warn!(container = exit.container_id, %error, "is deleted when it is removed");
            }
        });
        (pid, started.streams)
    }

    /// Sends a signal. A process that is gone is no error.
    pub fn signal(&self, request: &SignalRequest) -> Result<(), HostError> {
        let container = self.container(&request.container_id)?;
        let Some(process) = container.processes().get(&request.exec_id).cloned() else {
            return Ok(());
        };
        // A container's other processes end with its first.
        let sent = if request.all && !request.exec_id.is_empty() {
            process.kill_group()
        } else {
            process.signal(request.signal)
        };
        sent.map_err(kernel("sending a signal"))
    }

    /// Sets the size of a terminal. One whose process has ended is no error.
    pub fn resize(&self, request: &ResizeRequest) -> Result<(), HostError> {
        let container = self.container(&request.container_id)?;
        let terminals = container.terminals();
        let resized = terminals.get(&request.exec_id).map_or(Ok(()), |terminal| {
            terminal.resize(request.columns, request.rows)
        });
        resized.map_err(kernel("setting the size of a terminal"))
    }

    /// Sets a container's limits.
    pub async fn update(&self, id: &str, resources: &[u8]) -> Result<(), HostError> {
        let container = self.container(id)?;
        let is_running = container.processes().contains_key("");
        let bundle = self.bundle(id);
        let before = bundle::read(&bundle)?;
        let limits = bundle::update(&bundle, &before, resources)?;
        if is_running && let Err(error) = self.runtime.update(id, &limits).await {
            bundle::write(&bundle, &before)?;
            return Err(error.into());
        }
        Ok(())
    }

    /// Takes a container away; its bundle is podvisord's.
    pub async fn remove(&self, id: &str) -> Result<(), HostError> {
        if let Ok(container) = self.container(id) {
            // One that never ran is not known to the runtime: that is no failure of forced deletion.
            container.delete(&self.runtime, id).await?;
        }
        self.containers().remove(id);
        Ok(())
    }

    /// Kills what runs. podvisord takes the rest away.
    pub fn end(&self) {
        let containers: Vec<_> = self.containers().values().cloned().collect();
        for process in containers
            .iter()
            .flat_map(|c| c.processes().values().cloned().collect::<Vec<_>>())
        {
            let _ = process.signal(libc::SIGKILL as u32);
        }
    }

    fn bundle(&self, id: &str) -> PathBuf {
        self.dir.join("bundles").join(id)
    }

    fn container(&self, id: &str) -> Result<Arc<HostContainer>, HostError> {
        let found = self.containers().get(id).cloned();
        found.ok_or_else(|| HostError::NotFound(id.to_owned()))
    }

    fn containers(&self) -> MutexGuard<'_, HashMap<String, Arc<HostContainer>>> {
        self.containers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl Namespaces for Host {
    fn of_pod(&self, kind: &str) -> Result<PathBuf, HostError> {
        let pid = if kind == "pid" {
            let mut pause = self.pause.lock().unwrap_or_else(PoisonError::into_inner);
            if pause.is_none() {
                let pid = pause::start().map_err(kernel("a pid namespace"))?;
                *pause = Some((pid, self.children.awaited(pid)));
            }
            pause.as_ref().map_or(0, |(pid, _)| *pid)
        } else {
            std::process::id()
        };
        Ok(namespace(pid, kind))
    }

    fn of_container(&self, id: &str, kind: &str) -> Result<PathBuf, HostError> {
        let container = self.container(id)?;
        let first = container.processes().get("").map(|process| process.pid());
        let gone = || HostError::Spec(format!("container {id} does not run"));
        Ok(namespace(first.ok_or_else(gone)?, kind))
    }
}

fn namespace(pid: u32, kind: &str) -> PathBuf {
    Path::new("/proc")
        .join(pid.to_string())
        .join("ns")
        .join(kind)
}

fn news(kind: event::Kind) -> Event {
    Event {
        kind: Some(kind),
        ..Event::default()
    }
}
