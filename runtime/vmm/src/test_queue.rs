//! A virtqueue as a driver sees it, for the tests of devices.
//!
//! Not virtio-queue's own mock: its rings overlap when more than eight chains are used.

use virtio_bindings::bindings::virtio_ring::VRING_DESC_F_NEXT;
use virtio_queue::desc::RawDescriptor;
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// The part of a descriptor that matters: address, length, flags.
pub type Part = (u64, u32, u16);

/// The driver's side of a queue, and the device's beside it.
pub struct TestQueue<'m> {
    memory: &'m GuestMemoryMmap,
    /// Where the descriptors are; the rings follow.
    base: u64,
    available_ring: u64,
    used_ring: u64,
    available: u16,
    seen: u16,
    pub queue: Queue,
}

impl<'m> TestQueue<'m> {
    pub const SIZE: u16 = 16;

    /// A queue of 16 descriptors whose rings lie in the 4 KiB at `base`.
    pub fn new(memory: &'m GuestMemoryMmap, base: u64) -> Self {
        Self::with_size(memory, base, Self::SIZE)
    }

    /// A queue of `size` descriptors, which lies in the `32 * size + 16` bytes at `base`.
    pub fn with_size(memory: &'m GuestMemoryMmap, base: u64, size: u16) -> Self {
        let available_ring = base + 16 * u64::from(size);
        let used_ring = (available_ring + 6 + 2 * u64::from(size)).next_multiple_of(4);
        let end = used_ring + 6 + 8 * u64::from(size);
        memory
            .write_slice(&vec![0; (end - base) as usize], GuestAddress(base))
            .unwrap();
        let mut queue = Queue::new(size).unwrap();
        queue
            .try_set_desc_table_address(GuestAddress(base))
            .unwrap();
        queue
            .try_set_avail_ring_address(GuestAddress(available_ring))
            .unwrap();
        queue
            .try_set_used_ring_address(GuestAddress(used_ring))
            .unwrap();
        queue.set_ready(true);
        Self {
            memory,
            base,
            available_ring,
            used_ring,
            available: 0,
            seen: 0,
            queue,
        }
    }

    /// Makes a chain of `parts` available, in descriptors from `first` on.
    pub fn push_at(&mut self, first: u16, parts: &[Part]) {
        for (index, &(address, length, flags)) in parts.iter().enumerate() {
            let last = index + 1 == parts.len();
            let index = first + index as u16;
            let flags = if last {
                flags
            } else {
                flags | VRING_DESC_F_NEXT as u16
            };
            self.store(index, address, length, flags, index + 1);
        }
        self.publish(first);
    }

    /// Makes a chain available in descriptors from 0 on: for tests with one request at a time.
    pub fn push(&mut self, parts: &[Part]) {
        self.push_at(0, parts);
    }

    /// Writes any descriptor.
    pub fn store(&self, index: u16, address: u64, length: u32, flags: u16, next: u16) {
        let descriptor = RawDescriptor::from(Descriptor::new(address, length, flags, next));
        self.memory
            .write_obj(descriptor, GuestAddress(self.base + 16 * u64::from(index)))
            .unwrap();
    }

    /// Makes a head available, whatever it is.
    pub fn publish(&mut self, head: u16) {
        let slot = u64::from(self.available % self.queue.size());
        let address = self.available_ring + 4 + 2 * slot;
        self.memory
            .write_obj(head.to_le(), GuestAddress(address))
            .unwrap();
        self.available = self.available.wrapping_add(1);
        self.set_available(self.available);
    }

    /// Writes the available index, whatever it is.
    pub fn set_available(&self, index: u16) {
        self.memory
            .write_obj(index.to_le(), GuestAddress(self.available_ring + 2))
            .unwrap();
    }

    /// The next chain that the device has returned: its head and the bytes written.
    pub fn used(&mut self) -> Option<(u32, u32)> {
        let ring = self.used_ring;
        let index: u16 = self.memory.read_obj(GuestAddress(ring + 2)).unwrap();
        if index == self.seen {
            return None;
        }
        let slot = u64::from(self.seen % self.queue.size());
        self.seen = self.seen.wrapping_add(1);
        let element: [u32; 2] = self
            .memory
            .read_obj(GuestAddress(ring + 4 + 8 * slot))
            .unwrap();
        Some((element[0], element[1]))
    }
}
