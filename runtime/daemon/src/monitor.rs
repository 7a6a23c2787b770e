//! podvisord's end of a pod's monitor: starting one, finding one again after a restart, calling it,
//! and learning at once that it died.

use std::ops::{Deref, DerefMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener as StdUnixListener;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use hyper_util::rt::TokioIo;
use nix::sys::signal::Signal;
use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr};
use podvisor_monitor::fd_socket::Token;
use podvisor_monitor::launcher;
use podvisor_monitor::snapshots::{self, MAX_SNAPSHOT};
use podvisor_node::cgroup::PodCgroup;
use podvisor_node::pidfd::{PidFd, start_time};
use podvisor_proto::monitor::monitor_client::MonitorClient;
use podvisor_proto::monitor::{FollowRequest, Launch, Snapshot};
use prost::Message;
use tokio::io::AsyncWriteExt;
use tokio::io::unix::AsyncFd;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint};

use crate::confinement::Confinement;
use crate::daemon::within;
use crate::error::{Error, Result};

/// Largest answer of a monitor: ExecSync's two outputs of 16 MiB, and a frame around them.
const MAX_MESSAGE: usize = 33 << 20;

/// How long a monitor that lives may take to tell its state.
const FIRST_STATE: Duration = Duration::from_secs(2);

/// A sandbox's folder, to reach the sockets in it however long its path is: a socket address holds
/// 108 bytes (unix(7)), an id alone 64.
#[derive(Debug)]
pub struct SocketDir {
    dir: std::fs::File,
}

impl SocketDir {
    /// Opens the folder.
    ///
    /// # Errors
    /// It is not there.
    pub fn open(dir: &Path) -> std::io::Result<Self> {
        std::fs::File::open(dir).map(|dir| Self { dir })
    }

    /// A short path of the socket `name`, good in this process while `self` lives.
    pub fn path(&self, name: &str) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}/{name}", self.dir.as_raw_fd()))
    }
}

/// A client of a monitor's API, and the connection of it that all calls at the same time share.
#[derive(Debug)]
pub struct Client {
    calls: MonitorClient<Channel>,
    _connection: Arc<Channel>,
}

impl Deref for Client {
    type Target = MonitorClient<Channel>;

    fn deref(&self) -> &Self::Target {
        &self.calls
    }
}

impl DerefMut for Client {
    fn deref_mut(&mut self) -> &mut Self::Target {
        &mut self.calls
    }
}

/// The running monitor of one pod.
#[derive(Debug)]
pub struct Monitor {
    dir: Arc<SocketDir>,
    pid: u32,
    start: u64,
    /// Readable once the process has ended; never another process, unlike the pid.
    process: AsyncFd<PidFd>,
    /// While there are clients.
    connection: Mutex<Weak<Channel>>,
}

/// The file descriptors that the new monitor of a VM inherits, beside its sockets.
#[derive(Debug)]
pub struct LaunchFds {
    /// Guest kernel.
    pub kernel: OwnedFd,
    /// Guest initramfs.
    pub initramfs: OwnedFd,
    /// Tap device in the pod's network namespace.
    pub tap: OwnedFd,
    /// The pod's writable disk.
    pub scratch: OwnedFd,
}

