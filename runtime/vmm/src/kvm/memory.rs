//! Guest memory: private, anonymous, huge pages where the host has them, and not there before the guest touches it. The
//! kernel is its file's pages: what the guest only reads of it is shared with all other guests through the page cache.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::ops::Range;
use std::os::fd::AsRawFd as _;
use std::ptr;
use std::sync::{Arc, PoisonError};

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use vm_memory::bitmap::BitmapSlice;
use vm_memory::{
    GuestAddress, GuestAddressSpace as _, GuestMemoryAtomic, GuestMemoryBackend as _,
    GuestMemoryMmap, GuestMemoryRegion as _, GuestRegionMmap, MmapRegion, ReadVolatile,
    VolatileMemoryError, VolatileSlice,
};

use super::{KvmError, layout};

/// The size of a page, of the host's and of the guest's.
pub const PAGE: u64 = 4096;

/// The size of a huge page, of the host's and of KVM's for the guest.
const HUGE_PAGE: usize = 2 << 20;

/// Guest memory of `bytes`, in one region or, when it reaches the devices' addresses, in two.
pub fn create(bytes: u64) -> Result<GuestMemoryMmap, KvmError> {
    let low = bytes.min(layout::DEVICES_START);
    let high = layout::RAM_ABOVE_DEVICES;
    let ranges = [0..low, high..high + (bytes - low)];
    let ranges = ranges.iter().filter(|range| !range.is_empty());
    let regions: io::Result<_> = ranges.map(region).collect();
    regions
        .and_then(|regions| GuestMemoryMmap::from_regions(regions).map_err(io::Error::other))
        .map_err(KvmError::host("guest memory"))
}

/// Memory for a range of the guest's addresses.
fn region(range: &Range<u64>) -> io::Result<GuestRegionMmap> {
    let mapping = map((range.end - range.start) as usize)?;
    let region = GuestRegionMmap::new(mapping, GuestAddress(range.start))
        .ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
    // A core dump of ours holds nothing of the tenant's.
    advise(&region, libc::MADV_DONTDUMP)?;
    advise(&region, libc::MADV_DONTFORK)?;
    // For hosts that give huge pages to who asks. Some have none.
    let _ = advise(&region, libc::MADV_HUGEPAGE);
    Ok(region)
}

/// Anonymous memory that begins with a huge page, if it has one.
///
/// A huge page of ours is one for the guest only where its addresses and ours are the same within it, and the guest's
/// ranges begin with one. Otherwise each 4 KiB of it that the guest touches are an exit, 2300 until the agent is ready.
/// Kernels before 6.7 put a mapping anywhere. It goes into the highest gap that is large enough: here, most likely,
/// the one that is made for it. Nothing but time depends on it.
fn map(bytes: usize) -> io::Result<MmapRegion> {
    let around = bytes + HUGE_PAGE;
    // SAFETY: a new mapping, where the kernel likes.
    let start = unsafe {
        libc::mmap(
            ptr::null_mut(),
            around,
            libc::PROT_NONE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
            -1,
            0,
        )
    };
    if start == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    let before = start.align_offset(HUGE_PAGE);
    let gap = before..before + bytes;
    let unmap = |part: Range<usize>| {
        if !part.is_empty() {
            // SAFETY: a part of the mapping above, which nobody knows of. Each part is unmapped once.
            unsafe { libc::munmap(start.byte_add(part.start), part.len()) };
        }
    };
    unmap(gap.clone());
    let mapping = MmapRegion::new(bytes).map_err(io::Error::other);
    unmap(0..gap.start);
    unmap(gap.end..around);
    mapping
}

