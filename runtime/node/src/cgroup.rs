//! A pod's cgroup on the host: a leaf below the parent that the kubelet names, in every hierarchy
//! that is mounted. All processes of the pod's VM are in it.
//!
//! Works on cgroup v2, v1 and both at once. Nothing here talks to systemd: a leaf made by hand
//! below a slice is what other runtimes' cgroupfs mode makes too. Parents are the caller's: they
//! are made when missing and never removed.

pub mod hierarchy;
mod limits;

use std::collections::HashSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use podvisor_proto::agent::Usage;

use crate::pidfd::PidFd;
use hierarchy::{Hierarchy, Kind};

/// Looks at a group after its last process has ended until the kernel lets it be removed.
const REMOVE_PAUSE: Duration = Duration::from_millis(5);

/// Of processes that start others while they are killed one by one.
const KILL_ROUNDS: usize = 100;

/// What can go wrong with a pod's cgroup.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// `cgroup_parent` cannot be used.
    #[error("{0}")]
    Parent(String),
    /// No cgroup file system.
    #[error("cgroup hierarchies: {0}")]
    Hierarchies(io::Error),
    /// A step on the group.
    #[error("cgroup {}: {step}: {source}", path.display())]
    Io {
        /// The group, or a file of it.
        path: PathBuf,
        /// What was tried.
        step: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// Processes are left in the group.
    #[error("cgroup {}: processes {pids:?} are still in it", path.display())]
    Busy {
        /// The group.
        path: PathBuf,
        /// Processes in it.
        pids: Vec<u32>,
    },
}

impl CgroupError {
    fn io(path: &Path, step: &'static str) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { path, step, source }
    }
}

/// A pod's group in all hierarchies, whether it exists or not. Everything here blocks, for the
/// time of a few file operations where no other is named.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodCgroup {
    /// In the order of [`hierarchy::mounted`].
    groups: Vec<Hierarchy>,
}

impl PodCgroup {
    /// The group `leaf` below `parent`, a path or a slice (see [`hierarchy::parent_path`]).
    ///
    /// # Errors
    /// `parent` is neither, or there are no cgroups.
    pub fn at(parent: &str, leaf: &str) -> Result<Self, CgroupError> {
        let below = hierarchy::parent_path(parent)
            .map_err(CgroupError::Parent)?
            .join(leaf);
        let mounted = hierarchy::mounted().map_err(CgroupError::Hierarchies)?;
        Ok(Self {
            groups: mounted.iter().map(|root| root.child(&below)).collect(),
        })
    }

    /// Makes the group. One that exists is taken as it is.
    ///
    /// # Errors
    /// A hierarchy refuses. Nothing but parents is left then.
    pub fn create(parent: &str, leaf: &str) -> Result<Self, CgroupError> {
        let pod = Self::at(parent, leaf)?;
        let parent = hierarchy::parent_path(parent).map_err(CgroupError::Parent)?;
        for group in &pod.groups {
            let levels = parent.components().count() + 1;
            if let Err(error) = make(group, levels) {
                let _ = pod.remove(Duration::ZERO);
                return Err(error);
            }
        }
        Ok(pod)
    }

    /// The group `name` below this one, made if need be. On cgroup v2 this one must have no processes then.
    ///
    /// # Errors
    /// A hierarchy refuses.
    pub fn child(&self, name: &str) -> Result<Self, CgroupError> {
        let groups: Vec<Hierarchy> = self.groups.iter().map(|group| group.child(name)).collect();
        for group in &groups {
            make(group, 1)?;
        }
        Ok(Self { groups })
    }

    /// Puts a process, with all its threads, into the group. Its children will be in it too.
    ///
    /// # Errors
    /// The process has ended, or the group does not exist.
    pub fn add(&self, pid: u32) -> Result<(), CgroupError> {
        for group in &self.groups {
            let procs = group.root.join("cgroup.procs");
            fs::write(&procs, pid.to_string()).map_err(CgroupError::io(&procs, "add a process"))?;
        }
        Ok(())
    }

