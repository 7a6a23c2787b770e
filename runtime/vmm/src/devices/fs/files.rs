//! Open files that podvisor-fs has handed over: their contents go between file and guest memory here, and never through
//! the socket.
//!
//! What is opened, and how, podvisor-fs decides: a handed-over file is the guest's own opening of it. Everything but reading
//! and writing still goes there, and so does what would keep the device waiting, or what its thread would do in another
//! way:
//!
//! - a read of what is not in the node's page cache, or that fails;
//! - a write with `O_APPEND`, whose changes podvisor-fs follows: the file is given up;
//! - a write to a file that has set-uid or set-gid bits. This thread has no capabilities, so they would fall whoever writes.
//!   Such files are not handed over, and are given up when their mode changes.

use std::collections::HashMap;
use std::os::fd::{AsFd as _, OwnedFd};

use super::protocol::{Handle, OUT_HEADER_BYTES, Transfer, WRITTEN_BYTES, out_header, written};
use crate::buffers::GuestSlices;

/// What a guest can make this process hold, which may have a thousand open. More files are podvisor-fs' alone.
const MAX_FILES: usize = 256;

/// The files, by the number of their opening, with their own.
#[derive(Debug, Default)]
pub(super) struct Files {
    open: HashMap<u64, (u64, OwnedFd)>,
}

impl Files {
    /// Takes a file, if there is room for one more.
    pub(super) fn add(&mut self, handle: Handle, file: OwnedFd) {
        if self.open.len() < MAX_FILES {
            self.open.insert(handle.number, (handle.node, file));
        }
    }

    /// Gives up those that are `unwanted`.
    pub(super) fn give_up(&mut self, unwanted: impl Fn(Handle) -> bool) {
        self.open
            .retain(|&number, &mut (node, _)| !unwanted(Handle { node, number }));
    }

    /// Whether there are none.
    pub(super) fn is_empty(&self) -> bool {
        self.open.is_empty()
    }

    fn get(&self, handle: Handle) -> Option<&OwnedFd> {
        let (node, file) = self.open.get(&handle.number)?;
        (*node == handle.node).then_some(file)
    }

    /// Reads into `room`, behind the answer's header. Returns the answer's length. `None`: podvisor-fs is to do it.
    pub(super) fn read(
        &self,
        transfer: Transfer,
        unique: u64,
        mut room: GuestSlices<'_>,
    ) -> Option<u32> {
        let file = self.get(transfer.handle)?;
        let header = room.take_front(OUT_HEADER_BYTES)?;
        room.truncate(transfer.length);
        let (file, offset) = (file.as_fd(), transfer.offset);
        let read = match room.fill_from_cache(file, offset) {
            // Of those file systems that are handed over, the one that cannot tell has all in memory (tmpfs).
            Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => {
                room.fill_from_file(file, offset)
            }
            result => result,
        };
        let length = OUT_HEADER_BYTES + read.ok()?;
        header.write(&out_header(length, 0, unique));
        Some(length as u32)
    }

    /// Writes `content`, and answers in `room`. Returns the answer's length. `None`: podvisor-fs is to do it.
    pub(super) fn write(
        &self,
        transfer: Transfer,
        unique: u64,
        mut content: GuestSlices<'_>,
        mut room: GuestSlices<'_>,
    ) -> Option<u32> {
        let file = self.get(transfer.handle)?;
        if transfer.appends || content.len() < transfer.length || room.len() < WRITTEN_BYTES {
            return None;
        }
        content.truncate(transfer.length);
        match content.write_at(file.as_fd(), transfer.offset) {
            Ok(count) => room
                .write(&written(count, unique))
                .then_some(WRITTEN_BYTES as u32),
            Err(error) => {
                let error = error.raw_os_error().unwrap_or(libc::EIO);
                room.write(&out_header(OUT_HEADER_BYTES, error, unique))
                    .then_some(OUT_HEADER_BYTES as u32)
            }
        }
    }
}
