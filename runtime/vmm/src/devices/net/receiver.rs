//! Frames from the tap into the driver's receive buffers.
//!
//! How long a frame is shows when it has been read. So chains are gathered until the longest frame fits, the tap
//! writes the next one into them, and those that it did not need are for the ones after it, or go back to the queue
//! in the end.

use std::collections::VecDeque;
use std::io;
use std::sync::atomic::Ordering;

use tracing::{debug, warn};
use vm_memory::GuestMemoryMmap;

use super::tap::{HEADER_BYTES, MAX_FRAME_BYTES, Tap};
use crate::buffers::{ChainBuffers, Gathered};
use crate::device::{Counter, DeviceError, QueueRef};

/// Frames received before others have their turn.
const MAX_BATCH: usize = 64;

/// Where `num_buffers` is in a frame's header.
const NUM_BUFFERS_AT: usize = 10;

/// Why no more frames are received for now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Pause {
    /// The tap has no more, or it is another's turn: the tap says when to go on.
    UntilTap,
    /// The driver has to give buffers.
    UntilBuffers,
    /// The tap's interface is gone. So is the network, for good.
    Gone,
}

/// A chain that is gathered.
#[derive(Debug, Clone, Copy)]
struct Waiting {
    head: u16,
    bytes: usize,
    slices: usize,
}

/// Receives frames.
#[derive(Debug, Default)]
pub(super) struct Receiver {
    /// A frame may go into several chains (`VIRTIO_NET_F_MRG_RXBUF`).
    mergeable: bool,
    buffers: ChainBuffers,
    /// The chains in `buffers`.
    chains: VecDeque<Waiting>,
    /// The chains of one frame, as (head, bytes written).
    frame: Vec<(u16, u32)>,
    /// The most bytes that the driver has ever had in its queue at a time, as far as it matters.
    most_offered: usize,
    /// Frames that were lost because the driver's buffers did not hold them.
    pub(super) dropped: Counter,
}

impl Receiver {
    /// Begins for a driver that takes frames in several chains, or not.
    pub(super) fn start(&mut self, mergeable: bool) {
        self.mergeable = mergeable;
        self.most_offered = 0;
    }

    /// Receives frames until there are none, or no buffers, or it is enough for now. True: chains were returned to the
    /// driver.
    pub(super) fn receive(
        &mut self,
        memory: &GuestMemoryMmap,
        queue: &mut QueueRef<'_>,
        tap: &Tap,
    ) -> Result<(bool, Pause), DeviceError> {
        // Taken out so that what is gathered in it does not borrow all of this.
        let mut buffers = std::mem::take(&mut self.buffers);
        queue.disable_notification(memory)?;
        let outcome = self.receive_into(&mut buffers.gather(memory), memory, queue, tap);
        for _ in self.chains.drain(..) {
            queue.unpop();
        }
        self.buffers = buffers;
        outcome
    }

    fn receive_into<'m>(
        &mut self,
        room: &mut Gathered<'m>,
        memory: &'m GuestMemoryMmap,
        queue: &mut QueueRef<'_>,
        tap: &Tap,
    ) -> Result<(bool, Pause), DeviceError> {
        let mut used = false;
        for _ in 0..MAX_BATCH {
            used |= self.gather(room, memory, queue)?;
            if !self.enough(room) {
                return Ok((used, Pause::UntilBuffers));
            }
            match room.receive(tap.as_fd()) {
                Ok(Some(length)) if length >= HEADER_BYTES => {
                    self.hand_over(room, length);
                    queue.add_used_together(memory, &self.frame)?;
                    used = true;
                }
                Ok(_) => self.drop_frame(),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return Ok((used, Pause::UntilTap));
                }
                // A frame for which the tap has no header. It is no longer there.
                Err(error) if error.kind() == io::ErrorKind::InvalidInput => self.drop_frame(),
                Err(error) => {
                    warn!(%error, "the tap gives no frames any more");
                    return Ok((used, Pause::Gone));
                }
            }
        }
        Ok((used, Pause::UntilTap))
    }

    /// Takes chains from the queue until the longest frame fits or there are none. True: some were useless, and were
    /// returned.
    fn gather<'m>(
        &mut self,
        room: &mut Gathered<'m>,
        memory: &'m GuestMemoryMmap,
        queue: &mut QueueRef<'_>,
    ) -> Result<bool, DeviceError> {
        let mut used = false;
        while room.len() < self.wanted() {
            let Some(chain) = queue.pop(memory)? else {
                // Only now are new buffers of interest.
                if queue.enable_notification(memory)? {
                    continue;
                }
                break;
            };
            let head = chain.head_index();
            match room.add(chain, HEADER_BYTES) {
                Ok(share) => self.chains.push_back(Waiting {
                    head,
                    bytes: share.bytes,
                    slices: share.slices,
                }),
                Err(error) if self.chains.is_empty() => {
                    debug!(%error, "a malformed receive buffer");
                    queue.add_used(memory, head, 0)?;
                    used = true;
                }
                // Those before it first, so that it is known what goes back to the queue.
                Err(_) => {
                    queue.unpop();
                    self.most_offered = room.len();
                    break;
                }
            }
        }
        self.most_offered = self.most_offered.max(room.len());
        Ok(used)
    }

    /// Bytes of room to gather: for the longest frame, or the next chain if a frame must fit into one.
    fn wanted(&self) -> usize {
        if self.mergeable { MAX_FRAME_BYTES } else { 1 }
    }

    /// Whether to receive a frame into what is gathered. A driver that is about to give more buffers is waited for, as
    /// a long frame would be lost; one that has never had more in its queue is not.
    fn enough(&self, room: &Gathered<'_>) -> bool {
        !room.is_empty() && room.len() >= self.wanted().min(self.most_offered)
    }

    /// Takes the chains that a frame of `length` bytes is in from the room, and notes them in `frame`.
    fn hand_over(&mut self, room: &mut Gathered<'_>, length: usize) {
        self.frame.clear();
        let mut left = length;
        let mut slices = 0;
        while left > 0 {
            let Some(chain) = self.chains.pop_front() else {
                break;
            };
            let written = left.min(chain.bytes);
            self.frame.push((chain.head, written as u32));
            left -= written;
            slices += chain.slices;
        }
        let mut header = room.take(slices);
        header.advance(NUM_BUFFERS_AT);
        let stored = header.write(&(self.frame.len() as u16).to_le_bytes());
        debug_assert!(stored, "each chain has room for a header");
    }

    fn drop_frame(&self) {
        self.dropped.fetch_add(1, Ordering::Relaxed);
    }
}
