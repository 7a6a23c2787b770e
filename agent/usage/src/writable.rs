//! The size of writable layers: blocks and inodes of all that is in a directory.
//!
//! It is found by looking at each file, so it is not done for each sample: not while the file system says that nothing
//! was taken or given back since (`statvfs`, which costs nothing), and never for more than a hundredth of the time.
//! Quotas by project would tell it at once; the guest's kernel has none.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::dir::Dir;
use nix::fcntl::{AtFlags, OFlag, OpenHow, ResolveFlag, openat2};
use nix::sys::stat::{FileStat, Mode, SFlag, fstatat};
use nix::sys::statvfs::statvfs;
use podvisor_proto::agent::{FileSystemSample, WritableLayer};

/// A measurement is followed by a pause that many times as long.
const PAUSE: u32 = 100;

/// What is known of the writable layers of a pod.
#[derive(Debug, Default)]
pub struct WritableLayers(Mutex<Known>);

#[derive(Debug, Default)]
struct Known {
    layers: HashMap<String, WritableLayer>,
    /// Free blocks and inodes before they were measured.
    free: Option<(u64, u64)>,
    /// Somebody measures now.
    is_busy: bool,
    not_before: Option<Instant>,
}

impl WritableLayers {
    /// The size of a container's layer, as it was measured last.
    pub fn get(&self, id: &str) -> Option<WritableLayer> {
        self.known().layers.get(id).copied()
    }

    /// Measures `layers`, directories by container, on the file system of `scratch`, if that is due, and forgets all others.
    /// Blocks for as long as that takes.
    pub fn measure(&self, scratch: &Path, layers: &[(String, PathBuf)]) {
        let free = statvfs(scratch)
            .ok()
            .map(|fs| (fs.blocks_free(), fs.files_free()));
        {
            let mut known = self.known();
            known
                .layers
                .retain(|id, _| layers.iter().any(|(layer, _)| layer == id));
            let is_complete = layers.iter().all(|(id, _)| known.layers.contains_key(id));
            let is_unchanged = is_complete && free.is_some() && known.free == free;
            let is_early = known.not_before.is_some_and(|time| Instant::now() < time);
            if known.is_busy || is_unchanged || (is_complete && is_early) {
                return;
            }
            known.is_busy = true;
        }
        let begin = Instant::now();
        let measured: HashMap<_, _> = layers
            .iter()
            .map(|(id, path)| (id.clone(), size(path)))
            .collect();
        let took = begin.elapsed();
        *self.known() = Known {
            layers: measured,
            free,
            is_busy: false,
            not_before: Some(Instant::now() + pause(took)),
        };
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn pause(took: Duration) -> Duration {
    took.saturating_mul(PAUSE)
}

/// How large the file system at `path` is, and how full.
pub fn file_system(path: &Path) -> FileSystemSample {
    let Ok(fs) = statvfs(path) else {
        return FileSystemSample::default();
    };
    FileSystemSample {
        total_bytes: fs.blocks().saturating_mul(fs.fragment_size()),
        total_inodes: fs.files(),
        free_inodes: fs.files_free(),
    }
}

/// All that is in the directory `root`, itself included. What cannot be looked at, or is gone meanwhile, does not count.
fn size(root: &Path) -> WritableLayer {
    let mut size = WritableLayer::default();
    let Ok(root) = File::open(root).map(OwnedFd::from) else {
        return size;
    };
    let mut several_names = HashSet::new();
    let mut add = |stat: &FileStat| {
        // A file with several names counts once.
        if stat.st_nlink == 1 || is_directory(stat) || several_names.insert(stat.st_ino) {
            size.inodes += 1;
            size.used_bytes += stat.st_blocks as u64 * 512;
        }
    };
    let mut directories = vec![PathBuf::from(".")];
    if let Ok(stat) = fstatat(root.as_fd(), ".", AtFlags::empty()) {
        add(&stat);
    }
    while let Some(path) = directories.pop() {
        let Ok(mut directory) = open(&root, &path) else {
            continue;
        };
        let names: Vec<_> = directory.iter().flatten().collect();
        for entry in names {
            let name = entry.file_name();
            if matches!(name.to_bytes(), b"." | b"..") {
                continue;
            }
            let Ok(stat) = fstatat(directory.as_fd(), name, AtFlags::AT_SYMLINK_NOFOLLOW) else {
                continue;
            };
            add(&stat);
            if is_directory(&stat) {
                directories.push(path.join(std::ffi::OsStr::from_bytes(name.to_bytes())));
            }
        }
    }
    size
}

fn is_directory(stat: &FileStat) -> bool {
    SFlag::from_bits_truncate(stat.st_mode & SFlag::S_IFMT.bits()) == SFlag::S_IFDIR
}

/// The directory `path` below `root`. The container changes its files meanwhile: no link leads out of there.
fn open(root: &OwnedFd, path: &Path) -> io::Result<Dir> {
    let how = OpenHow::new()
        .flags(OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC)
        .mode(Mode::empty())
        .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS);
    Ok(Dir::from_fd(openat2(root.as_fd(), path, how)?)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::symlink;

    fn layers(dir: &Path) -> Vec<(String, PathBuf)> {
        vec![("c".to_owned(), dir.to_owned())]
    }

    #[test]
    fn files_count_once_and_links_lead_nowhere() {
        let outside = tempfile::tempdir().unwrap();
        fs::write(outside.path().join("big"), vec![1; 1 << 20]).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let sub = dir.path().join("sub");
        fs::create_dir(&sub).unwrap();
        fs::write(sub.join("file"), vec![1; 64 << 10]).unwrap();
        fs::hard_link(sub.join("file"), dir.path().join("same")).unwrap();
        symlink(outside.path(), dir.path().join("link")).unwrap();
        let size = size(dir.path());
        assert_eq!(size.inodes, 4, "two directories, a file, a link");
        assert!((64 << 10..512 << 10).contains(&size.used_bytes), "{size:?}");
    }

    #[test]
    fn a_new_container_is_measured_at_once_and_an_old_one_after_a_pause() {
        let dir = tempfile::tempdir().unwrap();
        let known = WritableLayers::default();
        known.measure(dir.path(), &layers(dir.path()));
        assert_eq!(known.get("c").unwrap().inodes, 1);
        fs::write(dir.path().join("file"), "x").unwrap();
        known.known().not_before = Some(Instant::now() + Duration::from_hours(1));
        known.measure(dir.path(), &layers(dir.path()));
        assert_eq!(known.get("c").unwrap().inodes, 1);
        known.known().not_before = None;
        // Whatever else happened on this file system meanwhile.
        known.known().free = None;
        known.measure(dir.path(), &layers(dir.path()));
        assert_eq!(known.get("c").unwrap().inodes, 2);
        known.measure(dir.path(), &[]);
        assert_eq!(known.get("c"), None);
    }

    #[test]
    fn nothing_is_measured_while_the_file_system_is_as_it_was() {
        let dir = tempfile::tempdir().unwrap();
        let known = WritableLayers::default();
        known.measure(dir.path(), &layers(dir.path()));
        // Others write to this file system too: it stays as it is for one of a few tries.
        let is_kept = (0..50).any(|_| {
            let fs = statvfs(dir.path()).unwrap();
            let mut state = known.known();
            state.not_before = None;
            state.free = Some((fs.blocks_free(), fs.files_free()));
            state.layers.get_mut("c").unwrap().inodes = 77;
            drop(state);
            known.measure(dir.path(), &layers(dir.path()));
            known.get("c").unwrap().inodes == 77
        });
        assert!(is_kept);
    }
}
