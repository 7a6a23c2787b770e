//! The pod's disk: a map of segments without a partition table. A segment becomes a block device with
//! `BLKPG_ADD_PARTITION` (linux/blkpg.h), an image layer is mounted once for all its containers.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use podvisor_proto::agent::Segment;

use crate::mount::{FileSystem, MountError};

/// Partitions of one virtio disk: minor numbers 1 to 255 after the disk's own.
const PARTITIONS: u32 = 255;
/// Segments are whole pages.
const ALIGNMENT: u64 = 4096;
/// Where layers are mounted.
const LAYERS: &str = "/run/podvisor/layers";

/// Why a segment is not there.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// A malformed request.
    #[error("segment {start}+{length} is not made of whole pages of {ALIGNMENT} bytes")]
    Segment {
        /// First byte.
        start: u64,
        /// Bytes.
        length: u64,
    },
    /// All numbers are taken.
    #[error(
        "all {PARTITIONS} partitions of the pod's disk are in use: too many different layers in one pod"
    )]
    Full,
    /// The kernel refused.
    #[error("{action} of segment {start}+{length}: {source}")]
    Kernel {
        /// What was tried.
        action: &'static str,
        /// First byte.
        start: u64,
        /// Bytes.
        length: u64,
        /// The kernel's reason.
        source: io::Error,
    },
    /// An image that the kernel does not mount.
    #[error("mounting the layer of segment {start}+{length}: {source}")]
    Layer {
        /// First byte.
        start: u64,
        /// Bytes.
        length: u64,
        /// The kernel's reason.
        source: MountError,
    },
}

/// A segment as a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Range {
    start: u64,
    length: u64,
}

impl Range {
    fn error(self, action: &'static str, source: impl Into<io::Error>) -> DiskError {
        DiskError::Kernel {
            action,
            start: self.start,
            length: self.length,
            source: source.into(),
        }
    }
}

impl TryFrom<Segment> for Range {
    type Error = DiskError;

    fn try_from(segment: Segment) -> Result<Self, DiskError> {
        let Segment { start, length } = segment;
        let whole = start.is_multiple_of(ALIGNMENT) && length.is_multiple_of(ALIGNMENT);
        // The kernel counts in signed 64 bits.
        let ends = start
            .checked_add(length)
            .is_some_and(|end| i64::try_from(end).is_ok());
        if length == 0 || !whole || !ends {
            return Err(DiskError::Segment { start, length });
        }
        Ok(Self { start, length })
    }
}

impl From<Range> for Segment {
    fn from(range: Range) -> Self {
        Self {
            start: range.start,
            length: range.length,
        }
    }
}

/// The pod's disk and what is in use of it.
pub struct Disk {
    path: PathBuf,
    numbers: Numbers,
    layers: HashMap<Range, Layer>,
    devices: HashMap<Range, Device>,
    /// Whose ids the files of layers have.
    user_namespace: Option<Arc<OwnedFd>>,
}

/// A block device of one container's.
struct Device {
    number: u32,
    user: String,
}

struct Layer {
    number: u32,
    users: HashSet<String>,
}

impl Disk {
    /// The disk at `path`, opened when a segment is asked for.
    pub fn new(path: PathBuf) -> Self {
        Self {
            path,
            numbers: Numbers::default(),
            layers: HashMap::new(),
            devices: HashMap::new(),
            user_namespace: None,
        }
    }

    /// Layers are mounted with the ids of `user_namespace` from now on.
    pub fn map_ids(&mut self, user_namespace: Arc<OwnedFd>) {
        self.user_namespace = Some(user_namespace);
    }

    /// Mounts the ext4 in `segment` at `target`, for as long as the guest lives.
    pub fn mount_scratch(&mut self, segment: Range, target: &Path) -> Result<(), DiskError> {
        let number = self.add_partition(segment)?;
        // Ownership and modes are the containers' business, devices are opened through their /dev.
        let flags = MsFlags::MS_NOATIME | MsFlags::MS_NODEV | MsFlags::MS_NOSUID;
        let mounted = std::fs::create_dir_all(target).and_then(|()| {
            mount(
                Some(&self.device(number)),
                target,
                Some("ext4"),
                flags,
                Some("discard"),
            )
            .map_err(io::Error::from)
        });
        mounted.map_err(|source| {
            let _ = self.delete_partition(segment, number);
            segment.error("mounting the scratch area", source)
        })
    }

