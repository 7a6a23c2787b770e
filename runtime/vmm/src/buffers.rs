//! A descriptor chain as slices of guest memory.
//!
//! Payload goes between guest memory and a file descriptor by `readv` and its kin, without a copy in between. This
//! module holds the unsafe code that this takes, so that devices need none.
//!
//! The guest can change the bytes of a slice at any time, and so can the host when it takes pages back (`release`).
//! So nothing here makes a reference to them: they are copied out once, or given to the kernel.
//!
//! - here: [`ChainBuffers`], one chain at a time, and [`GuestSlices`], its parts
//! - `gather`: [`Gathered`], the writable parts of several chains, for a frame that needs as many as it needs
//! - `message`: messages with headers of their own, and [`Room`] for those that come later
//! - `release`: [`release`], guest memory back to the host

mod gather;
mod message;
mod release;

use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr;

use libc::iovec;
use thiserror::Error;
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap};

use crate::device::Chain;

pub use gather::Gathered;
pub use message::Room;
pub use release::release;

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
    /// Less room than is asked for.
    #[error("too little room")]
    TooShort,
}

/// Memory for the slices of chains. A device keeps one and uses it for every request.
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
        let readable = append(&mut self.slices, MAX_SLICES, memory, chain)?;
        let (readable, writable) = self.slices.split_at_mut(readable);
        Ok((GuestSlices::new(readable), GuestSlices::new(writable)))
    }
}

/// Appends the slices of a chain, of which there may be `limit` then. Returns how many of the new ones are readable:
/// they come first.
fn append(
    slices: &mut Vec<iovec>,
    limit: usize,
    memory: &GuestMemoryMmap,
    chain: Chain<'_>,
) -> Result<usize, ChainError> {
    let first = slices.len();
    let mut readable = 0;
    for (index, descriptor) in chain.enumerate() {
        // Empty descriptors give no slice, and an indirect table has room for 65535 of them.
        if index == MAX_SLICES {
            return Err(ChainError::TooLong);
        }
        if !descriptor.is_write_only() && first + readable < slices.len() {
            return Err(ChainError::Order);
        }
        for slice in memory.get_slices(descriptor.addr(), descriptor.len() as usize) {
            let slice = slice.map_err(|_| ChainError::OutsideMemory)?;
            if slices.len() == limit {
                return Err(ChainError::TooLong);
            }
            slices.push(iovec {
                iov_base: slice.ptr_guard_mut().as_ptr().cast(),
                iov_len: slice.len(),
            });
        }
        if !descriptor.is_write_only() {
            readable = slices.len() - first;
        }
    }
    Ok(readable)
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
        let front = self.front(count)?;
        self.advance(count);
        Some(front)
    }

    /// The first `count` bytes, to be written later; what is done to all of this meanwhile includes them. `None`: there
    /// are not as many, or they are in more than four pieces.
    pub fn front(&self, count: usize) -> Option<GuestFront<'m>> {
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
        (left == 0).then_some(front)
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

    /// The same for what the host has in memory, without waiting for a disk.
    ///
    /// # Errors
    /// As of `preadv2(2)`; `WouldBlock` where not all is there, and anything may have been read.
    pub fn fill_from_cache(&mut self, file: BorrowedFd<'_>, offset: u64) -> io::Result<usize> {
        // To preadv2, -1 is wherever the file's position is.
        if i64::try_from(offset).is_err() {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        self.transfer_all(|slices, count, done| {
            // SAFETY: the slices are mapped and writable, the kernel writes only to them.
            unsafe {
                libc::preadv2(
                    file.as_raw_fd(),
                    slices,
                    count,
                    (offset + done) as libc::off_t,
                    libc::RWF_NOWAIT,
                )
            }
        })
    }

    /// Writes once to a file at `offset`. Returns the bytes written, which may be fewer than there are, and consumes them.
    ///
    /// # Errors
    /// As of `pwritev(2)`.
    pub fn write_at(&mut self, file: BorrowedFd<'_>, offset: u64) -> io::Result<usize> {
        self.transfer(|slices, count| {
            // SAFETY: the slices are mapped, the kernel reads only them.
            unsafe { libc::pwritev(file.as_raw_fd(), slices, count, offset as libc::off_t) }
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

    /// Writes all of this at once, to what takes it whole or not at all: a tap. Returns the bytes written and consumes
    /// them.
    ///
    /// # Errors
    /// As of `writev(2)`.
    pub fn write_to(&mut self, target: BorrowedFd<'_>) -> io::Result<usize> {
        self.transfer(|slices, count| {
            // SAFETY: the slices are mapped, the kernel reads only them.
            unsafe { libc::writev(target.as_raw_fd(), slices, count) }
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
mod tests;
