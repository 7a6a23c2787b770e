//! Guest memory back to the host.

use std::sync::LazyLock;

use tracing::debug;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

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
    let mut released = 0;
    for slice in memory.get_slices(address, length).map_while(Result::ok) {
        let guard = slice.ptr_guard_mut();
        let start = guard.as_ptr() as usize;
        let first = start.next_multiple_of(*PAGE_BYTES);
        let end = (start + slice.len()) / *PAGE_BYTES * *PAGE_BYTES;
        if first >= end {
            continue;
        }
        // SAFETY: within the slice, which is mapped guest memory. The mapping stays as it is, only its content changes,
        // at which every user of guest memory has to expect: no Rust object is there.
        let advised = unsafe {
            libc::madvise(
                guard.as_ptr().add(first - start).cast(),
                end - first,
                libc::MADV_DONTNEED,
            )
        };
        if advised == 0 {
            released += end - first;
        } else {
            // Locked or huge pages; the guest's memory stays as it was.
            debug!(error = %std::io::Error::last_os_error(), "guest memory stays");
        }
    }
    released
}
