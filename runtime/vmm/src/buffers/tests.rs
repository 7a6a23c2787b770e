//! Chains as slices, and what system calls do with them.

use std::io::{Read as _, Write as _};
use std::os::fd::AsFd;

use virtio_bindings::bindings::virtio_ring::VRING_DESC_F_WRITE;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::device::QueueRef;
use crate::test_queue::{Part, TestQueue};

const READ: u16 = 0;
const WRITE: u16 = VRING_DESC_F_WRITE as u16;

/// Two regions with a hole between them, so that a descriptor can span regions or reach into the hole.
fn memory() -> GuestMemoryMmap {
    GuestMemoryMmap::from_ranges(&[
        (GuestAddress(0), 0x1_0000),
        (GuestAddress(0x1_0000), 0x1_0000),
        (GuestAddress(0x4_0000), 0x1000),
    ])
    .unwrap()
}

fn chain<'m>(memory: &'m GuestMemoryMmap, parts: &[Part]) -> Chain<'m> {
    let mut queue = TestQueue::new(memory, 0);
    queue.push(parts);
    QueueRef::new(&mut queue.queue)
        .pop(memory)
        .unwrap()
        .unwrap()
}

#[test]
fn splits_and_spans_regions() {
    let memory = memory();
    let mut buffers = ChainBuffers::default();
    let parts = [
        (0x8000, 3, READ),
        (0xfffe, 4, READ),
        (0x9000, 0, READ),
        (0x9000, 5, WRITE),
        (0xa000, 2, WRITE),
    ];
    let (mut readable, mut writable) = buffers.collect(&memory, chain(&memory, &parts)).unwrap();
    memory.write_slice(b"abc", GuestAddress(0x8000)).unwrap();
    memory.write_slice(b"defg", GuestAddress(0xfffe)).unwrap();
    assert_eq!((readable.len(), writable.len()), (7, 7));

    let mut out = [0; 5];
    assert!(readable.read(&mut out));
    assert_eq!(&out, b"abcde");
    assert!(!readable.read(&mut [0; 3]), "only two bytes are left");
    assert!(readable.read(&mut out[..2]));
    assert_eq!(&out[..2], b"fg");

    writable.pop_byte().unwrap().write(b'!');
    assert!(!writable.write(b"1234567"));
    assert!(writable.write(b"12345"));
    writable.zero();
    assert!(writable.is_empty() && writable.pop_byte().is_none());
    let mut first = [0; 5];
    memory.read_slice(&mut first, GuestAddress(0x9000)).unwrap();
    assert_eq!(&first, b"12345");
    let mut second = [9; 2];
    memory
        .read_slice(&mut second, GuestAddress(0xa000))
        .unwrap();
    assert_eq!(&second, b"\0!");
}

#[test]
fn refuses_malformed_chains() {
    let memory = memory();
    let mut buffers = ChainBuffers::default();
    let cases: [(&[Part], ChainError); 4] = [
        (&[(0x8000, 1, WRITE), (0x9000, 1, READ)], ChainError::Order),
        (&[(0x1_fff0, 0x20, READ)], ChainError::OutsideMemory),
        (&[(u64::MAX - 3, 8, READ)], ChainError::OutsideMemory),
        (&[(0x3_ffff, 8, WRITE)], ChainError::OutsideMemory),
    ];
    for (parts, expected) in cases {
        assert_eq!(
            buffers.collect(&memory, chain(&memory, parts)).unwrap_err(),
            expected,
            "{parts:x?}"
        );
    }
}

#[test]
fn truncates() {
    let memory = memory();
    let mut buffers = ChainBuffers::default();
    memory
        .write_slice(b"0123456789", GuestAddress(0x8000))
        .unwrap();
    let parts = [(0x8000, 4, READ), (0x8004, 6, READ)];
    for keep in 0..12 {
        let (mut readable, _) = buffers.collect(&memory, chain(&memory, &parts)).unwrap();
        readable.truncate(keep);
        let mut out = vec![0; keep.min(10)];
        assert_eq!(readable.len(), out.len());
        assert!(readable.read(&mut out) && readable.is_empty());
        assert_eq!(out, b"0123456789"[..keep.min(10)]);
    }
}

