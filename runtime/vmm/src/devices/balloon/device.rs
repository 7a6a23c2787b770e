//! The virtio device (virtio 1.2, 5.5).

use std::io;
use std::os::fd::{AsRawFd as _, RawFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_BALLOON;
use vm_memory::GuestMemoryMmap;

use super::handle::{BalloonHandle, Shared};
use super::pages;
use crate::buffers::ChainBuffers;
use crate::device::{
    CONFIG_CHANGED, Counter, DeviceError, DeviceEvent, QueueRef, VirtioDevice, read_config_space,
};

/// Feature bits (virtio 1.2, 5.5.3), which virtio-bindings has not.
const VIRTIO_BALLOON_F_DEFLATE_ON_OOM: u32 = 2;
const VIRTIO_BALLOON_F_REPORTING: u32 = 5;

/// Pages into the balloon, pages out of it, free ranges. Linux wants room for 32 ranges. The queues of features that
/// this device has not are left out, as Linux does, whatever their numbers are in the specification.
const QUEUE_SIZES: &[u16] = &[32, 32, 32];
const INFLATE: usize = 0;
const REPORTING: usize = 2;

/// `struct virtio_balloon_config`: `num_pages`, and `actual`, which the driver writes.
const CONFIG_BYTES: usize = 8;
const ACTUAL_AT: usize = 4;

/// The virtio-balloon device.
///
/// Guest memory must be a private mapping: pages of a shared one would leave this process, but not the host.
#[derive(Debug)]
pub struct BalloonDevice {
    shared: Arc<Shared>,
    buffers: ChainBuffers,
    /// Bytes given back to the host, however often the guest took them again.
    released: Counter,
}

impl BalloonDevice {
    /// An empty balloon, and the handle to fill it.
    ///
    /// # Errors
    /// The process has no file descriptors left.
    pub fn new() -> io::Result<(Self, BalloonHandle)> {
        let (handle, shared) = BalloonHandle::new()?;
        let device = Self {
            shared,
            buffers: ChainBuffers::default(),
            released: Counter::default(),
        };
        Ok((device, handle))
    }

    fn config_space(&self) -> [u8; CONFIG_BYTES] {
        let target = self.shared.target.load(Ordering::Relaxed);
        let actual = self.shared.actual.load(Ordering::Relaxed);
        (u64::from(target) | u64::from(actual) << 32).to_le_bytes()
    }
}

impl VirtioDevice for BalloonDevice {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_BALLOON
    }

    fn queue_sizes(&self) -> &'static [u16] {
        QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1
            | 1 << VIRTIO_BALLOON_F_DEFLATE_ON_OOM
            | 1 << VIRTIO_BALLOON_F_REPORTING
    }

    fn activate(&mut self, _features: u64) {}

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_space(&self.config_space(), offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if let (Ok(ACTUAL_AT), Ok(actual)) = (usize::try_from(offset), data.try_into()) {
            let actual = u32::from_le_bytes(actual);
            self.shared.actual.store(actual, Ordering::Relaxed);
        }
    }

    fn wake_fd(&self) -> Option<RawFd> {
        Some(self.shared.changed.as_raw_fd())
    }

    fn process(
        &mut self,
        memory: &GuestMemoryMmap,
        queues: &mut [QueueRef<'_>],
        event: DeviceEvent,
    ) -> Result<u32, DeviceError> {
        let index = match event {
            DeviceEvent::Queue(index) => index,
            DeviceEvent::Wake => {
                // Fails only when nothing was written since: then there is nothing to clear.
                let _ = self.shared.changed.read();
                return Ok(CONFIG_CHANGED);
            }
        };
        let Some(queue) = queues.get_mut(index).filter(|queue| queue.ready()) else {
            return Ok(0);
        };
        let mut released = 0;
        let used = queue.serve(memory, &mut self.buffers, |readable, writable| {
            released += match index {
                INFLATE => pages::inflate(memory, readable),
                // The ranges are the buffers themselves, as if for the device to fill.
                REPORTING => writable.release(),
                // Pages out of the balloon come back when the guest touches them.
                _ => 0,
            };
            Ok(0)
        })?;
        self.released.fetch_add(released as u64, Ordering::Relaxed);
        Ok(u32::from(used) << index)
    }

    /// The host's wish stays, what the last driver had in the balloon does not.
    fn reset(&mut self) {
        self.shared.actual.store(0, Ordering::Relaxed);
    }

    fn counters(&self) -> Vec<(&'static str, Counter)> {
        vec![("released_bytes", self.released.clone())]
    }
}

#[cfg(test)]
mod tests;
