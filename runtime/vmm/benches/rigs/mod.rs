//! Devices with a driver and a host around them, each about one request: for benches of time and of instructions.

#[path = "../../src/test_queue.rs"]
#[allow(dead_code, reason = "shared with the tests")]
mod test_queue;
mod vsock;

use std::fs::File;
use std::hint::black_box;
use std::os::unix::fs::FileExt as _;
use std::os::unix::net::UnixDatagram;

use podvisor_vmm::{
    Access, BalloonDevice, DeviceEvent, NetDevice, QueueRef, RngDevice, SegmentDisk, SegmentMap,
    Tap, VirtioDevice,
};
use test_queue::{Part, TestQueue};
use vm_memory::{Bytes as _, GuestAddress, GuestMemoryMmap};

const WRITE: u16 = 2;
const HEADER: u64 = 0x1_0000;
const STATUS: u64 = 0x1_8000;
const DATA: u64 = 0x10_0000;

/// Something that a driver asks of a device, again and again.
pub trait Rig {
    /// The driver makes it available, the host does its part.
    fn before(&mut self);

    /// What the device does.
    fn process(&mut self);

    /// Driver and host take what has come out.
    fn after(&mut self);
}

/// What is measured: a group, a name in it, the bytes moved, and how it is made.
pub struct Case {
    pub group: &'static str,
    pub name: &'static str,
    pub bytes: u32,
    pub rig: fn(u32) -> Box<dyn Rig>,
}

/// All that is measured.
pub fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    let mut add = |group, name, sizes: &[u32], rig: fn(u32) -> Box<dyn Rig>| {
        cases.extend(sizes.iter().map(|&bytes| Case {
            group,
            name,
            bytes,
            rig,
        }));
    };
    add("disk", "read", &[4096, 128 << 10], |bytes| disk(0, bytes));
    add("disk", "write", &[4096], |bytes| disk(1, bytes));
    add("vsock", "to host", &[64, 4096, 60 << 10], vsock::to_host);
    add("vsock", "to guest", &[64, 4096, 60 << 10], vsock::to_guest);
    add("net", "to host", &[60, 1500, 64 << 10], net_to_host);
    add("net", "to guest", &[60, 1500, 64 << 10], net_to_guest);
    add("rng", "fill", &[64], rng);
    add("balloon", "inflate", &[256 * 4096], inflate);
    add("balloon", "report", &[32 << 20], report);
    cases
}

/// Guest memory of 64 MiB, which lasts as long as the process.
fn memory() -> &'static GuestMemoryMmap {
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 64 << 20)]).unwrap();
    Box::leak(Box::new(memory))
}

/// A device of which one queue is used, with one chain, always the same.
struct OneChain<D> {
    memory: &'static GuestMemoryMmap,
    device: D,
    queues: Vec<TestQueue<'static>>,
    queue: usize,
    chain: Vec<Part>,
}

impl<D: VirtioDevice> OneChain<D> {
    fn new(
        memory: &'static GuestMemoryMmap,
        mut device: D,
        queue: usize,
        chain: Vec<Part>,
    ) -> Self {
        device.activate(device.features());
        let queues = (0..device.queue_sizes().len() as u64)
            .map(|index| TestQueue::with_size(memory, 0x4000 * index, 64))
            .collect();
        Self {
            memory,
            device,
            queues,
            queue,
            chain,
        }
    }

    fn process(&mut self, event: DeviceEvent) {
        let (memory, device) = (self.memory, &mut self.device);
        process(memory, device, &mut self.queues, event);
    }
}