fn advise(region: &GuestRegionMmap, advice: libc::c_int) -> io::Result<()> {
    // SAFETY: the range is the region's own mapping, and no advice that is given here changes content.
    let advised = unsafe { libc::madvise(region.as_ptr().cast(), region.len() as usize, advice) };
    if advised < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Makes `memory` the VM's. The caller keeps `memory` as long as the VM has vCPUs that run.
pub fn register(vm: &VmFd, memory: &GuestMemoryMmap) -> Result<(), KvmError> {
    for (slot, region) in memory.iter().enumerate() {
        set_slot(vm, slot, region).map_err(KvmError::call("KVM_SET_USER_MEMORY_REGION"))?;
    }
    Ok(())
}

/// Makes `region` what the VM has in `slot`, a number that no other has. The caller keeps it as with [`register`].
fn set_slot(vm: &VmFd, slot: usize, region: &GuestRegionMmap) -> Result<(), kvm_ioctls::Error> {
    let region = kvm_userspace_memory_region {
        slot: slot as u32,
        guest_phys_addr: region.start_addr().0,
        memory_size: region.len(),
        userspace_addr: region.as_ptr() as u64,
        flags: 0,
    };
    // SAFETY: the range is mapped as long as the caller keeps the region, and guest memory is nobody's Rust object.
    unsafe { vm.set_user_memory_region(region) }
}

/// Adds `range` to `memory`, which is the VM's: for the guest first, then for the devices. Returns where it is in this
/// process.
///
/// # Errors
/// The host has no room for it, or the VM has memory there. Nothing has changed.
pub fn add(
    vm: &VmFd,
    memory: &GuestMemoryAtomic<GuestMemoryMmap>,
    range: &Range<u64>,
) -> io::Result<(u64, u64)> {
    let region = Arc::new(region(range)?);
    // Maps are replaced as a whole: one that panicked has replaced none.
    let exclusive = memory.lock().unwrap_or_else(PoisonError::into_inner);
    let before = memory.memory();
    let after = before
        .insert_region(Arc::clone(&region))
        .map_err(io::Error::other)?;
    set_slot(vm, before.num_regions(), &region)?;
    exclusive.replace(after);
    Ok((region.as_ptr() as u64, region.len()))
}

/// A file that is read into guest memory by mapping its pages, where both are aligned to pages and it is much at once, or
/// else by copying: parts of a kernel that are smaller than a huge page are its data, which it writes, and to map a file
/// there would only break the huge page up.
///
/// The file must not shrink while the VM runs, or the guest's access to what is gone ends the VM.
pub struct MappedFile {
    file: File,
    length: u64,
}

impl MappedFile {
    /// `file` at its beginning.
    pub fn new(file: File) -> io::Result<Self> {
        let length = file.metadata()?.len();
        Ok(Self { file, length })
    }

    /// Maps as many whole pages as go into `target`, and goes on behind them. 0: it is too little, or nothing is aligned.
    fn map<B: BitmapSlice>(&mut self, target: &VolatileSlice<'_, B>) -> io::Result<usize> {
        let position = self.file.stream_position()?;
        let address = target.ptr_guard_mut().as_ptr();
        let aligned = (address as u64).is_multiple_of(PAGE) && position.is_multiple_of(PAGE);
        let available = self.length.saturating_sub(position);
        let bytes = (target.len() as u64).min(available) / PAGE * PAGE;
        if !aligned || bytes < HUGE_PAGE as u64 {
            return Ok(0);
        }
        // SAFETY: the range is in `target`, which is guest memory: mapped, private, of whole pages here, and nobody's
        // Rust object. Its owner unmaps the whole of it, whatever lies there.
        let mapped = unsafe {
            libc::mmap(
                address.cast(),
                bytes as usize,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_FIXED | libc::MAP_NORESERVE,
                self.file.as_raw_fd(),
                position as libc::off_t,
            )
        };
        if mapped == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        self.file.seek(SeekFrom::Start(position + bytes))?;
        Ok(bytes as usize)
    }
}

impl ReadVolatile for MappedFile {
    /// Reads until `target` is full or the file ends: callers take a shorter read for the end.
    fn read_volatile<B: BitmapSlice>(
        &mut self,
        target: &mut VolatileSlice<'_, B>,
    ) -> Result<usize, VolatileMemoryError> {
        let mut done = self.map(target).map_err(VolatileMemoryError::IOError)?;
        while done < target.len() {
            let count = self.file.read_volatile(&mut target.offset(done)?)?;
            if count == 0 {
                break;
            }
            done += count;
        }
        Ok(done)
    }
}

impl Read for MappedFile {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.file.read(buffer)
    }
}

