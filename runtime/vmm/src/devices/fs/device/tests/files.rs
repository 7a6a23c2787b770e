//! Files that were handed over.

use std::fs::File;
use std::io::{IoSlice, Read as _};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt as _;

use nix::sys::socket::{ControlMessage, sendmsg};

use super::super::super::protocol;
use super::*;

/// The opening that the tests have.
const HANDLE: u64 = 0x77;
/// Where what is written lies.
const CONTENT: u64 = 0x2_0000;
const READ_ROOM: [Part; 1] = [(ANSWER, 16 + 8, WRITE)];
const WRITE_ROOM: [Part; 1] = [(ANSWER, 24, WRITE)];

/// `struct fuse_read_in` or `fuse_write_in`.
fn arguments(handle: u64, offset: u64, length: u32, flags: i32) -> [u8; 40] {
    let mut arguments = [0; 40];
    arguments[..8].copy_from_slice(&handle.to_ne_bytes());
    arguments[8..16].copy_from_slice(&offset.to_ne_bytes());
    arguments[16..20].copy_from_slice(&length.to_ne_bytes());
    arguments[32..36].copy_from_slice(&flags.to_ne_bytes());
    arguments
}

impl Rig<'_> {
    fn read(&mut self, unique: u64, handle: u64, offset: u64) {
        let arguments = arguments(handle, offset, 8, 0);
        self.ask_with(0, READ, unique, &arguments, &READ_ROOM);
    }

    /// Writes the bytes at `CONTENT`.
    fn write(&mut self, unique: u64, flags: i32) {
        let arguments = arguments(HANDLE, 2, 8, flags);
        let parts = [&[(CONTENT, 8, 0)], &WRITE_ROOM[..]].concat();
        self.ask_with(0, protocol::WRITE, unique, &arguments, &parts);
    }

    /// Reads through the server, which hands `file` over.
    fn hand_over(&mut self, server: &OwnedFd, handle: u64, file: &impl AsRawFd) {
        self.read(1, handle, 0);
        let (number, _) = next(server);
        send_file(server, number, file);
        reply(server, number, b"");
        self.process(DeviceEvent::Wake);
        assert_eq!(self.queues[1].used(), Some((0, 16)));
    }

    /// Whether a read of that handle goes to the server, which answers then.
    fn is_forwarded(&mut self, server: &OwnedFd, handle: u64) -> bool {
        self.read(2, handle, 0);
        let used = self.queues[1].used();
        if used.is_none() {
            reply(server, next(server).0, b"");
            self.process(DeviceEvent::Wake);
            assert_eq!(self.queues[1].used(), Some((0, 16)));
        }
        used.is_none()
    }
}

fn send_file(server: &OwnedFd, number: u64, file: &impl AsRawFd) {
    let header = out_header(16, -HANDED_OVER, number);
    sendmsg::<()>(
        server.as_raw_fd(),
        &[IoSlice::new(&header)],
        &[ControlMessage::ScmRights(&[file.as_raw_fd()])],
        MsgFlags::empty(),
        None,
    )
    .unwrap();
}

fn file(content: &[u8]) -> File {
    let file = tempfile::tempfile().unwrap();
    file.write_all_at(content, 0).unwrap();
    file
}

