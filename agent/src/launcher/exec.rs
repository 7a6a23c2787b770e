//! One more process in a running container: one `setns` with a pidfd, and one `clone3` into its control
//! group.

use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::sched::{CloneFlags, setns};
use nix::sys::prctl;

use super::message::{ExecRequest, FailureKind, Report, Reporter};
use super::process::{CLONE_INTO_CGROUP, CloneArguments, Failure};
use super::{program, user_namespace};
use crate::oci::Process;
use crate::seccomp::Filter;

/// Joins the container's namespaces and makes the process in `cgroup`.
pub fn run(
    request: ExecRequest,
    cgroup: OwnedFd,
    pidfd: &OwnedFd,
    reporter: Reporter,
) -> Result<(), Failure> {
    let ExecRequest {
        process,
        seccomp,
        user_namespace: in_user_namespace,
    } = request;
    // Before the container's namespaces: they have other files at these paths.
    let seccomp = seccomp
        .map(|filter| filter.read())
        .transpose()
        .map_err(|error| Failure::other("reading the seccomp filter", &error))?;
    program::set_inherited(&process)?;
    // From here on this process may be seen from inside.
    prctl::set_dumpable(false).map_err(|error| Failure::other("prctl", &error))?;
    // SAFETY: a helper has one thread.
    if in_user_namespace && !unsafe { user_namespace::move_to(&cgroup) }? {
        return Ok(());
    }
    // The cgroup namespace comes after the move to the cgroup: from within it, the move is forbidden.
    let mut shared = CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWPID
        | CloneFlags::CLONE_NEWIPC
        | CloneFlags::CLONE_NEWUTS
        | CloneFlags::CLONE_NEWNET;
    if in_user_namespace {
        shared |= CloneFlags::CLONE_NEWUSER;
    }
    setns(pidfd, shared).map_err(|error| match error {
        Errno::ESRCH => Failure {
            kind: FailureKind::Gone,
            message: "the container's first process has ended".to_owned(),
        },
        error => Failure::other("joining the container's namespaces", &error),
    })?;
    let mut arguments = CloneArguments {
        flags: libc::CLONE_PARENT as u64,
        ..CloneArguments::default()
    };
    if in_user_namespace {
        user_namespace::become_root()?;
    } else {
        arguments.flags |= CLONE_INTO_CGROUP;
        arguments.cgroup = cgroup.as_raw_fd() as u64;
    }
    // SAFETY: a helper has one thread.
    match unsafe { arguments.clone() }
        .map_err(|error| Failure::other("making the process", &error))?
    {
        Some(pid) => {
            reporter.send(&Report::Process(pid));
            Ok(())
        }
        None => Err(become_program(&process, seccomp.as_ref(), pidfd, reporter)),
    }
}

/// The life of the process until it is its program. Returns only if that fails.
fn become_program(
    process: &Process,
    seccomp: Option<&Filter>,
    pidfd: &OwnedFd,
    reporter: Reporter,
) -> Failure {
    match setns(pidfd, CloneFlags::CLONE_NEWCGROUP) {
        Ok(()) => program::become_program(process, seccomp, false, reporter),
        Err(error) => Failure::other("joining the cgroup namespace", &error),
    }
}
