//! Blobs of which the first part is there: what a pull had received before it failed, or before podvisord was killed. The
//! next pull of the blob goes on from that byte.
//!
//! Nothing vouches for these files: what they hold is read as if it came from a registry, and checked with the rest.

use std::fs::{self, File, TryLockError};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use nix::sys::statvfs::statvfs;
use tracing::debug;

use super::{Inner, unlink_later};
use crate::registry::manifest::Descriptor;

/// Room that there must be for a file of these, as a multiple of its blob: the layer itself is larger.
const ROOM: u64 = 8;

/// The first part of a blob. Gone when dropped, unless it is [kept](Partial::keep).
pub(crate) struct Partial {
    /// Locked, so that one pull alone writes it.
    file: File,
    path: PathBuf,
    is_kept: bool,
}

impl Partial {
    /// For whoever reads what is there and writes what comes.
    pub(crate) fn file(&self) -> io::Result<File> {
        self.file.try_clone()
    }

    /// Bytes of the blob that are there.
    pub(crate) fn length(&self) -> u64 {
        self.file.metadata().map_or(0, |metadata| metadata.len())
    }

    /// Takes all bytes away: they are not the blob's.
    pub(crate) fn clear(&self) -> io::Result<()> {
        self.file.set_len(0)
    }

    /// Leaves the file to the next pull.
    pub(crate) fn keep(mut self) {
        self.is_kept = true;
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        if !self.is_kept {
            unlink_later(Some(std::mem::take(&mut self.path)));
        }
    }
}

impl Inner {
    /// What is there of `blob`, or a file for it. None for blobs that are soon fetched again, when the disk has little room,
    /// and while another pull has it. Blocks.
    pub(crate) fn partial(&self, blob: &Descriptor) -> Option<Partial> {
        if blob.size < self.limits.min_resumed_bytes {
            return None;
        }
        let path = self.partial_dir.join(blob.digest.hex());
        let opened = self
            .has_room(blob.size)
            .and_then(|has_room| if has_room { lock(&path) } else { Ok(None) });
        let file = opened.unwrap_or_else(|error| {
            debug!(path = %path.display(), %error, "cannot keep a part of a blob");
            None
        })?;
        let partial = Partial {
            file,
            path,
            is_kept: false,
        };
        if partial.length() > blob.size {
            partial.clear().ok()?;
        }
        Some(partial)
    }

    fn has_room(&self, bytes: u64) -> io::Result<bool> {
        let disk = statvfs(&self.partial_dir)?;
        let free = disk.blocks_available().saturating_mul(disk.fragment_size());
        Ok(free / ROOM >= bytes)
    }

    /// Removes those to which nothing has come for [`Limits::resumable_for`](crate::Limits::resumable_for). Blocks.
    pub(crate) fn expire_partials(&self) {
        let entries = fs::read_dir(&self.partial_dir).into_iter().flatten();
        for path in entries.flatten().map(|entry| entry.path()) {
            let modified = fs::metadata(&path).and_then(|metadata| metadata.modified());
            let is_old = modified.is_ok_and(|time| age(time) > self.limits.resumable_for);
            // One that is locked is in use, however old.
            if is_old && let Ok(Some(_lock)) = lock(&path) {
                super::remove_file(&path);
            }
        }
    }
}

fn age(time: SystemTime) -> Duration {
    // In the future: the clock was set back, and that file is as good as new.
    SystemTime::now().duration_since(time).unwrap_or_default()
}

/// Opens and locks the file at `path`, made if need be. None: another has it.
fn lock(path: &Path) -> io::Result<Option<File>> {
    let file = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)?;
    match file.try_lock() {
        // Whoever had it meanwhile may have removed it.
        Ok(()) => Ok((file.metadata()?.nlink() > 0).then_some(file)),
        Err(TryLockError::WouldBlock) => Ok(None),
        Err(TryLockError::Error(error)) => Err(error),
    }
}
