//! The first process of a pid namespace that the pod's containers share: it holds the namespace and
//! reaps its orphans.

use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};

use super::message::{Report, Reporter};
use super::process::{Failure, clone_for_parent};
use super::user_namespace;

/// Makes the namespace and its first process. The pod's user namespace owns it, if there is one.
pub fn run(in_user_namespace: bool, reporter: Reporter) -> Result<(), Failure> {
    if in_user_namespace {
        user_namespace::enter()?;
    }
    unshare(CloneFlags::CLONE_NEWPID)
        .map_err(|error| Failure::other("making the pod's pid namespace", &error))?;
    // SAFETY: a helper has one thread.
    match unsafe { clone_for_parent() }
        .map_err(|error| Failure::other("making the pause process", &error))?
    {
        Some(pid) => reporter.send(&Report::Process(pid)),
        None => reap(),
    }
    Ok(())
}

/// Signals do not end the first process of a namespace unless they come from outside of it and cannot be
/// caught, so this never returns.
fn reap() -> ! {
    // Descriptors of PID 1's request, the report socket among them: closing it says "done".
    // SAFETY: nothing in this process uses a descriptor from here on.
    unsafe { libc::close_range(0, libc::c_uint::MAX, 0) };
    let name = c"podvisor-pause";
    // SAFETY: a string.
    unsafe { libc::prctl(libc::PR_SET_NAME, name.as_ptr()) };
    let mut children = SigSet::empty();
    children.add(Signal::SIGCHLD);
    let blocked = children.thread_block();
    loop {
        while let Ok(status) = waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            if status == WaitStatus::StillAlive {
                break;
            }
        }
        if blocked.is_err() || children.wait().is_err() {
            // SAFETY: waits for any signal.
            unsafe { libc::pause() };
        }
    }
}
