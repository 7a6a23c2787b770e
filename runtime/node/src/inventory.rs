//! What this instance of podvisor has on the host: found by its names, not by memory, so that
//! what a crash left is found as well as what runs.
//!
//! Every resource is named after its sandbox (docs/architecture.md); a reconcile compares what is
//! here with the sandboxes it knows, and removes the rest. Several instances share a host: files
//! are told apart by the folders they are in, processes by folders on their command lines or by
//! their cgroup, cgroups by [`instance_tag`].
//!
//! - `processes`: which processes are a pod's.
//! - `remove`: how each kind is removed.
//!
//! Not here, because nothing on the host names a sandbox for it: a pod's tap and veth, which end
//! with the namespace, and a namespace without its file, which ends with the process that holds
//! its tap.

mod processes;
mod remove;

use std::ffi::OsStr;
use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::cgroup::hierarchy::{self, Hierarchy};
use crate::mountinfo;

pub use remove::{RemoveError, remove_folder};

/// An instance's folders.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Places {
    /// `--run-dir`.
    pub run_dir: PathBuf,
    /// `--data-dir`.
    pub data_dir: PathBuf,
    /// Records of network attachments.
    pub cni_cache_dir: PathBuf,
}

/// Kinds of resources, in the order in which they can be removed.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// A monitor, a VMM, or anything else in a pod's cgroup.
    Process {
        /// Its number.
        pid: u32,
        /// [`crate::pidfd::start_time`]: the number may be another process's by the time it is
        /// used.
        start_time: u64,
    },
    /// A pod's group, in any hierarchy.
    Cgroup,
    /// Something mounted in a sandbox's folder.
    Mount,
    /// A network attachment: DEL has not been run, or not with success.
    NetworkAttachment,
    /// A network namespace's file.
    Netns,
    /// A sandbox's folder with its sockets and its monitor's state.
    Folder,
    /// A pod's writable disk, or the folder of its writable layers.
    Scratch,
    /// What an interrupted write has left.
    TemporaryFile,
}

/// One resource.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resource {
    /// What it is.
    pub kind: Kind,
    /// Whose. Empty for temporary files of no sandbox.
    pub sandbox_id: String,
    /// Where; for a process, its executable's name and arguments as far as they matter.
    pub path: PathBuf,
}

impl fmt::Display for Resource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match &self.kind {
            Kind::Process { pid, .. } => {
                return write!(f, "process {pid}: {}", self.path.display());
            }
            Kind::Cgroup => "cgroup",
            Kind::Mount => "mount",
            Kind::NetworkAttachment => "network attachment",
            Kind::Netns => "network namespace",
            Kind::Folder => "folder",
            Kind::Scratch => "scratch disk",
            Kind::TemporaryFile => "temporary file",
        };
        write!(f, "{kind} {}", self.path.display())
    }
}

/// Tells the instances on a host apart where a name is all there is: eight hex digits, the same
/// for the same run folder for ever (32 bit FNV-1a of its canonical path).
pub fn instance_tag(run_dir: &Path) -> String {
    let canonical = fs::canonicalize(run_dir).unwrap_or_else(|_| run_dir.to_owned());
    let bytes = canonical.as_os_str().as_encoded_bytes();
    let hash = bytes.iter().fold(0x811c_9dc5_u32, |hash, byte| {
        (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193)
    });
    format!("{hash:08x}")
}

/// Name of a pod's cgroup below its parent.
pub fn cgroup_leaf(run_dir: &Path, sandbox_id: &str) -> String {
    format!("podvisor-{}-{sandbox_id}", instance_tag(run_dir))
}

/// All resources of all the instance's sandboxes, in the order in which they can be removed.
/// Reads /proc, /sys and a few folders; a few ms.
///
/// # Errors
/// One of these cannot be read. Folders that do not exist are empty.
pub fn scan(places: &Places) -> io::Result<Vec<Resource>> {
    let run_dir = canonical(&places.run_dir);
    let data_dir = canonical(&places.data_dir);
    let cgroups = cgroups(&instance_tag(&run_dir))?;

    let mut found = processes::scan(&[&run_dir, &places.run_dir], &cgroups)?;
    found.extend(mounts(&run_dir, &data_dir)?);
    found.extend(cgroups);
    let in_folder = |kind, dir: PathBuf, suffix| files(kind, &dir, "", suffix);
    found.extend(in_folder(Kind::Netns, run_dir.join("netns"), "")?);
    found.extend(in_folder(Kind::Folder, run_dir.join("sandboxes"), "")?);
    found.extend(in_folder(Kind::Scratch, data_dir.join("scratch"), ".img")?);
    found.extend(in_folder(Kind::Scratch, data_dir.join("scratch"), "")?);
    found.extend(files(
        Kind::NetworkAttachment,
        &places.cni_cache_dir,
        "",
        ".json",
    )?);
    found.extend(files(
        Kind::TemporaryFile,
        &places.cni_cache_dir,
        ".",
        ".tmp",
    )?);
    found.extend(temporary_files(&data_dir.join("images").join("tmp"))?);
    // Stable: mounts stay in their order, the inner ones first.
    found.sort_by_key(|resource| match resource.kind {
        // All processes are one kind.
        Kind::Process { .. } => Kind::Process {
            pid: 0,
            start_time: 0,
        },
        ref other => other.clone(),
    });
    Ok(found)
}

