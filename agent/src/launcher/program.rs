//! The last steps of a process that is in its container already: limits, identity, filter, program. The
//! same for a container's first process and for an exec, in the order of runc's.

use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;

use nix::errno::Errno;
use nix::pty::openpty;
use nix::sys::prctl;
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::stat::{Mode, umask};
use nix::unistd::{
    Gid, Uid, chdir, dup2_stderr, dup2_stdin, dup2_stdout, fchown, setgroups, setresgid, setresuid,
    setsid,
};

use super::message::{FailureKind, Reporter};
use super::process::Failure;
use super::{capabilities, executable};
use crate::mount::Mount;
use crate::oci::{self, Limit, Process};
use crate::seccomp::Filter;
use podvisor_root::in_root::Root;

/// Sets what the process inherits: what the root of a user namespace could not raise. Not possible any more when this
/// process is not dumpable.
pub fn set_inherited(process: &Process) -> Result<(), Failure> {
    if let Some(score) = process.oom_score_adj {
        std::fs::write("/proc/self/oom_score_adj", score.to_string())
            .map_err(|error| Failure::other("setting oom_score_adj", &error))?;
    }
    for limit in &process.rlimits {
        set_limit(limit).map_err(|error| Failure::other("setting a resource limit", &error))?;
    }
    Ok(())
}

/// Turns this process into what the spec says. `console`: its terminal is also the container's
/// /dev/console. Returns only if that fails.
pub fn become_program(
    process: &Process,
    filter: Option<&Filter>,
    console: bool,
    reporter: Reporter,
) -> Failure {
    match prepare(process, filter, console, reporter) {
        Ok(()) => executable::execute(&process.args, &process.env),
        Err(failure) => failure,
    }
}

fn prepare(
    process: &Process,
    filter: Option<&Filter>,
    console: bool,
    reporter: Reporter,
) -> Result<(), Failure> {
    let step = |what: &'static str| move |error: Errno| Failure::other(what, &error);
    setsid().map_err(step("making a session"))?;
    if process.terminal {
        set_up_terminal(process, console, reporter)
            .map_err(|error| Failure::other("making a terminal", &error))?;
    }
    if process.no_new_privileges {
        prctl::set_no_new_privs().map_err(step("setting no_new_privs"))?;
    } else if let Some(filter) = filter {
        // Without no_new_privs this takes CAP_SYS_ADMIN, which goes away below.
        filter.load().map_err(step("loading the seccomp filter"))?;
    }
    if let Some(mask) = process.user.umask {
        umask(Mode::from_bits_truncate(mask));
    }
    chdir(&process.cwd).map_err(|error| Failure {
        kind: FailureKind::Program,
        message: format!("chdir to {}: {}", process.cwd.display(), error.desc()),
    })?;
    set_identity(process)?;
    if process.no_new_privileges
        && let Some(filter) = filter
    {
        filter.load().map_err(step("loading the seccomp filter"))?;
    }
    // Whatever is open besides the standard streams closes with the execution.
    // SAFETY: numbers.
    Errno::result(unsafe {
        libc::close_range(
            3,
            libc::c_uint::MAX,
            libc::CLOSE_RANGE_CLOEXEC as libc::c_int,
        )
    })
    .map(drop)
    .map_err(step("closing descriptors"))
}

fn set_identity(process: &Process) -> Result<(), Failure> {
    let user = &process.user;
    let (uid, gid) = (Uid::from_raw(user.uid), Gid::from_raw(user.gid));
    let groups = user.additional_gids.iter().copied().map(Gid::from_raw);
    let groups: Vec<Gid> = groups.collect();
    // Capabilities survive the change of user, down to what the spec grants.
    setgroups(&groups)
        .and_then(|()| prctl::set_keepcaps(true))
        .and_then(|()| setresgid(gid, gid, gid))
        .and_then(|()| setresuid(uid, uid, uid))
        .and_then(|()| prctl::set_keepcaps(false))
        .map_err(|error| Failure::other("setting user and groups", &error))?;
    capabilities::restrict(&process.capabilities)
        .map_err(|error| Failure::other("setting capabilities", &error))
}

fn set_limit(limit: &Limit) -> nix::Result<()> {
    let resource = match limit.resource {
        oci::Resource::RlimitCpu => Resource::RLIMIT_CPU,
        oci::Resource::RlimitFsize => Resource::RLIMIT_FSIZE,
        oci::Resource::RlimitData => Resource::RLIMIT_DATA,
        oci::Resource::RlimitStack => Resource::RLIMIT_STACK,
        oci::Resource::RlimitCore => Resource::RLIMIT_CORE,
        oci::Resource::RlimitRss => Resource::RLIMIT_RSS,
        oci::Resource::RlimitNproc => Resource::RLIMIT_NPROC,
        oci::Resource::RlimitNofile => Resource::RLIMIT_NOFILE,
        oci::Resource::RlimitMemlock => Resource::RLIMIT_MEMLOCK,
        oci::Resource::RlimitAs => Resource::RLIMIT_AS,
        oci::Resource::RlimitLocks => Resource::RLIMIT_LOCKS,
        oci::Resource::RlimitSigpending => Resource::RLIMIT_SIGPENDING,
        oci::Resource::RlimitMsgqueue => Resource::RLIMIT_MSGQUEUE,
        oci::Resource::RlimitNice => Resource::RLIMIT_NICE,
        oci::Resource::RlimitRtprio => Resource::RLIMIT_RTPRIO,
        oci::Resource::RlimitRttime => Resource::RLIMIT_RTTIME,
    };
    setrlimit(resource, limit.soft, limit.hard)
}

/// A terminal of the container's own devpts, as controlling terminal and standard streams.
fn set_up_terminal(process: &Process, console: bool, reporter: Reporter) -> std::io::Result<()> {
    let pty = openpty(None, None)?;
    fchown(&pty.slave, Some(process.user.uid.into()), None)?;
    if console {
        let place = Root::new(Path::new("/"))?.file(Path::new("/dev/console"))?;
        Mount::again(pty.slave.as_fd(), false)?.attach(place.as_fd())?;
    }
    reporter.send_console(pty.master.as_fd())?;
    // SAFETY: a descriptor and a number.
    Errno::result(unsafe { libc::ioctl(pty.slave.as_raw_fd(), libc::TIOCSCTTY, 0) })?;
    dup2_stdin(&pty.slave)?;
    dup2_stdout(&pty.slave)?;
    dup2_stderr(&pty.slave)?;
    Ok(())
}