    /// Makes `segment` a block device for `user`, which nobody else has. Returns its number (`st_rdev`).
    pub fn add_device(&mut self, user: &str, segment: Range) -> Result<u64, DiskError> {
        let number = self.add_partition(segment)?;
        let user = user.to_owned();
        self.devices.insert(segment, Device { number, user });
        let status = nix::sys::stat::stat(&self.device(number));
        let status = status.map_err(|error| segment.error("finding the device", error))?;
        Ok(status.st_rdev)
    }

    /// Mounts `segments` (lowest layer first) for `user`, each where it is mounted already if it is.
    /// Returns the directories in the same order. When this fails, nothing stays for `user`.
    pub fn acquire(&mut self, user: &str, segments: &[Range]) -> Result<Vec<PathBuf>, DiskError> {
        let acquired: Result<Vec<PathBuf>, DiskError> = segments
            .iter()
            .map(|segment| self.acquire_one(user, *segment))
            .collect();
        if acquired.is_err() {
            self.release(user);
        }
        acquired
    }

    /// Ends `user`'s use of its layers. Returns those that nobody uses any more and that are gone from
    /// the kernel; one that is still busy is tried again at the next release.
    pub fn release(&mut self, user: &str) -> Vec<Segment> {
        for layer in self.layers.values_mut() {
            layer.users.remove(user);
        }
        let unused: Vec<(Range, u32)> = self
            .layers
            .iter()
            .filter(|(_, layer)| layer.users.is_empty())
            .map(|(range, layer)| (*range, layer.number))
            .collect();
        let mut released = Vec::new();
        for (range, number) in unused {
            match self.unmount_layer(range, number) {
                Ok(()) => {
                    self.layers.remove(&range);
                    released.push(range.into());
                }
                Err(error) => crate::kmsg::error!("{error}"),
            }
        }
        let devices = self.devices.iter();
        let devices: Vec<(Range, u32)> = devices
            .filter(|(_, device)| device.user == user)
            .map(|(range, device)| (*range, device.number))
            .collect();
        for (range, number) in devices {
            match self.delete_partition(range, number) {
                Ok(()) => {
                    self.devices.remove(&range);
                    released.push(range.into());
                }
                Err(error) => crate::kmsg::error!("{error}"),
            }
        }
        released
    }

    fn acquire_one(&mut self, user: &str, segment: Range) -> Result<PathBuf, DiskError> {
        if let Some(layer) = self.layers.get_mut(&segment) {
            layer.users.insert(user.to_owned());
            return Ok(layer_path(layer.number));
        }
        let number = self.add_partition(segment)?;
        let target = layer_path(number);
        if let Err(source) = self.mount_layer(number, &target) {
            let _ = std::fs::remove_dir(&target);
            let _ = self.delete_partition(segment, number);
            let Range { start, length } = segment;
            return Err(DiskError::Layer {
                start,
                length,
                source,
            });
        }
        let users = HashSet::from([user.to_owned()]);
        self.layers.insert(segment, Layer { number, users });
        Ok(target)
    }

    fn mount_layer(&self, number: u32, target: &Path) -> Result<(), MountError> {
        std::fs::create_dir_all(target)?;
        let file_system = FileSystem::open(c"erofs")?;
        file_system.set(c"source", self.device(number).as_os_str().as_bytes())?;
        file_system.set_flag(c"ro")?;
        let mount = file_system
            .mount(libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOSUID)?;
        if let Some(user_namespace) = &self.user_namespace {
            mount.map_ids(user_namespace.as_fd())?;
        }
        mount.attach_at(target)
    }

    fn unmount_layer(&mut self, range: Range, number: u32) -> Result<(), DiskError> {
        let target = layer_path(number);
        match umount2(&target, MntFlags::empty()) {
            // EINVAL: not a mount point; an earlier release got this far.
            Ok(()) | Err(Errno::EINVAL | Errno::ENOENT) => {}
            Err(error) => return Err(range.error("unmounting the layer", error)),
        }
        let _ = std::fs::remove_dir(&target);
        self.delete_partition(range, number)
    }

    fn add_partition(&mut self, segment: Range) -> Result<u32, DiskError> {
        let number = self.numbers.take().ok_or(DiskError::Full)?;
        match self.partition(BLKPG_ADD_PARTITION, number, segment) {
            Ok(()) => Ok(number),
            Err(error) => {
                self.numbers.give_back(number);
                Err(segment.error("adding a partition", error))
            }
        }
    }

