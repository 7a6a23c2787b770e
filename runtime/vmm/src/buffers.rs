//! A descriptor chain as slices of guest memory.
//!
//! Payload goes between guest memory and a file descriptor by `readv` and its kin, without a copy in between. This
//! module holds the unsafe code that this takes, so that devices need none.
//!
//! The guest can change the bytes of a slice at any time. So nothing here makes a reference to them: they are copied
//! out once, or given to the kernel.

use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr;

use libc::iovec;
use thiserror::Error;
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap};

use crate::device::Chain;

/// Slices in one chain: what the kernel takes in one call (`IOV_MAX`).
const MAX_SLICES: usize = 1024;

/// A chain that cannot be used. The driver's fault.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum ChainError {
    /// A descriptor names memory that the guest does not have.
    #[error("a descriptor lies outside guest memory")]
    OutsideMemory,
    /// A readable descriptor follows a writable one (virtio 1.2, 2.7.4.2).
    #[error("a readable descriptor follows a writable one")]
    Order,
    /// More slices than the kernel takes in one call.
    #[error("too many descriptors")]
    TooLong,
}

/// Memory for the slices of one chain at a time. A device keeps one and uses it for every request.
#[derive(Debug, Default)]
pub struct ChainBuffers {
    slices: Vec<iovec>,
}

// SAFETY: the pointers left in `slices` are never used: `collect` clears them before it hands out any, and what it
// hands out borrows both this and guest memory.
unsafe impl Send for ChainBuffers {}

impl ChainBuffers {
    /// Splits a chain into its readable and its writable part.
    ///
    /// # Errors
    /// The chain is malformed; see [`ChainError`].
    pub fn collect<'m>(
        &'m mut self,
        memory: &'m GuestMemoryMmap,
        chain: Chain<'m>,
    ) -> Result<(GuestSlices<'m>, GuestSlices<'m>), ChainError> {
        self.slices.clear();
        let mut readable = 0;
        for (index, descriptor) in chain.enumerate() {
            // Empty descriptors give no slice, and an indirect table has room for 65535 of them.
            if index == MAX_SLICES {
                return Err(ChainError::TooLong);
            }
            if !descriptor.is_write_only() && readable < self.slices.len() {
                return Err(ChainError::Order);
            }
            for slice in memory.get_slices(descriptor.addr(), descriptor.len() as usize) {
                let slice = slice.map_err(|_| ChainError::OutsideMemory)?;
                if self.slices.len() == MAX_SLICES {
                    return Err(ChainError::TooLong);
                }
                self.slices.push(iovec {
                    iov_base: slice.ptr_guard_mut().as_ptr().cast(),
                    iov_len: slice.len(),
                });
            }
            if !descriptor.is_write_only() {
                readable = self.slices.len();
            }
        }
        let (readable, writable) = self.slices.split_at_mut(readable);
        Ok((GuestSlices::new(readable), GuestSlices::new(writable)))
    }
}

/// A sequence of slices of guest memory, consumed from the front.
#[derive(Debug)]
pub struct GuestSlices<'m> {
    /// Each is a range of guest memory, mapped and writable while `'m` lasts.
    slices: &'m mut [iovec],
    length: usize,
    memory: PhantomData<&'m GuestMemoryMmap>,
}

impl<'m> GuestSlices<'m> {
    fn new(slices: &'m mut [iovec]) -> Self {
        let length = slices.iter().map(|slice| slice.iov_len).sum();
        Self {
            slices,
            length,
            memory: PhantomData,
        }
    }

    /// Bytes left.
    pub fn len(&self) -> usize {
        self.length
    }

    /// Whether no byte is left.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Drops the first `count` bytes, or all that there are.
    pub fn advance(&mut self, count: usize) {
        let mut left = count.min(self.length);
        self.length -= left;
        let mut slices = std::mem::take(&mut self.slices);
        while let Some(first) = slices.first_mut() {
            if left < first.iov_len {
                // SAFETY: still within the range that `first` describes.
                first.iov_base = unsafe { first.iov_base.byte_add(left) };
                first.iov_len -= left;
                break;
            }
            left -= first.iov_len;
            slices = &mut slices[1..];
        }
        self.slices = slices;
    }

    /// Keeps the first `count` bytes.
    pub fn truncate(&mut self, count: usize) {
        let mut left = count.min(self.length);
        self.length = left;
        let mut kept = 0;
        for slice in self.slices.iter_mut() {
            if left == 0 {
                break;
            }
            slice.iov_len = slice.iov_len.min(left);
            left -= slice.iov_len;
            kept += 1;
        }
        let slices = std::mem::take(&mut self.slices);
        self.slices = &mut slices[..kept];
    }