/// Has the device work, as a transport does.
fn process(
    memory: &GuestMemoryMmap,
    device: &mut impl VirtioDevice,
    queues: &mut [TestQueue<'_>],
    event: DeviceEvent,
) {
    match queues {
        [a] => call(memory, device, [a], event),
        [a, b] => call(memory, device, [a, b], event),
        [a, b, c] => call(memory, device, [a, b, c], event),
        _ => unreachable!("no device has so many queues"),
    }
}

fn call<const N: usize>(
    memory: &GuestMemoryMmap,
    device: &mut impl VirtioDevice,
    queues: [&mut TestQueue<'_>; N],
    event: DeviceEvent,
) {
    let mut queues = queues.map(|queue| QueueRef::new(&mut queue.queue));
    black_box(device.process(memory, &mut queues, event).unwrap());
}

impl<D: VirtioDevice> Rig for OneChain<D> {
    fn before(&mut self) {
        self.queues[self.queue].push(&self.chain);
    }

    fn process(&mut self) {
        OneChain::process(self, DeviceEvent::Queue(self.queue));
    }

    fn after(&mut self) {
        self.queues[self.queue].used().unwrap();
    }
}

/// A block request to a file in the page cache.
fn disk(kind: u32, length: u32) -> Box<dyn Rig> {
    let file: File = tempfile::tempfile().unwrap();
    file.write_all_at(&vec![7; 1 << 20], 0).unwrap();
    let map = SegmentMap::new();
    map.insert(file, 0, 1 << 20, Access::Ephemeral).unwrap();
    let memory = memory();
    memory.write_obj(kind, GuestAddress(HEADER)).unwrap();
    let flags = if kind == 0 { WRITE } else { 0 };
    let chain = vec![(HEADER, 16, 0), (DATA, length, flags), (STATUS, 1, WRITE)];
    Box::new(OneChain::new(memory, SegmentDisk::new(map), 0, chain))
}

fn rng(length: u32) -> Box<dyn Rig> {
    let chain = vec![(DATA, length, WRITE)];
    Box::new(OneChain::new(memory(), RngDevice::new(), 0, chain))
}

/// A request of 256 pages in the order in which Linux gives them, nothing behind them.
fn inflate(bytes: u32) -> Box<dyn Rig> {
    let memory = memory();
    let first = DATA as u32 / 4096;
    let pages: Vec<u8> = (0..bytes / 4096)
        .rev()
        .flat_map(|page| (first + page).to_le_bytes())
        .collect();
    memory.write_slice(&pages, GuestAddress(HEADER)).unwrap();
    let chain = vec![(HEADER, pages.len() as u32, 0)];
    Box::new(OneChain::new(
        memory,
        BalloonDevice::new().unwrap().0,
        0,
        chain,
    ))
}

/// A report of 16 ranges, nothing behind them.
fn report(bytes: u32) -> Box<dyn Rig> {
    let length = bytes / 16;
    let chain = (0..16)
        .map(|range| (DATA + range * u64::from(length), length, WRITE))
        .collect();
    let device = BalloonDevice::new().unwrap().0;
    Box::new(OneChain::new(memory(), device, 2, chain))
}

/// A network device, and the network.
struct Net {
    rig: OneChain<NetDevice>,
    network: UnixDatagram,
    frame: Vec<u8>,
    /// Size of the driver's receive buffers.
    buffer: u32,
}

const NET_RX: usize = 0;
const NET_TX: usize = 1;
/// Linux makes them as large as frames are on average, between these.
const RX_BUFFER_BYTES: (u32, u32) = (1536, 4096);
const RX_BUFFERS: u16 = 64;

fn net(length: u32, chain: Vec<Part>) -> Net {
    let (network, ours) = UnixDatagram::pair().unwrap();
    let device = NetDevice::new(Tap::over_socket(ours).unwrap(), [2, 0, 0, 0, 0, 2], None);
    let mut net = Net {
        rig: OneChain::new(memory(), device.unwrap(), NET_TX, chain),
        network,
        frame: vec![0; 12 + length as usize],
        buffer: length.clamp(RX_BUFFER_BYTES.0, RX_BUFFER_BYTES.1),
    };
    for index in 0..RX_BUFFERS {
        net.post(index);
    }
    net.rig.process(DeviceEvent::Queue(NET_RX));
    net
}

impl Net {
    fn post(&mut self, index: u16) {
        let address = DATA + u64::from(index) * u64::from(self.buffer);
        self.rig.queues[NET_RX].push_at(index, &[(address, self.buffer, WRITE)]);
    }
}

/// The guest sends a frame: its header and what follows, as Linux gives it.
struct NetToHost(Net);

fn net_to_host(length: u32) -> Box<dyn Rig> {
    let chain = vec![(HEADER, 12, 0), (DATA, length, 0)];
    Box::new(NetToHost(net(length, chain)))
}

impl Rig for NetToHost {
    fn before(&mut self) {
        self.0.rig.before();
    }

    fn process(&mut self) {
        Rig::process(&mut self.0.rig);
    }

    fn after(&mut self) {
        self.0.rig.after();
        self.0.network.recv(&mut self.0.frame).unwrap();
    }
}

/// A frame for the guest, in as many buffers as it takes.
struct NetToGuest(Net);

fn net_to_guest(length: u32) -> Box<dyn Rig> {
    Box::new(NetToGuest(net(length, Vec::new())))
}

impl Rig for NetToGuest {
    fn before(&mut self) {
        self.0.network.send(&self.0.frame).unwrap();
    }

    fn process(&mut self) {
        self.0.rig.process(DeviceEvent::Wake);
    }

    fn after(&mut self) {
        let mut received = 0;
        while let Some((index, written)) = self.0.rig.queues[NET_RX].used() {
            received += written as usize;
            self.0.post(index as u16);
        }
        assert_eq!(received, self.0.frame.len());
    }
}
