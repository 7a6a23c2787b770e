//! The network device on a real tap: what the host's kernel gives and takes, with offloads and without.

#[path = "common/tap.rs"]
mod tap;
#[path = "../src/test_queue.rs"]
#[allow(dead_code, reason = "shared with other tests")]
mod test_queue;

use std::net::UdpSocket;
use std::os::fd::AsRawFd as _;
use std::process::Command;
use std::sync::atomic::Ordering;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, unshare};
use podvisor_vmm::{DeviceEvent, NetDevice, QueueRef, Tap, VirtioDevice as _};
use test_queue::TestQueue;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_USO4, VIRTIO_NET_F_GUEST_USO6,
    VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_HDR_F_NEEDS_CSUM, VIRTIO_NET_HDR_GSO_UDP_L4,
};
use vm_memory::{Bytes as _, GuestAddress, GuestMemoryMmap};

const WRITE: u16 = 2;
const RX: usize = 0;
const TX: usize = 1;
const SIZE: u16 = 256;
const BUFFER: u32 = 1526;
const RX_BUFFERS: u64 = 0x10_0000;
const TX_FRAME: u64 = 0x8_0000;
const HEADERS: usize = 12 + 14 + 20 + 8;

const MERGED: u64 = 1 << VIRTIO_NET_F_MRG_RXBUF;
const OFFLOADED: u64 = MERGED
    | 1 << VIRTIO_NET_F_GUEST_CSUM
    | 1 << VIRTIO_NET_F_GUEST_USO4
    | 1 << VIRTIO_NET_F_GUEST_USO6;

/// `struct virtio_net_hdr_v1`'s flags, gso_type, hdr_len, gso_size, csum_start and csum_offset.
fn header(flags: u8, gso_type: u8, gso_size: u16, csum_start: u16, csum_offset: u16) -> [u8; 12] {
    let mut header = [0; 12];
    header[0] = flags;
    header[1] = gso_type;
    header[4..6].copy_from_slice(&gso_size.to_le_bytes());
    header[6..8].copy_from_slice(&csum_start.to_le_bytes());
    header[8..10].copy_from_slice(&csum_offset.to_le_bytes());
    header
}

/// A device on a tap `tap0` in a network namespace of the thread's own. The host's end has the address 10.9.0.1, the
/// guest's 10.9.0.2.
struct Rig<'m> {
    memory: &'m GuestMemoryMmap,
    device: NetDevice,
    rx: TestQueue<'m>,
    tx: TestQueue<'m>,
}

const HOST_MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
const GUEST_MAC: [u8; 6] = [2, 0, 0, 0, 0, 2];

fn ip(arguments: &str) {
    let done = Command::new("ip").args(arguments.split(' ')).status();
    assert!(done.unwrap().success(), "ip {arguments}");
}

impl<'m> Rig<'m> {
    fn new(memory: &'m GuestMemoryMmap, features: u64) -> Option<Self> {
        if let Err(error) = unshare(CloneFlags::CLONE_NEWNET) {
            println!("SKIPPED: no network namespace: {error}");
            return None;
        }
        let tap = tap::open_tap()?;
        ip("link set tap0 address 02:00:00:00:00:01 up");
        ip("address add 10.9.0.1/24 dev tap0");
        ip("neighbour add 10.9.0.2 lladdr 02:00:00:00:00:02 dev tap0");
        let mut device = NetDevice::new(Tap::new(tap).unwrap(), GUEST_MAC, None).unwrap();
        if features & !device.features() != 0 {
            println!("SKIPPED: the kernel has no UDP segmentation on taps");
            return None;
        }
        device.activate(features);
        let mut rig = Self {
            memory,
            device,
            rx: TestQueue::with_size(memory, 0, SIZE),
            tx: TestQueue::with_size(memory, 0x8000, SIZE),
        };
        for index in 0..SIZE {
            rig.post(index);
        }
        rig.process(DeviceEvent::Queue(RX));
        Some(rig)
    }

