//! A container's root: image layers below, a writable directory of the scratch area above, joined by
//! overlayfs (Documentation/filesystems/overlayfs.rst).

use std::fs::File;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::chown;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::mount::{MntFlags, umount2};

use crate::mount::{FileSystem, MountError};

/// Overlayfs takes this many lower layers (`OVL_MAX_STACK`), and the lowest is ours.
const LAYER_LIMIT: usize = 499;
/// The lowest layer: places for what every container has mounted. An image that lacks them would have
/// them made in the writable layer, for which overlayfs first copies their directories up.
const LOWEST: &str = "/run/podvisor/lowest";
const DIRECTORIES: [&str; 4] = ["dev", "etc", "proc", "sys"];
const FILES: [&str; 3] = ["etc/hostname", "etc/hosts", "etc/resolv.conf"];

/// Why a root is not there.
#[derive(Debug, thiserror::Error)]
pub enum RootfsError {
    /// See [`LAYER_LIMIT`].
    #[error("{0} layers: overlayfs takes at most {LAYER_LIMIT}")]
    TooManyLayers(usize),
    /// The kernel refused.
    #[error("cannot mount the root file system: {0}")]
    Mount(#[from] MountError),
    /// Directories for it.
    #[error("cannot prepare the root file system: {0}")]
    Prepare(#[from] io::Error),
}

/// Makes the layer that is below all others, whose files are those of user and group `root`.
pub fn make_lowest_layer(root: u32) -> io::Result<()> {
    let layer = Path::new(LOWEST);
    for directory in DIRECTORIES {
        std::fs::create_dir_all(layer.join(directory))?;
    }
    for file in FILES {
        File::create(layer.join(file))?;
    }
    for name in DIRECTORIES.iter().chain(&FILES) {
        chown(layer.join(name), Some(root), Some(root))?;
    }
    Ok(())
}

/// Where the writable layer is in a container's directory of the scratch area.
pub fn upper(scratch: &Path) -> PathBuf {
    scratch.join("upper")
}

/// The directories of one container's root.
pub struct Rootfs {
    target: PathBuf,
    scratch: PathBuf,
    owner: u32,
}

impl Rootfs {
    /// `target`: where it is mounted. `scratch`: a directory of its own on the scratch area. `owner`: user and group
    /// of the root directory.
    pub fn new(target: PathBuf, scratch: PathBuf, owner: u32) -> Self {
        Self {
            target,
            scratch,
            owner,
        }
    }

    /// Where the root is mounted.
    pub fn path(&self) -> &Path {
        &self.target
    }

    /// Mounts `layers` (lowest first) and the writable layer. When this fails, nothing stays.
    pub fn mount(&self, layers: &[PathBuf]) -> Result<(), RootfsError> {
        if layers.len() > LAYER_LIMIT {
            return Err(RootfsError::TooManyLayers(layers.len()));
        }
        self.try_mount(layers).inspect_err(|_| {
            let _ = self.remove();
        })
    }

    fn try_mount(&self, layers: &[PathBuf]) -> Result<(), RootfsError> {
        let upper = upper(&self.scratch);
        let work = self.scratch.join("work");
        for directory in [&self.target, &upper, &work] {
            std::fs::create_dir_all(directory)?;
        }
        chown(&upper, Some(self.owner), Some(self.owner))?;
        let overlay = FileSystem::open(c"overlay")?;
        let set = |key, path: &Path| overlay.set(key, path.as_os_str().as_bytes());
        // "lowerdir+" adds below what is there, one path a time: no limit of one page for all.
        for layer in layers.iter().rev() {
            set(c"lowerdir+", layer)?;
        }
        set(c"lowerdir+", Path::new(LOWEST))?;
        set(c"upperdir", &upper)?;
        set(c"workdir", &work)?;
        // The upper layer ends with the pod: its fsyncs would protect what nobody will read.
        overlay.set_flag(c"volatile")?;
        Ok(overlay.mount(0)?.attach_at(&self.target)?)
    }

    /// Unmounts it and deletes the writable layer. What is not there is not an error.
    ///
    /// # Errors
    /// It is still in use, or a deletion failed.
    pub fn remove(&self) -> io::Result<()> {
        match umount2(&self.target, MntFlags::UMOUNT_NOFOLLOW) {
            Ok(()) | Err(Errno::EINVAL | Errno::ENOENT) => {}
            Err(error) => return Err(error.into()),
        }
        for directory in [&self.target, &self.scratch] {
            match std::fs::remove_dir_all(directory) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }
}
