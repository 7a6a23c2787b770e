//! Guest memory back to the host.

use std::io;
use std::sync::LazyLock;

use tracing::debug;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use super::GuestSlices;

/// Size of the host's pages in bytes.
static PAGE_BYTES: LazyLock<usize> = LazyLock::new(|| {
    // SAFETY: a call without pointers.
    let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    usize::try_from(size).expect("every kernel has a page size")
});

/// Gives the whole host pages of a range of guest memory back to the host. Returns their bytes, whether they were
/// populated or not. The first byte outside guest memory ends the range.
///
/// The guest keeps the range: what it finds there next is what the memory began with, zeroes, or the file's bytes
/// when it is a private mapping of one. A thread of ours that moves data for the guest meanwhile, to or from the same
/// page, is the guest's own mistake and harms only the guest: the system call works on the page as it was or as it
/// becomes, both mapped.
pub fn release(memory: &GuestMemoryMmap, address: GuestAddress, length: usize) -> usize {
    let slices = memory.get_slices(address, length);
    slices
        .map_while(Result::ok)
        .map(|slice| {
            let start = slice.ptr_guard_mut().as_ptr();
            // SAFETY: the slice is mapped guest memory.
            unsafe { release_mapped(start, slice.len()) }
        })
        .sum()
}

impl GuestSlices<'_> {
    /// Gives the whole host pages of what is left back to the host, as [`release`] does.
    pub fn release(self) -> usize {
        self.slices
            .iter()
            // SAFETY: the slices are mapped guest memory.
            .map(|slice| unsafe { release_mapped(slice.iov_base.cast(), slice.iov_len) })
            .sum()
    }
}

/// Gives the whole pages of a range back to the host. Returns their bytes.
///
/// # Safety
/// The range is mapped guest memory: its mapping stays as it is, only its content changes, which every user of guest
/// memory expects at any time. No Rust object is there.
unsafe fn release_mapped(start: *mut u8, length: usize) -> usize {
    let lead = start.align_offset(*PAGE_BYTES);
    let whole = length.saturating_sub(lead) / *PAGE_BYTES * *PAGE_BYTES;
    if whole == 0 {
        return 0;
    }
    // SAFETY: the pages are within the range, of which the caller vouches.
    let advised = unsafe { libc::madvise(start.add(lead).cast(), whole, libc::MADV_DONTNEED) };
    if advised != 0 {
        // Locked pages, or huge ones: the guest's memory stays as it was.
        debug!(error = %io::Error::last_os_error(), "guest memory stays");
        return 0;
    }
    whole
}
