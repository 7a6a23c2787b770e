//! Frames from the tap into the driver's receive buffers.
//!
//! How long a frame is shows when it has been read. So as many chains are gathered as the last frames were long, and
//! the tap writes the next one into them; the rest of a frame that is longer goes into memory of ours, and from there
//! into more chains. What a frame does not need is for the ones after it, or goes back to the queue in the end.
//!
//! A frame for which the driver has not given enough buffers waits until it has.

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

/// What gathering chains has come to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Supply {
    /// There is as much room as is wanted.
    Enough,
    /// There are no more chains.
    Exhausted,
    /// There was a malformed chain: it and those before it went back to the driver, empty.
    Malformed,
}

/// A chain that is gathered.
#[derive(Debug, Clone, Copy)]
struct Waiting {
    head: u16,
    bytes: usize,
    slices: usize,
}

/// Receives frames.
#[derive(Debug)]
pub(super) struct Receiver {
    /// A frame may go into several chains (`VIRTIO_NET_F_MRG_RXBUF`).
    mergeable: bool,
    buffers: ChainBuffers,
    /// The chains in `buffers`.
    chains: VecDeque<Waiting>,
    /// The chains of one frame, as (head, bytes written).
    frame: Vec<(u16, u32)>,
    /// How long the next frame is likely to be.
    expected: usize,
    /// What of a frame does not fit into the chains that were there for it, at the same place as in the frame. With a
    /// byte more than any frame has, as the kernel cuts what is longer without a word.
    spill: Vec<u8>,
    /// Length of the frame that is in `spill` as a whole, and waits for buffers; 0: there is none.
    waiting: usize,
    /// Frames that were lost, as the driver's buffers did not hold them.
    pub(super) dropped: Counter,
}

impl Receiver {
    pub(super) fn new() -> Self {
        Self {
            mergeable: false,
            buffers: ChainBuffers::default(),
            chains: VecDeque::new(),
            frame: Vec::new(),
            expected: 0,
            // Zeroes cost nothing before they are touched.
            spill: vec![0; MAX_FRAME_BYTES + 1],
            waiting: 0,
            dropped: Counter::default(),
        }
    }

    /// Begins for a driver that takes frames in several chains, or not.
    pub(super) fn start(&mut self, mergeable: bool) {
        self.mergeable = mergeable;
        self.waiting = 0;
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
        let mut room = buffers.gather(memory);
        queue.disable_notification(memory)?;
        let mut used = false;
        let mut outcome = Ok(None);
        for _ in 0..MAX_BATCH {
            outcome = self.next_frame(&mut room, memory, queue, tap, &mut used);
            if !matches!(outcome, Ok(None)) {
                break;
            }
        }
        for _ in self.chains.drain(..) {
            queue.unpop();
        }
        self.buffers = buffers;
        Ok((used, outcome?.unwrap_or(Pause::UntilTap)))
    }

    /// Receives a frame. Returns why that does not go on, if it does not.
    fn next_frame<'m>(
        &mut self,
        room: &mut Gathered<'m>,
        memory: &'m GuestMemoryMmap,
        queue: &mut QueueRef<'_>,
        tap: &Tap,
        used: &mut bool,
    ) -> Result<Option<Pause>, DeviceError> {
        // A frame: its length, and how much of it is in the room already; the rest is in `spill`.
        let (length, inside) = if self.waiting > 0 {
            (self.waiting, 0)
        } else {
            let supply = self.gather(self.expected, room, memory, queue)?;
            *used |= supply == Supply::Malformed;
            if room.is_empty() {
                return Ok((supply == Supply::Exhausted).then_some(Pause::UntilBuffers));
            }
            let inside = room.len();
            let spill = &mut self.spill[inside.min(MAX_FRAME_BYTES + 1)..];
            match room.receive(tap.as_fd(), spill) {
                Ok(length) => (length, inside.min(length)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return Ok(Some(Pause::UntilTap));
                }
                // A frame for which the tap has no header. It is no longer there.
                Err(error) if error.kind() == io::ErrorKind::InvalidInput => {
                    self.drop_frame();
                    return Ok(None);
                }
                Err(error) => {
                    warn!(%error, "the tap gives no frames any more");
                    return Ok(Some(Pause::Gone));
                }
            }
        };
        if !(HEADER_BYTES..=MAX_FRAME_BYTES).contains(&length) {
            self.drop_frame();
            return Ok(None);
        }
        self.expected = length.max(self.expected - self.expected / 8);
        match self.gather(length, room, memory, queue)? {
            Supply::Enough => {
                self.hand_over(room, length, inside);
                queue.add_used_together(memory, &self.frame)?;
                *used = true;
                Ok(None)
            }
            Supply::Exhausted if self.mergeable => {
                self.keep(room, length, inside);
                Ok(Some(Pause::UntilBuffers))
            }
            supply => {
                *used |= supply == Supply::Malformed;
                self.drop_frame();
                Ok(None)
            }
        }
    }

    /// Takes chains from the queue until there is room for `wanted` bytes, in one chain unless they merge.
    fn gather<'m>(
        &mut self,
        wanted: usize,
        room: &mut Gathered<'m>,
        memory: &'m GuestMemoryMmap,
        queue: &mut QueueRef<'_>,
    ) -> Result<Supply, DeviceError> {
        while room.len() < wanted.max(1) {
            if !self.mergeable && !room.is_empty() {
                return Ok(Supply::Exhausted);
            }
            let Some(chain) = queue.pop(memory)? else {
                // Only now are new buffers of interest.
                if queue.enable_notification(memory)? {
                    continue;
                }
                return Ok(Supply::Exhausted);
            };
            let head = chain.head_index();
            match room.add(chain, HEADER_BYTES) {
                Ok(share) => self.chains.push_back(Waiting {
                    head,
                    bytes: share.bytes,
                    slices: share.slices,
                }),
                Err(error) => {
                    debug!(%error, "a malformed receive buffer");
                    room.clear();
                    for chain in self.chains.drain(..) {
                        queue.add_used(memory, chain.head, 0)?;
                    }
                    queue.add_used(memory, head, 0)?;
                    return Ok(Supply::Malformed);
                }
            }
        }
        Ok(Supply::Enough)
    }

    /// Completes a frame in the chains at the front of the room, takes them out and notes them in `frame`.
    fn hand_over(&mut self, room: &mut Gathered<'_>, length: usize, inside: usize) {
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
        let count = (self.frame.len() as u16).to_le_bytes();
        let mut data = room.take(slices);
        let stored = if inside == 0 {
            self.spill[NUM_BUFFERS_AT..HEADER_BYTES].copy_from_slice(&count);
            data.write(&self.spill[..length])
        } else {
            data.advance(NUM_BUFFERS_AT);
            let stored = data.write(&count);
            data.advance(inside - HEADER_BYTES);
            stored && data.write(&self.spill[inside..length])
        };
        debug_assert!(stored, "there is room for all of the frame");
        self.waiting = 0;
    }

    /// Keeps a frame for which there are too few chains. They go back to the queue.
    fn keep(&mut self, room: &mut Gathered<'_>, length: usize, inside: usize) {
        let read = room.take_all().read(&mut self.spill[..inside]);
        debug_assert!(read, "it was read into the room");
        self.waiting = length;
    }

    fn drop_frame(&mut self) {
        self.waiting = 0;
        self.dropped.fetch_add(1, Ordering::Relaxed);
    }
}
