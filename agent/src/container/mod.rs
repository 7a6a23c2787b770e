//! The pod's containers: a table, and each container's life.
//!
//! | module      | calls                                             |
//! |-------------|---------------------------------------------------|
//! | [`assembly`]| create and remove: layers, root, bundle           |
//! | [`run`]     | start, and what happens when the process ends     |
//! | [`exec`]    | more processes in a running container             |
//! | [`update`]  | new limits                                        |
//! | [`control`] | signals, terminal sizes, the end of it all        |
//! | [`sample`]  | what they use                                     |
//!
//! Three kinds of lock, taken in this order: a container's `turn` (one call at a time changes its life),
//! the pod's `assembly` (disk and sandbox), and plain mutexes, never held across an `await`.

mod assembly;
mod control;
mod exec;
mod run;
mod sample;
mod update;

use std::collections::{HashMap, VecDeque};
use std::hash::{DefaultHasher, Hasher};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::{fmt, fs, io};

use nix::sys::signal::Signal;
use podvisor_proto::agent::{ConfigureSandboxRequest, ResolvedUser, Stdio};
use tokio::sync::{Semaphore, oneshot, watch};
use tokio::task::JoinError;

use crate::cgroup::Cgroup;
use crate::device_filter::DeviceFilter;
use crate::disk::{Disk, DiskError};
use crate::events::Events;
use crate::image_volume::ImageVolumeError;
use crate::launcher::{LaunchError, Launcher};
use crate::oci::Process;
use crate::port_forward;
use crate::reaper::Reaper;
use crate::resources::ResourcesError;
use crate::rootfs::RootfsError;
use crate::sandbox::{self, Sandbox, SandboxError, files};
use crate::seccomp::{SeccompFilterError, StoredFilter};
use crate::spec::SpecError;
use crate::stdio::Running;
use crate::streams::{StreamError, Streams};
use crate::user_namespace::IdMap;
use crate::watch::{MemoryWatch, Watch};
use podvisor_root::user::UserError;
use podvisor_usage::writable::WritableLayers;

