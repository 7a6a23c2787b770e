//! The writable parts of several chains as one room.

use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsRawFd as _, BorrowedFd};

use libc::iovec;
use vm_memory::GuestMemoryMmap;

use super::{ChainBuffers, ChainError, GuestSlices, MAX_SLICES, append, retry};
use crate::device::Chain;

/// The writable parts of several chains, one after the other: room for data whose length shows only when it is there.
#[derive(Debug)]
pub struct Gathered<'m> {
    /// Ranges of guest memory, mapped and writable while `'m` lasts. Those before `first` are taken.
    slices: &'m mut Vec<iovec>,
    first: usize,
    length: usize,
    memory: &'m GuestMemoryMmap,
}

/// What a chain adds to a [`Gathered`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Share {
    /// Bytes of room.
    pub bytes: usize,
    /// Slices, as [`Gathered::take`] counts them.
    pub slices: usize,
}

impl ChainBuffers {
    /// Begins to gather chains.
    pub fn gather<'m>(&'m mut self, memory: &'m GuestMemoryMmap) -> Gathered<'m> {
        self.slices.clear();
        Gathered {
            slices: &mut self.slices,
            first: 0,
            length: 0,
            memory,
        }
    }
}

impl<'m> Gathered<'m> {
    /// Bytes of room.
    pub fn len(&self) -> usize {
        self.length
    }

    /// Whether there is no room.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Adds the writable part of a chain, which must have `at_least` bytes.
    ///
    /// # Errors
    /// The chain is malformed, or one too many; nothing is added.
    pub fn add(&mut self, chain: Chain<'m>, at_least: usize) -> Result<Share, ChainError> {
        if self.first >= MAX_SLICES {
            self.slices.drain(..self.first);
            self.first = 0;
        }
        let before = self.slices.len();
        // One is left for what `receive` spills.
        let limit = self.first + MAX_SLICES - 1;
        let added = append(self.slices, limit, self.memory, chain).and_then(|readable| {
            self.slices.drain(before..before + readable);
            let added = &self.slices[before..];
            let share = Share {
                bytes: added.iter().map(|slice| slice.iov_len).sum(),
                slices: added.len(),
            };
            if share.bytes < at_least {
                return Err(ChainError::TooShort);
            }
            Ok(share)
        });
        match added {
            Ok(share) => self.length += share.bytes,
            Err(_) => self.slices.truncate(before),
        }
        added
    }

    /// Empties the room.
    pub fn clear(&mut self) {
        self.first = self.slices.len();
        self.length = 0;
    }

    /// Reads a frame from what gives one with each read: a tap. What the room does not hold goes into `spill`, and what
    /// neither holds is lost. Returns the bytes read; nothing is taken from the room.
    ///
    /// # Errors
    /// As of `readv(2)`; `WouldBlock` when no frame is there.
    pub fn receive(&mut self, source: BorrowedFd<'_>, spill: &mut [u8]) -> io::Result<usize> {
        self.slices.push(iovec {
            iov_base: spill.as_mut_ptr().cast(),
            iov_len: spill.len(),
        });
        let slices = &self.slices[self.first..];
        let received = retry(|| {
            // SAFETY: the slices are mapped and writable, the last one is `spill`; the kernel writes only to them.
            unsafe { libc::readv(source.as_raw_fd(), slices.as_ptr(), slices.len() as i32) }
        });
        self.slices.pop();
        received
    }

    /// Takes the first `count` slices from the room.
    pub fn take(&mut self, count: usize) -> GuestSlices<'_> {
        let taken = &mut self.slices[self.first..self.first + count];
        self.first += count;
        let taken = GuestSlices {
            length: taken.iter().map(|slice| slice.iov_len).sum(),
            slices: taken,
            memory: PhantomData,
        };
        self.length -= taken.length;
        taken
    }

    /// Takes the whole room.
    pub fn take_all(&mut self) -> GuestSlices<'_> {
        self.take(self.slices.len() - self.first)
    }
}