    fn process(&mut self, event: DeviceEvent) {
        let mut queues = [&mut self.rx.queue, &mut self.tx.queue].map(QueueRef::new);
        self.device
            .process(self.memory, &mut queues, event)
            .unwrap();
    }

    fn post(&mut self, index: u16) {
        let address = RX_BUFFERS + u64::from(index) * u64::from(BUFFER);
        self.rx.push_at(index, &[(address, BUFFER, WRITE)]);
    }

    /// Whether the device asks to be woken, within `patience`.
    fn wakes(&self, patience: PollTimeout) -> bool {
        // SAFETY: the device, and so its descriptor, outlives the call.
        let wake = unsafe { std::os::fd::BorrowedFd::borrow_raw(self.device.wake_fd().unwrap()) };
        poll(&mut [PollFd::new(wake, PollFlags::POLLIN)], patience).unwrap() > 0
    }

    /// The next UDP packet for the guest with all its headers; others (multicast, IPv6) are skipped.
    fn receive(&mut self) -> Vec<u8> {
        loop {
            let mut frame = Vec::new();
            let mut expected = 1;
            while expected > 0 {
                let Some((index, written)) = self.rx.used() else {
                    let patience = PollTimeout::try_from(Duration::from_secs(10)).unwrap();
                    assert!(self.wakes(patience), "no frame comes");
                    self.process(DeviceEvent::Wake);
                    continue;
                };
                let address = RX_BUFFERS + u64::from(index) * u64::from(BUFFER);
                let mut part = vec![0; written as usize];
                self.memory
                    .read_slice(&mut part, GuestAddress(address))
                    .unwrap();
                if frame.is_empty() {
                    expected = u16::from_le_bytes([part[10], part[11]]);
                }
                frame.extend(part);
                expected -= 1;
                self.post(index as u16);
            }
            if frame.len() > HEADERS
                && frame[12 + 12..12 + 14] == [8, 0]
                && frame[12 + 14 + 9] == 17
            {
                return frame;
            }
        }
    }

    fn send(&mut self, frame: &[u8]) {
        self.memory
            .write_slice(frame, GuestAddress(TX_FRAME))
            .unwrap();
        self.tx.push(&[(TX_FRAME, frame.len() as u32, 0)]);
        self.process(DeviceEvent::Queue(TX));
        assert!(self.tx.used().is_some());
    }

    /// A UDP packet of the guest's to port 7000 of the host's, whose checksum the host is to fill in.
    fn packet(header: [u8; 12], payload: &[u8]) -> Vec<u8> {
        let (ip_length, udp_length) = (28 + payload.len() as u16, 8 + payload.len() as u16);
        let mut ip = vec![
            0x45, 0, 0, 0, 0, 0, 0x40, 0, 64, 17, 0, 0, 10, 9, 0, 2, 10, 9, 0, 1,
        ];
        ip[2..4].copy_from_slice(&ip_length.to_be_bytes());
        let checksum = !ones_sum(&ip);
        ip[10..12].copy_from_slice(&checksum.to_be_bytes());
        let mut udp = [7001_u16, 7000, udp_length, 0]
            .map(u16::to_be_bytes)
            .concat();
        // What hardware starts from: the sum of the pseudo header.
        let pseudo = [&ip[12..20], &[0, 17], &udp_length.to_be_bytes()].concat();
        udp[6..8].copy_from_slice(&ones_sum(&pseudo).to_be_bytes());
        [
            &header[..],
            &HOST_MAC,
            &GUEST_MAC,
            &[8, 0],
            &ip,
            &udp,
            payload,
        ]
        .concat()
    }
}

/// The ones' complement sum of 16-bit words (RFC 1071).
fn ones_sum(bytes: &[u8]) -> u16 {
    let words = bytes.as_chunks().0.iter();
    let sum: u32 = words.map(|word| u32::from(u16::from_be_bytes(*word))).sum();
    (sum % 0xffff) as u16
}

fn memory() -> GuestMemoryMmap {
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 4 << 20)]).unwrap()
}

fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|at| (at % 253) as u8).collect()
}

