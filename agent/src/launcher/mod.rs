//! Everything that forks. PID 1 asks over a socket; the *launcher*, the same binary executed again as a
//! process with one thread, forks a *helper* for each request; the helper makes the container's or
//! exec's process and ends. So no fork ever happens beside another thread, and neither a request nor
//! a fork pays for executing and relocating the binary again.
//!
//! The helper and the process it makes become children of PID 1 (`CLONE_PARENT`, orphans), which reaps
//! them. They report over a socket of the request's own, until its last holder closes it: the helper by
//! ending, the process by executing its program.

mod capabilities;
mod create;
mod exec;
mod executable;
mod message;
mod namespaces;
mod pause;
pub mod process;
mod program;
mod user_namespace;
mod view;

use std::io::{self, IoSlice, IoSliceMut, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg,
    sendmsg, socketpair,
};
use nix::unistd::Pid;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::time::timeout;

use crate::fd::{register, set_nonblocking};
use crate::user_namespace::IdMap;
pub use message::{CreateRequest, ExecRequest, FailureKind, Request};
use message::{REPORT_LIMIT, Report};

/// From request to the program's execution. Far more than it takes; a program on a volume that does not
/// answer could take for ever.
const DEADLINE: Duration = Duration::from_secs(30);

/// Why a process was not made.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// The helper or the process said so.
    #[error("{message}")]
    Failed {
        /// Whose fault it is.
        kind: FailureKind,
        /// In words.
        message: String,
    },
    /// It ended without a word.
    #[error("the process was not made, and nobody said why")]
    Silent,
    /// See [`DEADLINE`].
    #[error("the process was not made within {} s", DEADLINE.as_secs())]
    Deadline,
    /// The launcher cannot be reached.
    #[error("cannot reach the launcher: {0}")]
    Unreachable(#[from] io::Error),
}

/// A process that runs its program.
#[derive(Debug)]
pub struct Launched {
    /// In PID 1's pid namespace.
    pub pid: i32,
    /// Master side of its terminal.
    pub console: Option<OwnedFd>,
}

/// PID 1's side of the launcher.
#[derive(Default)]
pub struct Launcher {
    socket: Mutex<Option<OwnedFd>>,
}

impl Launcher {
    /// Starts the launcher, unless it runs. Requests do so too: this only takes the time earlier.
    pub fn start(&self) -> io::Result<()> {
        let mut socket = self.lock();
        if socket.is_none() {
            *socket = Some(spawn()?);
        }
        Ok(())
    }

    /// Makes the pod's user namespace, with this map, and those that it owns, where [`crate::sandbox::files::namespace`]
    /// says.
    pub async fn make_namespaces(&self, ids: IdMap) -> Result<(), LaunchError> {
        let null = || crate::fd::null();
        let request = Request::Namespaces(ids);
        let reports = self
            .request(&request, [null()?, null()?, null()?], &[])
            .await?;
        match reports.failure {
            Some((kind, message)) => Err(LaunchError::Failed { kind, message }),
            None if reports.done => Ok(()),
            None => Err(LaunchError::Silent),
        }
    }

