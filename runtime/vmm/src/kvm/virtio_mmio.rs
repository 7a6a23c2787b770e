//! The virtio-mmio transport (virtio 1.2, 4.2): a device's registers, as vCPUs reach them.
//!
//! A vCPU's thread touches nothing but the registers. The device belongs to its own thread
//! ([`device_thread`](super::device_thread)): what the driver has set up goes there when it says `DRIVER_OK`, and a
//! reset waits until the device has done it.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::mpsc;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FAILED, VIRTIO_CONFIG_S_FEATURES_OK,
    VIRTIO_CONFIG_S_NEEDS_RESET, VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_mmio::{
    VIRTIO_MMIO_CONFIG, VIRTIO_MMIO_CONFIG_GENERATION, VIRTIO_MMIO_DEVICE_FEATURES,
    VIRTIO_MMIO_DEVICE_FEATURES_SEL, VIRTIO_MMIO_DEVICE_ID, VIRTIO_MMIO_DRIVER_FEATURES,
    VIRTIO_MMIO_DRIVER_FEATURES_SEL, VIRTIO_MMIO_INT_CONFIG, VIRTIO_MMIO_INT_VRING,
    VIRTIO_MMIO_INTERRUPT_ACK, VIRTIO_MMIO_INTERRUPT_STATUS, VIRTIO_MMIO_MAGIC_VALUE,
    VIRTIO_MMIO_QUEUE_AVAIL_HIGH, VIRTIO_MMIO_QUEUE_AVAIL_LOW, VIRTIO_MMIO_QUEUE_DESC_HIGH,
    VIRTIO_MMIO_QUEUE_DESC_LOW, VIRTIO_MMIO_QUEUE_NUM, VIRTIO_MMIO_QUEUE_NUM_MAX,
    VIRTIO_MMIO_QUEUE_READY, VIRTIO_MMIO_QUEUE_SEL, VIRTIO_MMIO_QUEUE_USED_HIGH,
    VIRTIO_MMIO_QUEUE_USED_LOW, VIRTIO_MMIO_SHM_BASE_HIGH, VIRTIO_MMIO_SHM_BASE_LOW,
    VIRTIO_MMIO_SHM_LEN_HIGH, VIRTIO_MMIO_SHM_LEN_LOW, VIRTIO_MMIO_STATUS, VIRTIO_MMIO_VENDOR_ID,
    VIRTIO_MMIO_VERSION,
};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vmm_sys_util::eventfd::EventFd;

use crate::device::VirtioDevice;

const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const VERSION: u32 = 2;
const VENDOR: u32 = u32::from_le_bytes(*b"pdvr");

/// Features of the ring, which the transport offers for every device.
const RING_FEATURES: u64 = 1 << VIRTIO_RING_F_INDIRECT_DESC | 1 << VIRTIO_RING_F_EVENT_IDX;

/// Configuration space that is kept: more than any device of ours has.
const CONFIG_BYTES: usize = 64;

/// What registers and device thread have in common.
#[derive(Debug)]
pub struct Shared {
    interrupt_status: AtomicU32,
    needs_reset: AtomicBool,
    config: Mutex<Config>,
    interrupt: EventFd,
}

#[derive(Debug)]
struct Config {
    bytes: [u8; CONFIG_BYTES],
    generation: u32,
}

impl Shared {
    /// Configuration space as `device` has it. `interrupt` raises the device's interrupt.
    pub fn new(device: &dyn VirtioDevice, interrupt: EventFd) -> Self {
        let mut bytes = [0; CONFIG_BYTES];
        device.read_config(0, &mut bytes);
        Self {
            interrupt_status: AtomicU32::new(0),
            needs_reset: AtomicBool::new(false),
            config: Mutex::new(Config {
                bytes,
                generation: 0,
            }),
            interrupt,
        }
    }

    /// Tells the driver that there are used buffers.
    pub fn buffers_used(&self) {
        self.raise(VIRTIO_MMIO_INT_VRING);
    }

