//! The virtio device (virtio 1.2, 5.4).

use std::io;
use std::os::fd::RawFd;

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;
use vm_memory::GuestMemoryMmap;

use super::entropy;
use crate::buffers::{ChainBuffers, GuestSlices};
use crate::device::{DeviceError, DeviceEvent, QueueRef, VirtioDevice};

/// The driver's empty buffers. Linux has one at a time there, of 64 bytes.
const QUEUE_SIZES: &[u16] = &[8];

/// The virtio-rng device.
///
/// A buffer gets at most 256 bytes, whatever its size, which the specification allows: so one costs the host a short
/// system call, about as much as it costs the guest to ask for it.
#[derive(Debug, Default)]
pub struct RngDevice {
    buffers: ChainBuffers,
}

impl RngDevice {
    /// A device that asks the host's kernel.
    pub fn new() -> Self {
        Self::default()
    }
}

impl VirtioDevice for RngDevice {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_RNG
    }

    fn queue_sizes(&self) -> &'static [u16] {
        QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1
    }

    fn activate(&mut self, _features: u64) {}

    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
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
        let used = queues[0].serve(memory, &mut self.buffers, |_, buffer| fill(buffer))?;
        Ok(used.into())
    }

    fn reset(&mut self) {}
}

/// Fills a buffer of the driver's, as far as one request may. Returns the bytes written.
fn fill(mut buffer: GuestSlices<'_>) -> io::Result<u32> {
    let mut bytes = [0; entropy::MAX_BYTES];
    let bytes = &mut bytes[..buffer.len().min(entropy::MAX_BYTES)];
    entropy::fill(bytes)?;
    let written = buffer.write(bytes);
    debug_assert!(written, "no longer than the buffer");
    Ok(bytes.len() as u32)
}

#[cfg(test)]
mod tests {
    use virtio_bindings::bindings::virtio_ring::VRING_DESC_F_WRITE;
    use vm_memory::{Bytes as _, GuestAddress};

    use super::*;
    use crate::test_queue::{Part, TestQueue};

    const WRITE: u16 = VRING_DESC_F_WRITE as u16;
    const BUFFER: u64 = 0x4000;

    #[test]
    fn fills_buffers() {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x10_0000)]).unwrap();
        let mut device = RngDevice::new();
        let mut queue = TestQueue::new(&memory, 0);
        let mut ask = |parts: &[Part]| {
            queue.push(parts);
            let mut queues = [QueueRef::new(&mut queue.queue)];
            let interrupts = device.process(&memory, &mut queues, DeviceEvent::Queue(0));
            assert_eq!(interrupts.unwrap(), 1);
            queue.used().unwrap().1
        };
        let content = |length: usize| {
            let mut bytes = vec![0; length];
            memory.read_slice(&mut bytes, GuestAddress(BUFFER)).unwrap();
            bytes
        };

        assert_eq!(ask(&[(BUFFER, 32, WRITE), (BUFFER + 32, 32, WRITE)]), 64);
        let first = content(80);
        assert_ne!(first[..64], [0; 64]);
        assert_eq!(first[64..], [0; 16]);
        assert_eq!(ask(&[(BUFFER, 64, WRITE)]), 64);
        assert_ne!(content(64), first[..64]);
        assert_eq!(ask(&[(BUFFER, 0x1000, WRITE)]), 256, "no more at once");
        assert_eq!(content(0x1000)[256..], [0; 0x1000 - 256]);

        assert_eq!(ask(&[(BUFFER, 64, 0)]), 0, "not to be written");
        assert_eq!(ask(&[(0x10_0000, 64, WRITE)]), 0, "outside memory");
    }

    #[test]
    fn waits_for_its_queue() {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x10_0000)]).unwrap();
        let mut queue = TestQueue::new(&memory, 0);
        queue.push(&[(BUFFER, 64, WRITE)]);
        virtio_queue::QueueT::set_ready(&mut queue.queue, false);
        let mut queues = [QueueRef::new(&mut queue.queue)];
        let interrupts = RngDevice::new().process(&memory, &mut queues, DeviceEvent::Queue(0));
        assert_eq!(interrupts.unwrap(), 0);
        assert_eq!(queue.used(), None);
    }
}
