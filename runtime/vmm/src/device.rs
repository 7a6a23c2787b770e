//! The trait of a virtio device, free of any transport.
//!
//! A transport (vhost-user under QEMU, virtio-mmio under our own VMM) negotiates features, sets up queues, tells the
//! device of events and sends the interrupts. A device sees guest memory and queues, nothing else. One thread calls
//! a device, so a device needs no lock of its own.

use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use thiserror::Error;
use tracing::debug;
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::buffers::{ChainBuffers, GuestSlices};

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
    Io(#[from] io::Error),
}

/// Something that a device counts. Only ever grows, except where its name says what it is now.
pub type Counter = Arc<AtomicU64>;

/// Beside the queues in what [`VirtioDevice::process`] returns: configuration space has changed, and the driver is to
/// be told.
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

    /// The driver writes configuration space. What is not writable stays as it is.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    /// Readable when the device has work that the guest did not cause.
    fn wake_fd(&self) -> Option<RawFd>;

    /// Does the work that `event` announces. Returns the queues whose driver may need an interrupt: bit i is queue i;
    /// and [`CONFIG_CHANGED`].
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

    /// What the device counts, by name, beside what transports count of every queue. Any thread may read it.
    fn counters(&self) -> Vec<(&'static str, Counter)> {
        Vec::new()
    }
}

/// Reads a configuration space that is the bytes `config`, for [`VirtioDevice::read_config`].
pub fn read_config_space(config: &[u8], offset: u64, data: &mut [u8]) {
    data.fill(0);
    let start = usize::try_from(offset).map_or(config.len(), |offset| offset.min(config.len()));
    let count = data.len().min(config.len() - start);
    data[..count].copy_from_slice(&config[start..start + count]);
}

/// Size of a used ring before its elements: flags and index.
const USED_HEADER_BYTES: u64 = 4;
/// Size of an element of a used ring.
const USED_ELEMENT_BYTES: u64 = 8;

/// A queue, as a device uses it.
#[derive(Debug)]
pub struct QueueRef<'a> {
    queue: &'a mut Queue,
    first_used: u16,
}

impl<'a> QueueRef<'a> {
    /// Wraps a queue. A transport that has stopped it clears its ready flag first.
    pub fn new(queue: &'a mut Queue) -> Self {
        let first_used = queue.next_used();
        Self { queue, first_used }
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
        let available = self.queue.avail_idx(memory, Ordering::Acquire)?.0;
        if available == self.queue.next_avail() {
            return Ok(None);
        }
        // A ring whose entries lie outside memory has an index and gives no chain, for ever.
        let chain = self.queue.iter(memory)?.next();
        Ok(Some(chain.ok_or(virtio_queue::Error::AddressOverflow)?))
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
        Ok(self.queue.add_used(memory, head, written)?)
    }

    /// Chains given back since this was made.
    pub fn used(&self) -> u64 {
        self.queue.next_used().wrapping_sub(self.first_used).into()
    }

    /// Returns several chains to the driver, as (head, bytes written), so that it sees all of them or none.
    ///
    /// # Errors
    /// The used ring is outside guest memory.
    pub fn add_used_together(
        &mut self,
        memory: &GuestMemoryMmap,
        chains: &[(u16, u32)],
    ) -> Result<(), DeviceError> {
        let Some((&(last, last_written), others)) = chains.split_last() else {
            return Ok(());
        };
        let first = self.queue.next_used();
        for (at, &(head, written)) in others.iter().enumerate() {
            let slot = first.wrapping_add(at as u16) % self.queue.size();
            let address = self
                .queue
                .used_ring()
                .checked_add(USED_HEADER_BYTES + USED_ELEMENT_BYTES * u64::from(slot))
                .ok_or(virtio_queue::Error::AddressOverflow)?;
            // `struct virtq_used_elem`: two numbers of 32 bits.
            let element = u64::from(head) | u64::from(written) << 32;
            memory
                .write_obj(element.to_le(), GuestAddress(address))
                .map_err(virtio_queue::Error::GuestMemory)?;
        }
        // The ring's index moves with the last one, over all. What virtio-queue knows of how many there are, and so
        // whether the driver wants an interrupt, is how often it was asked: it is asked that often, for the same slot.
        for _ in chains {
            self.queue
                .set_next_used(first.wrapping_add(others.len() as u16));
            self.queue.add_used(memory, last, last_written)?;
        }
        Ok(())
    }

    /// Takes chains until there are none, and returns each with as many bytes written as `serve` says, which gets its
    /// readable and its writable part. A malformed chain is returned with nothing written. True: there were chains.
    ///
    /// # Errors
    /// The queue is broken, or `serve` has failed.
    pub fn serve(
        &mut self,
        memory: &GuestMemoryMmap,
        buffers: &mut ChainBuffers,
        mut serve: impl FnMut(GuestSlices<'_>, GuestSlices<'_>) -> io::Result<u32>,
    ) -> Result<bool, DeviceError> {
        let mut used = false;
        loop {
            self.disable_notification(memory)?;
            while let Some(chain) = self.pop(memory)? {
                let head = chain.head_index();
                let written = match buffers.collect(memory, chain) {
                    Ok((readable, writable)) => serve(readable, writable)?,
                    Err(error) => {
                        debug!(%error, "a malformed request");
                        0
                    }
                };
                self.add_used(memory, head, written)?;
                used = true;
            }
            if !self.enable_notification(memory)? {
                return Ok(used);
            }
        }
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