    /// Tells the driver that configuration space is another now.
    pub fn config_changed(&self, device: &dyn VirtioDevice) {
        {
            let mut config = lock(&self.config);
            device.read_config(0, &mut config.bytes);
            config.generation = config.generation.wrapping_add(1);
        }
        self.raise(VIRTIO_MMIO_INT_CONFIG);
    }

    /// The driver wrote configuration space: it reads back what `device` has made of it.
    pub fn config_written(&self, device: &dyn VirtioDevice) {
        device.read_config(0, &mut lock(&self.config).bytes);
    }

    /// Tells the driver that the device does nothing more until it is reset.
    pub fn needs_reset(&self) {
        self.needs_reset.store(true, Ordering::Release);
        self.raise(VIRTIO_MMIO_INT_CONFIG);
    }

    fn raise(&self, cause: u32) {
        self.interrupt_status.fetch_or(cause, Ordering::AcqRel);
        // Full only after 2^64 - 1 interrupts that KVM did not take.
        let _ = self.interrupt.write(1);
    }

    fn clear(&self) {
        self.interrupt_status.store(0, Ordering::Release);
        self.needs_reset.store(false, Ordering::Release);
    }
}

/// What the driver wants of the device thread.
#[derive(Debug)]
pub enum Command {
    /// The driver is ready.
    Activate {
        /// What it accepted, of the device's and of the ring's features.
        features: u64,
        /// Its queues.
        queues: Vec<QueueSetup>,
    },
    /// Configuration space was written.
    WriteConfig {
        /// Where.
        offset: u64,
        /// What: as many bytes of it as `length`.
        bytes: [u8; 8],
        /// 1, 2, 4 or 8.
        length: usize,
    },
    /// Everything back to the beginning; to be answered when it is.
    Reset(mpsc::SyncSender<()>),
}

/// A queue as the driver has set it up; nothing of it is checked.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct QueueSetup {
    /// The driver may use it.
    pub ready: bool,
    /// Entries.
    pub size: u16,
    /// Guest-physical address of the descriptor table.
    pub descriptors: u64,
    /// Of the available ring.
    pub available: u64,
    /// Of the used ring.
    pub used: u64,
}

/// A way to the thread that owns the device.
#[derive(Debug)]
pub struct DeviceLink {
    /// What the thread has to do. Few at a time: a driver that is faster waits.
    pub commands: mpsc::SyncSender<Command>,
    /// Wakes the thread.
    pub doorbell: EventFd,
}

impl DeviceLink {
    fn send(&self, command: Command) {
        // A thread that has ended has a VM that ends.
        if self.commands.send(command).is_ok() {
            let _ = self.doorbell.write(1);
        }
    }
}

/// A device on the bus.
#[derive(Debug)]
pub struct VirtioMmio {
    shared: Arc<Shared>,
    registers: Mutex<Registers>,
}

#[derive(Debug)]
struct Registers {
    link: DeviceLink,
    device_type: u32,
    queue_sizes: &'static [u16],
    features: u64,
    features_sel: u32,
    driver_features: u64,
    driver_features_sel: u32,
    queue_sel: u32,
    queues: Vec<QueueSetup>,
    status: u32,
}

impl VirtioMmio {
    /// The registers of `device`.
    pub fn new(device: &dyn VirtioDevice, shared: Arc<Shared>, link: DeviceLink) -> Self {
        let queue_sizes = device.queue_sizes();
        let registers = Registers {
            link,
            device_type: device.device_type(),
            queue_sizes,
            features: device.features() | RING_FEATURES,
            features_sel: 0,
            driver_features: 0,
            driver_features_sel: 0,
            queue_sel: 0,
            queues: vec![QueueSetup::default(); queue_sizes.len()],
            status: 0,
        };
        Self {
            shared,
            registers: Mutex::new(registers),
        }
    }