    /// Makes a process whose standard streams are `stdio`. `others` are what the request needs besides.
    /// When this fails, the process is ended, or will end by itself.
    pub async fn launch(
        &self,
        request: &Request,
        stdio: [OwnedFd; 3],
        others: &[BorrowedFd<'_>],
    ) -> Result<Launched, LaunchError> {
        self.request(request, stdio, others).await?.into_result()
    }

    /// Sends a request and waits for all that is said about it.
    async fn request(
        &self,
        request: &Request,
        stdio: [OwnedFd; 3],
        others: &[BorrowedFd<'_>],
    ) -> Result<Reports, LaunchError> {
        let content = memfd_create(c"request", MFdFlags::MFD_CLOEXEC).map_err(io::Error::from)?;
        let mut content = std::fs::File::from(content);
        content.write_all(&serde_json::to_vec(request).map_err(io::Error::from)?)?;
        let (ours, theirs) = message_socket(SockFlag::SOCK_NONBLOCK)?;
        let mut fds = vec![content.as_fd(), theirs.as_fd()];
        fds.extend(stdio.iter().map(AsFd::as_fd));
        fds.extend(others);
        self.send(&fds)?;
        drop(fds);
        drop((theirs, stdio));

        let mut reports = Reports {
            socket: register(ours, Interest::READABLE)?,
            helper: None,
            pid: None,
            console: None,
            done: false,
            failure: None,
        };
        let Ok(collected) = timeout(DEADLINE, reports.collect()).await else {
            reports.kill();
            return Err(LaunchError::Deadline);
        };
        collected?;
        Ok(reports)
    }

    fn send(&self, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let mut socket = self.lock();
        for _ in 0..2 {
            if socket.is_none() {
                *socket = Some(spawn()?);
            }
            let Some(open) = socket.as_ref() else { break };
            let sent = sendmsg::<()>(
                open.as_raw_fd(),
                &[IoSlice::new(&[0])],
                &[ControlMessage::ScmRights(&raw)],
                MsgFlags::MSG_NOSIGNAL,
                None,
            );
            match sent {
                Ok(_) => return Ok(()),
                // The launcher is dead: killed for want of memory. The next one is as good.
                Err(Errno::EPIPE | Errno::ECONNRESET | Errno::ENOTCONN) => *socket = None,
                Err(error) => return Err(error.into()),
            }
        }
        Err(io::ErrorKind::BrokenPipe.into())
    }

    fn lock(&self) -> MutexGuard<'_, Option<OwnedFd>> {
        self.socket.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Executes this binary again as launcher. The reaper collects it, should it end.
fn spawn() -> io::Result<OwnedFd> {
    let (ours, theirs) = message_socket(SockFlag::empty())?;
    let child = Command::new("/proc/self/exe")
        .arg0("podvisor-launcher")
        .arg(crate::LAUNCHER)
        .stdin(Stdio::from(theirs))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .env_clear()
        .spawn()?;
    crate::kmsg::info!("launcher is process {}", child.id());
    Ok(ours)
}

/// A pair of sockets that keep messages apart. `ours` has the extra flags.
fn message_socket(ours: SockFlag) -> io::Result<(OwnedFd, OwnedFd)> {
    let (first, second) = socketpair(
        AddressFamily::Unix,
        SockType::SeqPacket,
        None,
        SockFlag::SOCK_CLOEXEC,
    )?;
    if ours.contains(SockFlag::SOCK_NONBLOCK) {
        set_nonblocking(&first)?;
    }
    Ok((first, second))
}

/// What helper and process say about one request.
struct Reports {
    socket: AsyncFd<OwnedFd>,
    helper: Option<i32>,
    pid: Option<i32>,
    console: Option<OwnedFd>,
    done: bool,
    failure: Option<(FailureKind, String)>,
}

impl Reports {
    /// Reads reports until all who could make one are done.
    async fn collect(&mut self) -> io::Result<()> {
        while let Some((report, fd)) = self.next().await? {
            match report {
                Report::Helper(pid) => self.helper = Some(pid),
                Report::Process(pid) => self.pid = Some(pid),
                Report::Console => self.console = fd,
                Report::Done => self.done = true,
                // The first is the cause, others are consequences.
                Report::Failed { kind, message } => {
                    self.failure.get_or_insert((kind, message));
                }
            }
        }
        Ok(())
    }

    async fn next(&self) -> io::Result<Option<(Report, Option<OwnedFd>)>> {
        self.socket
            .async_io(Interest::READABLE, |socket| {
                let mut bytes = [0; REPORT_LIMIT];
                let mut slices = [IoSliceMut::new(&mut bytes)];
                let mut space = nix::cmsg_space!(RawFd);
                let received = recvmsg::<()>(
                    socket.as_raw_fd(),
                    &mut slices,
                    Some(&mut space),
                    MsgFlags::MSG_CMSG_CLOEXEC,
                )?;
                let mut fd = None;
                for message in received.cmsgs()? {
                    if let ControlMessageOwned::ScmRights(fds) = message {
                        // SAFETY: the kernel has just made this descriptor for us.
                        fd = fds.first().map(|fd| unsafe { OwnedFd::from_raw_fd(*fd) });
                    }
                }
                let length = received.bytes;
                if length == 0 {
                    return Ok(None);
                }
                let report = serde_json::from_slice(&bytes[..length])?;
                Ok(Some((report, fd)))
            })
            .await
    }

    /// Ends whatever has not ended.
    fn kill(&self) {
        for pid in [self.pid, self.helper].into_iter().flatten() {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
    }

    fn into_result(self) -> Result<Launched, LaunchError> {
        if let Some((kind, message)) = self.failure {
            return Err(LaunchError::Failed { kind, message });
        }
        match self.pid {
            Some(pid) => Ok(Launched {
                pid,
                console: self.console,
            }),
            None => Err(LaunchError::Silent),
        }
    }
}
