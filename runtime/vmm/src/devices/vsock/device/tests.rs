//! The device driven through its queues, by a guest that plays by the rules and by one that does not. What any device
//! has to withstand is in `tests/hostile`.

mod connections;
mod flow;
mod limits;

use std::collections::{HashMap, VecDeque};
use std::io::{ErrorKind, Read as _, Write as _};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use proptest::collection::vec;
use proptest::prelude::*;
use tokio::sync::oneshot;
use virtio_bindings::bindings::virtio_ring::VRING_DESC_F_WRITE;
use virtio_queue::QueueT as _;
use vm_memory::{Bytes as _, GuestAddress};

use super::*;
use crate::devices::vsock::connection::WINDOW;
use crate::devices::vsock::handle::VsockListener;
use crate::devices::vsock::packet::{
    HEADER_BYTES, HOST_CID, Header, Op, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, TYPE_STREAM,
};
use crate::test_queue::{Part, TestQueue};

const GUEST_CID: u64 = 3;
const WRITE: u16 = VRING_DESC_F_WRITE as u16;

const TX_HEADER: u64 = 0x4000;
const TX_DATA: u64 = 0x10_0000;
const RX_BUFFERS: u64 = 0x20_0000;
const RX_BUFFER: u32 = 4096;
const MEMORY: usize = 0x40_0000;

/// The guest's receive buffer in the tests, in bytes.
const GUEST_BUFFER: u32 = 32 << 10;

fn memory() -> GuestMemoryMmap {
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap()
}

type Packet = (Header, Vec<u8>);

/// A device and the driver in the guest.
struct Rig<'m> {
    memory: &'m GuestMemoryMmap,
    device: VsockDevice,
    handle: VsockHandle,
    rx: TestQueue<'m>,
    tx: TestQueue<'m>,
    event: TestQueue<'m>,
    /// Buffers of the receive queue that the device does not have.
    idle: Vec<u16>,
}

impl<'m> Rig<'m> {
    fn new(memory: &'m GuestMemoryMmap) -> Self {
        let (device, handle) = VsockDevice::new(GUEST_CID).unwrap();
        let mut rig = Self {
            memory,
            device,
            handle,
            rx: TestQueue::new(memory, 0x1000),
            tx: TestQueue::new(memory, 0x2000),
            event: TestQueue::new(memory, 0x3000),
            idle: (0..TestQueue::SIZE).collect(),
        };
        rig.post(TestQueue::SIZE as usize);
        rig
    }

    fn process(&mut self, event: DeviceEvent) -> u32 {
        let queues = [
            &mut self.rx.queue,
            &mut self.tx.queue,
            &mut self.event.queue,
        ];
        self.device
            .process(self.memory, &mut queues.map(QueueRef::new), event)
            .unwrap()
    }

    /// Lets the device take in what happened on the host.
    fn wake(&mut self) {
        self.process(DeviceEvent::Wake);
    }

    /// Gives `count` idle receive buffers to the device.
    fn post(&mut self, count: usize) {
        for _ in 0..count.min(self.idle.len()) {
            let index = self.idle.pop().unwrap();
            let address = RX_BUFFERS + u64::from(index) * u64::from(RX_BUFFER);
            self.rx.push_at(index, &[(address, RX_BUFFER, WRITE)]);
        }
        self.process(DeviceEvent::Queue(RX));
    }

    /// The packets that the device has filled in.
    fn filled(&mut self) -> Vec<Packet> {
        let mut packets = Vec::new();
        while let Some((index, written)) = self.rx.used() {
            let address = RX_BUFFERS + u64::from(index) * u64::from(RX_BUFFER);
            let mut bytes = vec![0; written as usize];
            self.memory
                .read_slice(&mut bytes, GuestAddress(address))
                .unwrap();
            let header = Header::from_bytes(bytes[..HEADER_BYTES].try_into().unwrap());
            assert_eq!(
                (header.source_cid, header.destination_cid),
                (HOST_CID, GUEST_CID)
            );
            assert_eq!(header.length as usize, bytes.len() - HEADER_BYTES);
            packets.push((header, bytes.split_off(HEADER_BYTES)));
            self.idle.push(index as u16);
        }
        packets
    }

    /// All packets that the device has for the guest.
    fn receive(&mut self) -> Vec<Packet> {
        let mut all = Vec::new();
        loop {
            let packets = self.filled();
            self.post(usize::MAX);
            if packets.is_empty() {
                return all;
            }
            all.extend(packets);
        }
    }

    /// As `receive`: op, flags and length of each packet.
    fn receive_ops(&mut self) -> Vec<(Op, u32, u32)> {
        self.receive()
            .iter()
            .map(|(header, _)| (header.op, header.flags, header.length))
            .collect()
    }

    /// Sends any packet.
    fn send_raw(&mut self, header: Header, payload: &[u8]) {
        self.memory
            .write_slice(&header.to_bytes(), GuestAddress(TX_HEADER))
            .unwrap();
        self.memory
            .write_slice(payload, GuestAddress(TX_DATA))
            .unwrap();
        let mut parts: Vec<Part> = vec![(TX_HEADER, HEADER_BYTES as u32, 0)];
        if !payload.is_empty() {
            parts.push((TX_DATA, payload.len() as u32, 0));
        }
        self.tx.push(&parts);
        self.process(DeviceEvent::Queue(TX));
    }

    /// Sends a packet from the guest's port to the host's.
    fn send(&mut self, (host, guest): (u32, u32), op: Op, flags: u32, payload: &[u8]) {
        self.send_raw(
            Header {
                flags,
                length: payload.len() as u32,
                ..packet((host, guest), op)
            },
            payload,
        );
        assert!(self.tx.used().is_some());
    }

    /// The guest connects to a port on which `listener` listens.
    fn dial(&mut self, listener: &mut VsockListener, ports: (u32, u32)) -> UnixStream {
        self.send(ports, Op::Request, 0, &[]);
        assert_eq!(self.receive_ops(), [(Op::Response, 0, 0)]);
        listener.try_accept().unwrap()
    }

    /// The host asks for a connection to the guest's port.
    fn connect(&mut self, id: u64, port: u32) -> oneshot::Receiver<io::Result<UnixStream>> {
        let (answer, answered) = oneshot::channel();
        self.device
            .shared
            .submit(Command::Connect { id, port, answer })
            .unwrap();
        self.wake();
        answered
    }
}

fn packet((host, guest): (u32, u32), op: Op) -> Header {
    Header {
        source_cid: GUEST_CID,
        destination_cid: HOST_CID,
        source_port: guest,
        destination_port: host,
        length: 0,
        kind: TYPE_STREAM,
        op,
        flags: 0,
        buffer: GUEST_BUFFER,
        forwarded: 0,
    }
}

/// Everything that is there to be read now. The second: the stream has ended.
fn drain(stream: &mut UnixStream) -> (Vec<u8>, bool) {
    let mut all = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => return (all, true),
            Ok(count) => all.extend_from_slice(&buffer[..count]),
            Err(error) if error.kind() == ErrorKind::WouldBlock => return (all, false),
            Err(error) => panic!("{error}"),
        }
    }
}

const PORTS: (u32, u32) = (1024, 5000);