    /// Keeps the group's processes on some of the node's CPUs and memory nodes, lists as in cpuset(7). Empty:
    /// on those of its parent. A host without the controller is left as it is, if nothing is asked of it.
    ///
    /// # Errors
    /// The node does not have them, or the parent may not use them.
    pub fn set_cpuset(&self, cpus: &str, mems: &str) -> Result<(), CgroupError> {
        for (name, list) in [("cpuset.cpus", cpus), ("cpuset.mems", mems)] {
            let file = self
                .groups
                .iter()
                .find(|group| group.root.join(name).exists());
            let Some(group) = file else {
                if list.is_empty() {
                    continue;
                }
                let path = PathBuf::from(name);
                return Err(CgroupError::io(&path, "find the controller")(
                    io::ErrorKind::NotFound.into(),
                ));
            };
            let file = group.root.join(name);
            let is = fs::read_to_string(&file).unwrap_or_default();
            let mut wanted = list.to_owned();
            // A group with processes cannot have its list taken away again, on v2 neither.
            if list.is_empty() && !is.trim().is_empty() {
                let above = group.root.parent().unwrap_or(&group.root);
                let above = match group.kind {
                    Kind::V1Cpuset => above.join(name),
                    _ => above.join(format!("{name}.effective")),
                };
                wanted = fs::read_to_string(&above).map_err(CgroupError::io(&above, "read"))?;
            }
            // Every write makes the kernel look at each process of the group.
            if is.trim() != wanted.trim() {
                fs::write(&file, format!("{}\n", wanted.trim()))
                    .map_err(CgroupError::io(&file, "set"))?;
            }
        }
        Ok(())
    }

    /// What the group uses, or the group `below` it.
    pub fn usage(&self, below: &str) -> Usage {
        let groups = self.groups.iter().map(|group| group.root.join(below));
        podvisor_usage::cgroup::of_host(&groups.collect::<Vec<_>>())
    }

    /// Processes of the group and of groups below it.
    pub fn processes(&self) -> HashSet<u32> {
        let mut pids = HashSet::new();
        for group in &self.groups {
            collect_processes(&group.root, &mut pids);
        }
        pids
    }

    /// Kills every process in the group. They may take a moment to end: see [`PodCgroup::remove`].
    ///
    /// # Errors
    /// Processes keep starting others faster than they are killed (without cgroup v2 only).
    pub fn kill_all(&self) -> Result<(), CgroupError> {
        for group in self.groups.iter().filter(|g| g.kind == Kind::Unified) {
            // Since Linux 5.14, at once and with all that is being forked. Without it, or without
            // the group, what follows does what can be done.
            let _ = fs::write(group.root.join("cgroup.kill"), "1");
        }
        let mut killed = HashSet::new();
        for _ in 0..KILL_ROUNDS {
            let new: Vec<u32> = self.processes().difference(&killed).copied().collect();
            if new.is_empty() {
                return Ok(());
            }
            for pid in new {
                // An error is a process that has ended.
                let _ = PidFd::open(pid).and_then(|process| process.signal(Signal::SIGKILL));
                killed.insert(pid);
            }
        }
        Err(self.busy())
    }

    /// Removes the group and groups below it; one that does not exist is fine. Kills nothing:
    /// waits up to `patience` for the processes in it to end.
    ///
    /// # Errors
    /// [`CgroupError::Busy`], and all groups are left that the processes are in.
    pub fn remove(&self, patience: Duration) -> Result<(), CgroupError> {
        let deadline = Instant::now() + patience;
        loop {
            // The index last: see `hierarchy::mounted`.
            let mut still_busy = false;
            for group in self.groups.iter().rev() {
                match remove_tree(&group.root) {
                    Ok(()) => {}
                    Err(e) if e.raw_os_error() == Some(libc::EBUSY) => still_busy = true,
                    Err(e) => return Err(CgroupError::io(&group.root, "remove")(e)),
                }
                if still_busy {
                    break;
                }
            }
            if !still_busy {
                return Ok(());
            }
            if !self.wait_for_processes(deadline) || Instant::now() >= deadline {
                return Err(self.busy());
            }
        }
    }

