//! The device driven through its queues, with a socket in the tap's place.

use std::io::ErrorKind;
use std::os::unix::net::UnixDatagram;

use virtio_bindings::bindings::virtio_ring::VRING_DESC_F_WRITE;
use virtio_queue::QueueT as _;
use vm_memory::{Bytes as _, GuestAddress};

use super::*;
use crate::test_queue::{Part, TestQueue};

const WRITE: u16 = VRING_DESC_F_WRITE as u16;
const MAC: [u8; 6] = [2, 0, 0, 0, 0, 7];
const HEADER: u64 = 12;
const SIZE: u16 = 128;
const TX_FRAME: u64 = 0x10_000;
const RX_BUFFERS: u64 = 0x80_000;
const MEMORY: usize = 0x20_0000;

fn memory() -> GuestMemoryMmap {
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap()
}

/// A frame with a header before it, whose `num_buffers` is not filled in.
fn frame(length: usize) -> Vec<u8> {
    let content = (0..length).map(|at| (at % 251) as u8);
    [0; HEADER as usize].into_iter().chain(content).collect()
}

/// A device, its driver, and the network.
struct Rig<'m> {
    memory: &'m GuestMemoryMmap,
    device: NetDevice,
    rx: TestQueue<'m>,
    tx: TestQueue<'m>,
    network: UnixDatagram,
    /// Size of the receive buffers, which lie one after the other.
    buffer: u32,
}

impl<'m> Rig<'m> {
    fn new(memory: &'m GuestMemoryMmap, buffer: u32, features: u64) -> Self {
        let (network, ours) = UnixDatagram::pair().unwrap();
        network.set_nonblocking(true).unwrap();
        let tap = Tap::over_socket(ours).unwrap();
        let mut device = NetDevice::new(tap, MAC, None).unwrap();
        device.activate(features);
        Self {
            memory,
            device,
            rx: TestQueue::with_size(memory, 0, SIZE),
            tx: TestQueue::with_size(memory, 0x8000, SIZE),
            network,
            buffer,
        }
    }

    fn mergeable(memory: &'m GuestMemoryMmap, buffer: u32) -> Self {
        Self::new(memory, buffer, 1 << VIRTIO_NET_F_MRG_RXBUF)
    }

    fn process(&mut self, event: DeviceEvent) -> u32 {
        let mut queues = [&mut self.rx.queue, &mut self.tx.queue].map(QueueRef::new);
        self.device
            .process(self.memory, &mut queues, event)
            .unwrap()
    }

    /// Whether the device asks to be woken.
    fn wakes(&self) -> bool {
        let mut events = [EpollEvent::default(); 2];
        self.device.epoll.wait(0, &mut events).unwrap() > 0
    }

    /// Gives the receive buffers `which` to the device.
    fn post(&mut self, which: std::ops::Range<u16>) -> u32 {
        for index in which {
            let address = RX_BUFFERS + u64::from(index) * u64::from(self.buffer);
            self.rx.push_at(index, &[(address, self.buffer, WRITE)]);
        }
        self.process(DeviceEvent::Queue(RX))
    }

    /// The next received frame with its header, and in how many buffers it came.
    fn received(&mut self) -> Option<(Vec<u8>, u16)> {
        let mut frame = Vec::new();
        let mut buffers = 0;
        let mut expected = 1;
        while buffers < expected {
            let (index, written) = self.rx.used()?;
            let address = RX_BUFFERS + u64::from(index) * u64::from(self.buffer);
            let mut part = vec![0; written as usize];
            self.memory
                .read_slice(&mut part, GuestAddress(address))
                .unwrap();
            frame.extend(part);
            expected = u16::from_le_bytes([frame[10], frame[11]]);
            buffers += 1;
        }
        frame[10..12].fill(0);
        Some((frame, buffers))
    }

    fn send(&mut self, parts: &[Part]) {
        self.tx.push(parts);
        assert_eq!(self.process(DeviceEvent::Queue(TX)), 1 << TX);
        assert_eq!(self.tx.used(), Some((0, 0)));
    }