    /// Takes the last byte off.
    pub fn pop_byte(&mut self) -> Option<GuestByte<'m>> {
        let last = self
            .slices
            .iter_mut()
            .rev()
            .find(|slice| slice.iov_len > 0)?;
        last.iov_len -= 1;
        self.length -= 1;
        // SAFETY: the byte that `iov_len` just gave up is still within the range.
        let byte = unsafe { last.iov_base.cast::<u8>().add(last.iov_len) };
        Some(GuestByte {
            byte,
            memory: PhantomData,
        })
    }

    /// Takes the first `count` bytes off, to be written later than what follows them. `None`, and nothing taken: there
    /// are not as many, or they are in more than four pieces.
    pub fn take_front(&mut self, count: usize) -> Option<GuestFront<'m>> {
        if count > self.length {
            return None;
        }
        let mut front = GuestFront {
            pieces: [(ptr::null_mut(), 0); FRONT_PIECES],
            memory: PhantomData,
        };
        let mut left = count;
        let pieces = self.slices.iter().filter(|slice| slice.iov_len > 0);
        for (slice, piece) in pieces.zip(&mut front.pieces) {
            let length = slice.iov_len.min(left);
            *piece = (slice.iov_base.cast(), length);
            left -= length;
        }
        if left > 0 {
            return None;
        }
        self.advance(count);
        Some(front)
    }

    /// Copies `buffer.len()` bytes out. False, and nothing consumed: there are not as many.
    #[must_use]
    pub fn read(&mut self, buffer: &mut [u8]) -> bool {
        self.copy(buffer.len(), |guest, at, count| {
            let part = &mut buffer[at..at + count];
            // SAFETY: `guest` is `count` bytes of mapped guest memory, which no Rust object overlaps.
            unsafe { ptr::copy_nonoverlapping(guest, part.as_mut_ptr(), count) };
        })
    }

    /// Copies `bytes` in. False, and nothing done: there is no room.
    #[must_use]
    pub fn write(&mut self, bytes: &[u8]) -> bool {
        self.copy(bytes.len(), |guest, at, count| {
            let part = &bytes[at..at + count];
            // SAFETY: `guest` is `count` bytes of mapped guest memory, which no Rust object overlaps.
            unsafe { ptr::copy_nonoverlapping(part.as_ptr(), guest, count) };
        })
    }

    /// Fills all that is left with zeroes.
    pub fn zero(&mut self) {
        let filled = self.copy(self.length, |guest, _, count| {
            // SAFETY: `guest` is `count` bytes of mapped guest memory, which no Rust object overlaps.
            unsafe { ptr::write_bytes(guest, 0, count) };
        });
        debug_assert!(filled);
    }

    /// Calls `copy(address, offset, count)` for the pieces of the next `count` bytes and consumes them.
    fn copy(&mut self, count: usize, mut copy: impl FnMut(*mut u8, usize, usize)) -> bool {
        if count > self.length {
            return false;
        }
        let mut at = 0;
        for slice in self.slices.iter() {
            let piece = slice.iov_len.min(count - at);
            copy(slice.iov_base.cast(), at, piece);
            at += piece;
            if at == count {
                break;
            }
        }
        self.advance(count);
        true
    }

    /// Reads from a file at `offset` until this is full or the file ends. Returns the bytes read and consumes them.
    ///
    /// # Errors
    /// As of `preadv(2)`.
    pub fn fill_from_file(&mut self, file: BorrowedFd<'_>, offset: u64) -> io::Result<usize> {
        self.transfer_all(|slices, count, done| {
            // SAFETY: the slices are mapped and writable, the kernel writes only to them.
            unsafe {
                libc::preadv(
                    file.as_raw_fd(),
                    slices,
                    count,
                    (offset + done) as libc::off_t,
                )
            }
        })
    }

    /// Writes all that is left to a file at `offset`. Returns the bytes written and consumes them.
    ///
    /// # Errors
    /// As of `pwritev(2)`.
    pub fn drain_to_file(&mut self, file: BorrowedFd<'_>, offset: u64) -> io::Result<usize> {
        self.transfer_all(|slices, count, done| {
            // SAFETY: the slices are mapped, the kernel reads only them.
            unsafe {
                libc::pwritev(
                    file.as_raw_fd(),
                    slices,
                    count,
                    (offset + done) as libc::off_t,
                )
            }
        })
    }

    /// Receives once from a socket, at most `limit` bytes. Returns the bytes received and consumes them; 0 is the end
    /// of the stream (or no room).
    ///
    /// # Errors
    /// As of `readv(2)`; `WouldBlock` when nothing is there.
    pub fn receive(&mut self, socket: BorrowedFd<'_>, limit: usize) -> io::Result<usize> {
        // The slice in which the limit falls is shortened for the call.
        let mut before = 0;
        let mut shortened = None;
        for (index, slice) in self.slices.iter_mut().enumerate() {
            if before + slice.iov_len > limit {
                shortened = Some((index, slice.iov_len));
                slice.iov_len = limit - before;
                break;
            }
            before += slice.iov_len;
        }
        let count = shortened.map_or(self.slices.len(), |(index, _)| index + 1);
        let received = retry(|| {
            // SAFETY: the slices are mapped and writable, the kernel writes only to them.
            unsafe { libc::readv(socket.as_raw_fd(), self.slices.as_ptr(), count as i32) }
        });
        if let Some((index, length)) = shortened {
            self.slices[index].iov_len = length;
        }
        let received = received?;
        self.advance(received);
        Ok(received)
    }

    /// Sends once to a socket. Returns the bytes sent and consumes them.
    ///
    /// # Errors
    /// As of `sendmsg(2)`; `WouldBlock` when the socket is full.
    pub fn send(&mut self, socket: BorrowedFd<'_>) -> io::Result<usize> {
        self.transfer(|slices, count| {
            // SAFETY: an all-zero msghdr is valid: no address, no control data.
            let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
            message.msg_iov = slices.cast_mut();
            message.msg_iovlen = count as _;
            // SAFETY: the slices are mapped, the kernel reads only them.
            unsafe {
                libc::sendmsg(
                    socket.as_raw_fd(),
                    &raw const message,
                    libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT,
                )
            }
        })
    }

    /// One system call over all slices.
    fn transfer(&mut self, mut call: impl FnMut(*const iovec, i32) -> isize) -> io::Result<usize> {
        let moved = retry(|| call(self.slices.as_ptr(), self.slices.len() as i32))?;
        self.advance(moved);
        Ok(moved)
    }

    /// System calls until everything is moved or one moves nothing. `call` gets the bytes moved so far.
    fn transfer_all(
        &mut self,
        mut call: impl FnMut(*const iovec, i32, u64) -> isize,
    ) -> io::Result<usize> {
        let mut done = 0;
        while self.length > 0 {
            match self.transfer(|slices, count| call(slices, count, done as u64))? {
                0 => break,
                moved => done += moved,
            }
        }
        Ok(done)
    }
}

