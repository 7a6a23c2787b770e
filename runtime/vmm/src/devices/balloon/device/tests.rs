//! The device driven through its queues.

use virtio_bindings::bindings::virtio_ring::VRING_DESC_F_WRITE;
use virtio_queue::QueueT as _;
use vm_memory::{Bytes as _, GuestAddress, GuestMemoryBackend as _};

use super::super::pages::PAGE_BYTES;
use super::*;
use crate::test_queue::{Part, TestQueue};

const WRITE: u16 = VRING_DESC_F_WRITE as u16;
const DEFLATE: usize = 1;
const PAGE: u64 = PAGE_BYTES;
const NUMBERS: u64 = 4 * PAGE;
/// The pages that tests give away. Two regions meet at 64, memory ends at 80.
const FIRST: u32 = 16;
const LAST: u32 = 79;

fn memory() -> GuestMemoryMmap {
    let memory = GuestMemoryMmap::from_ranges(&[
        (GuestAddress(0), 64 * PAGE as usize),
        (GuestAddress(64 * PAGE), 16 * PAGE as usize),
    ])
    .unwrap();
    for page in FIRST..=LAST {
        fill(&memory, page);
    }
    memory
}

fn fill(memory: &GuestMemoryMmap, page: u32) {
    let address = GuestAddress(u64::from(page) * PAGE);
    memory.write_slice(&[7; PAGE as usize], address).unwrap();
}

/// The pages of the range of which nothing is left. Each must be there or gone as a whole.
fn gone(memory: &GuestMemoryMmap) -> Vec<u32> {
    let is_gone = |page: &u32| {
        let mut bytes = [0; PAGE as usize];
        let address = GuestAddress(u64::from(*page) * PAGE);
        memory.read_slice(&mut bytes, address).unwrap();
        let first = bytes[0];
        assert!(bytes.iter().all(|byte| *byte == first), "half of {page}");
        first == 0
    };
    (FIRST..=LAST).filter(is_gone).collect()
}

/// A device and its driver.
struct Rig<'m> {
    memory: &'m GuestMemoryMmap,
    device: BalloonDevice,
    handle: BalloonHandle,
    queues: [TestQueue<'m>; 3],
}

impl<'m> Rig<'m> {
    fn new(memory: &'m GuestMemoryMmap) -> Self {
        let (device, handle) = BalloonDevice::new().unwrap();
        Self {
            memory,
            device,
            handle,
            queues: [0, PAGE, 2 * PAGE].map(|base| TestQueue::new(memory, base)),
        }
    }

    fn process(&mut self, event: DeviceEvent) -> u32 {
        let mut queues = self
            .queues
            .each_mut()
            .map(|queue| QueueRef::new(&mut queue.queue));
        self.device
            .process(self.memory, &mut queues, event)
            .unwrap()
    }

    fn request(&mut self, queue: usize, parts: &[Part]) {
        self.queues[queue].push(parts);
        assert_eq!(self.process(DeviceEvent::Queue(queue)), 1 << queue);
        assert_eq!(self.queues[queue].used(), Some((0, 0)));
    }

    fn pages(&mut self, queue: usize, pages: &[u32]) {
        let bytes: Vec<u8> = pages.iter().flat_map(|page| page.to_le_bytes()).collect();
        self.memory
            .write_slice(&bytes, GuestAddress(NUMBERS))
            .unwrap();
        self.request(queue, &[(NUMBERS, bytes.len() as u32, 0)]);
    }

    fn released(&self) -> u64 {
        self.device.released.load(Ordering::Relaxed)
    }
}