#[test]
fn contents_are_moved_without_the_server() {
    let memory = memory();
    let mut rig = Rig::new(&memory);
    let server = rig.connect();
    let file = file(b"0123456789");
    rig.hand_over(&server, HANDLE, &file);

    rig.read(70, HANDLE, 1);
    assert_eq!(rig.queues[1].used(), Some((0, 16 + 8)));
    assert_eq!(rig.answered(ANSWER), (16 + 8, 0, 70));
    let content: [u8; 8] = memory.read_obj(GuestAddress(ANSWER + 16)).unwrap();
    assert_eq!(&content, b"12345678");
    // The file's end, and beyond.
    for (offset, left) in [(7, 3), (10, 0), (1 << 40, 0)] {
        rig.read(71, HANDLE, offset);
        assert_eq!(rig.queues[1].used(), Some((0, 16 + left)));
    }
    file.set_len(4).unwrap();
    rig.read(71, HANDLE, 0);
    assert_eq!(rig.queues[1].used(), Some((0, 16 + 4)));

    memory
        .write_slice(b"abcdefgh", GuestAddress(CONTENT))
        .unwrap();
    rig.write(72, 0);
    assert_eq!(rig.queues[1].used(), Some((0, 24)));
    assert_eq!(rig.answered(ANSWER), (24, 0, 72));
    let count: u32 = memory.read_obj(GuestAddress(ANSWER + 16)).unwrap();
    assert_eq!(count, 8);
    let mut content = [0; 12];
    assert_eq!(file.read_at(&mut content, 0).unwrap(), 10);
    assert_eq!(&content[..10], b"01abcdefgh");
    assert_eq!(rig.device.direct.load(Ordering::Relaxed), 6);
}

#[test]
fn a_file_is_used_as_it_was_opened() {
    let memory = memory();
    let mut rig = Rig::new(&memory);
    let server = rig.connect();
    rig.hand_over(&server, HANDLE, &File::open("/proc/self/exe").unwrap());
    rig.write(72, 0);
    assert_eq!(rig.queues[1].used(), Some((0, 16)));
    assert_eq!(rig.answered(ANSWER), (16, -libc::EBADF, 72));
    // Why something cannot be read, the server says.
    rig.read(73, HANDLE, u64::MAX);
    assert_eq!(next(&server).1.len(), 80);
}

#[test]
fn what_is_not_here_is_the_servers() {
    let memory = memory();
    let mut rig = Rig::new(&memory);
    let server = rig.connect();
    rig.hand_over(&server, HANDLE, &file(b"0123456789"));
    assert!(!rig.is_forwarded(&server, HANDLE));
    assert!(rig.is_forwarded(&server, HANDLE + 1));
    // The same opening, of another file.
    rig.node += 1;
    assert!(rig.is_forwarded(&server, HANDLE));
    rig.node -= 1;
    // Fewer bytes than it says.
    let request = arguments(HANDLE, 0, 9, 0);
    let parts = [&[(CONTENT, 8, 0)], &WRITE_ROOM[..]].concat();
    rig.ask_with(4, protocol::WRITE, 1, &request, &parts);
    assert_eq!(next(&server).1.len(), 88);
    // No room for an answer.
    rig.ask_with(8, READ, 1, &request, &[(ANSWER, 15, WRITE)]);
    assert_eq!(next(&server).1.len(), 80);
}

#[test]
fn memory_that_is_not_there_is_not_used() {
    let memory = memory();
    let mut rig = Rig::new(&memory);
    let server = rig.connect();
    let file = file(b"0123456789");
    rig.hand_over(&server, HANDLE, &file);
    let request = arguments(HANDLE, 0, 8, 0);
    let room = [(ANSWER, 16, WRITE), (1 << 40, 8, WRITE)];
    rig.ask_with(0, READ, 1, &request, &room);
    assert_eq!(rig.queues[1].used(), Some((0, 0)));
    let parts = [&[(0xf_fffc, 8, 0)], &WRITE_ROOM[..]].concat();
    rig.ask_with(0, protocol::WRITE, 1, &request, &parts);
    assert_eq!(rig.queues[1].used(), Some((0, 0)));
    let mut content = [0; 10];
    file.read_exact_at(&mut content, 0).unwrap();
    assert_eq!(&content, b"0123456789");
    assert!(!rig.is_forwarded(&server, HANDLE));
}