/// Makes a system call, again when a signal interrupts it.
fn retry(mut call: impl FnMut() -> isize) -> io::Result<usize> {
    loop {
        if let Ok(moved) = usize::try_from(call()) {
            return Ok(moved);
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

/// Pieces that the front of a chain may be in: every driver has it in one.
const FRONT_PIECES: usize = 4;

/// The front of a chain, to be written.
#[derive(Debug)]
pub struct GuestFront<'m> {
    /// Address and length of ranges of guest memory, mapped and writable while `'m` lasts.
    pieces: [(*mut u8, usize); FRONT_PIECES],
    memory: PhantomData<&'m GuestMemoryMmap>,
}

impl GuestFront<'_> {
    /// Stores `bytes`; what does not fit is dropped.
    pub fn write(self, mut bytes: &[u8]) {
        for (guest, length) in self.pieces {
            let (part, rest) = bytes.split_at(length.min(bytes.len()));
            // SAFETY: `part` is no longer than the piece, which no Rust object overlaps.
            unsafe { ptr::copy_nonoverlapping(part.as_ptr(), guest, part.len()) };
            bytes = rest;
        }
    }
}

/// One byte of guest memory, to be written.
#[derive(Debug)]
pub struct GuestByte<'m> {
    byte: *mut u8,
    memory: PhantomData<&'m GuestMemoryMmap>,
}

impl GuestByte<'_> {
    /// Stores the byte.
    pub fn write(self, value: u8) {
        // SAFETY: a mapped byte of guest memory, which no Rust object overlaps.
        unsafe { ptr::write_volatile(self.byte, value) };
    }
}

#[cfg(test)]
mod tests {
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
        let (mut readable, mut writable) =
            buffers.collect(&memory, chain(&memory, &parts)).unwrap();
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
        let (mut readable, mut writable) =
            buffers.collect(&memory, chain(&memory, &parts)).unwrap();
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
        let (mut readable, mut writable) =
            buffers.collect(&memory, chain(&memory, &parts)).unwrap();
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
}
