//! One connection of the guest's port 5000 to the host's port 1024.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;

use podvisor_vmm::{DeviceEvent, VsockDevice};
use vm_memory::{Bytes as _, GuestAddress, GuestMemoryMmap};

use super::test_queue::TestQueue;
use super::{DATA, HEADER, Rig, WRITE, memory, process};

const RX: usize = 0;
const TX: usize = 1;

const REQUEST: u16 = 1;
const DATA_OP: u16 = 5;
const CREDIT_UPDATE: u16 = 6;

struct Connection {
    memory: &'static GuestMemoryMmap,
    device: VsockDevice,
    queues: [TestQueue<'static>; 3],
    host: UnixStream,
    payload: Vec<u8>,
    /// Bytes that the guest has taken.
    taken: u32,
}

impl Connection {
    fn new(length: u32) -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_io()
            .build()
            .unwrap();
        let memory = memory();
        let (mut device, handle) = VsockDevice::new(3).unwrap();
        let mut queues = [0, 0x4000, 0x8000].map(|base| TestQueue::with_size(memory, base, 64));
        let mut listener = handle.listen(1024);
        queues[RX].push(&[(DATA, 4096, WRITE)]);
        write_header(memory, REQUEST, 0, 0);
        queues[TX].push(&[(HEADER, 44, 0)]);
        process(memory, &mut device, &mut queues, DeviceEvent::Queue(TX));
        queues[RX].used().unwrap();
        queues[TX].used().unwrap();
        let host = runtime.block_on(async { listener.accept().await.unwrap().into_std().unwrap() });
        Self {
            memory,
            device,
            queues,
            host,
            payload: vec![1; length as usize],
            taken: 0,
        }
    }

    fn process(&mut self, event: DeviceEvent) {
        process(self.memory, &mut self.device, &mut self.queues, event);
    }
}

/// A packet's header.
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

/// The guest sends, the host reads.
struct ToHost(Connection);

pub(super) fn to_host(length: u32) -> Box<dyn Rig> {
    let mut connection = Connection::new(length);
    connection.queues[RX].push(&[(DATA, 4096, WRITE)]);
    Box::new(ToHost(connection))
}

impl Rig for ToHost {
    fn before(&mut self) {
        let length = self.0.payload.len() as u32;
        write_header(self.0.memory, DATA_OP, length, 0);
        self.0.queues[TX].push(&[(HEADER, 44, 0), (DATA, length, 0)]);
    }

    fn process(&mut self) {
        self.0.process(DeviceEvent::Queue(TX));
    }

    fn after(&mut self) {
        self.0.queues[TX].used().unwrap();
        self.0.host.read_exact(&mut self.0.payload).unwrap();
        // What the device says of its buffer is not looked at, but has to go somewhere.
        while self.0.queues[RX].used().is_some() {
            self.0.queues[RX].push(&[(DATA, 4096, WRITE)]);
        }
    }
}

/// The host writes; the guest gets it, and says with the next one that it has taken it.
struct ToGuest(Connection);

pub(super) fn to_guest(length: u32) -> Box<dyn Rig> {
    Box::new(ToGuest(Connection::new(length)))
}

impl Rig for ToGuest {
    fn before(&mut self) {
        write_header(self.0.memory, CREDIT_UPDATE, 0, self.0.taken);
        self.0.queues[TX].push(&[(HEADER, 44, 0)]);
        self.0.process(DeviceEvent::Queue(TX));
        self.0.queues[TX].used().unwrap();
        self.0.host.write_all(&self.0.payload).unwrap();
        let length = 44 + self.0.payload.len() as u32;
        self.0.queues[RX].push(&[(DATA, length, WRITE)]);
    }

    fn process(&mut self) {
        self.0.process(DeviceEvent::Wake);
    }

    fn after(&mut self) {
        self.0.queues[RX].used().unwrap();
        self.0.taken = self.0.taken.wrapping_add(self.0.payload.len() as u32);
    }
}
