//! The map of the disk's address space.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use thiserror::Error;
use tracing::warn;

use crate::buffers::GuestSlices;

/// Size of every disk in bytes: nominal, nothing is allocated. Fits the largest file offsets, leaves room for 255 segments
/// of 32 GiB on average, and is what the guest's partition numbers were tried with.
pub const DISK_BYTES: u64 = 8 << 40;

/// Segments begin at multiples of this, in bytes: the guest's file systems see their own alignment kept.
const SEGMENT_ALIGNMENT: u64 = 1 << 20;

/// Lengths of segments are multiples of this, in bytes: the guest's page size.
const LENGTH_ALIGNMENT: u64 = 4096;

/// Partitions that Linux gives to one disk (`DISK_MAX_PARTS` is 256 with the disk itself).
const MAX_SEGMENTS: usize = 255;

/// What the guest may do with a segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Writes are I/O errors.
    ReadOnly,
    /// Reads and writes; a flush by the guest reaches stable storage.
    ReadWrite,
    /// Reads and writes of data that dies with the pod: a flush costs nothing.
    Ephemeral,
}

/// Where a segment lies on the disk, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// First byte; a multiple of 1 MiB.
    pub start: u64,
    /// Length; a multiple of 4 KiB.
    pub length: u64,
}

/// Why a segment cannot be added or removed.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum SegmentError {
    /// The length is 0 or larger than the disk, or the range ends beyond the largest file offset.
    #[error("a segment of {length} bytes at offset {offset} of its source")]
    Range {
        /// Offset in the source.
        offset: u64,
        /// Length asked for.
        length: u64,
    },
    /// A writable segment's length is no multiple of 4 KiB: the rounded tail would grow the file.
    #[error("a writable segment of {0} bytes: not a multiple of 4096")]
    Unaligned(u64),
    /// The disk has no room left, or has as many segments as the guest's kernel can have partitions.
    #[error("the disk is full of segments")]
    Full,
    /// No segment starts here.
    #[error("no segment starts at {0}")]
    NotFound(u64),
}

/// The segments of one disk. A cheap handle: the device and its owner share one map.
#[derive(Debug, Clone, Default)]
pub struct SegmentMap {
    /// By first byte. They do not overlap.
    segments: Arc<RwLock<BTreeMap<u64, Arc<Source>>>>,
}

impl SegmentMap {
    /// An empty disk.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds `length` bytes of `source` from `source_offset` on, in the first free place of the disk. The length is
    /// rounded up to 4 KiB; what lies beyond the end of the file reads as zeroes.
    ///
    /// # Errors
    /// Nothing is added; see [`SegmentError`].
    pub fn insert(
        &self,
        source: File,
        source_offset: u64,
        length: u64,
        access: Access,
    ) -> Result<Segment, SegmentError> {
        let out_of_range = SegmentError::Range {
            offset: source_offset,
            length,
        };
        if length == 0 || length > DISK_BYTES {
            return Err(out_of_range);
        }
        let rounded = length.next_multiple_of(LENGTH_ALIGNMENT);
        if access != Access::ReadOnly && rounded != length {
            return Err(SegmentError::Unaligned(length));
        }
        if source_offset
            .checked_add(rounded)
            .is_none_or(|end| i64::try_from(end).is_err())
        {
            return Err(out_of_range);
        }
        let mut segments = self.write();
        if segments.len() == MAX_SEGMENTS {
            return Err(SegmentError::Full);
        }
        let start = first_gap(&segments, rounded).ok_or(SegmentError::Full)?;
        let source = Source {
            file: source,
            offset: source_offset,
            length: rounded,
            access,
            dirty: AtomicBool::new(false),
            reported: AtomicBool::new(false),
        };
        segments.insert(start, Arc::new(source));
        Ok(Segment {
            start,
            length: rounded,
        })
    }

