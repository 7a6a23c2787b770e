//! The device driven through its queues, by a guest that plays by the rules and by one that does not.

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

#[test]
fn the_guest_dials() {
    let memory = memory();
    let mut rig = Rig::new(&memory);
    let mut listener = rig.handle.listen(1024);
    let mut stream = rig.dial(&mut listener, PORTS);

    rig.send(PORTS, Op::Data, 0, b"hello");
    assert_eq!(drain(&mut stream), (b"hello".to_vec(), false));
    stream.write_all(b"world").unwrap();
    rig.wake();
    let packets = rig.receive();
    assert_eq!(packets.len(), 1);
    assert_eq!(
        (packets[0].0.op, &packets[0].1[..]),
        (Op::Data, &b"world"[..])
    );
    assert_eq!((packets[0].0.buffer, packets[0].0.forwarded), (WINDOW, 5));

    // The guest is done sending, the host is not.
    rig.send(PORTS, Op::Shutdown, SHUTDOWN_SEND, &[]);
    assert_eq!(drain(&mut stream), (vec![], true));
    stream.write_all(b"bye").unwrap();
    drop(stream);
    rig.wake();
    assert_eq!(
        rig.receive_ops(),
        [(Op::Data, 0, 3), (Op::Shutdown, SHUTDOWN_BOTH, 0)]
    );
    rig.send(PORTS, Op::Shutdown, SHUTDOWN_BOTH, &[]);
    assert_eq!(rig.receive_ops(), [(Op::Reset, 0, 0)]);
    rig.send(PORTS, Op::Reset, 0, &[]);
    assert_eq!(rig.receive_ops(), [], "a reset is not answered");
}

#[test]
fn the_host_dials() {
    let memory = memory();
    let mut rig = Rig::new(&memory);
    let mut answered = rig.connect(77, 1025);
    let packets = rig.receive();
    assert_eq!(
        (packets[0].0.op, packets[0].0.destination_port),
        (Op::Request, 1025)
    );
    let ports = (packets[0].0.source_port, 1025);
    assert!(answered.try_recv().is_err());
    rig.send(ports, Op::Response, 0, &[]);
    let mut stream = answered.try_recv().unwrap().unwrap();
    stream.write_all(b"x").unwrap();
    rig.wake();
    assert_eq!(rig.receive_ops(), [(Op::Data, 0, 1)]);

    let mut refused = rig.connect(78, 1026);
    let port = rig.receive()[0].0.source_port;
    rig.send((port, 1026), Op::Reset, 0, &[]);
    assert_eq!(
        refused.try_recv().unwrap().unwrap_err().kind(),
        ErrorKind::ConnectionRefused
    );

    // Taken back: before the guest knows of it, nothing; after, a reset.
    let posted = rig.idle.len();
    assert_eq!(posted, 0);
    drop(rig.connect(79, 1027));
    let port = rig.receive()[0].0.source_port;
    rig.device
        .shared
        .submit(Command::Cancel { id: 79 })
        .unwrap();
    rig.wake();
    let packets = rig.receive();
    assert_eq!(
        (packets[0].0.op, packets[0].0.source_port),
        (Op::Reset, port)
    );
    rig.send((port, 1027), Op::Response, 0, &[]);
    assert_eq!(rig.receive_ops(), [(Op::Reset, 0, 0)], "too late");

    // Nobody waits any more when the guest accepts.
    drop(rig.connect(80, 1028));
    let port = rig.receive()[0].0.source_port;
    rig.send((port, 1028), Op::Response, 0, &[]);
    assert_eq!(rig.receive_ops(), [(Op::Reset, 0, 0)]);
    assert_eq!(rig.device.muxer.connections(), 1, "only the first is left");
}