#[test]
fn takes_the_front() {
    let memory = memory();
    let mut buffers = ChainBuffers::default();
    let parts = [(0xfffe, 4, WRITE), (0x9000, 0, WRITE), (0x8000, 4, WRITE)];
    let (_, mut writable) = buffers.collect(&memory, chain(&memory, &parts)).unwrap();
    assert!(writable.take_front(9).is_none());
    let front = writable.take_front(6).unwrap();
    assert!(writable.write(b"gh"));
    front.write(b"abcdef");
    let mut out = [0; 4];
    memory.read_slice(&mut out, GuestAddress(0xfffe)).unwrap();
    assert_eq!(&out, b"abcd");
    memory.read_slice(&mut out, GuestAddress(0x8000)).unwrap();
    assert_eq!(&out, b"efgh");

    let parts = [
        (0x8000, 1, WRITE),
        (0x8001, 1, WRITE),
        (0x8002, 1, WRITE),
        (0x8003, 1, WRITE),
        (0x8004, 9, WRITE),
    ];
    let (_, mut writable) = buffers.collect(&memory, chain(&memory, &parts)).unwrap();
    assert!(writable.take_front(5).is_none() && writable.len() == 13);
    assert!(writable.take_front(4).is_some() && writable.len() == 9);
}

#[test]
fn moves_between_memory_and_descriptors() {
    let memory = memory();
    let mut buffers = ChainBuffers::default();
    let parts = [
        (0xfff0, 0x20, READ),
        (0x8000, 0x10, WRITE),
        (0x9000, 0x10, WRITE),
    ];
    memory
        .write_slice(&[7; 0x20], GuestAddress(0xfff0))
        .unwrap();

    let mut file = tempfile::tempfile().unwrap();
    let (mut readable, mut writable) = buffers.collect(&memory, chain(&memory, &parts)).unwrap();
    assert_eq!(readable.drain_to_file(file.as_fd(), 5).unwrap(), 0x20);
    let mut content = Vec::new();
    file.read_to_end(&mut content).unwrap();
    assert_eq!(content, [&[0; 5][..], &[7; 0x20]].concat());
    assert_eq!(
        writable.fill_from_file(file.as_fd(), 0x10).unwrap(),
        0x15,
        "the file ends"
    );
    assert_eq!(writable.len(), 0x20 - 0x15);

    let (ours, mut theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    let (mut readable, mut writable) = buffers.collect(&memory, chain(&memory, &parts)).unwrap();
    assert_eq!(readable.send(ours.as_fd()).unwrap(), 0x20);
    theirs.read_exact(&mut [0; 0x20]).unwrap();
    assert_eq!(
        writable.receive(ours.as_fd(), 64).unwrap_err().kind(),
        io::ErrorKind::WouldBlock
    );
    theirs.write_all(&[8; 0x20]).unwrap();
    for limit in [3, 13, 1, 9] {
        assert_eq!(writable.receive(ours.as_fd(), limit).unwrap(), limit);
    }
    assert_eq!(
        (writable.receive(ours.as_fd(), 64).unwrap(), writable.len()),
        (6, 0)
    );
    let (_, mut writable) = buffers.collect(&memory, chain(&memory, &parts)).unwrap();
    drop(theirs);
    assert_eq!(writable.receive(ours.as_fd(), 64).unwrap(), 0);
    let (mut readable, _) = buffers.collect(&memory, chain(&memory, &parts)).unwrap();
    assert_eq!(
        readable.send(ours.as_fd()).unwrap_err().kind(),
        io::ErrorKind::BrokenPipe
    );
}