/// Removes a resource; one that is gone already is fine. Blocking: up to a few seconds for a
/// process or a cgroup that does not end.
///
/// # Errors
/// It is still there. Network attachments are only removed by [`podvisor_network::Cni::del`].
pub fn remove(resource: &Resource) -> Result<(), RemoveError> {
    remove::remove(resource)
}

/// The id at the beginning of a name: 64 lower-case hex digits.
fn sandbox_id(name: &str) -> Option<&str> {
    let id = name.get(..64)?;
    let hex = id
        .bytes()
        .all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
    hex.then_some(id)
}

fn canonical(dir: &Path) -> PathBuf {
    fs::canonicalize(dir).unwrap_or_else(|_| dir.to_owned())
}

/// Entries of a folder that are named `<prefix><id><suffix>`.
fn files(kind: Kind, dir: &Path, prefix: &str, suffix: &str) -> io::Result<Vec<Resource>> {
    let named = |name: &OsStr| -> Option<String> {
        let id = name.to_str()?.strip_prefix(prefix)?.strip_suffix(suffix)?;
        (id.len() == 64)
            .then(|| sandbox_id(id).map(str::to_owned))
            .flatten()
    };
    let entries = entries(dir)?.into_iter();
    let found = entries.filter_map(|path| {
        Some(Resource {
            kind: kind.clone(),
            sandbox_id: named(path.file_name()?)?,
            path,
        })
    });
    Ok(found.collect())
}

fn temporary_files(dir: &Path) -> io::Result<Vec<Resource>> {
    let resource = |path| Resource {
        kind: Kind::TemporaryFile,
        sandbox_id: String::new(),
        path,
    };
    Ok(entries(dir)?.into_iter().map(resource).collect())
}

/// A folder's entries by name; none when there is no such folder.
fn entries(dir: &Path) -> io::Result<Vec<PathBuf>> {
    let mut paths = match fs::read_dir(dir) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?
            .map(|entry| entry.map(|e| e.path()))
            .collect::<io::Result<Vec<_>>>()?,
    };
    paths.sort();
    Ok(paths)
}

/// Mounts below the instance's folders that belong to a sandbox, the inner ones first. A namespace
/// is one too, but it goes with its file.
fn mounts(run_dir: &Path, data_dir: &Path) -> io::Result<Vec<Resource>> {
    let namespaces = run_dir.join("netns");
    let mut found: Vec<Resource> = mountinfo::read()?
        .into_iter()
        .filter(|mount| !mount.point.starts_with(&namespaces))
        .filter_map(|mount| {
            let dir = [run_dir, data_dir]
                .into_iter()
                .find(|dir| mount.point.starts_with(dir))?;
            let mut below = mount.point.strip_prefix(dir).ok()?.components();
            let id = below
                .find_map(|part| sandbox_id(part.as_os_str().to_str()?))?
                .to_owned();
            Some(Resource {
                kind: Kind::Mount,
                sandbox_id: id,
                path: mount.point,
            })
        })
        .collect();
    found.reverse();
    Ok(found)
}

/// The instance's pod groups in every hierarchy.
///
/// Only the first hierarchy is searched whole: a group is made there first and removed there last
/// (see [`crate::cgroup`]).
fn cgroups(tag: &str) -> io::Result<Vec<Resource>> {
    let hierarchies = match hierarchy::mounted() {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        hierarchies => hierarchies?,
    };
    let prefix = format!("podvisor-{tag}-");
    let mut found = Vec::new();
    if let Some((index, others)) = hierarchies.split_first() {
        find_leaves(index, &index.root, &prefix, others, &mut found);
    }
    Ok(found)
}

fn find_leaves(
    index: &Hierarchy,
    dir: &Path,
    prefix: &str,
    others: &[Hierarchy],
    found: &mut Vec<Resource>,
) {
    // A group that goes away while it is looked at is no error.
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        if !entry.file_type().is_ok_and(|t| t.is_dir()) {
            continue;
        }
        let path = entry.path();
        let name = entry.file_name();
        let id = name
            .to_str()
            .and_then(|n| n.strip_prefix(prefix))
            .and_then(sandbox_id);
        let Some(id) = id else {
            find_leaves(index, &path, prefix, others, found);
            continue;
        };
        // What is below a leaf goes with it.
        let below = path.strip_prefix(&index.root).unwrap_or(Path::new(""));
        let elsewhere = others
            .iter()
            .map(|h| h.root.join(below))
            .filter(|p| p.exists());
        found.extend(elsewhere.chain([path.clone()]).map(|path| Resource {
            kind: Kind::Cgroup,
            sandbox_id: id.to_owned(),
            path,
        }));
    }
}

#[cfg(test)]
mod tests;