impl Seek for MappedFile {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.file.seek(to)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt as _;

    use vm_memory::Bytes as _;

    use super::*;

    fn file(length: usize) -> (MappedFile, Vec<u8>) {
        let content: Vec<u8> = (0..length).map(|at| (at / 7) as u8).collect();
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&content, 0).unwrap();
        (MappedFile::new(file).unwrap(), content)
    }

    fn read_into(memory: &GuestMemoryMmap, file: &mut MappedFile, address: u64, count: usize) {
        memory
            .read_exact_volatile_from(GuestAddress(address), file, count)
            .unwrap();
    }

    #[test]
    fn the_regions_leave_room_for_devices() {
        let memory = create(4 << 30).unwrap();
        let ranges: Vec<_> = memory.iter().map(|r| (r.start_addr().0, r.len())).collect();
        assert_eq!(ranges, [(0, 3 << 30), (4 << 30, 1 << 30)]);
        assert_eq!(create(64 << 20).unwrap().num_regions(), 1);
    }

    #[test]
    fn memory_begins_with_a_huge_page() {
        let aligned = |bytes| {
            let mapping = map(bytes).unwrap();
            assert_eq!(mapping.size(), bytes);
            mapping.as_ptr().addr().is_multiple_of(HUGE_PAGE)
        };
        // Whatever lies around it.
        let _between = [3, 700].map(|pages| map(pages * PAGE as usize).unwrap());
        for bytes in [HUGE_PAGE, (64 << 20) + 8192, 1 << 30] {
            // Another test's thread may take the gap.
            assert!((0..3).any(|_| aligned(bytes)), "{bytes}");
        }
    }

    #[test]
    fn aligned_and_unaligned_parts_of_a_file() {
        let memory = create(32 << 20).unwrap();
        let (mut mapped, content) = file(HUGE_PAGE + 5 * 4096 + 100);
        for (offset, address) in [
            (0, 0x1000),
            (4096, 0x40_0000),
            (10, 0x80_0000),
            (4096, 0xc0_0010),
            // Too little to be mapped.
            (HUGE_PAGE, 0x100_0000),
        ] {
            let count = content.len() - offset;
            mapped.seek(SeekFrom::Start(offset as u64)).unwrap();
            read_into(&memory, &mut mapped, address, count);
            let mut found = vec![0; count];
            memory
                .read_slice(&mut found, GuestAddress(address))
                .unwrap();
            assert!(found == content[offset..], "offset {offset}");
            // What follows the file's end in its last page is not the file's.
            let after: u8 = memory
                .read_obj(GuestAddress(address + count as u64))
                .unwrap();
            assert_eq!(after, 0);
        }
        assert!(
            memory
                .read_exact_volatile_from(GuestAddress(0), &mut mapped, 1)
                .is_err(),
            "the end of the file"
        );
    }

    #[test]
    fn what_the_guest_writes_stays_its_own() {
        let memory = create(4 << 20).unwrap();
        let (mut mapped, content) = file(HUGE_PAGE);
        read_into(&memory, &mut mapped, 0, HUGE_PAGE);
        memory
            .write_slice(&vec![0xff; HUGE_PAGE], GuestAddress(0))
            .unwrap();
        let mut found = vec![0; HUGE_PAGE];
        mapped.file.read_exact_at(&mut found, 0).unwrap();
        assert!(found == content);
    }
}
