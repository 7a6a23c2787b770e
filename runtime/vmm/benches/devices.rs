//! What a device costs per request, without a VM: the driver's side is played here.

#![allow(missing_docs, reason = "criterion's macros")]

#[path = "../src/test_queue.rs"]
#[allow(dead_code, reason = "shared with the tests")]
mod test_queue;

use std::fs::File;
use std::hint::black_box;
use std::io::{Read as _, Write as _};
use std::os::unix::fs::FileExt as _;
use std::os::unix::net::UnixStream;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use podvisor_vmm::{
    Access, DeviceEvent, QueueRef, SegmentDisk, SegmentMap, VirtioDevice, VsockDevice,
};
use test_queue::TestQueue;
use vm_memory::{Bytes as _, GuestAddress, GuestMemoryMmap};

const WRITE: u16 = 2;
const HEADER: u64 = 0x8000;
const STATUS: u64 = 0x9000;
const DATA: u64 = 0x10_0000;

fn memory() -> GuestMemoryMmap {
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 4 << 20)]).unwrap()
}

/// Bytes of a file in the page cache.
fn file(length: usize) -> File {
    let file = tempfile::tempfile().unwrap();
    file.write_all_at(&vec![7; length], 0).unwrap();
    file
}

fn disk(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("disk");
    for (name, kind, flags, length) in [
        ("read", 0_u32, WRITE, 4096_u32),
        ("read", 0, WRITE, 128 << 10),
        ("write", 1, 0, 4096),
    ] {
        let memory = memory();
        let map = SegmentMap::new();
        map.insert(file(1 << 20), 0, 1 << 20, Access::Ephemeral)
            .unwrap();
        let mut device = SegmentDisk::new(map);
        let mut queue = TestQueue::new(&memory, 0);
        memory.write_obj(kind, GuestAddress(HEADER)).unwrap();
        group.throughput(Throughput::Bytes(length.into()));
        group.bench_function(format!("{name} {length}"), |bencher| {
            bencher.iter(|| {
                queue.push(&[(HEADER, 16, 0), (DATA, length, flags), (STATUS, 1, WRITE)]);
                let mut queues = [QueueRef::new(&mut queue.queue)];
                black_box(
                    device
                        .process(&memory, &mut queues, DeviceEvent::Queue(0))
                        .unwrap(),
                );
                queue.used().unwrap()
            });
        });
    }
}

/// A vsock device with one connection of the guest's port 5000 to the host's port 1024.
struct Vsock<'m> {
    memory: &'m GuestMemoryMmap,
    device: VsockDevice,
    queues: [TestQueue<'m>; 3],
    host: UnixStream,
    moved: u32,
}

impl<'m> Vsock<'m> {
    fn new(memory: &'m GuestMemoryMmap) -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_io()
            .build()
            .unwrap();
        let (mut device, handle) = VsockDevice::new(3).unwrap();
        let mut queues = [0, 0x1000, 0x2000].map(|base| TestQueue::new(memory, base));
        let mut listener = handle.listen(1024);
        queues[0].push(&[(DATA, 4096, WRITE)]);
        write_header(memory, 1, 0, 0);
        queues[1].push(&[(HEADER, 44, 0)]);
        process(memory, &mut device, &mut queues, DeviceEvent::Queue(1));
        queues[0].used().unwrap();
        let host = runtime.block_on(async { listener.accept().await.unwrap().into_std().unwrap() });
        Self {
            memory,
            device,
            queues,
            host,
            moved: 0,
        }
    }

    fn process(&mut self, event: DeviceEvent) {
        process(self.memory, &mut self.device, &mut self.queues, event);
    }

    /// The guest sends `length` bytes, the host reads them.
    fn send_to_host(&mut self, buffer: &mut [u8]) {
        write_header(self.memory, 5, buffer.len() as u32, 0);
        self.queues[1].push(&[(HEADER, 44, 0), (DATA, buffer.len() as u32, 0)]);
        self.process(DeviceEvent::Queue(1));
        self.host.read_exact(buffer).unwrap();
        // What the device says of its buffer is not looked at, but has to go somewhere.
        while self.queues[0].used().is_some() {
            self.queues[0].push(&[(DATA, 4096, WRITE)]);
        }
    }

    /// The host writes `bytes`, the guest gets them, and says that it has taken them.
    fn send_to_guest(&mut self, bytes: &[u8]) {
        self.host.write_all(bytes).unwrap();
        self.queues[0].push(&[(DATA, 44 + bytes.len() as u32, WRITE)]);
        self.process(DeviceEvent::Wake);
        self.queues[0].used().unwrap();
        self.moved = self.moved.wrapping_add(bytes.len() as u32);
        write_header(self.memory, 6, 0, self.moved);
        self.queues[1].push(&[(HEADER, 44, 0)]);
        self.process(DeviceEvent::Queue(1));
    }
}

fn process(
    memory: &GuestMemoryMmap,
    device: &mut VsockDevice,
    queues: &mut [TestQueue<'_>; 3],
    event: DeviceEvent,
) {
    let mut queues = queues
        .each_mut()
        .map(|queue| QueueRef::new(&mut queue.queue));
    black_box(device.process(memory, &mut queues, event).unwrap());
}

/// A packet's header: a stream packet from port 5000 to port 1024 of the host.
fn write_header(memory: &GuestMemoryMmap, op: u16, length: u32, forwarded: u32) {
    let mut header = [0; 44];
    header[0] = 3;
    header[8] = 2;
    header[16..20].copy_from_slice(&5000_u32.to_le_bytes());
    header[20..24].copy_from_slice(&1024_u32.to_le_bytes());
    header[24..28].copy_from_slice(&length.to_le_bytes());
    header[28] = 1;
    header[30..32].copy_from_slice(&op.to_le_bytes());
    header[36..40].copy_from_slice(&(256_u32 << 10).to_le_bytes());
    header[40..44].copy_from_slice(&forwarded.to_le_bytes());
    memory.write_slice(&header, GuestAddress(HEADER)).unwrap();
}

fn vsock(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("vsock");
    for length in [64, 4096, 60 << 10] {
        let memory = memory();
        let mut rig = Vsock::new(&memory);
        let mut buffer = vec![1; length];
        group.throughput(Throughput::Bytes(length as u64));
        rig.queues[0].push(&[(DATA, 4096, WRITE)]);
        group.bench_function(format!("to host {length}"), |bencher| {
            bencher.iter(|| rig.send_to_host(&mut buffer));
        });
        let mut rig = Vsock::new(&memory);
        group.bench_function(format!("to guest {length}"), |bencher| {
            bencher.iter(|| rig.send_to_guest(&buffer));
        });
    }
}

criterion_group!(benches, disk, vsock);
criterion_main!(benches);
