//! Guest memory: private, anonymous, and not there before the guest touches it. The kernel and the initramfs are
//! their files' pages: what the guest only reads is shared with all other guests through the page cache.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::ops::Range;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::FileExt as _;
use std::sync::{Arc, PoisonError};

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use vm_memory::bitmap::BitmapSlice;
use vm_memory::{
    GuestAddress, GuestAddressSpace as _, GuestMemoryAtomic, GuestMemoryBackend as _,
    GuestMemoryMmap, GuestMemoryRegion as _, GuestRegionMmap, ReadVolatile, VolatileMemoryError,
    VolatileSlice,
};

use super::{KvmError, layout};

/// The size of a page, of the host's and of the guest's.
pub const PAGE: u64 = 4096;

/// Guest memory of `bytes`, in one region or, when it reaches the devices' addresses, in two.
pub fn create(bytes: u64) -> Result<GuestMemoryMmap, KvmError> {
    let low = bytes.min(layout::DEVICES_START);
    let mut ranges = vec![(GuestAddress(0), low as usize)];
    if bytes > low {
        let high = GuestAddress(layout::RAM_ABOVE_DEVICES);
        ranges.push((high, (bytes - low) as usize));
    }
    let memory = GuestMemoryMmap::from_ranges(&ranges)
        .map_err(|error| KvmError::host("guest memory")(io::Error::other(error)))?;
    for region in memory.iter() {
        keep_to_ourselves(region).map_err(KvmError::host("guest memory"))?;
    }
    Ok(memory)
}

fn keep_to_ourselves(region: &GuestRegionMmap) -> io::Result<()> {
    for advice in [
        // A core dump of ours holds nothing of the tenant's.
        libc::MADV_DONTDUMP,
        libc::MADV_DONTFORK,
    ] {
        // SAFETY: the range is the region's own mapping, and the advice changes no content.
        let advised =
            unsafe { libc::madvise(region.as_ptr().cast(), region.len() as usize, advice) };
        if advised < 0 {
            return Err(io::Error::last_os_error());
        }
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
    let length = (range.end - range.start) as usize;
    let region = GuestRegionMmap::from_range(GuestAddress(range.start), length, None)
        .map_err(io::Error::other)?;
    keep_to_ourselves(&region)?;
    let region = Arc::new(region);
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

/// A file that is read into guest memory by mapping its pages, where both are aligned to pages, or else by copying.
///
/// The file must not shrink while the VM runs, or the guest's access to what is gone ends the VM.
pub struct MappedFile {
    file: File,
    position: u64,
    length: u64,
}

impl MappedFile {
    /// `file` at its beginning.
    pub fn new(file: File) -> io::Result<Self> {
        let length = file.metadata()?.len();
        Ok(Self {
            file,
            position: 0,
            length,
        })
    }

    /// Its length in bytes.
    pub fn len(&self) -> u64 {
        self.length
    }

    /// Maps as many whole pages as go into `target`. 0: nothing is aligned.
    fn map<B: BitmapSlice>(&self, target: &VolatileSlice<'_, B>) -> io::Result<usize> {
        let address = target.ptr_guard_mut().as_ptr();
        let aligned = (address as u64).is_multiple_of(PAGE) && self.position.is_multiple_of(PAGE);
        let available = self.length.saturating_sub(self.position);
        let bytes = (target.len() as u64).min(available) / PAGE * PAGE;
        if !aligned || bytes == 0 {
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
                self.position as libc::off_t,
            )
        };
        if mapped == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(bytes as usize)
    }

    /// Copies what there is of the file into `target`.
    fn copy<B: BitmapSlice>(&self, target: &VolatileSlice<'_, B>) -> io::Result<usize> {
        let mut buffer = [0; PAGE as usize];
        let count = buffer.len().min(target.len());
        let count = self.file.read_at(&mut buffer[..count], self.position)?;
        target.copy_from(&buffer[..count]);
        Ok(count)
    }
}

impl ReadVolatile for MappedFile {
    /// Reads until `target` is full or the file ends: callers take a shorter read for the end.
    fn read_volatile<B: BitmapSlice>(
        &mut self,
        target: &mut VolatileSlice<'_, B>,
    ) -> Result<usize, VolatileMemoryError> {
        let mut done = self.map(target).map_err(VolatileMemoryError::IOError)?;
        self.position += done as u64;
        while done < target.len() {
            let rest = target.offset(done)?;
            let count = self.copy(&rest).map_err(VolatileMemoryError::IOError)?;
            if count == 0 {
                break;
            }
            self.position += count as u64;
            done += count;
        }
        Ok(done)
    }
}

impl Read for MappedFile {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.file.read_at(buffer, self.position)?;
        self.position += count as u64;
        Ok(count)
    }
}

impl Seek for MappedFile {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let position = match to {
            SeekFrom::Start(offset) => Some(offset),
            SeekFrom::Current(offset) => self.position.checked_add_signed(offset),
            SeekFrom::End(offset) => self.length.checked_add_signed(offset),
        };
        self.position = position.ok_or(io::ErrorKind::InvalidInput)?;
        Ok(self.position)
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
    fn aligned_and_unaligned_parts_of_a_file() {
        let memory = create(1 << 20).unwrap();
        let (mut mapped, content) = file(5 * 4096 + 100);
        for (offset, address) in [
            (0, 0x1000),
            (4096, 0x2_0000),
            (10, 0x4_0000),
            (4096, 0x6_0010),
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
        let memory = create(1 << 20).unwrap();
        let (mut mapped, content) = file(8192);
        read_into(&memory, &mut mapped, 0, 8192);
        memory.write_slice(&[0xff; 8192], GuestAddress(0)).unwrap();
        let mut found = vec![0; 8192];
        mapped.file.read_exact_at(&mut found, 0).unwrap();
        assert!(found == content);
    }
}
