//! Root file systems on the host: an image's layers, the same EROFS files that VMs have on their disks, each
//! mounted once, under an overlay.

use std::collections::HashSet;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use nix::mount::MsFlags;

use crate::mount::{erofs, is_erofs, mount, remove_dir, unmount};

/// Before a diff id's digits in the name of its mount.
const PREFIX: &str = "layer-";

/// A layer of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layer {
    /// Its identity, `sha256:…`.
    pub diff_id: String,
    /// Its EROFS file.
    pub image: PathBuf,
}

/// The mounts of layers, all in one folder. They are there as long as a container needs them, also when no process of
/// ours is.
#[derive(Debug)]
pub struct Layers {
    dir: PathBuf,
    /// One change at a time.
    changing: Mutex<()>,
}

impl Layers {
    /// Mounts are in `dir`, which is made with the first. Only root gets there: images have set-uid programs.
    pub fn new(dir: PathBuf) -> Self {
        Self {
            dir,
            changing: Mutex::default(),
        }
    }

    /// Mounts `layers`, lowest first, under a writable layer in the folder `writable`, at `target`. Both are made.
    ///
    /// # Errors
    /// The kernel refuses. The overlay is not there then.
    pub fn mount_overlay(
        &self,
        layers: &[Layer],
        writable: &Path,
        target: &Path,
    ) -> io::Result<()> {
        let (upper, work) = (writable.join("upper"), writable.join("work"));
        for dir in [&upper, &work] {
            fs::create_dir_all(dir)?;
        }
        fs::create_dir_all(target)?;
        let _one = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        let lower = self.open(layers, writable)?;
        let (upper, work) = (open_path(&upper)?, open_path(&work)?);
        let options = format!(
            "lowerdir={},upperdir={},workdir={}",
            lowest_last(&lower),
            by_descriptor(&upper),
            by_descriptor(&work),
        );
        mount(
            Path::new("overlay"),
            target,
            "overlay",
            MsFlags::empty(),
            &options,
        )
    }

    /// Mounts `layers`, lowest first, read-only, at `target`, which is made.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn mount_read_only(&self, layers: &[Layer], target: &Path) -> io::Result<()> {
        fs::create_dir_all(target)?;
        let _one = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        let lower = self.open(layers, target)?;
        if let [only] = lower.as_slice() {
            return mount(
                Path::new(&by_descriptor(only)),
                target,
                "",
                MsFlags::MS_BIND,
                "",
            );
        }
        let options = format!("lowerdir={}", lowest_last(&lower));
        mount(
            Path::new("overlay"),
            target,
            "overlay",
            MsFlags::MS_RDONLY,
            &options,
        )
    }

    /// Takes the mounts of all layers away but those `in_use`, by diff id.
    ///
    /// # Errors
    /// The first failure, after all have been tried.
    pub fn keep(&self, in_use: &HashSet<String>) -> io::Result<()> {
        let _one = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        let entries = match fs::read_dir(&self.dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            entries => entries?,
        };
        let used: HashSet<PathBuf> = in_use.iter().map(|id| self.path(id)).collect();
        let mut result = Ok(());
        for entry in entries {
            let path = entry?.path();
            if !used.contains(&path) {
                result = result.and(unmount(&path).and_then(|()| remove_dir(&path)));
            }
        }
        result
    }

    /// The layers' folders, mounted; `empty` is one without anything, should there be no layer.
    fn open(&self, layers: &[Layer], empty: &Path) -> io::Result<Vec<File>> {
        if layers.is_empty() {
            let nothing = empty.join("nothing");
            fs::create_dir_all(&nothing)?;
            return Ok(vec![open_path(&nothing)?]);
        }
        layers
            .iter()
            .map(|layer| {
                let path = self.path(&layer.diff_id);
                if !is_erofs(&path) {
                    DirBuilder::new()
                        .recursive(true)
                        .mode(0o700)
                        .create(&self.dir)?;
                    fs::create_dir_all(&path)?;
                    erofs(&layer.image, &path)?;
                }
                open_path(&path)
            })
            .collect()
    }

    fn path(&self, diff_id: &str) -> PathBuf {
        let digits = diff_id.rsplit(':').next().unwrap_or(diff_id);
        self.dir.join(format!("{PREFIX}{digits}"))
    }
}

fn open_path(path: &Path) -> io::Result<File> {
    let flags = libc::O_PATH | libc::O_DIRECTORY;
    OpenOptions::new().read(true).custom_flags(flags).open(path)
}

/// Short, whatever the path: a mount's options hold 4096 bytes (mount(2)), an image may have 127 layers. Without
/// characters that mean something there.
fn by_descriptor(dir: &File) -> String {
    format!("/proc/self/fd/{}", dir.as_raw_fd())
}

/// As overlayfs names lower layers: the highest first.
fn lowest_last(layers: &[File]) -> String {
    let paths: Vec<_> = layers.iter().rev().map(by_descriptor).collect();
    paths.join(":")
}