/// The file is one end of a pipe; the other tells when it is closed.
#[test]
fn files_are_given_up() {
    type End = fn(&mut Rig<'_>, OwnedFd);
    let memory = memory();
    let ends: [(&str, End); 7] = [
        ("closed", |rig, _| {
            let release = arguments(HANDLE, 0, 0, 0);
            rig.ask_with(0, RELEASE, 1, &release, &WRITE_ROOM);
        }),
        ("appended to", |rig, _| rig.write(1, libc::O_APPEND)),
        ("its mode set", |rig, _| {
            let mode = arguments(1, 0, 0, 0);
            rig.ask_with(0, SETATTR, 1, &mode, &WRITE_ROOM);
        }),
        ("begun anew", |rig, _| rig.ask(0, INIT, 1, &WRITE_ROOM)),
        ("unmounted", |rig, _| rig.ask(0, DESTROY, 1, &WRITE_ROOM)),
        ("reset", |rig, _| rig.device.reset()),
        ("no server", |rig, server| {
            drop(server);
            rig.process(DeviceEvent::Wake);
        }),
    ];
    for (how, end) in ends {
        let mut rig = Rig::new(&memory);
        let server = rig.connect();
        let (read, write) = nix::unistd::pipe().unwrap();
        rig.hand_over(&server, HANDLE, &write);
        drop(write);
        end(&mut rig, server);
        let flags = nix::fcntl::OFlag::O_NONBLOCK;
        nix::fcntl::fcntl(&read, nix::fcntl::FcntlArg::F_SETFL(flags)).unwrap();
        assert_eq!(File::from(read).read(&mut [0]).unwrap(), 0, "{how}");
    }
}

#[test]
fn other_files_are_kept() {
    let memory = memory();
    let mut rig = Rig::new(&memory);
    let server = rig.connect();
    let file = file(b"0123456789");
    rig.hand_over(&server, HANDLE, &file);
    let release = arguments(HANDLE + 1, 0, 0, 0);
    rig.ask_with(0, RELEASE, 1, &release, &WRITE_ROOM);
    rig.node += 1;
    let mode = arguments(1, 0, 0, 0);
    rig.ask_with(4, SETATTR, 1, &mode, &WRITE_ROOM);
    rig.node -= 1;
    let size = arguments(1 << 3, 0, 0, 0);
    rig.ask_with(8, SETATTR, 1, &size, &WRITE_ROOM);
    assert_eq!(rig.queues[1].used(), Some((0, 16)));
    rig.read(2, HANDLE, 0);
    assert_eq!(rig.queues[1].used(), Some((0, 16 + 8)));
}

#[test]
fn a_file_that_was_closed_meanwhile_is_not_kept() {
    let memory = memory();
    let mut rig = Rig::new(&memory);
    let server = rig.connect();
    rig.read(1, HANDLE, 0);
    let (number, _) = next(&server);
    let release = arguments(HANDLE, 0, 0, 0);
    rig.ask_with(4, RELEASE, 2, &release, &[(ANSWER + 0x100, 16, WRITE)]);
    assert_eq!(rig.queues[1].used(), Some((4, 16)));
    assert_eq!(next(&server).0, 0);
    send_file(&server, number, &file(b"0123456789"));
    reply(&server, number, b"");
    rig.process(DeviceEvent::Wake);
    assert_eq!(rig.queues[1].used(), Some((0, 16)));
    assert!(rig.is_forwarded(&server, HANDLE));
}

#[test]
fn a_file_for_an_earlier_guest_is_not_kept() {
    let memory = memory();
    let mut rig = Rig::new(&memory);
    let server = rig.connect();
    rig.read(1, HANDLE, 0);
    let (old, _) = next(&server);
    rig.device.reset();
    rig.queues = [0, 0x1000].map(|base| TestQueue::new(&memory, base));
    rig.read(2, HANDLE, 0);
    send_file(&server, old, &file(b"0123456789"));
    reply(&server, next(&server).0, b"");
    rig.process(DeviceEvent::Wake);
    assert_eq!(rig.queues[1].used(), Some((0, 16)));
    assert!(rig.is_forwarded(&server, HANDLE));
}

#[test]
fn there_are_only_so_many() {
    let memory = memory();
    let mut rig = Rig::new(&memory);
    let server = rig.connect();
    let file = file(b"0123456789");
    for handle in 0..=256 {
        rig.hand_over(&server, handle, &file);
    }
    assert!(!rig.is_forwarded(&server, 255));
    assert!(rig.is_forwarded(&server, 256));
}
