//! The virtio device (virtio 1.2, 5.2).

use std::os::fd::RawFd;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_SEG_MAX,
    VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use vm_memory::GuestMemoryMmap;

use super::request::{self, MAX_RANGES, SECTOR_BYTES};
use super::segments::{DISK_BYTES, SegmentMap};
use crate::buffers::ChainBuffers;
use crate::device::{DeviceError, DeviceEvent, QueueRef, VirtioDevice, read_config_space};

const QUEUE_SIZES: &[u16] = &[256];

/// Data descriptors in a request: the queue without the header's and the status's.
const SEG_MAX: u32 = 254;

/// What the guest's file systems should align to. The logical block stays 512: partitions are given in it.
const PHYSICAL_BLOCK_BYTES: u32 = 4096;

/// Largest range of a discard, in sectors: 1 GiB, a multiple of the alignment.
const MAX_CLEAR_SECTORS: u32 = 1 << 21;

/// Size of `struct virtio_blk_config` up to and with the write-zeroes fields.
const CONFIG_BYTES: usize = 60;

/// The virtio-blk device over a [`SegmentMap`].
#[derive(Debug)]
pub struct SegmentDisk {
    map: SegmentMap,
    buffers: ChainBuffers,
}

impl SegmentDisk {
    /// A disk that shows what `map` holds, now and later.
    pub fn new(map: SegmentMap) -> Self {
        Self {
            map,
            buffers: ChainBuffers::default(),
        }
    }
}

impl VirtioDevice for SegmentDisk {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn queue_sizes(&self) -> &'static [u16] {
        QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1
            | 1 << VIRTIO_BLK_F_SEG_MAX
            | 1 << VIRTIO_BLK_F_BLK_SIZE
            | 1 << VIRTIO_BLK_F_TOPOLOGY
            | 1 << VIRTIO_BLK_F_FLUSH
            | 1 << VIRTIO_BLK_F_DISCARD
            | 1 << VIRTIO_BLK_F_WRITE_ZEROES
    }

    fn activate(&mut self, _features: u64) {}

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_space(&config_space(), offset, data);
    }

    fn wake_fd(&self) -> Option<RawFd> {
        None
    }

    fn process(
        &mut self,
        memory: &GuestMemoryMmap,
        queues: &mut [QueueRef<'_>],
        _event: DeviceEvent,
    ) -> Result<u32, DeviceError> {
        if !queues[0].ready() {
            return Ok(0);
        }
        let used = queues[0].serve(memory, &mut self.buffers, |readable, writable| {
            Ok(request::serve(&self.map, readable, writable))
        })?;
        Ok(used.into())
    }

    fn reset(&mut self) {}
}

/// `struct virtio_blk_config` (virtio 1.2, 5.2.4), as far as our features give it meaning.
fn config_space() -> [u8; CONFIG_BYTES] {
    let mut config = [0; CONFIG_BYTES];
    let mut put = |at: usize, bytes: &[u8]| config[at..at + bytes.len()].copy_from_slice(bytes);
    let per_physical = PHYSICAL_BLOCK_BYTES / SECTOR_BYTES as u32;
    put(0, &(DISK_BYTES / SECTOR_BYTES).to_le_bytes()); // capacity
    put(12, &SEG_MAX.to_le_bytes());
    put(20, &(SECTOR_BYTES as u32).to_le_bytes()); // blk_size
    put(24, &[per_physical.trailing_zeros() as u8]); // physical_block_exp
    put(26, &(per_physical as u16).to_le_bytes()); // min_io_size, in logical blocks
    put(34, &1_u16.to_le_bytes()); // num_queues
    put(36, &MAX_CLEAR_SECTORS.to_le_bytes()); // max_discard_sectors
    put(40, &MAX_RANGES.to_le_bytes()); // max_discard_seg
    put(44, &per_physical.to_le_bytes()); // discard_sector_alignment
    put(48, &MAX_CLEAR_SECTORS.to_le_bytes()); // max_write_zeroes_sectors
    put(52, &MAX_RANGES.to_le_bytes()); // max_write_zeroes_seg
    put(56, &[1]); // write_zeroes_may_unmap
    config
}

#[cfg(test)]
mod tests;
