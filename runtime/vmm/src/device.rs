//! The trait of a virtio device, free of any transport.
//!
//! A transport (vhost-user under QEMU, virtio-mmio under our own VMM) negotiates features, sets up queues, tells the
//! device of events and sends the interrupts. A device sees guest memory and queues, nothing else. One thread calls
//! a device, so a device needs no lock of its own.

use std::os::fd::RawFd;

use thiserror::Error;
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::GuestMemoryMmap;

/// A chain of descriptors taken from a queue.
pub type Chain<'m> = DescriptorChain<&'m GuestMemoryMmap>;

/// Why a device stops: the driver broke the queue itself, or the host failed. What a driver merely asks wrongly is
/// answered in the device's own protocol instead.
#[derive(Debug, Error)]
pub enum DeviceError {
    /// A ring lies outside guest memory, or its indices are impossible.
    #[error("broken virtqueue: {0}")]
    Queue(#[from] virtio_queue::Error),
    /// The host side of the device failed.
    #[error("device: {0}")]
    Io(#[from] std::io::Error),
}

/// In what [`VirtioDevice::process`] returns: configuration space has changed.
pub const CONFIG_CHANGED: u32 = 1 << 31;

/// Why [`VirtioDevice::process`] is called.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceEvent {
    /// The driver made buffers available in this queue.
    Queue(usize),
    /// [`VirtioDevice::wake_fd`] is readable.
    Wake,
}

/// A virtio device.
pub trait VirtioDevice: Send {
    /// The device's id (virtio 1.2, section 5).
    fn device_type(&self) -> u32;

    /// The largest size of each queue.
    fn queue_sizes(&self) -> &'static [u16];

    /// Feature bits of the device and of virtio itself. Ring features (`INDIRECT_DESC`, `EVENT_IDX`) are the transport's.
    fn features(&self) -> u64;

    /// The driver accepted `features`.
    fn activate(&mut self, features: u64);

    /// Reads configuration space; what lies beyond its end is zero.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// Readable when the device has work that the guest did not cause.
    fn wake_fd(&self) -> Option<RawFd>;

    /// Does the work that `event` announces. Returns the queues whose driver may need an interrupt: bit i is queue i,
    /// with [`CONFIG_CHANGED`] if it has.
    ///
    /// A queue that is not ready is skipped.
    ///
    /// # Errors
    /// The device cannot go on: the transport stops serving it (`DEVICE_NEEDS_RESET`) until it is reset.
    fn process(
        &mut self,
        memory: &GuestMemoryMmap,
        queues: &mut [QueueRef<'_>],
        event: DeviceEvent,
    ) -> Result<u32, DeviceError>;

    /// Back to the state before `activate`. Connections and other state of the last driver are gone.
    fn reset(&mut self);
}

/// A queue, as a device uses it.
#[derive(Debug)]
pub struct QueueRef<'a> {
    queue: &'a mut Queue,
    used: u64,
}

impl<'a> QueueRef<'a> {
    /// Wraps a queue. A transport that has stopped it clears its ready flag first.
    pub fn new(queue: &'a mut Queue) -> Self {
        Self { queue, used: 0 }
    }

    /// Whether the driver has set the queue up.
    pub fn ready(&self) -> bool {
        self.queue.ready()
    }

    /// Takes the next chain.
    ///
    /// # Errors
    /// The available ring is outside guest memory or claims more than the queue holds.
    pub fn pop<'m>(
        &mut self,
        memory: &'m GuestMemoryMmap,
    ) -> Result<Option<Chain<'m>>, DeviceError> {
        Ok(self.queue.iter(memory)?.next())
    }

    /// Puts the chain that was taken last back, so that the next `pop` returns it again.
    pub fn unpop(&mut self) {
        self.queue.go_to_previous_position();
    }

    /// Returns a chain to the driver: `written` bytes of its writable part hold data.
    ///
    /// # Errors
    /// The used ring is outside guest memory.
    pub fn add_used(
        &mut self,
        memory: &GuestMemoryMmap,
        head: u16,
        written: u32,
    ) -> Result<(), DeviceError> {
        self.used += 1;
        Ok(self.queue.add_used(memory, head, written)?)
    }

    /// Chains given back so far.
    pub fn used(&self) -> u64 {
        self.used
    }

    /// Asks the driver not to tell us of new buffers, while we take them anyway.
    pub fn disable_notification(&mut self, memory: &GuestMemoryMmap) -> Result<(), DeviceError> {
        Ok(self.queue.disable_notification(memory)?)
    }

    /// Asks the driver to tell us of new buffers. True: there are new ones already, go on.
    pub fn enable_notification(&mut self, memory: &GuestMemoryMmap) -> Result<bool, DeviceError> {
        Ok(self.queue.enable_notification(memory)?)
    }
}