impl Monitor {
    /// Starts the monitor at `binary` for the sandbox whose folder is `dir`, in `cgroup`. The VM
    /// begins to boot before this returns. The fields of `launch` that hold descriptors are set here.
    /// `fds`: a VM's.
    ///
    /// # Errors
    /// The binary cannot be executed, a socket cannot be bound, the cgroup refuses the process.
    pub async fn launch(
        binary: &Path,
        dir: &Path,
        cgroup: &PodCgroup,
        confinement: &Confinement,
        mut launch: Launch,
        fds: Option<LaunchFds>,
    ) -> Result<Self> {
        let sockets = SocketDir::open(dir).map_err(Error::io(dir.display().to_string()))?;
        let bind = |name| StdUnixListener::bind(sockets.path(name)).map_err(Error::io(name));
        let grpc = bind("monitor.sock")?;
        let fd_socket = bind_seqpacket(&sockets.path("fd.sock")).map_err(Error::io("fd.sock"))?;
        let dir_file = std::fs::File::open(dir).map_err(Error::io(dir.display().to_string()))?;
        let log =
            std::fs::File::create(dir.join("monitor.log")).map_err(Error::io("monitor.log"))?;

        let vsock = fds.as_ref().map(|_| bind("vsock.sock")).transpose()?;
        if let (Some(vm), Some(fds), Some(vsock)) = (&mut launch.vm, &fds, &vsock) {
            vm.kernel_fd = fds.kernel.as_raw_fd();
            vm.initramfs_fd = fds.initramfs.as_raw_fd();
            vm.tap_fd = fds.tap.as_raw_fd();
            launch.scratch_fd = fds.scratch.as_raw_fd();
            launch.vsock_fd = vsock.as_raw_fd();
        }
        launch.grpc_fd = grpc.as_raw_fd();
        launch.fd_socket_fd = fd_socket.as_raw_fd();
        launch.dir_fd = dir_file.as_raw_fd();
        let mut command = launcher::command(binary, dir, &launch, log.into());
        confinement.confine(&mut command);
        let mut child = tokio::process::Command::from(command)
            .spawn()
            .map_err(Error::io(format!("cannot start {}", binary.display())))?;
        let pid = child.id().ok_or(Error::Cancelled)?;
        let process = PidFd::open(pid).map_err(Error::io("pidfd_open"))?;
        let mut stdin = child.stdin.take().ok_or(Error::Cancelled)?;
        // Nothing runs yet: the monitor waits for its Launch, so all that it starts is in the cgroup.
        if let Err(error) = cgroup.add(pid) {
            let _ = child.kill().await;
            return Err(error.into());
        }
        if let Err(error) = stdin.write_all(&launch.encode_to_vec()).await {
            let _ = child.kill().await;
            return Err(Error::io("the monitor ended at once, see monitor.log")(
                error,
            ));
        }
        drop(stdin);
        // tokio reaps a dropped child when it ends; the pidfd tells when.
        drop(child);
        Self::new(dir, pid, process)
    }

    /// Finds the monitor of an earlier podvisord again. `None` when that process is gone.
    ///
    /// # Errors
    /// The kernel has no pidfds.
    pub fn adopt(dir: &Path, pid: u32, start: u64) -> Result<Option<Self>> {
        let process = match PidFd::open(pid) {
            Ok(fd) => fd,
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => return Ok(None),
            Err(error) => return Err(Error::io("pidfd_open")(error)),
        };
        // The pid could be another process by now. The pidfd holds whatever it is: compare after.
        if start_time(pid).ok() != Some(start) {
            return Ok(None);
        }
        Self::new(dir, pid, process).map(Some)
    }

    fn new(dir: &Path, pid: u32, process: PidFd) -> Result<Self> {
        let start = start_time(pid).unwrap_or(0);
        let dir = SocketDir::open(dir).map_err(Error::io(dir.display().to_string()))?;
        // SAFETY: the AsyncFd owns the descriptor: it stays open for as long as it is registered.
        let process = unsafe { AsyncFd::register(process) }
            .map_err(|error| Error::io("pidfd")(error.into()))?;
        Ok(Self {
            dir: Arc::new(dir),
            pid,
            start,
            process,
            connection: Mutex::default(),
        })
    }

    /// A client of the monitor's API. The connection is closed when its last client is dropped: gRPC takes 50 KiB for
    /// each, and a node's pods are many and mostly left alone.
    pub fn client(&self) -> Client {
        let connection = {
            let mut shared = self
                .connection
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            shared.upgrade().unwrap_or_else(|| {
                let connection = Arc::new(self.connect());
                *shared = Arc::downgrade(&connection);
                connection
            })
        };
        let calls = MonitorClient::new(Channel::clone(&connection));
        Client {
            calls: calls.max_decoding_message_size(MAX_MESSAGE),
            _connection: connection,
        }
    }

    /// A channel that is connected when it is first used.
    fn connect(&self) -> Channel {
        let dir = Arc::clone(&self.dir);
        Endpoint::from_static("http://monitor").connect_with_connector_lazy(tower::service_fn(
            move |_| {
                let path = dir.path("monitor.sock");
                async move { UnixStream::connect(path).await.map(TokioIo::new) }
            },
        ))
    }