#[test]
fn a_process_dials() {
    let memory = memory();
    let mut rig = Rig::new(&memory);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("socket");
    rig.handle
        .serve(std::os::unix::net::UnixListener::bind(&path).unwrap())
        .unwrap();
    rig.wake();
    let mut process = UnixStream::connect(&path).unwrap();
    process.set_nonblocking(true).unwrap();
    process.write_all(b"CONNECT 10").unwrap();
    rig.wake();
    rig.wake();
    assert_eq!(rig.receive_ops(), []);
    process.write_all(b"25\nearly").unwrap();
    rig.wake();
    let packets = rig.receive();
    assert_eq!(
        (packets[0].0.op, packets[0].0.destination_port),
        (Op::Request, 1025)
    );
    let ports = (packets[0].0.source_port, 1025);
    rig.send(ports, Op::Response, 0, &[]);
    assert_eq!(
        drain(&mut process),
        (format!("OK {}\n", ports.0).into_bytes(), false)
    );
    rig.wake();
    assert_eq!(rig.receive_ops(), [(Op::Data, 0, 5)]);
    rig.send(ports, Op::Data, 0, b"answer");
    assert_eq!(drain(&mut process), (b"answer".to_vec(), false));

    // Refused, wrong, and gone before the answer.
    let dial = |rig: &mut Rig<'_>, line: &str| {
        let mut process = UnixStream::connect(&path).unwrap();
        process.set_nonblocking(true).unwrap();
        process.write_all(line.as_bytes()).unwrap();
        rig.wake();
        rig.wake();
        process
    };
    let mut refused = dial(&mut rig, "CONNECT 9\n");
    let port = rig.receive()[0].0.source_port;
    rig.send((port, 9), Op::Reset, 0, &[]);
    assert_eq!(drain(&mut refused), (vec![], true));
    let mut wrong = dial(&mut rig, "GET / HTTP/1.1\r\n");
    assert_eq!(drain(&mut wrong), (vec![], true));
    drop(dial(&mut rig, "CONNECT 8\n"));
    rig.wake();
    let ops: Vec<_> = rig.receive().iter().map(|(header, _)| header.op).collect();
    assert_eq!(ops, [Op::Request, Op::Reset]);
    assert_eq!(rig.device.muxer.connections(), 1);
}

#[test]
fn what_is_against_the_rules_is_reset() {
    let memory = memory();
    let mut rig = Rig::new(&memory);
    let mut listener = rig.handle.listen(1024);

    // Nobody listens; no such connection.
    rig.send((9, 1), Op::Request, 0, &[]);
    rig.send((1024, 1), Op::Data, 0, b"x");
    assert_eq!(rig.receive_ops(), [(Op::Reset, 0, 0), (Op::Reset, 0, 0)]);
    // Not from this guest, not to the host: not even an answer.
    rig.send_raw(
        Header {
            source_cid: 4,
            ..packet(PORTS, Op::Request)
        },
        &[],
    );
    rig.send_raw(
        Header {
            destination_cid: 1,
            ..packet(PORTS, Op::Request)
        },
        &[],
    );
    assert_eq!(rig.receive_ops(), []);
    // Not a stream.
    rig.send_raw(
        Header {
            kind: 2,
            ..packet(PORTS, Op::Request)
        },
        &[],
    );
    let packets = rig.receive();
    assert_eq!((packets[0].0.op, packets[0].0.kind), (Op::Reset, 2));

    let broken = [
        packet(PORTS, Op::Unknown(99)),
        packet(PORTS, Op::Request),
        packet(PORTS, Op::Response),
        Header {
            kind: 2,
            ..packet(PORTS, Op::Data)
        },
        Header {
            length: 3,
            ..packet(PORTS, Op::Data)
        }, // more than there is
        Header {
            length: 1 << 30,
            ..packet(PORTS, Op::Data)
        }, // much more
    ];
    for header in broken {
        let mut stream = rig.dial(&mut listener, PORTS);
        rig.send_raw(header, b"ab");
        assert_eq!(rig.receive_ops(), [(Op::Reset, 0, 0)], "{header:?}");
        assert_eq!(drain(&mut stream), (vec![], true));
        assert_eq!(rig.device.muxer.connections(), 0);
    }
    // A length smaller than the buffer is fine: the rest is no payload.
    let mut stream = rig.dial(&mut listener, PORTS);
    rig.send_raw(
        Header {
            length: 1,
            ..packet(PORTS, Op::Data)
        },
        b"ab",
    );
    assert_eq!(drain(&mut stream), (b"a".to_vec(), false));
}

