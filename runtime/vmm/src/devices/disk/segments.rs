//! The map of the disk's address space.

use std::fs::File;
use std::sync::Arc;

use thiserror::Error;

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
    /// A writable segment's length is no multiple of 4 KiB.
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
    _inner: Arc<()>,
}

impl SegmentMap {
    /// An empty disk.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds `length` bytes of `source` from `source_offset` on, in a free place of the disk. The length is rounded up
    /// to 4 KiB; what lies beyond the end of the file reads as zeroes.
    pub fn insert(
        &self,
        _source: File,
        source_offset: u64,
        length: u64,
        _access: Access,
    ) -> Result<Segment, SegmentError> {
        Err(SegmentError::Range {
            offset: source_offset,
            length,
        })
    }

    /// Removes the segment that begins at `start`. A request that is under way still completes.
    pub fn remove(&self, start: u64) -> Result<(), SegmentError> {
        Err(SegmentError::NotFound(start))
    }
}