    /// The stream on which it tells its state, and every later one ([`podvisor_monitor::snapshots`]).
    ///
    /// # Errors
    /// The monitor does not answer in time.
    pub async fn follow(&self) -> Result<UnixStream> {
        let (ours, theirs) = UnixStream::pair().map_err(Error::io("socketpair"))?;
        let request = FollowRequest {
            stream_fd_token: self.send_fd(theirs).await?,
        };
        let mut client = self.client();
        within(FIRST_STATE, "Follow", client.follow(request)).await?;
        Ok(ours)
    }

    /// The state it tells now. `None` from one that does not answer in time: it is *unknown*.
    pub async fn first_state(&self) -> Option<Snapshot> {
        let ask = async {
            let mut stream = self.follow().await.ok()?;
            snapshots::read(&mut stream).await.ok()?
        };
        tokio::time::timeout(FIRST_STATE, ask).await.ok()?
    }

    /// Process id.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Start time of the process in clock ticks since boot, against reused pids.
    pub fn start(&self) -> u64 {
        self.start
    }

    /// Ends when the process has ended.
    pub async fn died(&self) {
        // An error would mean that the runtime shuts down: then nobody waits.
        let _ = self.process.readable().await;
    }

    /// Ends the process, and with it its VM. Nothing happens when it has ended.
    pub fn kill(&self) {
        let _ = self.process.get_ref().signal(Signal::SIGKILL);
    }

    /// Hands a file descriptor over. The answer is the token that an RPC names it by.
    ///
    /// # Errors
    /// The monitor does not take it in time.
    pub async fn send_fd(&self, fd: impl AsFd) -> Result<Vec<u8>> {
        self.send_fds(&[fd.as_fd()]).await
    }

    /// Hands file descriptors over as one token.
    ///
    /// # Errors
    /// The monitor does not take them in time.
    pub async fn send_fds(&self, fds: &[BorrowedFd<'_>]) -> Result<Vec<u8>> {
        let token = Token::random();
        podvisor_monitor::fd_socket::send(&self.dir.path("fd.sock"), token, fds)
            .await
            .map_err(|error| Error::MonitorUnreachable(error.to_string()))?;
        Ok(token.to_vec())
    }
}

/// The last state that a monitor wrote in its sandbox's folder.
pub fn read_state_file(dir: &Path) -> Option<Snapshot> {
    let path = dir.join("state");
    // What is larger was not written by a monitor.
    if std::fs::metadata(&path).ok()?.len() > u64::from(MAX_SNAPSHOT) {
        return None;
    }
    Snapshot::decode(std::fs::read(&path).ok()?.as_slice()).ok()
}

fn bind_seqpacket(path: &Path) -> std::io::Result<OwnedFd> {
    let fd = nix::sys::socket::socket(
        AddressFamily::Unix,
        SockType::SeqPacket,
        SockFlag::SOCK_CLOEXEC,
        None,
    )?;
    nix::sys::socket::bind(fd.as_raw_fd(), &UnixAddr::new(path)?)?;
    nix::sys::socket::listen(&fd, Backlog::new(16)?)?;
    Ok(fd)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_oversized_state_file_is_not_read() {
        let dir = tempfile::tempdir().unwrap();
        let file = std::fs::File::create(dir.path().join("state")).unwrap();
        file.set_len(u64::from(MAX_SNAPSHOT) + 1).unwrap();
        assert!(read_state_file(dir.path()).is_none());
        file.set_len(0).unwrap();
        assert_eq!(read_state_file(dir.path()), Some(Snapshot::default()));
    }

    #[tokio::test]
    async fn a_dead_process_is_not_adopted() {
        let dir = tempfile::tempdir().unwrap();
        let mut child = tokio::process::Command::new("true").spawn().unwrap();
        let pid = child.id().unwrap();
        child.wait().await.unwrap();
        assert!(Monitor::adopt(dir.path(), pid, 1).unwrap().is_none());
    }

    #[tokio::test]
    async fn a_process_with_a_reused_pid_is_not_adopted() {
        let dir = tempfile::tempdir().unwrap();
        let own = std::process::id();
        assert!(Monitor::adopt(dir.path(), own, 1).unwrap().is_none());
        let start = start_time(own).unwrap();
        assert!(Monitor::adopt(dir.path(), own, start).unwrap().is_some());
    }
}
