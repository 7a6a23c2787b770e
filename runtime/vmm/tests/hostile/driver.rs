//! A driver that does anything, and the little of a transport that it takes to reach a device.
//!
//! What it does is encoded in bytes, so that property tests and fuzzers drive devices alike: records of [`RECORD`]
//! bytes, of which each is a step. Most of the numbers in them are bent towards where something is: otherwise hardly
//! any chain would get past its first descriptor.

use podvisor_vmm::{CONFIG_CHANGED, DeviceEvent, QueueRef, VirtioDevice};
use virtio_queue::{Queue, QueueT as _};
use vm_memory::{Bytes as _, GuestAddress, GuestMemoryMmap};

use crate::test_queue::{Part, TestQueue};

/// Bytes of a step.
pub const RECORD: usize = 24;

pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;
/// Descriptors of a queue in the beginning.
pub const SIZE: u16 = 64;
/// Where messages are written.
pub const MESSAGE: u64 = 0x1_0000;
/// Where there is nothing in particular.
pub const DATA: u64 = 0x1_4000;
/// Memory up to here is in two regions, then comes a hole, then a last page.
const END: u64 = 0x4_0000;
const REGIONS: [(GuestAddress, usize); 3] = [
    (GuestAddress(0), 0x2_0000),
    (GuestAddress(0x2_0000), 0x2_0000),
    (GuestAddress(0x8_0000), 0x1000),
];

/// The guest's memory.
pub fn memory() -> GuestMemoryMmap {
    GuestMemoryMmap::from_ranges(&REGIONS).unwrap()
}

/// A device with what is on the host's side of it.
pub trait Subject {
    /// The device.
    fn device(&mut self) -> &mut dyn VirtioDevice;

    /// Something happens on the host.
    fn host(&mut self, _what: u8) {}

    /// Bytes that look like what a driver says to such a device.
    fn message(&self, seed: &[u8; RECORD]) -> Vec<u8>;

    /// Does what the device is for, with a driver that keeps the rules. Panics if it does not work.
    fn check(&mut self, driver: &mut Driver<'_>);
}

/// The driver of a device, and the transport between them.
pub struct Driver<'m> {
    pub memory: &'m GuestMemoryMmap,
    pub queues: Vec<TestQueue<'m>>,
    /// The device gave up, and is not called before a reset.
    broken: bool,
}

impl<'m> Driver<'m> {
    /// A driver that has set the device up, with all features.
    pub fn new(memory: &'m GuestMemoryMmap, subject: &mut dyn Subject) -> Self {
        let mut driver = Self {
            memory,
            queues: Vec::new(),
            broken: false,
        };
        driver.reset(subject, u64::MAX);
        driver
    }

    /// Takes the steps, then resets the device, after which it has to work.
    pub fn run(mut self, subject: &mut dyn Subject, steps: &[u8]) {
        for step in steps.as_chunks().0 {
            self.step(subject, step);
        }
        self.reset(subject, u64::MAX);
        subject.check(&mut self);
    }

    /// Resets a device that gave up, as a driver does that wants to go on.
    pub fn restart(&mut self, subject: &mut dyn Subject) {
        if self.broken {
            self.reset(subject, u64::MAX);
        }
    }

    /// Resets the device and sets it up as the rules are.
    fn reset(&mut self, subject: &mut dyn Subject, features: u64) {
        let device = subject.device();
        device.reset();
        let memory = self.memory;
        self.queues = (0..device.queue_sizes().len() as u64)
            .map(|index| TestQueue::with_size(memory, 0x1000 * index, SIZE))
            .collect();
        device.activate(features & device.features());
        self.broken = false;
    }

    /// Calls the device as a transport does. True: it did something.
    pub fn process(&mut self, subject: &mut dyn Subject, event: DeviceEvent) -> bool {
        if self.broken {
            return false;
        }
        let mut queues: Vec<_> = self
            .queues
            .iter_mut()
            .map(|queue| QueueRef::new(&mut queue.queue))
            .collect();
        let result = subject.device().process(self.memory, &mut queues, event);
        let interrupts = result.unwrap_or_else(|_| {
            self.broken = true;
            0
        });
        assert_eq!(
            interrupts & !CONFIG_CHANGED & (u32::MAX << self.queues.len()),
            0
        );
        for (index, queue) in self.queues.iter_mut().enumerate() {
            if interrupts & 1 << index != 0 {
                let _ = queue.queue.needs_notification(self.memory);
            }
        }
        interrupts != 0
    }

    /// A request by the rules: it is answered. Returns the bytes written.
    pub fn request(&mut self, subject: &mut dyn Subject, queue: usize, parts: &[Part]) -> u32 {
        self.queues[queue].push(parts);
        assert!(self.process(subject, DeviceEvent::Queue(queue)));
        self.queues[queue].used().expect("no answer").1
    }

