//! Messages of a `SOCK_SEQPACKET`: with a header that is not in guest memory, and into room that was kept for them.

use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd};

use libc::{iovec, msghdr};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use super::{ChainBuffers, ChainError, GuestSlices, retry};
use crate::device::Chain;

/// Pieces of guest memory in a message. Linux' longest are 256 pages and the parts of a header.
const MAX_PIECES: usize = 264;

/// The writable part of a chain that stays with the device: guest addresses, checked when they are used.
#[derive(Debug)]
pub struct Room {
    ranges: Box<[(GuestAddress, u32)]>,
    length: usize,
}

impl Room {
    /// Of this chain.
    ///
    /// # Errors
    /// More than 264 descriptors.
    pub fn of(chain: Chain<'_>) -> Result<Self, ChainError> {
        let mut ranges = Vec::new();
        for (index, descriptor) in chain.enumerate() {
            if index == 2 * MAX_PIECES || ranges.len() == MAX_PIECES {
                return Err(ChainError::TooLong);
            }
            if descriptor.is_write_only() {
                ranges.push((descriptor.addr(), descriptor.len()));
            }
        }
        Ok(Self {
            length: ranges.iter().map(|(_, length)| *length as usize).sum(),
            ranges: ranges.into(),
        })
    }

    /// Bytes of room.
    pub fn len(&self) -> usize {
        self.length
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// As slices.
    ///
    /// # Errors
    /// It is not in guest memory.
    pub fn slices<'m>(
        &self,
        buffers: &'m mut ChainBuffers,
        memory: &'m GuestMemoryMmap,
    ) -> Result<GuestSlices<'m>, ChainError> {
        buffers.slices.clear();
        for &(address, length) in &self.ranges {
            for slice in memory.get_slices(address, length as usize) {
                let slice = slice.map_err(|_| ChainError::OutsideMemory)?;
                if buffers.slices.len() == MAX_PIECES {
                    return Err(ChainError::TooLong);
                }
                buffers.slices.push(iovec {
                    iov_base: slice.ptr_guard_mut().as_ptr().cast(),
                    iov_len: slice.len(),
                });
            }
        }
        Ok(GuestSlices::new(&mut buffers.slices))
    }
}

impl GuestSlices<'_> {
    /// Sends `header` and all of this as one message, and consumes nothing.
    ///
    /// # Errors
    /// As of `sendmsg(2)`; `WouldBlock` when the socket is full; `EMSGSIZE` for more than 264 slices.
    pub fn send_message(&self, socket: BorrowedFd<'_>, header: &[u8]) -> io::Result<()> {
        let mut pieces = [NOTHING; MAX_PIECES + 1];
        let message = message(
            &mut pieces,
            header.as_ptr().cast_mut(),
            header.len(),
            self.slices,
        )?;
        let flags = libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT;
        // SAFETY: the pieces are `header` and mapped guest memory; the kernel only reads them.
        retry(|| unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const message, flags) })?;
        Ok(())
    }

    /// Receives one message, the first bytes of it into `header` and the rest into this. Returns its length and the file
    /// that came with it, and consumes nothing.
    ///
    /// # Errors
    /// As of `recvmsg(2)`; `EMSGSIZE` when it was longer, and what is not in `header` is lost.
    pub fn receive_message(
        &mut self,
        socket: BorrowedFd<'_>,
        header: &mut [u8],
    ) -> io::Result<(usize, Option<OwnedFd>)> {
        let mut pieces = [NOTHING; MAX_PIECES + 1];
        let mut message = message(&mut pieces, header.as_mut_ptr(), header.len(), self.slices)?;
        let mut control = Control::default();
        message.msg_control = (&raw mut control).cast();
        message.msg_controllen = size_of::<Control>();
        let flags = libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC;
        // SAFETY: the pieces are `header` and mapped guest memory, writable, which overlaps no Rust object; `control` lives
        // longer than the call.
        let received =
            retry(|| unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, flags) })?;
        let file = control.take(message.msg_controllen);
        if message.msg_flags & libc::MSG_TRUNC != 0 {
            return Err(io::Error::from_raw_os_error(libc::EMSGSIZE));
        }
        Ok((received, file))
    }
}

/// Room for one file beside a message; the kernel closes what does not fit. `struct cmsghdr` and one descriptor, as long
/// as its alignment makes it.
#[repr(C)]
#[derive(Default)]
struct Control {
    length: usize,
    level: libc::c_int,
    kind: libc::c_int,
    descriptor: libc::c_int,
    _padding: libc::c_int,
}

impl Control {
    /// The file, when the kernel has filled so many bytes of this.
    fn take(&self, filled: usize) -> Option<OwnedFd> {
        // SAFETY: a computation.
        let needed = unsafe { libc::CMSG_LEN(size_of::<libc::c_int>() as u32) } as usize;
        let is_file = filled >= needed
            && self.length == needed
            && (self.level, self.kind) == (libc::SOL_SOCKET, libc::SCM_RIGHTS);
        // SAFETY: the kernel has just opened it for this process, nobody else has it.
        is_file.then(|| unsafe { OwnedFd::from_raw_fd(self.descriptor) })
    }
}

const NOTHING: iovec = iovec {
    iov_base: std::ptr::null_mut(),
    iov_len: 0,
};

/// A message of a header and guest memory, described in `pieces`, which must live as long as it is used.
fn message(
    pieces: &mut [iovec; MAX_PIECES + 1],
    header: *mut u8,
    header_bytes: usize,
    slices: &[iovec],
) -> io::Result<msghdr> {
    if slices.len() > MAX_PIECES {
        return Err(io::Error::from_raw_os_error(libc::EMSGSIZE));
    }
    pieces[0] = iovec {
        iov_base: header.cast(),
        iov_len: header_bytes,
    };
    pieces[1..=slices.len()].copy_from_slice(slices);
    // SAFETY: an all-zero msghdr is valid: no address, no control data.
    let mut message: msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = pieces.as_mut_ptr();
    message.msg_iovlen = slices.len() as _;
    message.msg_iovlen += 1;
    Ok(message)
}
