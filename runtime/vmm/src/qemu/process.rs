//! QEMU's process.

use std::io;
use std::os::fd::RawFd;
use std::path::Path;
use std::process::{ExitStatus, Stdio};

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::prctl;
use nix::sys::signal::Signal;
use tokio::io::AsyncReadExt as _;
use tokio::process::{Child, ChildStderr, Command};
use tokio::task::JoinHandle;

use super::command::Arguments;

/// What is kept of standard error, in bytes.
const STDERR_TAIL_BYTES: usize = 4096;

/// A running QEMU. Dropping it kills it.
#[derive(Debug)]
pub(super) struct Process {
    child: Child,
    stderr: JoinHandle<String>,
    /// The end, once it is known.
    ended: Option<(ExitStatus, String)>,
}

impl Process {
    /// Starts QEMU, which dies with the calling thread.
    pub(super) fn spawn(binary: &Path, arguments: &Arguments) -> io::Result<Self> {
        let mut command = Command::new(binary);
        command
            .args(&arguments.arguments)
            .env_clear()
            .current_dir("/");
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .kill_on_drop(true);
        let descriptors = arguments.descriptors.clone();
        let parent = nix::unistd::getpid();
        // SAFETY: only async-signal-safe system calls, no allocation, between fork and exec.
        unsafe {
            command.pre_exec(move || {
                prctl::set_pdeathsig(Signal::SIGKILL)?;
                if nix::unistd::getppid() != parent {
                    return Err(io::ErrorKind::BrokenPipe.into());
                }
                inherit_only(&descriptors)
            });
        }
        let mut child = command.spawn()?;
        let stderr = child
            .stderr
            .take()
            .map(read_tail)
            .ok_or(io::ErrorKind::BrokenPipe)?;
        Ok(Self {
            child,
            stderr: tokio::spawn(stderr),
            ended: None,
        })
    }

    pub(super) fn pid(&self) -> Option<u32> {
        self.child.id()
    }

    /// Waits for the end: how, and the last of standard error. May be dropped and called again.
    pub(super) async fn ended(&mut self) -> (ExitStatus, String) {
        if let Some(ended) = &self.ended {
            return ended.clone();
        }
        // Waiting for a child of ours that nobody else waits for does not fail.
        let status = self.child.wait().await.unwrap_or_default();
        // It neither panics nor is cancelled.
        let stderr = (&mut self.stderr).await.unwrap_or_default();
        self.ended = Some((status, stderr.clone()));
        (status, stderr)
    }

    /// Sends SIGKILL. [`Self::ended`] tells when it is over.
    pub(super) fn kill(&mut self) {
        // An error says that it has ended already.
        let _ = self.child.start_kill();
    }
}

/// Lets exec keep standard streams and `descriptors`, and nothing else of whatever this process has open.
fn inherit_only(descriptors: &[RawFd]) -> io::Result<()> {
    // SAFETY: the call changes only flags of descriptors of the child.
    let closed = unsafe {
        libc::syscall(
            libc::SYS_close_range,
            3,
            libc::c_uint::MAX,
            libc::CLOSE_RANGE_CLOEXEC,
        )
    };
    if closed != 0 {
        return Err(io::Error::last_os_error());
    }
    for fd in descriptors {
        // SAFETY: the caller of `spawn` keeps the descriptors open until the child has been started.
        let fd = unsafe { std::os::fd::BorrowedFd::borrow_raw(*fd) };
        fcntl(fd, FcntlArg::F_SETFD(FdFlag::empty()))?;
    }
    Ok(())
}

/// Reads to the end and keeps the last of it.
async fn read_tail(mut stderr: ChildStderr) -> String {
    let mut tail = Vec::new();
    let mut buffer = [0; 512];
    while let Ok(count) = stderr.read(&mut buffer).await
        && count > 0
    {
        tail.extend_from_slice(&buffer[..count]);
        let excess = tail.len().saturating_sub(STDERR_TAIL_BYTES);
        tail.drain(..excess);
    }
    String::from_utf8_lossy(&tail).trim_end().to_owned()
}
