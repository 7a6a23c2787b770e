//! Bytes that the guest has sent and the host has not taken yet.

use std::io;
use std::io::IoSlice;
use std::os::fd::{AsRawFd, BorrowedFd};

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, sendmsg};

use crate::buffers::GuestSlices;

/// A ring of bytes. It allocates when the host falls behind, never more than its limit, and gives the memory back when
/// the host has caught up.
#[derive(Debug)]
pub(super) struct Backlog {
    ring: Box<[u8]>,
    start: usize,
    length: usize,
    limit: usize,
}

/// First allocation in bytes; grows by doubling.
const SMALLEST: usize = 4096;

impl Backlog {
    /// An empty backlog of at most `limit` bytes, a power of two.
    pub(super) fn new(limit: usize) -> Self {
        debug_assert!(limit.is_power_of_two() && limit >= SMALLEST);
        Self {
            ring: Box::default(),
            start: 0,
            length: 0,
            limit,
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.length == 0
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.length
    }

    /// Appends all of `slices`. False, and nothing done: beyond the limit.
    #[must_use]
    pub(super) fn push(&mut self, slices: &mut GuestSlices<'_>) -> bool {
        let needed = self.length + slices.len();
        if needed > self.limit {
            return false;
        }
        if needed > self.ring.len() {
            self.grow(needed.next_power_of_two().max(SMALLEST));
        }
        while !slices.is_empty() {
            let end = (self.start + self.length) % self.ring.len();
            let room = if end < self.start {
                self.start - end
            } else {
                self.ring.len() - end
            };
            let count = room.min(slices.len());
            // `count` is at most what is left, so the read succeeds.
            let copied = slices.read(&mut self.ring[end..end + count]);
            debug_assert!(copied);
            self.length += count;
        }
        true
    }

    /// Sends once to a socket. Returns the bytes sent.
    pub(super) fn send(&mut self, socket: BorrowedFd<'_>) -> io::Result<usize> {
        let (first, second) = self.parts();
        let parts = [IoSlice::new(first), IoSlice::new(second)];
        let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
        let sent = loop {
            match sendmsg::<()>(socket.as_raw_fd(), &parts, &[], flags, None) {
                Err(Errno::EINTR) => {}
                result => break result?,
            }
        };
        self.consume(sent);
        Ok(sent)
    }

    /// Gives everything up.
    pub(super) fn clear(&mut self) {
        *self = Self::new(self.limit);
    }

    fn parts(&self) -> (&[u8], &[u8]) {
        let until_wrap = self.length.min(self.ring.len() - self.start);
        (
            &self.ring[self.start..self.start + until_wrap],
            &self.ring[..self.length - until_wrap],
        )
    }

    fn consume(&mut self, count: usize) {
        self.length -= count;
        if self.length == 0 {
            self.clear();
        } else {
            self.start = (self.start + count) % self.ring.len();
        }
    }

    fn grow(&mut self, size: usize) {
        let mut larger = Vec::with_capacity(size);
        let (first, second) = self.parts();
        larger.extend_from_slice(first);
        larger.extend_from_slice(second);
        larger.resize(size, 0);
        self.ring = larger.into_boxed_slice();
        self.start = 0;
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;
    use std::io::Read as _;
    use std::os::fd::AsFd as _;
    use std::os::unix::net::UnixStream;

    use proptest::collection::vec;
    use proptest::prelude::*;
    use vm_memory::{Bytes as _, GuestAddress, GuestMemoryMmap};

    use super::*;
    use crate::buffers::ChainBuffers;
    use crate::device::QueueRef;
    use crate::test_queue::TestQueue;

    const LIMIT: usize = 16 << 10;

    proptest! {
        #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

        /// A queue of bytes, whatever is pushed and sent in whatever order, that never exceeds its limit.
        #[test]
        fn is_a_queue(steps in vec((any::<bool>(), 1_usize..9000), 1..60)) {
            let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x10_000)]).unwrap();
            let mut queue = TestQueue::new(&memory, 0);
            let mut buffers = ChainBuffers::default();
            let mut backlog = Backlog::new(LIMIT);
            let mut model = VecDeque::new();
            let (ours, mut theirs) = UnixStream::pair().unwrap();
            let mut next = 0_u8;
            for (push, count) in steps {
                if push {
                    let bytes: Vec<u8> = (0..count).map(|_| { next = next.wrapping_add(1); next }).collect();
                    memory.write_slice(&bytes, GuestAddress(0x2000)).unwrap();
                    let half = count as u32 / 2;
                    queue.push(&[(0x2000, half, 0), (0x2000 + u64::from(half), count as u32 - half, 0)]);
                    let chain = QueueRef::new(&mut queue.queue).pop(&memory).unwrap().unwrap();
                    let (mut slices, _) = buffers.collect(&memory, chain).unwrap();
                    let fits = model.len() + count <= LIMIT;
                    prop_assert_eq!(backlog.push(&mut slices), fits);
                    if fits {
                        model.extend(bytes);
                    }
                } else if !backlog.is_empty() {
                    let sent = backlog.send(ours.as_fd()).unwrap();
                    let mut received = vec![0; sent];
                    theirs.read_exact(&mut received).unwrap();
                    prop_assert_eq!(received, model.drain(..sent).collect::<Vec<_>>());
                }
                prop_assert_eq!(backlog.length, model.len());
                prop_assert!(backlog.ring.len() <= LIMIT);
                prop_assert_eq!(backlog.ring.is_empty(), model.is_empty());
            }
        }
    }
}
