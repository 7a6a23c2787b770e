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
    let advise = |advice| unsafe { libc::madvise(start.add(lead).cast(), whole, advice) };
    // A huge page of which a part is unmapped stays whole, out of use and in nobody's account, until the host is so
    // short of memory that it splits it (mm/huge_memory.c, deferred_split_folio). This advice splits it now, where the
    // range has only a part of it. Whether it does is the kernel's business.
    advise(libc::MADV_COLD);
    if advise(libc::MADV_DONTNEED) != 0 {
        // Locked pages, or huge ones: the guest's memory stays as it was.
        debug!(error = %io::Error::last_os_error(), "guest memory stays");
        return 0;
    }
    whole
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Write as _;
    use std::os::unix::fs::FileExt as _;

    use super::*;

    const HUGE: usize = 2 << 20;
    /// KPF_THP of Documentation/admin-guide/mm/pagemap.rst.
    const IS_HUGE: u64 = 1 << 22;
    const IS_PRESENT: u64 = 1 << 63;
    const FRAME: u64 = (1 << 55) - 1;

    fn word(file: &File, index: u64) -> u64 {
        let mut bytes = [0; 8];
        file.read_exact_at(&mut bytes, 8 * index).unwrap();
        u64::from_ne_bytes(bytes)
    }

    /// Is there a page, and a part of a huge one? `None` for all but root.
    fn page(address: *const u8) -> Option<(bool, bool)> {
        let map = File::open("/proc/self/pagemap").unwrap();
        let entry = word(&map, (address as usize / *PAGE_BYTES) as u64);
        if entry & IS_PRESENT == 0 {
            return Some((false, false));
        }
        let frame = Some(entry & FRAME).filter(|frame| *frame != 0)?;
        let flags = File::open("/proc/kpageflags").ok()?;
        Some((true, word(&flags, frame) & IS_HUGE != 0))
    }

    #[test]
    fn a_part_of_a_huge_page_is_free_at_once() {
        let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 2 * HUGE)]).unwrap();
        let start = memory.get_host_address(GuestAddress(0)).unwrap();
        let lead = start.align_offset(HUGE);
        // SAFETY: within the mapping, which is of two huge pages.
        let huge = unsafe { start.add(lead) };
        // SAFETY: the range is guest memory's mapping; the advice changes no content.
        unsafe { libc::madvise(huge.cast(), HUGE, libc::MADV_HUGEPAGE) };
        // SAFETY: within the mapping.
        unsafe { huge.write_volatile(1) };
        if page(huge) != Some((true, true)) {
            // Not to be swallowed by the test's harness.
            let _ = writeln!(io::stderr(), "SKIPPED: no huge pages here, or not root");
            return;
        }
        let part = 16 * *PAGE_BYTES;
        let address = GuestAddress((lead + HUGE / 2) as u64);
        assert_eq!(release(&memory, address, part), part);
        assert_eq!(page(huge.wrapping_add(HUGE / 2)), Some((false, false)));
        assert_eq!(page(huge), Some((true, false)), "what is left is small");
        // SAFETY: within the mapping.
        assert_eq!(unsafe { huge.read_volatile() }, 1);
    }
}
