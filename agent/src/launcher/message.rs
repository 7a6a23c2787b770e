//! What PID 1 and its helpers say to each other.

use std::io::{IoSlice, Write};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::path::PathBuf;

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use serde::{Deserialize, Serialize};

use crate::oci::Process;
use crate::seccomp::StoredFilter;
use crate::user_namespace::IdMap;

/// Longest report, in bytes.
pub const REPORT_LIMIT: usize = 8192;
/// Longest text in a report: escaped, it still fits.
const TEXT_LIMIT: usize = 1024;

/// What is to be launched.
#[derive(Debug, Serialize, Deserialize)]
pub enum Request {
    /// A container's first process. Besides: its control group's directory, and a pidfd of the first process
    /// of the container whose pid namespace it joins, if it joins one.
    Create(CreateRequest),
    /// One more process in a container. Besides: its control group's directory, a pidfd of the
    /// container's first process.
    Exec(Box<ExecRequest>),
    /// A process that does nothing but hold the pod's pid namespace and reap its orphans.
    Pause {
        /// The pod has a user namespace.
        user_namespace: bool,
    },
    /// The pod's user namespace, and those that it owns.
    Namespaces(IdMap),
}

/// See [`Request::Create`].
#[derive(Debug, Serialize, Deserialize)]
pub struct CreateRequest {
    /// File with the spec.
    pub spec: PathBuf,
    /// The container's seccomp filter.
    pub seccomp: Option<StoredFilter>,
    /// Ids of the pod's user namespace, if it has one.
    pub ids: Option<IdMap>,
}

/// See [`Request::Exec`].
#[derive(Debug, Serialize, Deserialize)]
pub struct ExecRequest {
    /// The process, as in a spec.
    pub process: Process,
    /// The container's seccomp filter.
    pub seccomp: Option<StoredFilter>,
    /// The pod has a user namespace.
    pub user_namespace: bool,
}

/// Whose fault a failure is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FailureKind {
    /// The program cannot be executed: it does not exist, it is no program.
    Program,
    /// The container's first process is not there any more.
    Gone,
    /// Anything else.
    Other,
}

/// One message about a request's progress.
#[derive(Debug, Serialize, Deserialize)]
pub enum Report {
    /// The helper's pid.
    Helper(i32),
    /// The pid of the process it has made.
    Process(i32),
    /// What was asked for is there, and no process.
    Done,
    /// Comes with the master side of the process's terminal.
    Console,
    /// It did not work.
    Failed {
        /// Whose fault.
        kind: FailureKind,
        /// In words.
        message: String,
    },
}

/// The reporting end of a request's socket. Cheap to copy: who holds it does not close it, so that it
/// closes when the process ends or executes its program.
#[derive(Clone, Copy, Debug)]
pub struct Reporter(RawFd);

impl Reporter {
    /// Keeps `socket` open for the life of this process.
    pub fn new(socket: OwnedFd) -> Self {
        use std::os::fd::IntoRawFd;
        Self(socket.into_raw_fd())
    }

    /// Sends one report. There is nobody to tell when that fails.
    pub fn send(self, report: &Report) {
        let Ok(bytes) = serde_json::to_vec(report) else {
            return;
        };
        // SAFETY: `new` has leaked the descriptor.
        let mut file = std::mem::ManuallyDrop::new(unsafe {
            <std::fs::File as std::os::fd::FromRawFd>::from_raw_fd(self.0)
        });
        // write(2), which every seccomp filter that lets a program run allows.
        let _ = file.write_all(&bytes);
    }

    /// Reports a failure.
    pub fn fail(self, kind: FailureKind, message: &str) {
        let mut message = message.to_owned();
        if message.len() > TEXT_LIMIT {
            message.truncate(message.floor_char_boundary(TEXT_LIMIT));
        }
        self.send(&Report::Failed { kind, message });
    }

    /// Sends the master side of a terminal.
    pub fn send_console(self, master: BorrowedFd<'_>) -> nix::Result<()> {
        // Serialising a unit variant cannot fail.
        let bytes = serde_json::to_vec(&Report::Console).unwrap_or_default();
        sendmsg::<()>(
            self.0,
            &[IoSlice::new(&bytes)],
            &[ControlMessage::ScmRights(&[master.as_raw_fd()])],
            MsgFlags::MSG_NOSIGNAL,
            None,
        )?;
        Ok(())
    }
}