/// Containers of one pod, those that have ended included.
const CONTAINER_LIMIT: usize = 512;
/// Execs that run at one time in one container.
const RUNNING_EXEC_LIMIT: usize = 256;
/// Execs that have ended and are still known, so that a repeated call gets the same answer.
const ENDED_EXEC_LIMIT: usize = 64;
/// Longest id of a container or exec, in bytes.
const ID_LIMIT: usize = 128;

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
pub enum ContainerError {
    /// Unknown container or exec.
    #[error("no such {0}")]
    NotFound(What),
    /// Not a name for a file.
    #[error("{0:?} is not an id: 1 to {ID_LIMIT} letters, digits, '-', '_', and '.' not first")]
    Id(String),
    /// Same id, other content.
    #[error("{0} exists already, and is a different one")]
    Exists(What),
    /// The wrong moment.
    #[error("{what} {state}")]
    State {
        /// Which.
        what: What,
        /// What is in the way.
        state: &'static str,
    },
    /// A bound of the agent's own.
    #[error("too many {0}")]
    TooMany(&'static str),
    /// A malformed request.
    #[error("{0}")]
    Invalid(String),
    /// See [`SpecError`].
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// See [`SeccompFilterError`].
    #[error(transparent)]
    Seccomp(#[from] SeccompFilterError),
    /// See [`UserError`].
    #[error(transparent)]
    User(#[from] UserError),
    /// See [`SandboxError`].
    #[error(transparent)]
    Sandbox(#[from] SandboxError),
    /// See [`DiskError`].
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// See [`RootfsError`].
    #[error(transparent)]
    Rootfs(#[from] RootfsError),
    /// See [`ImageVolumeError`].
    #[error(transparent)]
    ImageVolume(#[from] ImageVolumeError),
    /// See [`ResourcesError`].
    #[error(transparent)]
    Resources(#[from] ResourcesError),
    /// See [`StreamError`].
    #[error(transparent)]
    Stream(#[from] StreamError),
    /// See [`LaunchError`].
    #[error(transparent)]
    Launch(#[from] LaunchError),
    /// Nobody accepts there.
    #[error("port {port}: {source}")]
    Port {
        /// Of the loopback interface.
        port: u16,
        /// The kernel's reason.
        source: io::Error,
    },
    /// The kernel refused something else.
    #[error("{action}: {source}")]
    Kernel {
        /// What was tried.
        action: &'static str,
        /// The kernel's reason.
        source: io::Error,
    },
    /// Work of the agent's own was cancelled.
    #[error("the agent is shutting down")]
    ShuttingDown,
}

/// Wraps a failure with what was tried.
fn kernel<E: Into<io::Error>>(action: &'static str) -> impl FnOnce(E) -> ContainerError {
    move |error| ContainerError::Kernel {
        action,
        source: error.into(),
    }
}

impl From<JoinError> for ContainerError {
    fn from(_: JoinError) -> Self {
        Self::ShuttingDown
    }
}

/// Names the subject of an error.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum What {
    /// A container, by id.
    Container(String),
    /// An exec, by id.
    Exec(String),
}

impl fmt::Display for What {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Container(id) => write!(formatter, "container {id}"),
            Self::Exec(id) => write!(formatter, "exec {id}"),
        }
    }
}

/// All there is of the pod. Cheap to clone.
#[derive(Clone)]
pub struct Pod(Arc<Shared>);

struct Shared {
    table: Mutex<HashMap<String, Arc<Container>>>,
    assembly: Arc<tokio::sync::Mutex<Assembly>>,
    /// Whether the pid namespace that containers share is there.
    pid_namespace: tokio::sync::Mutex<bool>,
    /// See [`Pod::network_namespace`].
    network_namespace: OnceLock<fs::File>,
    /// Places for connections to its ports.
    forwards: Arc<Semaphore>,
    launcher: Launcher,
    /// Whether the sandbox is configured.
    configured: watch::Sender<bool>,
    /// Whether containers can be started.
    prepared: watch::Sender<bool>,
    reaper: Reaper,
    streams: Streams,
    events: Events,
    watch: Watch,
    writable_layers: WritableLayers,
}

/// What containers are made of.
struct Assembly {
    disk: Disk,
    sandbox: Sandbox,
}

/// One container, from its creation to its removal.
struct Container {
    id: String,
    /// Of the request that made it.
    fingerprint: u64,
    user: ResolvedUser,
    /// Ids of the pod's user namespace, if it has one.
    ids: Option<IdMap>,
    /// It may write to the files of its control group.
    manages_cgroup: bool,
    bundle: PathBuf,
    /// Shares the pod's pid namespace.
    pod_pids: bool,
    /// Id of the container whose pid namespace it shares.
    pid_target: Option<String>,
    /// Template of each exec's process.
    process: Process,
    /// Of each of its processes.
    seccomp: Option<StoredFilter>,
    devices: Option<DeviceFilter>,
    turn: tokio::sync::Mutex<()>,
    state: Mutex<State>,
    execs: Mutex<Execs>,
}

enum State {
    Created,
    Started(Started),
    /// Being taken apart; nothing new begins.
    Removing,
}

/// A container that was started; its first process may have ended.
struct Started {
    /// As the call named them.
    stdio: Stdio,
    pid: i32,
    cgroup: Cgroup,
    memory: Arc<MemoryWatch>,
    relays: Running,
    /// None when the process has ended.
    pidfd: Option<Arc<OwnedFd>>,
}

/// A container's execs.
#[derive(Default)]
struct Execs {
    running: HashMap<String, Exec>,
    /// Oldest first.
    ended: VecDeque<(String, Exec)>,
    /// Being launched, with the signal that came meanwhile.
    starting: HashMap<String, Option<Signal>>,
}

struct Exec {
    /// Of the request that made it.
    fingerprint: u64,
    pid: i32,
    cgroup: Cgroup,
    relays: Running,
    /// None when the process has ended.
    pidfd: Option<Arc<OwnedFd>>,
}

impl Pod {
    /// A pod without sandbox and containers.
    pub fn new(
        disk: PathBuf,
        reaper: Reaper,
        streams: Streams,
        events: Events,
        watch: Watch,
    ) -> Self {
        Self(Arc::new(Shared {
            table: Mutex::default(),
            assembly: Arc::new(tokio::sync::Mutex::new(Assembly {
                disk: Disk::new(disk),
                sandbox: Sandbox::default(),
            })),
            pid_namespace: tokio::sync::Mutex::default(),
            network_namespace: OnceLock::new(),
            forwards: Arc::new(Semaphore::new(port_forward::LIMIT)),
            launcher: Launcher::default(),
            configured: watch::Sender::new(false),
            prepared: watch::Sender::new(false),
            reaper,
            streams,
            events,
            watch,
            writable_layers: WritableLayers::default(),
        }))
    }

    /// Starts the launcher; from then on, containers can be started. Those that wait for it go on.
    pub fn start_launcher(&self) -> io::Result<()> {
        self.0.launcher.start()?;
        self.0.prepared.send_replace(true);
        Ok(())
    }

    /// The events of this pod.
    pub fn events(&self) -> &Events {
        &self.0.events
    }

    /// See [`Sandbox::configure`].
    pub async fn configure_sandbox(
        &self,
        request: ConfigureSandboxRequest,
    ) -> Result<(), ContainerError> {
        let ids = sandbox::id_map(&request)?;
        let mut assembly = Arc::clone(&self.0.assembly).lock_owned().await;
        if let Some(ids) = ids
            && self.0.network_namespace.get().is_none()
        {
            self.0.launcher.make_namespaces(ids).await?;
            let namespace = fs::File::open(files::namespace("net"));
            let namespace = namespace.map_err(kernel("opening the pod's network namespace"))?;
            // Nobody else has set it: the assembly is locked.
            let _ = self.0.network_namespace.set(namespace);
        }
        let (sender, configured) = oneshot::channel();
        let work = move || {
            let Assembly { disk, sandbox } = &mut *assembly;
            // The receiver is there as long as the call, which runs to its end.
            let _ = sender.send(sandbox.configure(request, disk));
        };
        // A thread of its own: its namespaces become the pod's.
        std::thread::Builder::new()
            .name("sandbox".to_owned())
            .spawn(work)
            .map_err(kernel("starting a thread"))?;
        configured
            .await
            .map_err(|_| ContainerError::ShuttingDown)??;
        self.0.configured.send_replace(true);
        Ok(())
    }

    /// The network namespace of a pod that has a user namespace, once the sandbox is configured. Others have the guest's.
    pub fn network_namespace(&self) -> io::Result<Option<fs::File>> {
        let namespace = self.0.network_namespace.get();
        namespace.map(fs::File::try_clone).transpose()
    }

    /// Ends when the sandbox is configured.
    pub async fn configured(&self) {
        wait_for(&self.0.configured).await;
    }

    fn find(&self, id: &str) -> Result<Arc<Container>, ContainerError> {
        self.table()
            .get(id)
            .cloned()
            .ok_or_else(|| ContainerError::NotFound(What::Container(id.to_owned())))
    }

    fn table(&self) -> MutexGuard<'_, HashMap<String, Arc<Container>>> {
        lock(&self.0.table)
    }
}

impl Container {
    fn what(&self) -> What {
        What::Container(self.id.clone())
    }

    /// User and group of its processes, as the guest's root knows them.
    fn owner(&self) -> (u32, u32) {
        // `create` has seen that the namespace has them.
        let outside = |id| self.ids.and_then(|ids| ids.outside(id)).unwrap_or(id);
        (outside(self.user.uid), outside(self.user.gid))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    fn execs(&self) -> MutexGuard<'_, Execs> {
        lock(&self.execs)
    }

    fn wrong_state(&self, state: &'static str) -> ContainerError {
        ContainerError::State {
            what: self.what(),
            state,
        }
    }
}

impl Execs {
    fn get(&self, id: &str) -> Option<&Exec> {
        self.running.get(id).or_else(|| {
            self.ended
                .iter()
                .find_map(|(ended, exec)| (ended == id).then_some(exec))
        })
    }
}

/// Ends when the value is true.
async fn wait_for(flag: &watch::Sender<bool>) {
    // An error says that the sender is gone, which the reference excludes.
    let _ = flag.subscribe().wait_for(|set| *set).await;
}

/// A mutex whose holder panicked: the agent is gone then.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Tells whether a repeated request is the same. Not for adversaries: the host has no reason to deceive
/// itself.
fn fingerprint(message: &impl prost::Message) -> u64 {
    let mut hasher = DefaultHasher::new();
    hasher.write(&message.encode_to_vec());
    hasher.finish()
}

/// Ids become names of files and control groups.
fn check_id(id: &str) -> Result<(), ContainerError> {
    let well_formed = (1..=ID_LIMIT).contains(&id.len())
        && !id.starts_with('.')
        && id
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte));
    if well_formed {
        Ok(())
    } else {
        Err(ContainerError::Id(id.to_owned()))
    }
}

/// Of a bundle: the spec.
const SPEC: &str = "config.json";

/// Directory of one container's bundle.
fn bundle(id: &str) -> PathBuf {
    Path::new(sandbox::DIRECTORY).join("containers").join(id)
}

/// Opens a pidfd, unless the process has ended and was collected already.
fn open_pidfd(pid: i32) -> Option<Arc<OwnedFd>> {
    use std::os::fd::FromRawFd;
    // SAFETY: numbers.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    // SAFETY: pidfd_open has just returned this descriptor; it fits in an int.
    (fd >= 0).then(|| Arc::new(unsafe { OwnedFd::from_raw_fd(fd as i32) }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_names_of_files() {
        for id in ["a", "0123abc", "a-b_c.d", &"x".repeat(ID_LIMIT)] {
            assert!(check_id(id).is_ok(), "{id}");
        }
        for id in [
            "",
            ".",
            "..",
            ".a",
            "a/b",
            "a b",
            "a\0",
            "ä",
            &"x".repeat(ID_LIMIT + 1),
        ] {
            assert!(check_id(id).is_err(), "{id}");
        }
    }
}
