//! The pod's user namespace, and the namespaces of the pod that it owns: ipc, uts, network. Who is root in it may
//! change what these are about, as with runc.

use std::fs;
use std::io;
use std::path::Path;

use nix::sched::CloneFlags;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::waitpid;
use nix::unistd::Pid;

use super::message::{Report, Reporter};
use super::process::{CloneArguments, Failure};
use crate::sandbox::keep_namespace;
use crate::user_namespace::IdMap;

/// Makes them. They are kept by mounts when nobody is in them.
pub fn run(ids: IdMap, reporter: Reporter) -> Result<(), Failure> {
    let flags = CloneFlags::CLONE_NEWUSER
        | CloneFlags::CLONE_NEWIPC
        | CloneFlags::CLONE_NEWUTS
        | CloneFlags::CLONE_NEWNET;
    let arguments = CloneArguments {
        flags: flags.bits() as u64,
        exit_signal: libc::SIGCHLD as u64,
        ..CloneArguments::default()
    };
    // SAFETY: a helper has one thread.
    let first = unsafe { arguments.clone() }
        .map_err(|error| Failure::other("making the pod's user namespace", &error))?;
    let Some(pid) = first else { wait_for_the_end() };
    let kept = keep(pid, ids);
    let pid = Pid::from_raw(pid);
    let ended = kill(pid, Signal::SIGKILL).and_then(|()| waitpid(pid, None));
    kept.map_err(|error| Failure::other("keeping the pod's user namespace", &error))?;
    ended.map_err(|error| Failure::other("leaving the pod's user namespace", &error))?;
    reporter.send(&Report::Done);
    Ok(())
}

/// The life of the process that the namespaces are made with: until it is killed.
fn wait_for_the_end() -> ! {
    loop {
        // SAFETY: waits for any signal.
        unsafe { libc::pause() };
    }
}

fn keep(pid: i32, ids: IdMap) -> io::Result<()> {
    let process = Path::new("/proc").join(pid.to_string());
    for map in ["uid_map", "gid_map"] {
        fs::write(process.join(map), ids.line())?;
    }
    for name in ["ipc", "uts", "net", "user"] {
        keep_namespace(&process.join("ns"), name)?;
    }
    Ok(())
}
