//! The cgroup hierarchies of a host, and where a pod's parent is in them.

use std::io;
use std::path::{Path, PathBuf};

use crate::mountinfo::{self, Mount};

/// One mounted hierarchy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hierarchy {
    /// The mount point.
    pub root: PathBuf,
    /// Which kind.
    pub kind: Kind,
}

impl Hierarchy {
    /// A group below this one, as if it were a hierarchy.
    pub fn child(&self, below: impl AsRef<Path>) -> Self {
        Self {
            root: self.root.join(below),
            kind: self.kind,
        }
    }
}

/// Kinds of hierarchies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// Version 2, with or without controllers (hybrid hosts).
    Unified,
    /// Version 1.
    V1,
    /// Version 1 with the cpuset controller: a new group holds no process until it is given CPUs.
    V1Cpuset,
}

/// The host's hierarchies, each once. The first one is the index: a pod's group is made there
/// first and removed there last, so that a group anywhere has one there.
///
/// # Errors
/// No /proc, or no hierarchy at all.
pub fn mounted() -> io::Result<Vec<Hierarchy>> {
    let hierarchies = of_mounts(&mountinfo::read()?);
    if hierarchies.is_empty() {
        return Err(io::Error::new(
            io::ErrorKind::NotFound,
            "no cgroup file system is mounted",
        ));
    }
    Ok(hierarchies)
}

fn of_mounts(mounts: &[Mount]) -> Vec<Hierarchy> {
    let mut seen = Vec::new();
    let mut hierarchies = Vec::new();
    for mount in mounts {
        let has = |option: &str| mount.super_options.iter().any(|o| o == option);
        let kind = match mount.fs_type.as_str() {
            "cgroup2" => Kind::Unified,
            "cgroup" if has("cpuset") => Kind::V1Cpuset,
            "cgroup" => Kind::V1,
            _ => continue,
        };
        // A part of a hierarchy, bound somewhere for a container, is not the hierarchy.
        if mount.root != Path::new("/") || seen.contains(&&mount.device) {
            continue;
        }
        seen.push(&mount.device);
        hierarchies.push(Hierarchy {
            root: mount.point.clone(),
            kind,
        });
    }
    // Stable: the rest stays in the order of mounting.
    hierarchies.sort_by_key(|h| h.kind);
    hierarchies
}

/// Where `cgroup_parent` of a pod is, from a hierarchy's root.
///
/// With the systemd driver a kubelet names a slice, `kubepods-burstable-podX.slice`, which systemd
/// nests by its hyphens (systemd.slice(5)); everything else is a path.
///
/// # Errors
/// What is wrong with it.
pub fn parent_path(parent: &str) -> Result<PathBuf, String> {
    let path = parent.trim_matches('/');
    if path
        .split('/')
        .any(|part| part == ".." || part == "." || part.contains('\0'))
    {
        return Err(format!("cgroup parent {parent:?} is not a plain path"));
    }
    if !path.contains('/')
        && let Some(slice) = path.strip_suffix(".slice")
    {
        return slice_path(slice).ok_or_else(|| format!("{parent:?} is not the name of a slice"));
    }
    Ok(path.split('/').filter(|part| !part.is_empty()).collect())
}

fn slice_path(slice: &str) -> Option<PathBuf> {
    // The root slice.
    if slice == "-" {
        return Some(PathBuf::new());
    }
    let mut path = PathBuf::new();
    let mut prefix = String::new();
    for part in slice.split('-') {
        if part.is_empty() {
            return None;
        }
        prefix.push_str(part);
        path.push(format!("{prefix}.slice"));
        prefix.push('-');
    }
    Some(path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn mount(device: &str, root: &str, point: &str, fs_type: &str, options: &str) -> Mount {
        Mount {
            is_shared: false,
            device: device.into(),
            root: root.into(),
            point: point.into(),
            fs_type: fs_type.into(),
            super_options: options.split(',').map(str::to_owned).collect(),
        }
    }

    #[test]
    fn hybrid_hosts() {
        let found = of_mounts(&[
            mount("0:1", "/", "/proc", "proc", "rw"),
            mount("0:2", "/", "/cg/cpu,cpuacct", "cgroup", "rw,cpu,cpuacct"),
            mount("0:3", "/", "/cg/cpuset", "cgroup", "rw,cpuset"),
            mount("0:2", "/", "/elsewhere/cpu", "cgroup", "rw,cpu,cpuacct"),
            mount("0:4", "/pod1", "/container", "cgroup", "rw,memory"),
            mount("0:5", "/", "/cg/unified", "cgroup2", "rw"),
        ]);
        let shown: Vec<_> = found
            .iter()
            .map(|h| (h.root.to_str().unwrap(), h.kind))
            .collect();
        assert_eq!(
            shown,
            [
                ("/cg/unified", Kind::Unified),
                ("/cg/cpu,cpuacct", Kind::V1),
                ("/cg/cpuset", Kind::V1Cpuset),
            ]
        );
    }

    #[test]
    fn parents() {
        let path = |parent: &str| parent_path(parent).map(|p| p.to_str().unwrap().to_owned());
        for (parent, expected) in [
            ("/kubepods/burstable/pod1-2", "kubepods/burstable/pod1-2"),
            ("podvisor", "podvisor"),
            ("/", ""),
            ("", ""),
            ("//a//b/", "a/b"),
            ("-.slice", ""),
            ("system.slice", "system.slice"),
            ("/system.slice", "system.slice"),
            (
                "kubepods-burstable-pod1_2.slice",
                "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1_2.slice",
            ),
            (
                "/kubepods.slice/kubepods-pod1.slice",
                "kubepods.slice/kubepods-pod1.slice",
            ),
        ] {
            assert_eq!(path(parent).as_deref(), Ok(expected), "{parent}");
        }
        for bad in [
            "/a/../b",
            "..",
            "a/./b",
            "a--b.slice",
            "-a.slice",
            ".slice",
            "a\0",
        ] {
            assert!(path(bad).is_err(), "{bad:?}");
        }
    }

    proptest! {
        #[test]
        fn parents_stay_below_the_root(parent: String) {
            if let Ok(path) = parent_path(&parent) {
                prop_assert!(path.is_relative());
                prop_assert!(path.components().all(|c| matches!(c, std::path::Component::Normal(_))));
            }
        }
    }
}