#[test]
fn a_slow_host_stops_the_guest_and_loses_nothing() {
    let memory = memory();
    let mut rig = Rig::new(&memory);
    let mut listener = rig.handle.listen(1024);
    let mut stream = rig.dial(&mut listener, PORTS);
    let mut sent = Vec::new();
    let mut taken = 0;
    let mut credit = WINDOW;
    // A guest by the rules: it sends while it has credit.
    while credit > 0 {
        let length = credit.min(30_000);
        let chunk: Vec<u8> = (0..length)
            .map(|at| (sent.len() as u32 + at * 7) as u8)
            .collect();
        rig.send(PORTS, Op::Data, 0, &chunk);
        sent.extend(chunk);
        for (header, _) in rig.receive() {
            assert_eq!(header.op, Op::CreditUpdate);
            taken = header.forwarded;
        }
        credit = header_credit(WINDOW, sent.len(), taken);
    }
    // The socket is full, and so is the window, except for what is not worth a packet yet.
    let waiting = rig.device.muxer.waiting();
    assert!(
        (3 * WINDOW as usize / 4..=WINDOW as usize).contains(&waiting),
        "{waiting}"
    );

    // The guest closes for good: it is told at once that it may forget, the host still gets all of it.
    rig.send(PORTS, Op::Shutdown, SHUTDOWN_BOTH, &[]);
    assert_eq!(rig.receive_ops(), [(Op::Reset, 0, 0)]);
    let mut received = Vec::new();
    loop {
        let (bytes, ended) = drain(&mut stream);
        received.extend(bytes);
        if ended {
            break;
        }
        rig.wake();
    }
    assert!(received == sent);
    assert_eq!(rig.device.muxer.connections(), 0);
}

fn header_credit(window: u32, sent: usize, forwarded: u32) -> u32 {
    window - (sent as u32 - forwarded)
}

#[test]
fn more_than_the_credit_is_a_violation() {
    let memory = memory();
    let mut rig = Rig::new(&memory);
    let mut listener = rig.handle.listen(1024);
    let stream = rig.dial(&mut listener, PORTS);
    let mut ops = Vec::new();
    for _ in 0..100 {
        rig.send(PORTS, Op::Data, 0, &vec![1; 32 << 10]);
        ops.extend(rig.receive_ops());
        assert!(rig.device.muxer.waiting() <= WINDOW as usize);
    }
    assert!(ops.contains(&(Op::Reset, 0, 0)));
    drop(stream);
}

#[test]
fn the_guests_credit_is_kept() {
    let memory = memory();
    let mut rig = Rig::new(&memory);
    let mut listener = rig.handle.listen(1024);
    let mut stream = rig.dial(&mut listener, PORTS);
    stream
        .write_all(&vec![5; 2 * GUEST_BUFFER as usize])
        .unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    rig.wake();
    let ops = rig.receive_ops();
    let bytes: u32 = ops.iter().map(|(_, _, length)| length).sum();
    assert_eq!(bytes, GUEST_BUFFER);
    assert_eq!(ops.last().unwrap().0, Op::CreditRequest);
    let update = Header {
        forwarded: GUEST_BUFFER,
        ..packet(PORTS, Op::CreditUpdate)
    };
    rig.send_raw(update, &[]);
    let ops = rig.receive_ops();
    let bytes: u32 = ops.iter().map(|(_, _, length)| length).sum();
    assert_eq!(bytes, GUEST_BUFFER);
    // The end of the host's data waits for no credit once the data is out.
    rig.send_raw(
        Header {
            forwarded: 2 * GUEST_BUFFER,
            ..update
        },
        &[],
    );
    let ops = [ops, rig.receive_ops()].concat();
    assert_eq!(ops.last().unwrap(), &(Op::Shutdown, SHUTDOWN_SEND, 0));
}