    /// False when the deadline comes before the end of the processes that are in the group now.
    fn wait_for_processes(&self, deadline: Instant) -> bool {
        let pids = self.processes();
        if pids.is_empty() {
            // The last one has ended, and the kernel is about to notice; it tells nobody when.
            thread::sleep(REMOVE_PAUSE);
        }
        pids.into_iter().all(|pid| match PidFd::open(pid) {
            Ok(process) => process.wait(deadline).unwrap_or(false),
            Err(_) => true,
        })
    }

    fn busy(&self) -> CgroupError {
        let mut pids: Vec<u32> = self.processes().into_iter().collect();
        pids.sort_unstable();
        let path = self
            .groups
            .first()
            .map(|g| g.root.clone())
            .unwrap_or_default();
        CgroupError::Busy { path, pids }
    }
}

/// Removes one group of one hierarchy, as [`PodCgroup::remove`] does.
///
/// # Errors
/// [`CgroupError::Busy`], and the group is left.
pub fn remove_group(path: &Path, patience: Duration) -> Result<(), CgroupError> {
    let groups = vec![Hierarchy {
        root: path.to_owned(),
        kind: Kind::V1,
    }];
    PodCgroup { groups }.remove(patience)
}

/// Makes a group and the `levels` - 1 groups above it that may be missing.
fn make(group: &Hierarchy, levels: usize) -> Result<(), CgroupError> {
    let mut path: Vec<&Path> = group.root.ancestors().take(levels).collect();
    path.reverse();
    for level in path {
        if group.kind == Kind::Unified
            && let Some(above) = level.parent()
        {
            delegate_controllers(above);
        }
        match fs::create_dir(level) {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
            made => made.map_err(CgroupError::io(level, "make"))?,
        }
        if group.kind == Kind::V1Cpuset {
            inherit_cpuset(level)?;
        }
    }
    Ok(())
}

/// Gives the group's children the controllers it has, as far as it can: the limits that count are
/// on the parent, which the kubelet has set up; the leaf's own controllers are for its statistics.
/// A parent with processes of its own cannot (the rule of no internal processes).
fn delegate_controllers(group: &Path) {
    let Ok(available) = fs::read_to_string(group.join("cgroup.controllers")) else {
        return;
    };
    let control = group.join("cgroup.subtree_control");
    let enabled = fs::read_to_string(&control).unwrap_or_default();
    let enabled: HashSet<&str> = enabled.split_whitespace().collect();
    for controller in available
        .split_whitespace()
        .filter(|c| !enabled.contains(c))
    {
        if let Err(error) = fs::write(&control, format!("+{controller}")) {
            tracing::debug!(group = %group.display(), controller, %error, "controller not delegated");
        }
    }
}

/// A new group of cpuset v1 has no CPUs and no memory nodes, and takes no process until it has.
fn inherit_cpuset(group: &Path) -> Result<(), CgroupError> {
    for name in ["cpuset.cpus", "cpuset.mems"] {
        let file = group.join(name);
        let own = fs::read_to_string(&file).map_err(CgroupError::io(&file, "read"))?;
        if !own.trim().is_empty() {
            continue;
        }
        let above = group.parent().unwrap_or(group).join(name);
        let inherited = fs::read_to_string(&above).map_err(CgroupError::io(&above, "read"))?;
        fs::write(&file, inherited.trim()).map_err(CgroupError::io(&file, "write"))?;
    }
    Ok(())
}

fn collect_processes(group: &Path, pids: &mut HashSet<u32>) {
    let procs = fs::read_to_string(group.join("cgroup.procs")).unwrap_or_default();
    pids.extend(procs.lines().filter_map(|line| line.parse::<u32>().ok()));
    for child in children(group) {
        collect_processes(&child, pids);
    }
}

/// Removes a group after those below it; one that does not exist is fine.
fn remove_tree(group: &Path) -> io::Result<()> {
    for child in children(group) {
        remove_tree(&child)?;
    }
    match fs::remove_dir(group) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

fn children(group: &Path) -> Vec<PathBuf> {
    fs::read_dir(group)
        .into_iter()
        .flatten()
        .flatten()
        .filter(|entry| entry.file_type().is_ok_and(|t| t.is_dir()))
        .map(|entry| entry.path())
        .collect()
}

#[cfg(test)]
mod tests;