    /// Removes the segment that begins at `start`. A request that is under way still completes; the file is closed after.
    ///
    /// # Errors
    /// [`SegmentError::NotFound`].
    pub fn remove(&self, start: u64) -> Result<(), SegmentError> {
        self.write()
            .remove(&start)
            .map(drop)
            .ok_or(SegmentError::NotFound(start))
    }

    /// The segment that holds all of `length` bytes at `offset`, and where in it they begin.
    pub(super) fn find(&self, offset: u64, length: u64) -> Option<(Arc<Source>, u64)> {
        let segments = self.read();
        let (start, source) = segments.range(..=offset).next_back()?;
        let within = offset - start;
        let end = within.checked_add(length)?;
        (end <= source.length).then(|| (source.clone(), within))
    }

    /// Puts what was written since the last flush on stable storage.
    pub(super) fn flush(&self) -> io::Result<()> {
        let dirty: Vec<_> = self
            .read()
            .values()
            .filter(|source| source.dirty.swap(false, Ordering::AcqRel))
            .cloned()
            .collect();
        for source in dirty {
            if let Err(error) = source.file.sync_data() {
                source.dirty.store(true, Ordering::Release);
                source.report("flush", 0, &error);
                return Err(error);
            }
        }
        Ok(())
    }

    fn read(&self) -> RwLockReadGuard<'_, BTreeMap<u64, Arc<Source>>> {
        // A panic while the lock is held cannot leave the map half changed.
        self.segments.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, BTreeMap<u64, Arc<Source>>> {
        self.segments
            .write()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// The first aligned place with `length` free bytes.
fn first_gap(segments: &BTreeMap<u64, Arc<Source>>, length: u64) -> Option<u64> {
    let mut candidate = 0;
    for (start, source) in segments {
        if candidate + length <= *start {
            break;
        }
        candidate = (start + source.length).next_multiple_of(SEGMENT_ALIGNMENT);
    }
    (candidate + length <= DISK_BYTES).then_some(candidate)
}

/// What is behind a segment. Offsets given to its methods are within the segment and were checked by
/// [`SegmentMap::find`].
#[derive(Debug)]
pub(super) struct Source {
    file: File,
    offset: u64,
    length: u64,
    access: Access,
    /// Written since the last flush.
    dirty: AtomicBool,
    /// A failure of the file was logged.
    reported: AtomicBool,
}

impl Source {
    /// The host's own failure is worth a line in its log, but not one for each request that the guest makes of it.
    pub(super) fn report(&self, what: &str, at: u64, error: &io::Error) {
        if !self.reported.swap(true, Ordering::Relaxed) {
            warn!(at, length = self.length, %error, "disk: {what} fails");
        }
    }

    pub(super) fn writable(&self) -> bool {
        self.access != Access::ReadOnly
    }

    /// Fills `slices`; zeroes beyond the end of the file.
    pub(super) fn read(&self, at: u64, slices: &mut GuestSlices<'_>) -> io::Result<()> {
        slices.fill_from_file(self.file.as_fd(), self.offset + at)?;
        slices.zero();
        Ok(())
    }

    /// Writes all of `slices`.
    pub(super) fn write(&self, at: u64, slices: &mut GuestSlices<'_>) -> io::Result<()> {
        self.mark_dirty();
        slices.drain_to_file(self.file.as_fd(), self.offset + at)?;
        if slices.is_empty() {
            Ok(())
        } else {
            Err(io::ErrorKind::WriteZero.into())
        }
    }

    /// Makes a range read as zeroes and gives its blocks back to the file system.
    pub(super) fn punch(&self, at: u64, length: u64) -> Result<(), Errno> {
        self.mark_dirty();
        let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        fallocate(&self.file, flags, (self.offset + at) as i64, length as i64)
    }

    fn mark_dirty(&self) {
        if self.access == Access::ReadWrite {
            self.dirty.store(true, Ordering::Release);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn file() -> File {
        File::open("/dev/null").unwrap()
    }

    #[test]
    fn refuses_bad_ranges() {
        let map = SegmentMap::new();
        let range = |offset, length| Err(SegmentError::Range { offset, length });
        assert_eq!(map.insert(file(), 0, 0, Access::ReadOnly), range(0, 0));
        assert_eq!(
            map.insert(file(), 0, DISK_BYTES + 1, Access::ReadOnly),
            range(0, DISK_BYTES + 1)
        );
        assert_eq!(
            map.insert(file(), u64::MAX, 4096, Access::ReadOnly),
            range(u64::MAX, 4096)
        );
        assert_eq!(
            map.insert(file(), i64::MAX as u64, 1, Access::ReadOnly),
            range(i64::MAX as u64, 1)
        );
        assert_eq!(
            map.insert(file(), 0, 4095, Access::ReadWrite),
            Err(SegmentError::Unaligned(4095))
        );
        assert_eq!(map.remove(0), Err(SegmentError::NotFound(0)));
    }

    #[test]
    fn ends_when_the_disk_or_the_partitions_do() {
        let map = SegmentMap::new();
        let whole = map.insert(file(), 0, DISK_BYTES, Access::ReadOnly).unwrap();
        assert_eq!(
            whole,
            Segment {
                start: 0,
                length: DISK_BYTES
            }
        );
        assert_eq!(
            map.insert(file(), 0, 1, Access::ReadOnly),
            Err(SegmentError::Full)
        );
        map.remove(0).unwrap();
        for index in 0..255 {
            assert_eq!(
                map.insert(file(), 0, 1, Access::ReadOnly).unwrap().start,
                index << 20
            );
        }
        assert_eq!(
            map.insert(file(), 0, 1, Access::ReadOnly),
            Err(SegmentError::Full)
        );
        map.remove(7 << 20).unwrap();
        assert_eq!(
            map.insert(file(), 0, 1, Access::ReadOnly).unwrap().start,
            7 << 20
        );
    }

    #[derive(Debug, Clone)]
    enum Step {
        Insert(u64),
        Remove(usize),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            (1_u64..6 << 20).prop_map(Step::Insert),
            (1_u64..DISK_BYTES / 2).prop_map(Step::Insert),
            any::<usize>().prop_map(Step::Remove),
        ]
    }

    proptest! {
        /// Whatever is added and removed: aligned, long enough, disjoint, inside the disk, and found exactly where it is.
        #[test]
        fn segments_stay_disjoint(steps in proptest::collection::vec(step(), 1..60)) {
            let map = SegmentMap::new();
            let mut live: Vec<Segment> = Vec::new();
            for step in steps {
                match step {
                    Step::Insert(length) => {
                        let Ok(new) = map.insert(file(), 0, length, Access::ReadOnly) else { continue };
                        prop_assert_eq!(new.start % SEGMENT_ALIGNMENT, 0);
                        prop_assert_eq!(new.length, length.next_multiple_of(LENGTH_ALIGNMENT));
                        prop_assert!(new.start + new.length <= DISK_BYTES);
                        for old in &live {
                            prop_assert!(new.start + new.length <= old.start || old.start + old.length <= new.start);
                        }
                        live.push(new);
                    }
                    Step::Remove(index) if !live.is_empty() => {
                        let gone = live.swap_remove(index % live.len());
                        map.remove(gone.start).unwrap();
                        prop_assert!(map.find(gone.start, 1).is_none());
                    }
                    Step::Remove(_) => {}
                }
                for segment in &live {
                    let (_, within) = map.find(segment.start + segment.length - 512, 512).unwrap();
                    prop_assert_eq!(within, segment.length - 512);
                    prop_assert!(map.find(segment.start, segment.length).is_some());
                    prop_assert!(map.find(segment.start, segment.length + 1).is_none());
                    prop_assert!(map.find(segment.start + segment.length - 512, 1024).is_none());
                    prop_assert!(map.find(segment.start, u64::MAX).is_none());
                }
            }
        }
    }
}
