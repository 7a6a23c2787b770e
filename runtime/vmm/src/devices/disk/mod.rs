//! The pod's disk: a virtio-blk device whose address space is a map of segments of files.

mod segments;

pub use segments::{Access, Segment, SegmentError, SegmentMap};

/// The virtio-blk device over a [`SegmentMap`].
#[derive(Debug)]
pub struct SegmentDisk {
    #[expect(dead_code, reason = "skeleton")]
    map: SegmentMap,
}

impl SegmentDisk {
    /// A disk that shows what `map` holds, now and later.
    pub fn new(map: SegmentMap) -> Self {
        Self { map }
    }
}