/// Sends `payload` from the host in segments of 1400 bytes, which the kernel makes, or whoever it leaves that to.
fn send_segmented(payload: &[u8]) {
    let socket = UdpSocket::bind("10.9.0.1:0").unwrap();
    let segment: libc::c_int = 1400;
    // SAFETY: the option is an int, which outlives the call.
    let set = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_UDP,
            libc::UDP_SEGMENT,
            (&raw const segment).cast(),
            size_of_val(&segment) as u32,
        )
    };
    assert_eq!(set, 0);
    assert_eq!(
        socket.send_to(payload, "10.9.0.2:7000").unwrap(),
        payload.len()
    );
}

#[test]
fn without_offloads_the_guest_gets_finished_packets() {
    let memory = memory();
    let Some(mut rig) = Rig::new(&memory, MERGED) else {
        return;
    };
    let payload = pattern(5 * 1400);
    send_segmented(&payload);
    for part in payload.chunks(1400) {
        let frame = rig.receive();
        assert_eq!(frame[..10], [0; 10]);
        assert_eq!(&frame[HEADERS..], part);
    }
}

#[test]
fn with_offloads_the_guest_gets_one_long_packet() {
    let memory = memory();
    let Some(mut rig) = Rig::new(&memory, OFFLOADED) else {
        return;
    };
    let payload = pattern(45 * 1400);
    send_segmented(&payload);
    let frame = rig.receive();
    assert_eq!(frame[0], VIRTIO_NET_HDR_F_NEEDS_CSUM as u8);
    assert_eq!(frame[1], VIRTIO_NET_HDR_GSO_UDP_L4 as u8);
    assert_eq!(frame[4..6], 1400_u16.to_le_bytes());
    assert!(frame[HEADERS..] == payload);
}

#[test]
fn the_host_finishes_the_guests_packets() {
    let memory = memory();
    let Some(mut rig) = Rig::new(&memory, OFFLOADED) else {
        return;
    };
    let socket = UdpSocket::bind("10.9.0.1:7000").unwrap();
    socket
        .set_read_timeout(Some(Duration::from_secs(10)))
        .unwrap();
    let receive = || {
        let mut buffer = vec![0; 0x1_0000];
        let length = socket.recv(&mut buffer).unwrap();
        buffer.truncate(length);
        buffer
    };
    let checksum = VIRTIO_NET_HDR_F_NEEDS_CSUM as u8;
    let payload = pattern(1000);
    let packet = Rig::packet(header(checksum, 0, 0, 34, 6), &payload);
    rig.send(&packet);
    assert_eq!(receive(), payload);

    let payload = pattern(40 * 1400);
    let segmented = header(checksum, VIRTIO_NET_HDR_GSO_UDP_L4 as u8, 1400, 34, 6);
    let packet = Rig::packet(segmented, &payload);
    rig.send(&packet);
    for part in payload.chunks(1400) {
        assert_eq!(receive(), part);
    }

    // Headers that make no sense are the kernel's to refuse.
    let packet = Rig::packet([0xff; 12], &payload);
    rig.send(&packet);
    let counters = rig.device.counters();
    assert_eq!(counters[1].0, "tx_dropped");
    assert_eq!(counters[1].1.load(Ordering::Relaxed), 1);
}

#[test]
fn without_its_interface_the_device_is_quiet() {
    let memory = memory();
    let Some(mut rig) = Rig::new(&memory, OFFLOADED) else {
        return;
    };
    ip("link delete tap0");
    // Woken at most to find out.
    if rig.wakes(PollTimeout::ZERO) {
        rig.process(DeviceEvent::Wake);
    }
    assert!(!rig.wakes(PollTimeout::ZERO));
    rig.process(DeviceEvent::Queue(RX));
    let packet = Rig::packet([0; 12], &[1; 100]);
    rig.send(&packet);
    rig.device.reset();
    rig.device.activate(OFFLOADED);
    rig.process(DeviceEvent::Queue(RX));
    assert!(!rig.wakes(PollTimeout::ZERO));
    let counters = rig.device.counters();
    assert_eq!(counters[1].1.load(Ordering::Relaxed), 1);
}