    fn step(&mut self, subject: &mut dyn Subject, step: &[u8; RECORD]) {
        // A driver that goes on with a device that gave up is not interesting for long.
        if !step[23].is_multiple_of(8) {
            self.restart(subject);
        }
        let index = usize::from(step[1]) % self.queues.len();
        let (size, descriptor, next) = (SIZE, u16::from(step[2]), u16::from(step[3]));
        let address = address_of(step[7], le64(step, 16));
        match step[0] % 16 {
            0 | 1 => {
                let flags = if step[5] < 0xf0 {
                    u16::from(step[4]) & 7
                } else {
                    le16(step, 4)
                };
                let queue = &mut self.queues[index];
                queue.store(
                    descriptor % size,
                    address,
                    length_of(step[6], le32(step, 8)),
                    flags,
                    next,
                );
                if step[0] % 16 == 1 {
                    queue.publish(descriptor % size);
                }
            }
            2 if step[5] < 0xf0 => self.queues[index].publish(descriptor % size),
            2 => self.queues[index].publish(le16(step, 2)),
            3 if step[5] >= 0xc0 => self.queues[index].set_available(le16(step, 2)),
            3..6 => drop(self.process(subject, DeviceEvent::Queue(index))),
            6 => drop(self.process(subject, DeviceEvent::Wake)),
            7 => {
                let message = subject.message(step);
                self.write(if step[6] & 1 == 0 { MESSAGE } else { address }, &message);
            }
            8 => self.write(address, &step[8..16]),
            9 => self.reset(
                subject,
                if step[2] & 1 == 0 {
                    u64::MAX
                } else {
                    le64(step, 16)
                },
            ),
            10 => set_up(&mut self.queues[index].queue, step, address),
            11 => {
                let length = usize::from(step[2] % 32);
                let mut config = vec![0; length];
                subject
                    .device()
                    .read_config(config_offset(step), &mut config);
                subject
                    .device()
                    .write_config(config_offset(step), &step[8..8 + length.min(16)]);
            }
            12 | 13 => subject.host(step[1]),
            // A request as it could be, at once.
            _ => {
                let message = subject.message(step);
                self.write(MESSAGE, &message);
                let length = length_of(step[6], le32(step, 8));
                let flags = if step[2] & 1 == 0 { 0 } else { WRITE };
                let parts = [
                    (MESSAGE, message.len() as u32, 0),
                    (address, length, flags),
                    (DATA, 1, WRITE),
                ];
                let (from, to) = [(0, 2), (0, 3), (1, 2), (1, 3)][usize::from(step[3] % 4)];
                self.queues[index].push(&parts[from..to]);
                self.process(subject, DeviceEvent::Queue(index));
            }
        }
    }

    /// Writes to guest memory as much as there is of it.
    pub fn write(&self, address: u64, bytes: &[u8]) {
        let _ = self.memory.write(bytes, GuestAddress(address));
    }
}

/// Sets a queue up in any way that a transport lets a driver do it.
fn set_up(queue: &mut Queue, step: &[u8; RECORD], address: u64) {
    queue.set_event_idx(step[2] & 1 != 0);
    queue.set_ready(step[2] & 2 != 0);
    let _ = queue.try_set_size(le16(step, 4));
    let address = GuestAddress(address);
    let _ = match step[3] % 8 {
        0 => queue.try_set_desc_table_address(address),
        1 => queue.try_set_avail_ring_address(address),
        2 => queue.try_set_used_ring_address(address),
        _ => Ok(()),
    };
}

/// An address: mostly in memory.
fn address_of(kind: u8, number: u64) -> u64 {
    match kind % 8 {
        0..4 => DATA + number % (END - DATA),
        4 => MESSAGE,
        5 => number % MESSAGE,
        6 => (number >> 8) % 3 * 0x2_0000 + 0x2_0000 - number % 64,
        _ => number,
    }
}

/// A length: mostly a usual one.
fn length_of(kind: u8, number: u32) -> u32 {
    match kind % 8 {
        0 | 1 => [0, 1, 11, 12, 16, 44, 64, 1526][number as usize % 8],
        2 | 3 => number % 5000,
        4 => number % 0x1_2000,
        5 | 6 => number % 256 * 512,
        _ => number,
    }
}

fn config_offset(step: &[u8; RECORD]) -> u64 {
    if step[3] & 1 == 0 {
        u64::from(step[3] % 64)
    } else {
        le64(step, 16)
    }
}

pub fn le16(step: &[u8; RECORD], at: usize) -> u16 {
    u16::from_le_bytes([step[at], step[at + 1]])
}

pub fn le32(step: &[u8; RECORD], at: usize) -> u32 {
    u32::from(le16(step, at)) | u32::from(le16(step, at + 2)) << 16
}

pub fn le64(step: &[u8; RECORD], at: usize) -> u64 {
    u64::from(le32(step, at)) | u64::from(le32(step, at + 4)) << 32
}