#[test]
fn a_guest_that_takes_no_more_stops_the_host() {
    let memory = memory();
    let mut rig = Rig::new(&memory);
    let mut listener = rig.handle.listen(1024);
    let mut stream = rig.dial(&mut listener, PORTS);
    rig.send(PORTS, Op::Shutdown, SHUTDOWN_RECEIVE, &[]);
    assert_eq!(
        stream.write(b"x").unwrap_err().kind(),
        ErrorKind::BrokenPipe
    );
    rig.send(PORTS, Op::Data, 0, b"still");
    assert_eq!(drain(&mut stream), (b"still".to_vec(), false));
    drop(stream);
    rig.wake();
    assert_eq!(rig.receive_ops(), [(Op::Shutdown, SHUTDOWN_BOTH, 0)]);
}

#[test]
fn a_host_that_is_gone_stops_the_guest() {
    let memory = memory();
    let mut rig = Rig::new(&memory);
    let mut listener = rig.handle.listen(1024);
    drop(rig.dial(&mut listener, PORTS));
    // Before the device has seen that the host's end is closed.
    rig.send(PORTS, Op::Data, 0, b"lost");
    rig.wake();
    let ops = rig.receive_ops();
    assert_eq!(ops.last().unwrap(), &(Op::Shutdown, SHUTDOWN_BOTH, 0));
    assert_eq!(
        rig.device.muxer.connections(),
        1,
        "the guest has not confirmed"
    );
    rig.send(PORTS, Op::Reset, 0, &[]);
    assert_eq!(rig.device.muxer.connections(), 0);
}

#[test]
fn a_full_backlog_and_too_many_connections_are_refused() {
    let memory = memory();
    let mut rig = Rig::new(&memory);
    let _listener = rig.handle.listen(1024);
    let mut answers = HashMap::new();
    for guest_port in 0..70 {
        rig.send((1024, guest_port), Op::Request, 0, &[]);
        for (op, ..) in rig.receive_ops() {
            *answers.entry(format!("{op:?}")).or_insert(0) += 1;
        }
    }
    assert_eq!(
        answers,
        HashMap::from([("Response".to_owned(), 64), ("Reset".to_owned(), 6)])
    );

    let mut last = Vec::new();
    for id in 0..1024 {
        last.push(rig.connect(10_000 + id, 1025));
        rig.receive();
    }
    assert_eq!(rig.device.muxer.connections(), 1024);
    assert_eq!(
        last[1023].try_recv().unwrap().unwrap_err().kind(),
        ErrorKind::QuotaExceeded
    );
}

#[test]
fn replies_do_not_pile_up() {
    let memory = memory();
    let mut rig = Rig::new(&memory);
    // The guest never empties its receive queue, and sends what needs replies.
    let mut taken = 0;
    for guest_port in 0..2000 {
        rig.send_raw(packet((9, guest_port), Op::Data), &[]);
        if rig.tx.used().is_none() {
            break;
        }
        taken += 1;
    }
    assert_eq!(
        taken,
        256 + u32::from(TestQueue::SIZE),
        "then its packets wait"
    );
    // It empties it: all is answered, those that waited too.
    assert_eq!(rig.receive().len(), taken as usize + 1);
    assert!(rig.tx.used().is_some());
}

#[test]
fn malformed_chains_are_given_back() {
    let memory = memory();
    let mut rig = Rig::new(&memory);
    let malformed: [&[Part]; 4] = [
        &[(TX_HEADER, 43, 0)],
        &[(TX_HEADER, 44, WRITE)],
        &[(MEMORY as u64, 44, 0)],
        &[(TX_HEADER, 44, WRITE), (TX_DATA, 4, 0)],
    ];
    for chain in malformed {
        rig.tx.push(chain);
        rig.process(DeviceEvent::Queue(TX));
        assert_eq!(rig.tx.used(), Some((0, 0)));
    }
    // Receive buffers that hold no header, before one that does.
    let mut rig = Rig::new(&memory);
    rig.rx = TestQueue::new(&memory, 0x1000);
    rig.rx.push_at(0, &[(RX_BUFFERS, 43, WRITE)]);
    rig.rx.push_at(1, &[(MEMORY as u64 - 10, 44, WRITE)]);
    rig.rx
        .push_at(2, &[(RX_BUFFERS, 20, WRITE), (RX_BUFFERS + 20, 24, WRITE)]);
    rig.send((9, 1), Op::Data, 0, &[]);
    assert_eq!([rig.rx.used(), rig.rx.used()], [Some((0, 0)), Some((1, 0))]);
    assert_eq!(rig.rx.used(), Some((2, 44)));
}

