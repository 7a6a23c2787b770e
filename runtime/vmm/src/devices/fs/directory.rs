//! The attributes of a directory that the guest has just changed.
//!
//! Linux forgets what it knows of a directory when it makes or removes a name in it, and asks for it again before it does
//! anything else there. So podvisor-fs sends them along with the answer ([`super::protocol::CHANGES`]), and the question is
//! answered here, as long as they are certainly those that podvisor-fs would find: no other request was on its way
//! meanwhile, and none since that may change anything. For the node's own changes they are as old as the guest may take
//! them for true at all; what of that time has passed is taken off.

use std::time::{Duration, Instant};

use super::protocol::{
    ATTRIBUTES_BYTES, CHANGES_NOTHING, OUT_HEADER_BYTES, out_header, u32_at, u64_at,
};
use crate::buffers::GuestSlices;

/// What is known, if anything.
#[derive(Debug, Default)]
pub(super) struct Directory {
    /// The request that was sent when there was none on its way, and the last one.
    alone: Option<u64>,
    known: Option<Known>,
}

#[derive(Debug)]
struct Known {
    node: u64,
    /// `struct fuse_attr_out`.
    attributes: [u8; ATTRIBUTES_BYTES],
    since: Instant,
}

impl Directory {
    /// A request is sent. `alone`: its number, if no other one is on its way.
    pub(super) fn sent(&mut self, opcode: u32, alone: Option<u64>) {
        self.alone = alone;
        if !CHANGES_NOTHING.contains(&opcode) {
            self.known = None;
        }
    }

    /// The answer to a request that changes the directory `node` came with its attributes.
    pub(super) fn received(&mut self, number: u64, node: u64, attributes: [u8; ATTRIBUTES_BYTES]) {
        if self.alone == Some(number) {
            self.known = Some(Known {
                node,
                attributes,
                since: Instant::now(),
            });
        }
    }

    /// Answers a GETATTR in `room`. Returns the answer's length. `None`: podvisor-fs is to do it.
    pub(super) fn answer(&self, node: u64, unique: u64, mut room: GuestSlices<'_>) -> Option<u32> {
        const LENGTH: usize = OUT_HEADER_BYTES + ATTRIBUTES_BYTES;
        let known = self.known.as_ref().filter(|known| known.node == node)?;
        let mut attributes = known.attributes;
        // `attr_valid` and `attr_valid_nsec`.
        let valid = Duration::from_secs(u64_at(&attributes, 0))
            .checked_add(Duration::from_nanos(u32_at(&attributes, 8).into()))?;
        let left = valid.checked_sub(known.since.elapsed())?;
        attributes[..8].copy_from_slice(&left.as_secs().to_ne_bytes());
        attributes[8..12].copy_from_slice(&left.subsec_nanos().to_ne_bytes());
        let mut answer = [0; LENGTH];
        answer[..OUT_HEADER_BYTES].copy_from_slice(&out_header(LENGTH, 0, unique));
        answer[OUT_HEADER_BYTES..].copy_from_slice(&attributes);
        room.write(&answer).then_some(LENGTH as u32)
    }

    /// Whether anything is.
    pub(super) fn is_known(&self) -> bool {
        self.known.is_some()
    }

    /// Nothing is known.
    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }
}
