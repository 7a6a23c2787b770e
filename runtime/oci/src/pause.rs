//! The first process of a pid namespace that the containers of a pod share: it reaps what they orphan, and
//! the namespace lives as long as it does.
//!
//! Containers see it. So it has nothing: an empty root, no privileges, another user's ids.

use std::ffi::CString;
use std::io;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};

/// The argument by which a binary that calls [`run`] knows that it is meant.
pub const ARGUMENT: &str = "pause";

/// nobody(5)'s ids.
const NOBODY: u32 = 65534;

/// Starts this binary again, in a pid namespace of its own, to [`run`]. Ends with the calling thread.
///
/// # Errors
/// The kernel refuses.
pub fn start() -> io::Result<u32> {
    let name = CString::from(c"podvisor-pause");
    let argument = CString::new(ARGUMENT)?;
    let arguments = [name.as_ptr(), argument.as_ptr(), std::ptr::null()];
    let environment = [std::ptr::null()];
    // SAFETY: all zeros is a valid clone_args.
    let mut how: libc::clone_args = unsafe { std::mem::zeroed() };
    how.flags = libc::CLONE_NEWPID as u64;
    how.exit_signal = libc::SIGCHLD as u64;
    // SAFETY: without CLONE_VM this is fork(2). The child makes only system calls, with what was made before.
    let pid = unsafe {
        libc::syscall(
            libc::SYS_clone3,
            &raw mut how,
            size_of::<libc::clone_args>(),
        )
    };
    if pid == 0 {
        // SAFETY: strings and arrays that end with null, and live on in this copy of memory.
        unsafe {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            libc::execve(
                c"/proc/self/exe".as_ptr(),
                arguments.as_ptr(),
                environment.as_ptr(),
            );
            libc::_exit(127)
        }
    }
    Ok(nix::errno::Errno::result(pid)? as u32)
}

/// Gives everything up, then reaps for ever.
///
/// # Errors
/// Something could not be given up.
pub fn run() -> io::Result<()> {
    unshare(CloneFlags::CLONE_NEWNS)?;
    let nothing: Option<&str> = None;
    mount(
        nothing,
        "/",
        nothing,
        MsFlags::MS_REC | MsFlags::MS_PRIVATE,
        nothing,
    )?;
    let flags = MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("none"), "/proc", Some("tmpfs"), flags, Some("size=4k"))?;
    nix::unistd::chdir("/proc")?;
    nix::unistd::pivot_root(".", ".")?;
    umount2(".", MntFlags::MNT_DETACH)?;
    nix::unistd::chdir("/")?;
    // setresuid(2) of root takes all capabilities with it.
    nix::unistd::setgroups(&[])?;
    let (group, user) = (NOBODY.into(), NOBODY.into());
    nix::unistd::setresgid(group, group, group)?;
    nix::unistd::setresuid(user, user, user)?;
    nix::sys::prctl::set_no_new_privs()?;
    // That cleared it (prctl(2)): still to end with its parent.
    nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?;

    let mut child_ended = SigSet::empty();
    child_ended.add(Signal::SIGCHLD);
    child_ended.thread_block()?;
    loop {
        while let Ok(status) = waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            if status == WaitStatus::StillAlive {
                break;
            }
        }
        child_ended.wait()?;
    }
}