#[test]
fn pages_in_the_balloon_leave_the_host() {
    let memory = memory();
    let mut rig = Rig::new(&memory);
    rig.pages(INFLATE, &[20, 19, 18, 30, 63, 64, 18, 79, 80, u32::MAX]);
    assert_eq!(gone(&memory), [18, 19, 20, 30, 63, 64, 79]);
    assert_eq!(rig.released(), 7 * PAGE);
    rig.pages(DEFLATE, &[20, 40]);
    assert_eq!(gone(&memory).len(), 7);
    fill(&memory, 20);
    assert!(!gone(&memory).contains(&20), "the guest has it again");

    // A number cut short is none.
    memory
        .write_slice(&[50, 0, 0, 0, 51, 0, 0], GuestAddress(NUMBERS))
        .unwrap();
    rig.request(INFLATE, &[(NUMBERS, 3, 0), (NUMBERS + 3, 4, 0)]);
    assert_eq!(gone(&memory), [18, 19, 30, 50, 63, 64, 79]);
}

#[test]
fn reported_ranges_leave_the_host_as_whole_pages() {
    let memory = memory();
    let mut rig = Rig::new(&memory);
    let at = |page: u64| page * PAGE;
    rig.request(
        REPORTING,
        &[
            (at(20), 2 * PAGE as u32, WRITE),
            (at(30) + 1, 3 * PAGE as u32, WRITE),
            (at(40) + 1, PAGE as u32, WRITE),
            (at(63), 2 * PAGE as u32, WRITE),
        ],
    );
    assert_eq!(gone(&memory), [20, 21, 31, 32, 63, 64]);
    assert_eq!(rig.released(), 6 * PAGE);
    // Not to be written, and outside memory.
    rig.request(REPORTING, &[(at(50), PAGE as u32, 0)]);
    rig.request(REPORTING, &[(at(79), 2 * PAGE as u32, WRITE)]);
    assert_eq!(rig.released(), 6 * PAGE);
}

#[test]
fn released_memory_is_no_longer_resident() {
    let memory = memory();
    let mut rig = Rig::new(&memory);
    let resident = |memory: &GuestMemoryMmap| {
        let start = memory.get_host_address(GuestAddress(0)).unwrap();
        let mut pages = [0_u8; 64];
        // SAFETY: the mapping has 64 pages, for each of which the kernel writes a byte.
        let done = unsafe { libc::mincore(start.cast(), 64 * PAGE as usize, pages.as_mut_ptr()) };
        assert_eq!(done, 0);
        pages.iter().filter(|page| **page & 1 != 0).count()
    };
    let before = resident(&memory);
    rig.request(REPORTING, &[(16 * PAGE, 48 * PAGE as u32, WRITE)]);
    assert_eq!(resident(&memory), before - 48);
}

#[test]
fn the_host_asks_and_the_driver_answers() {
    let memory = memory();
    let mut rig = Rig::new(&memory);
    let config = |rig: &Rig<'_>| {
        let mut config = [0_u8; 12];
        rig.device.read_config(0, &mut config);
        config
    };
    assert_eq!(config(&rig), [0; 12]);
    rig.handle.set_target(0x12_3456);
    assert_eq!(rig.process(DeviceEvent::Wake), CONFIG_CHANGED);
    assert!(rig.device.shared.changed.read().is_err(), "it is read");
    assert_eq!(config(&rig), [0x23, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    rig.handle.set_target(u64::MAX);
    assert_eq!(config(&rig)[..4], [0xff; 4]);

    rig.device.write_config(4, &[2, 1, 0, 0]);
    assert_eq!(rig.handle.actual(), 0x102 * PAGE);
    assert_eq!(config(&rig)[4..8], [2, 1, 0, 0]);
    // What is not that field as a whole changes nothing.
    rig.device.write_config(0, &[9; 4]);
    rig.device.write_config(4, &[9; 3]);
    rig.device.write_config(3, &[9; 8]);
    rig.device.write_config(u64::MAX, &[9; 4]);
    assert_eq!(rig.handle.actual(), 0x102 * PAGE);
    assert_eq!(config(&rig)[..4], [0xff; 4]);

    rig.device.reset();
    assert_eq!(rig.handle.actual(), 0);
    assert_eq!(config(&rig)[..4], [0xff; 4], "the host still wants it");
    rig.queues[REPORTING].queue.set_ready(false);
    assert_eq!(rig.process(DeviceEvent::Queue(REPORTING)), 0);
    assert_eq!(rig.process(DeviceEvent::Queue(7)), 0);
}
