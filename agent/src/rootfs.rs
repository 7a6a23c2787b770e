//! A container's root: image layers below, a writable directory of the scratch area above, joined by
//! overlayfs (Documentation/filesystems/overlayfs.rst).

use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::mount::{MntFlags, umount2};

use crate::mount::{FileSystem, MountError};

/// Overlayfs takes this many lower layers (`OVL_MAX_STACK`).
const LAYER_LIMIT: usize = 500;

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

/// The directories of one container's root.
pub struct Rootfs {
    target: PathBuf,
    scratch: PathBuf,
}

impl Rootfs {
    /// `target`: where it is mounted. `scratch`: a directory of its own on the scratch area.
    pub fn new(target: PathBuf, scratch: PathBuf) -> Self {
        Self { target, scratch }
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
        let upper = self.scratch.join("upper");
        let work = self.scratch.join("work");
        // Overlayfs wants a layer below; that of an image without layers is empty.
        let empty = self.scratch.join("empty");
        for directory in [&self.target, &upper, &work, &empty] {
            std::fs::create_dir_all(directory)?;
        }
        let overlay = FileSystem::open(c"overlay")?;
        let set = |key, path: &Path| overlay.set(key, path.as_os_str().as_bytes());
        let empty = [empty];
        let lowest_first = if layers.is_empty() { &empty } else { layers };
        // "lowerdir+" adds below what is there, one path a time: no limit of one page for all.
        for layer in lowest_first.iter().rev() {
            set(c"lowerdir+", layer)?;
        }
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
