mod directory;
mod files;

use nix::sys::socket::{AddressFamily, SockFlag, SockType, send, socketpair};
use virtio_bindings::bindings::virtio_ring::VRING_DESC_F_WRITE;
use vm_memory::{Bytes as _, GuestAddress};

use super::*;
use crate::test_queue::{Part, TestQueue};

const WRITE: u16 = VRING_DESC_F_WRITE as u16;
const REQUEST: u64 = 0x4000;
const ANSWER: u64 = 0x8000;

/// A device with a guest, and with a server when it is connected.
struct Rig<'m> {
    memory: &'m GuestMemoryMmap,
    device: FsDevice,
    handle: FsHandle,
    queues: [TestQueue<'m>; 2],
    /// The file that is asked for.
    node: u64,
}

impl<'m> Rig<'m> {
    fn new(memory: &'m GuestMemoryMmap) -> Self {
        let (mut device, handle) = FsDevice::new().unwrap();
        device.activate(device.features());
        Self {
            memory,
            device,
            handle,
            queues: [0, 0x1000].map(|base| TestQueue::new(memory, base)),
            node: 0x0101_0101_0101_0101,
        }
    }

    fn connect(&mut self) -> OwnedFd {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let (ours, theirs) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags).unwrap();
        self.handle.connect(ours);
        self.process(DeviceEvent::Wake);
        theirs
    }

    fn process(&mut self, event: DeviceEvent) -> u32 {
        let [high, requests] = &mut self.queues;
        let mut queues = [&mut high.queue, &mut requests.queue].map(QueueRef::new);
        self.device
            .process(self.memory, &mut queues, event)
            .unwrap()
    }

    /// Asks: a header of this operation and number, then 16 bytes more; in a chain that begins at `first`.
    fn ask(&mut self, first: u16, opcode: u32, unique: u64, answer: &[Part]) {
        self.ask_with(first, opcode, unique, &[1; 16], answer);
    }

    /// The same with these arguments, which `more` descriptors follow.
    fn ask_with(&mut self, first: u16, opcode: u32, unique: u64, arguments: &[u8], more: &[Part]) {
        let mut request = [&[1; 40], arguments].concat();
        request[4..8].copy_from_slice(&opcode.to_ne_bytes());
        request[8..16].copy_from_slice(&unique.to_ne_bytes());
        request[16..24].copy_from_slice(&self.node.to_ne_bytes());
        let address = REQUEST + 0x100 * u64::from(first);
        self.memory
            .write_slice(&request, GuestAddress(address))
            .unwrap();
        let length = arguments.len() as u32;
        let parts = [&[(address, 40, 0), (address + 40, length, 0)], more].concat();
        self.queues[1].push_at(first, &parts);
        self.process(DeviceEvent::Queue(1));
    }

    fn answered(&self, at: u64) -> (u32, i32, u64) {
        let header: [u8; 16] = self.memory.read_obj(GuestAddress(at)).unwrap();
        (
            u32_at(&header, 0),
            u32_at(&header, 4) as i32,
            u64_at(&header, 8),
        )
    }
}

fn memory() -> GuestMemoryMmap {
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x10_0000)]).unwrap()
}

/// The next request: its number and all of it.
fn next(server: &OwnedFd) -> (u64, Vec<u8>) {
    let mut request = [0; 256];
    let length = recv(server.as_raw_fd(), &mut request, MsgFlags::empty()).unwrap();
    assert_eq!(u32_at(&request, 0) as usize, length);
    (u64_at(&request, 8), request[..length].to_vec())
}

fn reply(server: &OwnedFd, number: u64, payload: &[u8]) {
    let mut message = out_header(16 + payload.len(), 0, number).to_vec();
    message.extend(payload);
    send(server.as_raw_fd(), &message, MsgFlags::empty()).unwrap();
}

