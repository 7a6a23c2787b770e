//! The launcher and its helpers: processes with one thread and no runtime.

use std::fs::File;
use std::io::{self, IoSliceMut, Read, Seek, SeekFrom};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use nix::fcntl::{FcntlArg, OFlag, fcntl, open};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use nix::sys::stat::Mode;
use nix::unistd::{dup2_stderr, dup2_stdin, dup2_stdout};

use super::message::{FailureKind, Report, Reporter, Request};
use super::{create, exec, namespaces, pause};
use crate::kmsg;

/// Descriptors of a request: content, report socket, three standard streams, and what it needs besides.
const FDS_LIMIT: usize = 8;

/// Why a helper did not do its work.
#[derive(Debug)]
pub struct Failure {
    pub kind: FailureKind,
    pub message: String,
}

impl Failure {
    pub fn other(what: &str, error: &dyn std::fmt::Display) -> Self {
        Self {
            kind: FailureKind::Other,
            message: format!("{what}: {error}"),
        }
    }
}

/// The launcher's life: takes requests from the socket that is its stdin, until PID 1 is gone.
pub fn run() -> libc::c_int {
    kmsg::open();
    kmsg::end_on_panic();
    match serve() {
        Ok(()) => 0,
        Err(error) => {
            kmsg::error!("launcher: {error}");
            1
        }
    }
}

fn serve() -> io::Result<()> {
    // Out of the way of the helpers' standard streams.
    let moved = fcntl(io::stdin(), FcntlArg::F_DUPFD_CLOEXEC(10))?;
    // SAFETY: fcntl has just made this descriptor.
    let socket = unsafe { OwnedFd::from_raw_fd(moved) };
    dup2_stdin(open("/dev/null", OFlag::O_RDWR, Mode::empty())?)?;
    loop {
        let fds = receive(&socket)?;
        if fds.is_empty() {
            return Ok(());
        }
        // SAFETY: this process has one thread, so the child may do anything.
        if unsafe { clone_for_parent() }?.is_none() {
            drop(socket);
            help(fds);
            // SAFETY: ends the process; nothing is left to clean up.
            unsafe { libc::_exit(0) }
        }
    }
}

/// The next request's descriptors; none when PID 1 is gone.
fn receive(socket: &OwnedFd) -> io::Result<Vec<OwnedFd>> {
    let mut byte = [0];
    let mut slices = [IoSliceMut::new(&mut byte)];
    let mut space = nix::cmsg_space!([RawFd; FDS_LIMIT]);
    let received = recvmsg::<()>(
        socket.as_raw_fd(),
        &mut slices,
        Some(&mut space),
        MsgFlags::MSG_CMSG_CLOEXEC,
    )?;
    let mut fds = Vec::new();
    for message in received.cmsgs()? {
        if let ControlMessageOwned::ScmRights(raw) = message {
            // SAFETY: the kernel has just made these descriptors for us.
            fds.extend(
                raw.into_iter()
                    .map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }),
            );
        }
    }
    Ok(fds)
}

/// Forks a sibling: a child of this process's parent, PID 1, which reaps it. None in the child.
///
/// # Safety
/// The calling process has one thread.
pub unsafe fn clone_for_parent() -> io::Result<Option<i32>> {
    let arguments = CloneArguments {
        flags: libc::CLONE_PARENT as u64,
        ..CloneArguments::default()
    };
    // SAFETY: the caller's promise.
    unsafe { arguments.clone() }
}

/// linux/sched.h; newer than the libc crate's list on some targets.
pub const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// linux/sched.h, `struct clone_args`.
#[repr(C)]
#[derive(Default)]
pub struct CloneArguments {
    pub flags: u64,
    pub pidfd: u64,
    pub child_tid: u64,
    pub parent_tid: u64,
    pub exit_signal: u64,
    pub stack: u64,
    pub stack_size: u64,
    pub tls: u64,
    pub set_tid: u64,
    pub set_tid_size: u64,
    pub cgroup: u64,
}

impl CloneArguments {
    /// clone3(2), as fork(2) is: the child goes on with a copy. None in the child.
    ///
    /// # Safety
    /// The calling process has one thread, and `flags` share nothing that a copy would break.
    pub unsafe fn clone(&self) -> io::Result<Option<i32>> {
        // SAFETY: a structure and its size; the rest is the caller's promise.
        let result = unsafe { libc::syscall(libc::SYS_clone3, self, size_of::<Self>()) };
        match nix::errno::Errno::result(result)? {
            0 => Ok(None),
            pid => Ok(Some(pid as i32)),
        }
    }
}

/// A helper's life.
fn help(fds: Vec<OwnedFd>) {
    let mut fds = fds.into_iter();
    let (Some(content), Some(report)) = (fds.next(), fds.next()) else {
        return;
    };
    let reporter = Reporter::new(report);
    reporter.send(&Report::Helper(std::process::id() as i32));
    if let Err(failure) = answer(content, fds, reporter) {
        reporter.fail(failure.kind, &failure.message);
    }
}

fn answer(
    content: OwnedFd,
    mut fds: std::vec::IntoIter<OwnedFd>,
    reporter: Reporter,
) -> Result<(), Failure> {
    let mut content = File::from(content);
    let mut bytes = Vec::new();
    let request: Request = content
        .seek(SeekFrom::Start(0))
        .and_then(|_| content.read_to_end(&mut bytes))
        .map_err(serde_json::Error::io)
        .and_then(|_| serde_json::from_slice(&bytes))
        .map_err(|error| Failure::other("reading the request", &error))?;
    let (Some(stdin), Some(stdout), Some(stderr)) = (fds.next(), fds.next(), fds.next()) else {
        return Err(Failure::other(
            "reading the request",
            &"no standard streams",
        ));
    };
    dup2_stdin(stdin)
        .and_then(|()| dup2_stdout(stdout))
        .and_then(|()| dup2_stderr(stderr))
        .map_err(|error| Failure::other("placing the standard streams", &error))?;
    match request {
        Request::Create(request) => match fds.next() {
            Some(cgroup) => create::run(&request, cgroup, fds.next().as_ref(), reporter),
            None => Err(Failure::other("reading the request", &"no control group")),
        },
        Request::Exec(request) => match (fds.next(), fds.next()) {
            (Some(cgroup), Some(pidfd)) => exec::run(*request, cgroup, &pidfd, reporter),
            _ => Err(Failure::other("reading the request", &"no control group")),
        },
        Request::Pause { user_namespace } => pause::run(user_namespace, reporter),
        Request::Namespaces(ids) => namespaces::run(ids, reporter),
    }
}
