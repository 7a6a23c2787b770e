//! A container's first process: its namespaces, and in them its view of the file system.
//!
//! The helper joins the namespaces that are the pod's, and one `clone3` makes the process in its control
//! group, with those that are its own. The process sets up the rest by itself. libcontainer's way (three
//! processes, five sockets, state files) took twice the time in a guest without KVM, and a fifth of the
//! agent's size.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::prctl;
use nix::unistd::{chdir, fchdir, pivot_root, sethostname};

use super::message::{CreateRequest, FailureKind, Report, Reporter};
use super::process::{CLONE_INTO_CGROUP, CloneArguments, Failure};
use super::view::Prepared;
use super::{program, user_namespace, view};
use crate::oci::{Namespace, NamespaceKind, Spec};
use crate::resources;
use crate::seccomp::{Filter, StoredFilter};
use crate::sysctl;
use podvisor_root::in_root::Root;

/// Makes the first process of a container in `cgroup`, in the pid namespace of `target` if there is one.
pub fn run(
    request: &CreateRequest,
    cgroup: OwnedFd,
    target: Option<&OwnedFd>,
    reporter: Reporter,
) -> Result<(), Failure> {
    let step = |what| move |error: nix::Error| Failure::other(what, &error);
    let spec = fs::read(&request.spec)
        .map_err(serde_json::Error::io)
        .and_then(|bytes| serde_json::from_slice::<Spec>(&bytes))
        .map_err(|error| Failure::other("reading the spec", &error))?;
    let filter = request
        .seccomp
        .as_ref()
        .map(StoredFilter::read)
        .transpose()
        .map_err(|error| Failure::other("reading the seccomp filter", &error))?;
    resources::apply(&spec.linux.resources, cgroup.as_fd())
        .map_err(|error| Failure::other("limiting the container's resources", &error))?;
    program::set_inherited(&spec.process)?;
    // From here on this process may be seen from inside.
    prctl::set_dumpable(false).map_err(step("prctl"))?;
    // SAFETY: a helper has one thread.
    if request.ids.is_some() && !unsafe { user_namespace::move_to(&cgroup) }? {
        return Ok(());
    }
    let own = join_namespaces(&spec.linux.namespaces, target)?;
    let mut arguments = CloneArguments {
        // The cgroup namespace comes later: its root is the control group of who makes it.
        flags: (own & !CloneFlags::CLONE_NEWCGROUP).bits() as u64 | libc::CLONE_PARENT as u64,
        ..CloneArguments::default()
    };
    let prepared = if let Some(ids) = request.ids {
        let prepared = view::prepare(&spec, ids)?;
        user_namespace::enter()?;
        prepared
    } else {
        arguments.flags |= CLONE_INTO_CGROUP;
        arguments.cgroup = cgroup.as_raw_fd() as u64;
        Prepared::default()
    };
    // SAFETY: a helper has one thread.
    match unsafe { arguments.clone() }
        .map_err(|error| Failure::other("making the process", &error))?
    {
        Some(pid) => {
            reporter.send(&Report::Process(pid));
            Ok(())
        }
        None => Err(first_process(
            &spec,
            own,
            prepared,
            filter.as_ref(),
            reporter,
        )),
    }
}

/// Joins the namespaces that have a path, and the pid namespace of `target`; returns those that are to be
/// made.
fn join_namespaces(
    namespaces: &[Namespace],
    target: Option<&OwnedFd>,
) -> Result<CloneFlags, Failure> {
    let mut own = CloneFlags::empty();
    for namespace in namespaces {
        let kind = match namespace.kind {
            NamespaceKind::Mount => CloneFlags::CLONE_NEWNS,
            NamespaceKind::Pid => CloneFlags::CLONE_NEWPID,
            NamespaceKind::Ipc => CloneFlags::CLONE_NEWIPC,
            NamespaceKind::Uts => CloneFlags::CLONE_NEWUTS,
            NamespaceKind::Network => CloneFlags::CLONE_NEWNET,
            NamespaceKind::Cgroup => CloneFlags::CLONE_NEWCGROUP,
            // Joined last: what is made before is made by the guest's root.
            NamespaceKind::User => continue,
        };
        match (&namespace.path, target) {
            (None, _) => own |= kind,
            (Some(_), Some(target)) if kind == CloneFlags::CLONE_NEWPID => {
                setns(target, kind).map_err(|error| match error {
                    Errno::ESRCH => Failure {
                        kind: FailureKind::Gone,
                        message: "the container whose processes it is to see has ended".to_owned(),
                    },
                    error => Failure::other("joining another container's pid namespace", &error),
                })?;
            }
            (Some(path), _) => join(path, kind)
                .map_err(|error| Failure::other("joining the pod's namespaces", &error))?,
        }
    }
    Ok(own)
}

fn join(path: &Path, kind: CloneFlags) -> io::Result<()> {
    Ok(setns(File::open(path)?, kind)?)
}

/// The life of the container's first process until it is its program. Returns only if that fails.
fn first_process(
    spec: &Spec,
    own: CloneFlags,
    prepared: Prepared,
    filter: Option<&Filter>,
    reporter: Reporter,
) -> Failure {
    match enter(spec, own, prepared) {
        Ok(()) => program::become_program(&spec.process, filter, true, reporter),
        Err(failure) => failure,
    }
}

/// Moves into the container's namespaces and root. Until the last step, paths are the guest's.
fn enter(spec: &Spec, own: CloneFlags, prepared: Prepared) -> Result<(), Failure> {
    let step = |what| move |error: nix::Error| Failure::other(what, &error);
    if own.contains(CloneFlags::CLONE_NEWCGROUP) {
        unshare(CloneFlags::CLONE_NEWCGROUP).map_err(step("making the cgroup namespace"))?;
    }
    if own.contains(CloneFlags::CLONE_NEWUTS) {
        sethostname(&spec.hostname).map_err(step("setting the host name"))?;
    }
    for (name, value) in &spec.linux.sysctl {
        sysctl::set(name, value).map_err(|error| Failure::other("sysctl", &error))?;
    }
    let propagation = match spec.linux.rootfs_propagation.as_str() {
        "shared" | "rshared" => MsFlags::MS_SHARED,
        "private" | "rprivate" => MsFlags::MS_PRIVATE,
        _ => MsFlags::MS_SLAVE,
    };
    change_propagation("/", propagation).map_err(step("detaching from the guest's mounts"))?;
    let root = view::build(spec, prepared)?;
    change_root(&root).map_err(step("changing the root"))
}

/// Makes `root`, a mount point, the root, and takes the guest's mounts out of sight.
fn change_root(root: &Root) -> nix::Result<()> {
    fchdir(root)?;
    // The old root goes on top of the new one (pivot_root(2)); unmounting it must not reach the guest.
    pivot_root(".", ".")?;
    change_propagation(".", MsFlags::MS_SLAVE)?;
    umount2(".", MntFlags::MNT_DETACH)?;
    chdir("/")
}

fn change_propagation(path: &str, propagation: MsFlags) -> nix::Result<()> {
    mount(
        None::<&str>,
        path,
        None::<&str>,
        MsFlags::MS_REC | propagation,
        None::<&str>,
    )
}
