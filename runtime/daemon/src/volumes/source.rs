//! The host's side of a volume: a file or a directory, opened once, and a mount of it.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::fcntl::{OFlag, open};
use nix::sys::stat::{Mode, SFlag, fstat};
use podvisor_node::mountinfo;
use tonic::Code;

use super::{Propagation, Volume, mount};
use crate::error::{Error, Result};

/// What a volume's host path led to.
#[derive(Debug)]
pub struct Source {
    /// A mount of it that is nowhere yet.
    pub tree: OwnedFd,
    /// Or else a file, a socket, a device …
    pub is_directory: bool,
    /// For a volume that is read-only by itself alone: the mounts below it, which are not. Relative to it.
    pub writable_below: Vec<PathBuf>,
}

impl Source {
    /// Opens a volume's host path. Blocking.
    ///
    /// # Errors
    /// FAILED_PRECONDITION: there is nothing, or it cannot be mounted.
    pub fn open(volume: &Volume) -> Result<Self> {
        Self::try_open(volume).map_err(|error| Error::Element {
            list: "mounts",
            index: volume.index,
            field: "host_path",
            problem: format!("{}: {error}", volume.host_path.display()),
            code: Code::FailedPrecondition,
        })
    }

    fn try_open(volume: &Volume) -> io::Result<Self> {
        let flags = OFlag::O_PATH | OFlag::O_CLOEXEC;
        let place = open(&volume.host_path, flags, Mode::empty())?;
        let kind = SFlag::from_bits_truncate(fstat(&place)?.st_mode) & SFlag::S_IFMT;
        let tree = mount::clone(place.as_fd())?;
        let propagation = if volume.propagation == Propagation::Private {
            libc::MS_PRIVATE
        } else {
            libc::MS_SLAVE
        };
        mount::set(tree.as_fd(), 0, propagation, true)?;
        if volume.read_only {
            mount::set(tree.as_fd(), libc::MOUNT_ATTR_RDONLY, 0, volume.recursive)?;
        }
        if let Some(ids) = &volume.ids {
            ids.apply(tree.as_fd())
                .map_err(|error| io::Error::other(format!("cannot map ids: {error}")))?;
        }
        let writable_below = if volume.read_only && !volume.recursive {
            mounts_below(&std::fs::read_link(format!(
                "/proc/self/fd/{}",
                place.as_raw_fd()
            ))?)?
        } else {
            Vec::new()
        };
        Ok(Self {
            tree,
            is_directory: kind == SFlag::S_IFDIR,
            writable_below,
        })
    }
}

/// Mounts below `path`, relative to it.
fn mounts_below(path: &Path) -> io::Result<Vec<PathBuf>> {
    let mut below: Vec<PathBuf> = mountinfo::read()?
        .into_iter()
        .filter_map(|mount| Some(mount.point.strip_prefix(path).ok()?.to_owned()))
        .filter(|below| !below.as_os_str().is_empty())
        .collect();
    below.sort();
    below.dedup();
    Ok(below)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn volume(path: &Path) -> Volume {
        Volume {
            index: 4,
            container_path: "/x".into(),
            host_path: path.to_owned(),
            read_only: true,
            recursive: false,
            propagation: Propagation::Private,
            ids: None,
        }
    }

    #[test]
    fn a_missing_path_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let error = Source::open(&volume(&dir.path().join("missing"))).unwrap_err();
        assert_eq!(error.code(), Code::FailedPrecondition);
        let message = error.to_string();
        assert!(
            message.starts_with("config.mounts[4].host_path: "),
            "{message}"
        );
    }

    #[test]
    fn links_are_followed() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("file"), "x").unwrap();
        std::os::unix::fs::symlink("file", dir.path().join("link")).unwrap();
        let source = Source::open(&volume(&dir.path().join("link"))).unwrap();
        assert!(!source.is_directory);
        assert!(Source::open(&volume(dir.path())).unwrap().is_directory);
    }
}