#[test]
fn a_reset_drops_connections_but_not_requests_to_come() {
    let memory = memory();
    let mut rig = Rig::new(&memory);
    let mut listener = rig.handle.listen(1024);
    let mut stream = rig.dial(&mut listener, PORTS);
    rig.rx.queue.set_ready(false);
    let mut answered = rig.connect(77, 1025);
    rig.device.reset();
    assert_eq!(drain(&mut stream), (vec![], true));
    rig.rx.queue.set_ready(true);
    rig.post(0);
    assert_eq!(rig.receive_ops(), [(Op::Request, 0, 0)]);
    drop(rig.device);
    assert!(matches!(
        answered.try_recv(),
        Err(oneshot::error::TryRecvError::Closed)
    ));
    assert!(listener.try_accept().is_none());
}

/// What one side has sent and the other not received yet.
#[derive(Default)]
struct Pipe {
    next: u8,
    on_the_way: VecDeque<u8>,
}

impl Pipe {
    fn make(&mut self, length: usize) -> Vec<u8> {
        let bytes: Vec<u8> = (0..length)
            .map(|_| {
                self.next = self.next.wrapping_mul(5).wrapping_add(1);
                self.next
            })
            .collect();
        self.on_the_way.extend(&bytes);
        bytes
    }

    fn expect(&mut self, bytes: &[u8]) {
        assert!(
            self.on_the_way.len() >= bytes.len()
                && self
                    .on_the_way
                    .drain(..bytes.len())
                    .eq(bytes.iter().copied())
        );
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    /// Both directions, in any interleaving of a guest that keeps its credit and a host that reads when it likes: every
    /// byte arrives, in order, and then the end.
    #[test]
    fn streams_are_streams(steps in vec((0_u8..5, 1_usize..40_000), 1..120)) {
        let memory = memory();
        let mut rig = Rig::new(&memory);
        let mut listener = rig.handle.listen(1024);
        let mut stream = rig.dial(&mut listener, PORTS);
        let (mut to_host, mut to_guest) = (Pipe::default(), Pipe::default());
        let (mut sent, mut taken, mut received) = (0_u32, 0_u32, 0_u32);
        let mut host_wrote_all = true;
        let take = |packets: Vec<Packet>, to_guest: &mut Pipe, taken: &mut u32, received: &mut u32| {
            for (header, payload) in packets {
                *taken = header.forwarded;
                *received += payload.len() as u32;
                to_guest.expect(&payload);
            }
        };
        for (action, amount) in steps {
            match action {
                0 => {
                    let length = amount.min((WINDOW - (sent - taken)) as usize);
                    let bytes = to_host.make(length);
                    sent += length as u32;
                    let header = Header { length: length as u32, forwarded: received, ..packet(PORTS, Op::Data) };
                    rig.send_raw(header, &bytes);
                }
                1 => {
                    let mut bytes = vec![0; amount];
                    if let Ok(count) = stream.read(&mut bytes) {
                        to_host.expect(&bytes[..count]);
                    }
                    rig.wake();
                }
                2 if host_wrote_all => {
                    let bytes = to_guest.make(amount);
                    let written = stream.write(&bytes).unwrap_or(0);
                    to_guest.on_the_way.truncate(to_guest.on_the_way.len() - (amount - written));
                    host_wrote_all = written == amount;
                    rig.wake();
                }
                3 => {
                    let packets = rig.filled();
                    take(packets, &mut to_guest, &mut taken, &mut received);
                    rig.post(amount % 17);
                }
                _ => rig.send_raw(Header { forwarded: received, ..packet(PORTS, Op::CreditUpdate) }, &[]),
            }
            prop_assert!(rig.device.muxer.waiting() <= WINDOW as usize);
        }
        // Both close their sides; what is on the way arrives.
        rig.send_raw(Header { flags: SHUTDOWN_SEND, ..packet(PORTS, Op::Shutdown) }, &[]);
        stream.shutdown(Shutdown::Write).unwrap();
        let mut ended = (false, false);
        for _ in 0..200 {
            let (bytes, end) = drain(&mut stream);
            to_host.expect(&bytes);
            ended.0 |= end;
            rig.wake();
            let packets = rig.receive();
            ended.1 |= packets.iter().any(|(header, _)| header.op == Op::Shutdown && header.flags & SHUTDOWN_SEND != 0);
            take(packets, &mut to_guest, &mut taken, &mut received);
            rig.send_raw(Header { forwarded: received, ..packet(PORTS, Op::CreditUpdate) }, &[]);
        }
        prop_assert_eq!((to_host.on_the_way.len(), to_guest.on_the_way.len()), (0, 0));
        prop_assert_eq!(ended, (true, true));
    }

    /// Any packets and any descriptors: never a panic, never more than the limits.
    #[test]
    fn survives_any_guest(
        packets in vec(
            (
                (0_u16..9, 1022_u32..1026, 0_u32..4, 0_u32..8),
                prop_oneof![0_u32..70_000, any::<u32>()],
                prop_oneof![0_u32..70_000, any::<u32>()],
                (0_usize..9000, prop_oneof![9 => Just(1_u16), 1 => 0_u16..3]),
                0_u8..6,
            ),
            1..100,
        ),
        wild in vec((any::<u64>(), any::<u32>(), any::<u16>(), any::<u16>(), any::<u16>()), 0..20),
    ) {
        let memory = memory();
        let mut rig = Rig::new(&memory);
        let mut listeners = [rig.handle.listen(1023), rig.handle.listen(1024)];
        let mut streams = Vec::new();
        for ((op, host, guest, flags), length, number, (bytes, kind), host_action) in packets {
            let mut wire = packet((host, guest), Op::Data).to_bytes();
            wire[30] = op as u8;
            let length = if length % 3 == 0 { length } else { bytes as u32 };
            let header = Header { flags, length, kind, buffer: number, forwarded: number / 2, ..Header::from_bytes(&wire) };
            rig.send_raw(header, &vec![1; bytes]);
            streams.extend(listeners.iter_mut().filter_map(VsockListener::try_accept));
            match host_action {
                0 => drop(streams.pop()),
                1 => streams.iter_mut().for_each(|stream| drop(stream.write(&[2; 5000]))),
                2 => streams.iter_mut().for_each(|stream| drop(stream.read(&mut vec![0; 50_000]))),
                3 => drop(rig.connect(u64::from(number) + 1_000_000, guest)),
                4 => streams.iter().for_each(|stream| drop(stream.shutdown(Shutdown::Write))),
                _ => drop(rig.filled()),
            }
            rig.wake();
            rig.post(3);
            prop_assert!(rig.device.muxer.connections() <= 1024);
            prop_assert!(rig.device.muxer.waiting() <= 1024 * WINDOW as usize);
        }
        for (address, length, flags, next, head) in wild {
            rig.tx.store(head % TestQueue::SIZE, address % (2 * MEMORY as u64), length, flags, next % 20);
            rig.rx.store(head % TestQueue::SIZE, address % (2 * MEMORY as u64), length, flags, next % 20);
            rig.tx.publish(head % 20);
            rig.rx.publish(head % 20);
            let queues = [&mut rig.rx.queue, &mut rig.tx.queue, &mut rig.event.queue];
            // An impossible head or index is an error of the queue.
            let _ = rig.device.process(&memory, &mut queues.map(QueueRef::new), DeviceEvent::Queue(TX));
        }
    }
}