#[test]
fn answers_go_to_their_requests_in_any_order() {
    let memory = memory();
    let mut rig = Rig::new(&memory);
    let server = rig.connect();
    rig.ask(
        0,
        GETATTR,
        70,
        &[(ANSWER, 16, WRITE), (ANSWER + 0x100, 8, WRITE)],
    );
    rig.ask(4, GETATTR, 71, &[(ANSWER + 0x200, 24, WRITE)]);
    let (first, request) = next(&server);
    assert_eq!((request.len(), &request[16..]), (56, &[1; 40][..]));
    let (second, _) = next(&server);
    reply(&server, second, b"to the 2");
    reply(&server, first, b"to the 1");
    assert_eq!(rig.process(DeviceEvent::Wake), 1 << 1);
    assert_eq!(rig.queues[1].used(), Some((4, 24)));
    assert_eq!(rig.queues[1].used(), Some((0, 24)));
    assert_eq!(rig.answered(ANSWER), (24, 0, 70));
    assert_eq!(rig.answered(ANSWER + 0x200), (24, 0, 71));
    let text: [u8; 8] = memory.read_obj(GuestAddress(ANSWER + 0x100)).unwrap();
    assert_eq!(&text, b"to the 1");
}

/// A header and 256 pages, each by itself.
#[test]
fn the_longest_answers_of_linux_fit() {
    let memory = memory();
    let mut rig = Rig::new(&memory);
    rig.queues[1] = TestQueue::with_size(&memory, 0xc000, 512);
    let server = rig.connect();
    let mut room = vec![(ANSWER, 16, WRITE)];
    room.extend((0..256).map(|page| (0x2_0000 + 0x100 * page, 16, WRITE)));
    rig.ask(0, GETATTR, 5, &room);
    let content: Vec<u8> = (0..4096).map(|i| (i % 251) as u8).collect();
    reply(&server, next(&server).0, &content);
    assert_eq!(rig.process(DeviceEvent::Wake), 1 << 1);
    assert_eq!(rig.queues[1].used(), Some((0, 16 + 4096)));
    assert_eq!(rig.answered(ANSWER), (16 + 4096, 0, 5));
    let last: [u8; 16] = memory.read_obj(GuestAddress(0x2_ff00)).unwrap();
    assert_eq!(last, content[4080..]);
}

#[test]
fn without_a_server_requests_fail() {
    let memory = memory();
    let mut rig = Rig::new(&memory);
    let answer = [(ANSWER, 24, WRITE)];
    rig.ask(0, GETATTR, 70, &answer);
    assert_eq!(rig.queues[1].used(), Some((0, 16)));
    assert_eq!(rig.answered(ANSWER), (16, -libc::ENOTCONN, 70));

    let server = rig.connect();
    rig.ask(0, GETATTR, 71, &answer);
    drop(server);
    assert_eq!(rig.process(DeviceEvent::Wake), 1 << 1);
    assert_eq!(rig.queues[1].used(), Some((0, 16)));
    assert_eq!(rig.answered(ANSWER), (16, -libc::ENOTCONN, 71));
    // The next one serves.
    let server = rig.connect();
    rig.ask(0, GETATTR, 72, &answer);
    reply(&server, next(&server).0, b"");
    rig.process(DeviceEvent::Wake);
    assert_eq!(rig.answered(ANSWER), (16, 0, 72));
}

#[test]
fn what_has_no_answer_is_done_when_it_is_sent() {
    let memory = memory();
    let mut rig = Rig::new(&memory);
    let server = rig.connect();
    rig.ask(0, FORGET, 1, &[]);
    assert_eq!(rig.queues[1].used(), Some((0, 0)));
    rig.ask(0, DESTROY, 2, &[(ANSWER, 16, WRITE)]);
    assert_eq!(rig.queues[1].used(), Some((0, 16)));
    assert_eq!(rig.answered(ANSWER), (16, 0, 2));
    assert_eq!(next(&server).1.len() + next(&server).1.len(), 112);
    rig.ask(0, RELEASE, 3, &[(ANSWER, 16, WRITE)]);
    assert_eq!(rig.queues[1].used(), Some((0, 16)));
    assert_eq!(rig.answered(ANSWER), (16, 0, 3));
    assert_eq!(next(&server).0, 0, "a number that stands for no request");
}