    /// A vCPU reads at `offset`.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        if let Some(offset) = offset.checked_sub(VIRTIO_MMIO_CONFIG.into()) {
            self.read_config(offset, data);
            return;
        }
        // All other registers are 32 bits wide (4.2.2.2); what else is asked for is zero.
        let value = match (data.len(), offset as u32) {
            (4, VIRTIO_MMIO_INTERRUPT_STATUS) => {
                self.shared.interrupt_status.load(Ordering::Acquire)
            }
            (4, VIRTIO_MMIO_CONFIG_GENERATION) => lock(&self.shared.config).generation,
            (4, VIRTIO_MMIO_STATUS) => {
                let needs_reset = self.shared.needs_reset.load(Ordering::Acquire);
                let bit = u32::from(needs_reset) * VIRTIO_CONFIG_S_NEEDS_RESET;
                lock(&self.registers).status | bit
            }
            (4, offset) => lock(&self.registers).read(offset),
            _ => 0,
        };
        let count = data.len().min(4);
        data.fill(0);
        data[..count].copy_from_slice(&value.to_le_bytes()[..count]);
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let config = lock(&self.shared.config);
        let start = usize::try_from(offset).unwrap_or(CONFIG_BYTES);
        if let Some(rest) = config.bytes.get(start..) {
            let count = rest.len().min(data.len());
            data[..count].copy_from_slice(&rest[..count]);
        }
    }

    /// A vCPU writes at `offset`. What is not 32 bits wide, but for configuration space, has no effect.
    pub fn write(&self, offset: u64, data: &[u8]) {
        if let Some(offset) = offset.checked_sub(VIRTIO_MMIO_CONFIG.into()) {
            lock(&self.registers).write_config(offset, data);
            return;
        }
        let (Ok(value), Ok(offset)) = (data.try_into(), u32::try_from(offset)) else {
            return;
        };
        let value = u32::from_le_bytes(value);
        match offset {
            VIRTIO_MMIO_INTERRUPT_ACK => {
                self.shared
                    .interrupt_status
                    .fetch_and(!value, Ordering::AcqRel);
            }
            VIRTIO_MMIO_STATUS => lock(&self.registers).set_status(value, &self.shared),
            _ => lock(&self.registers).write(offset, value),
        }
    }
}

impl Registers {
    fn read(&self, offset: u32) -> u32 {
        match offset {
            VIRTIO_MMIO_MAGIC_VALUE => MAGIC,
            VIRTIO_MMIO_VERSION => VERSION,
            VIRTIO_MMIO_DEVICE_ID => self.device_type,
            VIRTIO_MMIO_VENDOR_ID => VENDOR,
            VIRTIO_MMIO_DEVICE_FEATURES => half(self.features, self.features_sel),
            VIRTIO_MMIO_QUEUE_NUM_MAX => {
                let size = self.queue_sizes.get(self.queue_sel as usize);
                size.copied().unwrap_or(0).into()
            }
            VIRTIO_MMIO_QUEUE_READY => {
                let queue = self.queues.get(self.queue_sel as usize);
                queue.is_some_and(|queue| queue.ready).into()
            }
            // There is no shared memory region: its length is all ones (4.2.2).
            VIRTIO_MMIO_SHM_LEN_LOW
            | VIRTIO_MMIO_SHM_LEN_HIGH
            | VIRTIO_MMIO_SHM_BASE_LOW
            | VIRTIO_MMIO_SHM_BASE_HIGH => u32::MAX,
            _ => 0,
        }
    }

    fn write(&mut self, offset: u32, value: u32) {
        match offset {
            VIRTIO_MMIO_DEVICE_FEATURES_SEL => self.features_sel = value,
            VIRTIO_MMIO_DRIVER_FEATURES_SEL => self.driver_features_sel = value,
            VIRTIO_MMIO_DRIVER_FEATURES if self.status & VIRTIO_CONFIG_S_FEATURES_OK == 0 => {
                set_half(&mut self.driver_features, self.driver_features_sel, value);
            }
            VIRTIO_MMIO_QUEUE_SEL => self.queue_sel = value,
            // Once the driver is ready, the queues are the device's until the next reset.
            _ if self.status & VIRTIO_CONFIG_S_DRIVER_OK == 0 => self.set_up_queue(offset, value),
            VIRTIO_MMIO_QUEUE_READY if value == 0 => {
                if let Some(queue) = self.queues.get_mut(self.queue_sel as usize) {
                    queue.ready = false;
                }
            }
            _ => {}
        }
    }

