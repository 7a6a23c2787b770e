//! Directories that have changed.

use std::time::Duration;

use super::super::super::protocol;
use super::*;

const MKDIR: u32 = 9;
const UNLINK: u32 = 10;
const ROOM: [Part; 1] = [(ANSWER, 16 + 104, WRITE)];
/// How long attributes are valid: longer than a test takes.
const VALID: u64 = 1000;

impl Rig<'_> {
    /// Changes the directory in a chain from `first` on. Returns the request's number.
    fn change(&mut self, server: &OwnedFd, first: u16, opcode: u32) -> u64 {
        let room = ANSWER + 0x100 * u64::from(first);
        self.ask(first, opcode, 1, &[(room, 16 + 8, WRITE)]);
        next(server).0
    }

    /// Asks for the attributes. Whether that goes to the server, which answers then.
    fn is_asked(&mut self, server: &OwnedFd) -> bool {
        self.ask(8, GETATTR, 5, &ROOM);
        let used = self.queues[1].used();
        if used.is_none() {
            reply(server, next(server).0, &[0; 104]);
            self.process(DeviceEvent::Wake);
            assert_eq!(self.queues[1].used(), Some((8, 120)));
        }
        used.is_none()
    }
}

/// The answer to a change, with attributes that are valid for so many seconds, and `rest`.
fn changed(server: &OwnedFd, number: u64, valid: u64, rest: &[u8]) {
    let mut attributes = [3; 104];
    attributes[..8].copy_from_slice(&valid.to_ne_bytes());
    attributes[8..12].fill(0);
    let header = out_header(16 + rest.len(), 0, number);
    let message = [&header[..], &attributes, rest].concat();
    send(server.as_raw_fd(), &message, MsgFlags::empty()).unwrap();
}

#[test]
fn its_attributes_come_with_the_answer() {
    let memory = memory();
    let mut rig = Rig::new(&memory);
    let server = rig.connect();
    let number = rig.change(&server, 0, MKDIR);
    changed(&server, number, VALID, b"the rest");
    assert_eq!(rig.process(DeviceEvent::Wake), 1 << 1);
    assert_eq!(rig.queues[1].used(), Some((0, 16 + 8)));
    assert_eq!(rig.answered(ANSWER), (16 + 8, 0, 1));
    let rest: [u8; 8] = memory.read_obj(GuestAddress(ANSWER + 16)).unwrap();
    assert_eq!(&rest, b"the rest");

    assert!(!rig.is_asked(&server));
    assert_eq!(rig.answered(ANSWER), (120, 0, 5));
    let mut attributes = [0; 104];
    memory
        .read_slice(&mut attributes, GuestAddress(ANSWER + 16))
        .unwrap();
    let left = Duration::new(u64_at(&attributes, 0), u32_at(&attributes, 8));
    assert!(left < Duration::from_secs(VALID) && left > Duration::ZERO);
    assert_eq!(attributes[12..], [3; 92]);
    // Another's are not known.
    rig.node += 1;
    assert!(rig.is_asked(&server));
}

#[test]
fn what_did_not_succeed_has_none() {
    let memory = memory();
    let mut rig = Rig::new(&memory);
    let server = rig.connect();
    let number = rig.change(&server, 0, UNLINK);
    let error = out_header(16, libc::ENOENT, number);
    send(server.as_raw_fd(), &error, MsgFlags::empty()).unwrap();
    rig.process(DeviceEvent::Wake);
    assert_eq!(rig.queues[1].used(), Some((0, 16)));
    assert_eq!(rig.answered(ANSWER), (16, -libc::ENOENT, 1));
    assert!(rig.is_asked(&server));
    // Cut short.
    let number = rig.change(&server, 0, UNLINK);
    reply(&server, number, &[0; 50]);
    rig.process(DeviceEvent::Wake);
    assert_eq!(rig.queues[1].used(), Some((0, 16)));
    assert_eq!(rig.answered(ANSWER), (16, -libc::EIO, 1));
    assert!(rig.is_asked(&server));
}

#[test]
fn they_are_known_until_something_may_change_them() {
    let memory = memory();
    type Change = fn(&mut Rig<'_>, &OwnedFd);
    let changes: [(&str, bool, Change); 6] = [
        ("time", false, |rig, server| {
            let number = rig.change(server, 0, UNLINK);
            changed(server, number, 0, b"");
            rig.process(DeviceEvent::Wake);
        }),
        ("a lookup", true, |rig, server| {
            rig.ask(0, protocol::LOOKUP, 1, &[(ANSWER, 24, WRITE)]);
            reply(server, next(server).0, b"");
            rig.process(DeviceEvent::Wake);
        }),
        ("another change", false, |rig, server| {
            rig.change(server, 0, MKDIR);
        }),
        ("its mode", false, |rig, server| {
            rig.ask(0, SETATTR, 1, &[(ANSWER, 24, WRITE)]);
            next(server);
        }),
        ("a reset", false, |rig, _| {
            rig.device.reset();
            rig.queues = [0, 0x1000].map(|base| TestQueue::new(rig.memory, base));
        }),
        ("nothing", true, |_, _| {}),
    ];
    for (what, is_known, change) in changes {
        let mut rig = Rig::new(&memory);
        let server = rig.connect();
        let number = rig.change(&server, 0, UNLINK);
        changed(&server, number, VALID, b"");
        rig.process(DeviceEvent::Wake);
        assert_eq!(rig.queues[1].used(), Some((0, 16)));
        change(&mut rig, &server);
        while rig.queues[1].used().is_some() {}
        rig.ask(8, GETATTR, 5, &ROOM);
        assert_eq!(rig.queues[1].used().is_some(), is_known, "{what}");
    }
}

/// Which of two came first is not known.
#[test]
fn changes_at_a_time_leave_none() {
    let memory = memory();
    for reverse in [false, true] {
        let mut rig = Rig::new(&memory);
        let server = rig.connect();
        let mut numbers = [0, 4].map(|first| rig.change(&server, first, UNLINK));
        if reverse {
            numbers.reverse();
        }
        for number in numbers {
            changed(&server, number, VALID, b"");
        }
        rig.process(DeviceEvent::Wake);
        assert!(rig.queues[1].used().is_some() && rig.queues[1].used().is_some());
        assert!(rig.is_asked(&server));
    }
}