    /// The next frame that the network has got.
    fn sent(&self) -> Option<Vec<u8>> {
        let mut bytes = vec![0; 0x2_0000];
        match self.network.recv(&mut bytes) {
            Ok(length) => {
                bytes.truncate(length);
                Some(bytes)
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => None,
            Err(error) => panic!("{error}"),
        }
    }

    fn counter(&self, name: &str) -> u64 {
        let counters = self.device.counters();
        let (_, counter) = counters.iter().find(|(found, _)| *found == name).unwrap();
        counter.load(Ordering::Relaxed)
    }
}

#[test]
fn config_space_has_the_address_and_the_mtu() {
    let (_, ours) = UnixDatagram::pair().unwrap();
    let tap = Tap::over_socket(ours).unwrap();
    let device = NetDevice::new(tap, MAC, Some(1450)).unwrap();
    assert_ne!(device.features() & 1 << VIRTIO_NET_F_MTU, 0);
    let mut config = [9; 14];
    device.read_config(0, &mut config);
    assert_eq!(config, [2, 0, 0, 0, 0, 7, 0, 0, 0, 0, 0xaa, 5, 0, 0]);
}

#[test]
fn sends_frames_as_they_are() {
    let memory = memory();
    let mut rig = Rig::mergeable(&memory, 2048);
    let whole = frame(1500);
    memory.write_slice(&whole, GuestAddress(TX_FRAME)).unwrap();
    rig.send(&[(TX_FRAME, 12, 0), (TX_FRAME + 12, 1500, 0)]);
    assert_eq!(rig.sent(), Some(whole));

    let longest = frame(MAX_FRAME_BYTES - 12);
    memory
        .write_slice(&longest, GuestAddress(TX_FRAME))
        .unwrap();
    rig.send(&[(TX_FRAME, MAX_FRAME_BYTES as u32, 0)]);
    assert_eq!(rig.sent(), Some(longest));

    rig.send(&[(TX_FRAME, MAX_FRAME_BYTES as u32 + 1, 0)]);
    rig.send(&[(MEMORY as u64 - 10, 64, 0)]);
    rig.send(&[(TX_FRAME, 12, WRITE), (TX_FRAME + 12, 60, 0)]);
    assert_eq!(rig.sent(), None);
    assert_eq!(rig.counter("tx_dropped"), 3);

    // Nobody takes frames any more, as with a tap that is gone.
    let (other, _) = UnixDatagram::pair().unwrap();
    rig.network = other;
    rig.send(&[(TX_FRAME, 72, 0)]);
    assert_eq!(rig.counter("tx_dropped"), 4);
}

#[test]
fn sends_in_turns() {
    let memory = memory();
    let mut rig = Rig::mergeable(&memory, 2048);
    rig.post(0..SIZE);
    // As many as a socket takes, then the rest is dropped: what counts is when.
    for index in 0..MAX_BATCH as u16 + 10 {
        rig.tx.push_at(index, &[(TX_FRAME, 72, 0)]);
    }
    assert_eq!(rig.process(DeviceEvent::Queue(TX)), 1 << TX);
    let returned = std::iter::from_fn(|| rig.tx.used()).count();
    assert_eq!(returned, MAX_BATCH);
    assert!(rig.wakes());
    assert_eq!(rig.process(DeviceEvent::Wake), 1 << TX);
    let returned = std::iter::from_fn(|| rig.tx.used()).count();
    assert_eq!(returned, 10);
    assert!(!rig.wakes());
}

#[test]
fn a_frame_gets_as_many_buffers_as_it_needs() {
    let memory = memory();
    let mut rig = Rig::mergeable(&memory, 1000);
    rig.post(0..100);
    let lengths = [60, 988, 989, 5000, MAX_FRAME_BYTES - 12];
    for length in lengths {
        let sent = frame(length);
        rig.network.send(&sent).unwrap();
        assert!(rig.wakes());
        assert_eq!(rig.process(DeviceEvent::Wake), 1 << RX);
        let (got, buffers) = rig.received().unwrap();
        assert!(got == sent, "{length}");
        assert_eq!(usize::from(buffers), sent.len().div_ceil(1000));
        assert!(!rig.wakes());
    }
    // Buffers of several pieces, the header in two of them.
    let mut rig = Rig::mergeable(&memory, 1000);
    let base = RX_BUFFERS;
    rig.rx.push(&[
        (base, 7, WRITE),
        (base + 7, 0, WRITE),
        (base + 7, 4, WRITE),
        (base + 11, 989, WRITE),
    ]);
    let sent = frame(500);
    rig.network.send(&sent).unwrap();
    rig.process(DeviceEvent::Queue(RX));
    assert_eq!(rig.received(), Some((sent, 1)));
}

#[test]
fn many_frames_come_in_turns() {
    let memory = memory();
    let mut rig = Rig::mergeable(&memory, 2048);
    // The other way round, as a socket holds few datagrams: what it holds arrives, and no more than a batch at once.
    rig.post(0..SIZE);
    let mut received = 0;
    for turn in 0..20 {
        let mut sent = 0;
        while rig.network.send(&frame(60 + sent)).is_ok() {
            sent += 1;
        }
        while rig.wakes() {
            rig.process(DeviceEvent::Wake);
        }
        for at in 0..sent {
            let Some((got, 1)) = rig.received() else {
                panic!("turn {turn}: {at} of {sent}")
            };
            assert_eq!(got.len(), frame(60 + at).len());
            let index = received % SIZE;
            received += 1;
            rig.post(index..index + 1);
        }
        assert!(sent > 0);
    }
}

#[test]
fn a_frame_must_fit_into_one_buffer_unless_they_merge() {
    let memory = memory();
    let mut rig = Rig::new(&memory, 1526, 0);
    rig.post(0..10);
    rig.network.send(&frame(1515)).unwrap();
    assert_eq!(rig.process(DeviceEvent::Wake), 0);
    assert_eq!(rig.counter("rx_dropped"), 1);
    let sent = frame(1514);
    rig.network.send(&sent).unwrap();
    assert_eq!(rig.process(DeviceEvent::Wake), 1 << RX);
    assert_eq!(rig.received(), Some((sent, 1)));
}

#[test]
fn waits_for_buffers_without_being_woken() {
    let memory = memory();
    let mut rig = Rig::mergeable(&memory, 1000);
    rig.network.send(&frame(60)).unwrap();
    assert!(!rig.wakes(), "there are no buffers");
    assert_eq!(rig.process(DeviceEvent::Wake), 0);
    assert_eq!(rig.post(0..2), 1 << RX);
    assert_eq!(rig.received(), Some((frame(60), 1)));

    // More than there is room for: some of it was in the buffer already.
    rig.network.send(&frame(5000)).unwrap();
    rig.network.send(&frame(70)).unwrap();
    assert!(rig.wakes());
    assert_eq!(rig.process(DeviceEvent::Wake), 0);
    assert!(!rig.wakes());
    for index in 2..6 {
        assert_eq!(rig.post(index..index + 1), 0);
        assert!(!rig.wakes());
    }
    assert_eq!(rig.post(6..8), 1 << RX);
    assert_eq!(rig.received(), Some((frame(5000), 6)));
    assert_eq!(rig.received(), Some((frame(70), 1)));
    assert_eq!(rig.counter("rx_dropped"), 0);

    // The next driver does not get what waits.
    rig.network.send(&frame(800)).unwrap();
    rig.process(DeviceEvent::Wake);
    rig.device.reset();
    rig.rx = TestQueue::with_size(&memory, 0, SIZE);
    rig.device.activate(1 << VIRTIO_NET_F_MRG_RXBUF);
    assert_eq!(rig.post(0..10), 0);
}

#[test]
fn a_frame_is_whole_whatever_was_expected() {
    let memory = memory();
    let mut rig = Rig::mergeable(&memory, 1000);
    rig.post(0..SIZE);
    let mut next = 0;
    for length in [60, 60_000, 50, 61_000, 1000, 900, 988, 989, 65_000, 3000] {
        // Two at once: the second finds what the first left in the room.
        for _ in 0..2 {
            rig.network.send(&frame(length)).unwrap();
        }
        assert_eq!(rig.process(DeviceEvent::Wake), 1 << RX);
        for _ in 0..2 {
            let (got, buffers) = rig.received().unwrap();
            assert!(got == frame(length), "{length}");
            for _ in 0..buffers {
                rig.post(next % SIZE..next % SIZE + 1);
                next += 1;
            }
        }
    }
    assert_eq!(rig.counter("rx_dropped"), 0);
    // What is longer than any frame is none.
    rig.network.send(&frame(MAX_FRAME_BYTES - 11)).unwrap();
    rig.network.send(&[0; 11]).unwrap();
    assert_eq!(rig.process(DeviceEvent::Wake), 0);
    assert_eq!(rig.counter("rx_dropped"), 2);
}

#[test]
fn malformed_buffers_are_given_back() {
    let memory = memory();
    let mut rig = Rig::mergeable(&memory, 1000);
    rig.network.send(&frame(60)).unwrap();
    rig.rx.push_at(0, &[(RX_BUFFERS, 11, WRITE)]);
    rig.rx.push_at(1, &[(MEMORY as u64 - 1, 500, WRITE)]);
    rig.rx.push_at(2, &[(RX_BUFFERS, 500, 0)]);
    let readable = (RX_BUFFERS, 64, 0);
    rig.rx
        .push_at(3, &[readable, (RX_BUFFERS + 3000, 1000, WRITE)]);
    assert_eq!(rig.process(DeviceEvent::Queue(RX)), 1 << RX);
    for index in 0..3 {
        assert_eq!(rig.rx.used(), Some((index, 0)));
    }
    assert_eq!(rig.received(), Some((frame(60), 1)));

    // One in the middle, found when a frame turns out to be long: what was before it is given back too, and the frame,
    // of which it holds a part, is lost.
    rig.rx.push_at(5, &[(RX_BUFFERS + 5000, 1000, WRITE)]);
    rig.rx.push_at(7, &[(RX_BUFFERS, 11, WRITE)]);
    rig.rx.push_at(9, &[(RX_BUFFERS + 9000, 1000, WRITE)]);
    rig.network.send(&frame(1500)).unwrap();
    rig.network.send(&frame(80)).unwrap();
    rig.process(DeviceEvent::Wake);
    assert_eq!(rig.rx.used(), Some((5, 0)));
    assert_eq!(rig.rx.used(), Some((7, 0)));
    assert!(rig.received() == Some((frame(80), 1)));
    assert_eq!(rig.counter("rx_dropped"), 1);
}

#[test]
fn a_reset_forgets_what_waits() {
    let memory = memory();
    let mut rig = Rig::mergeable(&memory, 1000);
    rig.post(0..10);
    rig.network.send(&frame(60)).unwrap();
    rig.device.reset();
    assert!(!rig.wakes());
    rig.rx = TestQueue::with_size(&memory, 0, SIZE);
    rig.device.activate(1 << VIRTIO_NET_F_MRG_RXBUF);
    assert_eq!(rig.post(0..10), 0);
    rig.network.send(&frame(70)).unwrap();
    assert!(rig.wakes());
    rig.process(DeviceEvent::Wake);
    assert_eq!(rig.received(), Some((frame(70), 1)));

    // Without a queue nothing is waited for.
    rig.network.send(&frame(60)).unwrap();
    rig.rx.queue.set_ready(false);
    assert_eq!(rig.process(DeviceEvent::Wake), 0);
    assert!(!rig.wakes());
}

#[test]
fn buffers_of_a_frame_are_seen_together() {
    let memory = memory();
    let mut rig = Rig::mergeable(&memory, 1000);
    rig.rx.queue.set_event_idx(true);
    rig.post(0..20);
    rig.network.send(&frame(7000)).unwrap();
    rig.process(DeviceEvent::Wake);
    // The driver has seen none of the 8, and asked to be told of the first: that must not go under.
    assert!(rig.rx.queue.needs_notification(&memory).unwrap());
    assert_eq!(rig.rx.queue.next_used(), 8);
    assert!(!rig.rx.queue.needs_notification(&memory).unwrap());
}
