//! How a helper gets into the pod's user namespace, from which it cannot come back.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd};

use nix::sched::{CloneFlags, setns};
use nix::unistd::{Gid, Uid, setgroups, setresgid, setresuid};

use super::process::{CLONE_INTO_CGROUP, CloneArguments, Failure};
use crate::sandbox::files;

/// Joins the pod's user namespace as its root, with all capabilities in it and none outside.
pub fn enter() -> Result<(), Failure> {
    File::open(files::namespace("user"))
        .and_then(|namespace| Ok(setns(namespace.as_fd(), CloneFlags::CLONE_NEWUSER)?))
        .map_err(|error| Failure::other("joining the pod's user namespace", &error))?;
    become_root()
}

/// Becomes root of the user namespace that this process has joined: it still has the user that it had outside, which is
/// nobody here.
pub fn become_root() -> Result<(), Failure> {
    let (user, group) = (Uid::from_raw(0), Gid::from_raw(0));
    setgroups(&[])
        .and_then(|()| setresgid(group, group, group))
        .and_then(|()| setresuid(user, user, user))
        .map_err(|error| Failure::other("becoming root of the pod's user namespace", &error))
}

/// Goes on in a process in `cgroup`, as whose child a process of that group is made: what is root of a user namespace
/// alone may not put it there. False: this process, which has nothing left to do.
///
/// # Safety
/// The calling process has one thread.
pub unsafe fn move_to(cgroup: &impl AsRawFd) -> Result<bool, Failure> {
    let arguments = CloneArguments {
        flags: libc::CLONE_PARENT as u64 | CLONE_INTO_CGROUP,
        cgroup: cgroup.as_raw_fd() as u64,
        ..CloneArguments::default()
    };
    // SAFETY: the caller's promise.
    let child = unsafe { arguments.clone() }
        .map_err(|error| Failure::other("entering the control group", &error))?;
    Ok(child.is_none())
}