    fn write_config(&self, offset: u64, data: &[u8]) {
        let mut bytes = [0; 8];
        if let Some(target) = bytes.get_mut(..data.len()) {
            target.copy_from_slice(data);
            self.link.send(Command::WriteConfig {
                offset,
                bytes,
                length: data.len(),
            });
        }
    }

    fn set_up_queue(&mut self, offset: u32, value: u32) {
        let Some(queue) = self.queues.get_mut(self.queue_sel as usize) else {
            return;
        };
        match offset {
            VIRTIO_MMIO_QUEUE_READY => queue.ready = value == 1,
            _ if queue.ready => {}
            // A size that does not fit is as wrong as 0, which the device thread refuses.
            VIRTIO_MMIO_QUEUE_NUM => queue.size = u16::try_from(value).unwrap_or(0),
            VIRTIO_MMIO_QUEUE_DESC_LOW => set_half(&mut queue.descriptors, 0, value),
            VIRTIO_MMIO_QUEUE_DESC_HIGH => set_half(&mut queue.descriptors, 1, value),
            VIRTIO_MMIO_QUEUE_AVAIL_LOW => set_half(&mut queue.available, 0, value),
            VIRTIO_MMIO_QUEUE_AVAIL_HIGH => set_half(&mut queue.available, 1, value),
            VIRTIO_MMIO_QUEUE_USED_LOW => set_half(&mut queue.used, 0, value),
            VIRTIO_MMIO_QUEUE_USED_HIGH => set_half(&mut queue.used, 1, value),
            _ => {}
        }
    }

    /// The driver's steps (3.1.1). Bits are only added; 0 is a reset.
    fn set_status(&mut self, value: u32, shared: &Shared) {
        if value == 0 {
            self.reset(shared);
            return;
        }
        let mut added = value & !self.status;
        let unknown = self.driver_features & !self.features;
        let modern = self.driver_features & 1 << VIRTIO_F_VERSION_1 != 0;
        if unknown != 0 || !modern {
            // The driver reads it back, to learn that we do not agree.
            added &= !VIRTIO_CONFIG_S_FEATURES_OK;
        }
        let agreed = (self.status | added) & VIRTIO_CONFIG_S_FEATURES_OK != 0;
        if !agreed || value & VIRTIO_CONFIG_S_FAILED != 0 {
            added &= !VIRTIO_CONFIG_S_DRIVER_OK;
        }
        self.status |= added & !VIRTIO_CONFIG_S_NEEDS_RESET;
        if added & VIRTIO_CONFIG_S_DRIVER_OK != 0 {
            self.link.send(Command::Activate {
                features: self.driver_features,
                queues: self.queues.clone(),
            });
        }
    }

    fn reset(&mut self, shared: &Shared) {
        if self.status & VIRTIO_CONFIG_S_DRIVER_OK != 0 {
            let (done, is_done) = mpsc::sync_channel(1);
            self.link.send(Command::Reset(done));
            // An error: the thread has ended, and so will the VM.
            let _ = is_done.recv();
        }
        shared.clear();
        self.status = 0;
        self.features_sel = 0;
        self.driver_features = 0;
        self.driver_features_sel = 0;
        self.queue_sel = 0;
        self.queues.fill(QueueSetup::default());
    }
}

/// The lower (0) or upper (1) half; there are no other features.
fn half(value: u64, select: u32) -> u32 {
    match select {
        0 => value as u32,
        1 => (value >> 32) as u32,
        _ => 0,
    }
}

fn set_half(value: &mut u64, select: u32, half: u32) {
    match select {
        0 => *value = *value & !0xffff_ffff | u64::from(half),
        1 => *value = *value & 0xffff_ffff | u64::from(half) << 32,
        // A bit that is beyond what we offer: no agreement.
        _ => {}
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
