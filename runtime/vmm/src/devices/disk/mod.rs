//! The pod's disk: a virtio-blk device whose address space is a map of segments of files.
//!
//! - `segments`: the map, and the files behind it
//! - `request`: one request of the driver, carried out (virtio 1.2, 5.2.6)
//! - `device`: the virtio device

mod device;
mod request;
mod segments;

pub use device::SegmentDisk;
pub use segments::{Access, DISK_BYTES, Segment, SegmentError, SegmentMap};