    fn delete_partition(&mut self, segment: Range, number: u32) -> Result<(), DiskError> {
        self.partition(BLKPG_DEL_PARTITION, number, segment)
            .map_err(|error| segment.error("deleting the partition", error))?;
        self.numbers.give_back(number);
        Ok(())
    }

    fn partition(&self, operation: libc::c_int, number: u32, segment: Range) -> io::Result<()> {
        let disk = File::open(&self.path)?;
        let mut partition = BlkpgPartition {
            start: segment.start as i64,
            length: segment.length as i64,
            number: number as libc::c_int,
            device_name: [0; 64],
            volume_name: [0; 64],
        };
        let argument = BlkpgArgument {
            operation,
            flags: 0,
            data_length: size_of::<BlkpgPartition>() as libc::c_int,
            data: &raw mut partition,
        };
        // SAFETY: `argument` and the partition it points to have the layout of linux/blkpg.h and
        // live through the call.
        Errno::result(unsafe { libc::ioctl(disk.as_raw_fd(), BLKPG, &raw const argument) })?;
        Ok(())
    }

    fn device(&self, number: u32) -> PathBuf {
        let disk = self.path.to_string_lossy();
        // The kernel puts a "p" between a disk's name and the number when the name ends in a digit.
        let infix = if disk.ends_with(|last: char| last.is_ascii_digit()) {
            "p"
        } else {
            ""
        };
        PathBuf::from(format!("{disk}{infix}{number}"))
    }
}

fn layer_path(number: u32) -> PathBuf {
    Path::new(LAYERS).join(number.to_string())
}

/// linux/blkpg.h: `_IO(0x12, 105)` and its operations.
const BLKPG: libc::Ioctl = 0x1269;
const BLKPG_ADD_PARTITION: libc::c_int = 1;
const BLKPG_DEL_PARTITION: libc::c_int = 2;

#[repr(C)]
struct BlkpgPartition {
    start: i64,
    length: i64,
    number: libc::c_int,
    device_name: [u8; 64],
    volume_name: [u8; 64],
}

#[repr(C)]
struct BlkpgArgument {
    operation: libc::c_int,
    flags: libc::c_int,
    data_length: libc::c_int,
    data: *mut BlkpgPartition,
}

/// Partition numbers that are free.
#[derive(Default)]
struct Numbers {
    taken: HashSet<u32>,
}

impl Numbers {
    /// The lowest free number.
    fn take(&mut self) -> Option<u32> {
        let free = (1..=PARTITIONS).find(|number| !self.taken.contains(number))?;
        self.taken.insert(free);
        Some(free)
    }

    fn give_back(&mut self, number: u32) {
        self.taken.remove(&number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn malformed_segments_are_refused() {
        let range = |start, length| Range::try_from(Segment { start, length });
        assert!(range(0, 4096).is_ok());
        assert!(range(4096, 8192).is_ok());
        assert!(range(0, 0).is_err());
        assert!(range(1, 4096).is_err());
        assert!(range(4096, 4097).is_err());
        assert!(range(u64::MAX - 4095, 4096).is_err());
        assert!(range(i64::MAX as u64 - 4095, 4096).is_err());
    }

    #[test]
    fn device_names() {
        let device = |path| Disk::new(PathBuf::from(path)).device(7);
        assert_eq!(device("/dev/vda"), Path::new("/dev/vda7"));
        assert_eq!(device("/dev/loop0"), Path::new("/dev/loop0p7"));
    }

    proptest! {
        #[test]
        fn numbers_are_unique_and_never_run_out_early(steps in proptest::collection::vec(any::<(bool, u8)>(), 0..900)) {
            let mut numbers = Numbers::default();
            let mut held: Vec<u32> = Vec::new();
            for (take, index) in steps {
                if take || held.is_empty() {
                    if let Some(number) = numbers.take() {
                        prop_assert!((1..=PARTITIONS).contains(&number));
                        prop_assert!(!held.contains(&number));
                        held.push(number);
                    } else {
                        prop_assert_eq!(held.len(), PARTITIONS as usize);
                    }
                } else {
                    let number = held.swap_remove(usize::from(index) % held.len());
                    numbers.give_back(number);
                }
            }
        }
    }
}
