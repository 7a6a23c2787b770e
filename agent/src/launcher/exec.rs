//! One more process in a running container.
//!
//! libcontainer's tenant builder is not used for this: in 0.7 it gives the process no seccomp filter
//! (the spec it adapts has none), and it parses the whole spec and forks twice for what one `setns` with
//! a pidfd and one `clone3` into the control group do.

use std::fs::File;
use std::io::{self, BufReader};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;

use libcontainer::capabilities;
use libcontainer::seccomp::initialize_seccomp;
use libcontainer::syscall::Syscall;
use libcontainer::syscall::syscall::create_syscall;
use nix::errno::Errno;
use nix::pty::openpty;
use nix::sched::{CloneFlags, setns};
use nix::sys::prctl;
use nix::sys::stat::{Mode, umask};
use nix::unistd::{
    Gid, Uid, chdir, dup2_stderr, dup2_stdin, dup2_stdout, fchown, setgroups, setresgid, setresuid,
    setsid,
};
use oci_spec::runtime::{Capabilities, LinuxCapabilities, LinuxSeccomp, Process};

use super::executable;
use super::message::{ExecRequest, FailureKind, Report, Reporter};
use super::process::{CloneArguments, Failure};

/// linux/sched.h; newer than the libc crate's list.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// Joins the container's namespaces and makes the process in `cgroup`.
pub fn run(
    request: ExecRequest,
    cgroup: OwnedFd,
    pidfd: &OwnedFd,
    reporter: Reporter,
) -> Result<(), Failure> {
    let ExecRequest { process, seccomp } = request;
    // Before the container's namespaces: they have other files at these paths.
    let seccomp = seccomp
        .map(|path| read_seccomp(&path))
        .transpose()
        .map_err(|error| Failure::other("reading the seccomp filter", &error))?;
    if let Some(score) = process.oom_score_adj() {
        std::fs::write("/proc/self/oom_score_adj", score.to_string())
            .map_err(|error| Failure::other("setting oom_score_adj", &error))?;
    }
    // From here on this process may be seen from inside.
    prctl::set_dumpable(false).map_err(|error| Failure::other("prctl", &error))?;
    // The cgroup namespace comes after the move to the cgroup: from within it, the move is forbidden.
    let shared = CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWPID
        | CloneFlags::CLONE_NEWIPC
        | CloneFlags::CLONE_NEWUTS
        | CloneFlags::CLONE_NEWNET;
    setns(pidfd, shared).map_err(|error| match error {
        Errno::ESRCH => Failure {
            kind: FailureKind::Gone,
            message: "the container's first process has ended".to_owned(),
        },
        error => Failure::other("joining the container's namespaces", &error),
    })?;
    let arguments = CloneArguments {
        flags: libc::CLONE_PARENT as u64 | CLONE_INTO_CGROUP,
        cgroup: cgroup.as_raw_fd() as u64,
        ..CloneArguments::default()
    };
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

fn read_seccomp(path: &Path) -> io::Result<LinuxSeccomp> {
    Ok(serde_json::from_reader(BufReader::new(File::open(path)?))?)
}

/// Turns this process into what the spec says, in the order of runc's `setns` init. Returns only if that
/// fails.
fn become_program(
    process: &Process,
    seccomp: Option<&LinuxSeccomp>,
    pidfd: &OwnedFd,
    reporter: Reporter,
) -> Failure {
    match prepare(process, seccomp, pidfd, reporter) {
        Ok(()) => executable::execute(
            process.args().as_deref().unwrap_or_default(),
            process.env().as_deref().unwrap_or_default(),
        ),
        Err(failure) => failure,
    }
}

fn prepare(
    process: &Process,
    seccomp: Option<&LinuxSeccomp>,
    pidfd: &OwnedFd,
    reporter: Reporter,
) -> Result<(), Failure> {
    let step = |what: &'static str| move |error: Errno| Failure::other(what, &error);
    let syscall = create_syscall();
    setns(pidfd, CloneFlags::CLONE_NEWCGROUP).map_err(step("joining the cgroup namespace"))?;
    setsid().map_err(step("making a session"))?;
    if process.terminal().unwrap_or(false) {
        set_up_terminal(process, reporter)?;
    }
    for limit in process.rlimits().iter().flatten() {
        syscall
            .set_rlimit(limit)
            .map_err(|error| Failure::other("setting a resource limit", &error))?;
    }
    let no_new_privileges = process.no_new_privileges().unwrap_or(false);
    if no_new_privileges {
        prctl::set_no_new_privs().map_err(step("setting no_new_privs"))?;
    } else if let Some(seccomp) = seccomp {
        // Without no_new_privs this takes CAP_SYS_ADMIN, which goes away below.
        load(seccomp)?;
    }
    if let Some(mask) = process.user().umask() {
        umask(Mode::from_bits_truncate(mask));
    }
    chdir(process.cwd()).map_err(|error| Failure {
        kind: FailureKind::Program,
        message: format!("chdir to {}: {}", process.cwd().display(), error.desc()),
    })?;
    let groups: Vec<Gid> = process
        .user()
        .additional_gids()
        .iter()
        .flatten()
        .map(|gid| Gid::from_raw(*gid))
        .collect();
    setgroups(&groups).map_err(step("setting supplementary groups"))?;
    set_identity(process, syscall.as_ref())?;
    if no_new_privileges && let Some(seccomp) = seccomp {
        load(seccomp)?;
    }
    // Whatever is open besides the standard streams closes with the execution.
    syscall
        .close_range(0)
        .map_err(|error| Failure::other("closing descriptors", &error))
}

fn set_identity(process: &Process, syscall: &dyn Syscall) -> Result<(), Failure> {
    let (uid, gid) = (
        Uid::from_raw(process.user().uid()),
        Gid::from_raw(process.user().gid()),
    );
    // Capabilities survive the change of user, down to what the spec grants.
    prctl::set_keepcaps(true)
        .and_then(|()| setresgid(gid, gid, gid))
        .and_then(|()| setresuid(uid, uid, uid))
        .and_then(|()| prctl::set_keepcaps(false))
        .map_err(|error| Failure::other("setting user and group", &error))?;
    let capabilities = process.capabilities().clone().unwrap_or_else(|| {
        // No list: no capabilities (the spec's default, unlike the type's).
        let mut none = LinuxCapabilities::default();
        none.set_bounding(None)
            .set_effective(Some(Capabilities::new()))
            .set_permitted(Some(Capabilities::new()))
            .set_inheritable(Some(Capabilities::new()))
            .set_ambient(Some(Capabilities::new()));
        none
    });
    capabilities::reset_effective(syscall)
        .and_then(|()| capabilities::drop_privileges(&capabilities, syscall))
        .map_err(|error| Failure::other("setting capabilities", &error))
}

fn load(seccomp: &LinuxSeccomp) -> Result<(), Failure> {
    // Filters that notify a listener would need one; the spec of a container with one never comes here
    // without libcontainer having refused it first.
    initialize_seccomp(seccomp)
        .map(drop)
        .map_err(|error| Failure::other("loading the seccomp filter", &error))
}

/// A terminal of the container's own devpts, as controlling terminal and standard streams.
fn set_up_terminal(process: &Process, reporter: Reporter) -> Result<(), Failure> {
    let step = |error: Errno| Failure::other("making a terminal", &error);
    let pty = openpty(None, None).map_err(step)?;
    fchown(&pty.slave, Some(process.user().uid().into()), None).map_err(step)?;
    reporter.send_console(pty.master.as_fd()).map_err(step)?;
    // SAFETY: a descriptor and a number.
    Errno::result(unsafe { libc::ioctl(pty.slave.as_raw_fd(), libc::TIOCSCTTY, 0) })
        .map_err(step)?;
    dup2_stdin(&pty.slave)
        .and_then(|()| dup2_stdout(&pty.slave))
        .and_then(|()| dup2_stderr(&pty.slave))
        .map_err(step)
}