#[test]
fn answers_that_cannot_be_are_errors() {
    let memory = memory();
    let mut rig = Rig::new(&memory);
    let server = rig.connect();
    let answer = [(ANSWER, 24, WRITE)];
    rig.ask(0, GETATTR, 1, &answer);
    let (number, _) = next(&server);
    reply(&server, number ^ 1 << 40, b"of another time");
    reply(&server, number, b"longer than the room");
    rig.process(DeviceEvent::Wake);
    assert_eq!(rig.queues[1].used(), Some((0, 16)));
    assert_eq!(rig.answered(ANSWER), (16, -libc::EIO, 1));
    // Not twice.
    reply(&server, number, b"");
    assert_eq!(rig.process(DeviceEvent::Wake), 0);
    rig.ask(0, GETATTR, 2, &[(ANSWER, 8, WRITE)]);
    reply(&server, next(&server).0, b"");
    rig.process(DeviceEvent::Wake);
    assert_eq!(rig.queues[1].used(), Some((0, 0)), "no room for a header");
}

#[test]
fn a_full_socket_is_waited_for() {
    let memory = memory();
    let mut rig = Rig::new(&memory);
    let server = rig.connect();
    // Larger than what is left when it is asked for the third time or so.
    let mut sent = 0;
    let large = |rig: &mut Rig<'_>| {
        let mut request = [0; 40];
        request[4..8].copy_from_slice(&FORGET.to_ne_bytes());
        memory.write_slice(&request, GuestAddress(REQUEST)).unwrap();
        rig.queues[1].push(&[(REQUEST, 40, 0), (0x2_0000, 0x1_8000, 0)]);
        rig.process(DeviceEvent::Queue(1));
        rig.queues[1].used()
    };
    while large(&mut rig).is_some() {
        sent += 1;
        assert!(sent < 100);
    }
    assert_eq!(rig.process(DeviceEvent::Wake), 0, "still full");
    let mut buffer = vec![0; 0x2_0000];
    for _ in 0..sent {
        let length = recv(server.as_raw_fd(), &mut buffer, MsgFlags::empty()).unwrap();
        assert_eq!(length, 0x1_8028);
    }
    assert_eq!(rig.process(DeviceEvent::Wake), 1 << 1);
    assert_eq!(rig.queues[1].used(), Some((0, 0)));
    recv(server.as_raw_fd(), &mut buffer, MsgFlags::empty()).unwrap();
}

#[test]
fn a_reset_forgets_what_was_asked() {
    let memory = memory();
    let mut rig = Rig::new(&memory);
    let server = rig.connect();
    rig.ask(0, GETATTR, 1, &[(ANSWER, 24, WRITE)]);
    let (old, _) = next(&server);
    rig.device.reset();
    rig.queues = [0, 0x1000].map(|base| TestQueue::new(&memory, base));
    rig.ask(0, GETATTR, 2, &[(ANSWER, 24, WRITE)]);
    reply(&server, old, b"");
    assert_eq!(rig.process(DeviceEvent::Wake), 0);
    reply(&server, next(&server).0, b"12345678");
    rig.process(DeviceEvent::Wake);
    assert_eq!(rig.answered(ANSWER), (24, 0, 2));
}

#[test]
fn configuration_space() {
    let (device, _) = FsDevice::new().unwrap();
    let mut config = [9; 44];
    device.read_config(0, &mut config);
    assert_eq!(&config[..8], b"volumes\0");
    assert_eq!(config[36..], [1, 0, 0, 0, 0, 0, 0, 0]);
}
