//! What is in guest memory before the first instruction: kernel, initramfs, and the PVH boot protocol's structures
//! (Xen's docs/misc/pvh.pandoc; `xen/include/public/arch-x86/hvm/start_info.h`).

use std::fmt::Display;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;

use linux_loader::configurator::pvh::PvhBootConfigurator;
use linux_loader::configurator::{BootConfigurator as _, BootParams};
use linux_loader::loader::KernelLoader as _;
use linux_loader::loader::elf::start_info::{
    hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use linux_loader::loader::elf::{Elf, PvhBootCapability};
use vm_memory::{Bytes as _, GuestAddress, GuestMemoryBackend as _, GuestMemoryMmap};

use super::layout;
use super::memory::{MappedFile, PAGE};
use super::{KvmError, mptable};

const START_INFO_MAGIC: u32 = 0x336e_c578;
/// Types of memory in the map, as in the BIOS's E820.
const RAM: u32 = 1;
const RESERVED: u32 = 2;

/// Memory that the kernel needs beside its image and the initramfs, to begin with.
const KERNEL_NEEDS_BYTES: u64 = 32 << 20;

/// Kernel and initramfs in guest memory.
#[derive(Debug)]
pub struct Images {
    /// Where the kernel begins, in 32-bit protected mode.
    pub entry: GuestAddress,
    initramfs: hvm_modlist_entry,
}

/// Loads kernel and initramfs.
pub fn load(
    memory: &GuestMemoryMmap,
    kernel: OwnedFd,
    initramfs: OwnedFd,
) -> Result<Images, KvmError> {
    let (entry, kernel_end) = load_kernel(memory, kernel)?;
    let initramfs = load_initramfs(memory, initramfs, kernel_end)?;
    Ok(Images { entry, initramfs })
}

/// Writes what the kernel reads of its machine.
pub fn describe(
    memory: &GuestMemoryMmap,
    images: &Images,
    cmdline: &str,
    vcpus: u32,
) -> Result<(), KvmError> {
    if cmdline.len() >= layout::CMDLINE_BYTES {
        return Err(KvmError::Config(format!(
            "a kernel command line of {} bytes: less than {} are possible",
            cmdline.len(),
            layout::CMDLINE_BYTES
        )));
    }
    memory
        .write_slice(cmdline.as_bytes(), layout::CMDLINE)
        .and_then(|()| mptable::write(memory, vcpus))
        .map_err(|error| KvmError::host("boot structures")(io::Error::other(error)))?;
    write_start_info(memory, &images.initramfs)
}

fn load_kernel(memory: &GuestMemoryMmap, kernel: OwnedFd) -> Result<(GuestAddress, u64), KvmError> {
    let mut kernel = MappedFile::new(File::from(kernel)).map_err(unreadable("kernel"))?;
    let high_ram = Some(GuestAddress(layout::HIGH_RAM_START));
    let loaded = Elf::load(memory, None, &mut kernel, high_ram).map_err(|error| {
        KvmError::Config(format!(
            "the kernel cannot be loaded into {} MiB: {error}",
            (memory.last_addr().0 + 1) >> 20
        ))
    })?;
    match loaded.pvh_boot_cap {
        PvhBootCapability::PvhEntryPresent(entry) => Ok((entry, loaded.kernel_end)),
        _ => Err(KvmError::Config(
            "the kernel has no PVH entry (CONFIG_PVH)".into(),
        )),
    }
}

/// Puts the initramfs at the end of the RAM below the devices. Copied: the guest reads all of it once, frees it, which
/// is a write, and from then on these are pages like others. Those of a file would each be two exits.
fn load_initramfs(
    memory: &GuestMemoryMmap,
    initramfs: OwnedFd,
    kernel_end: u64,
) -> Result<hvm_modlist_entry, KvmError> {
    let mut initramfs = File::from(initramfs);
    let size = initramfs.metadata().map_err(unreadable("initramfs"))?.len();
    let ram_end = (memory.last_addr().0 + 1).min(layout::DEVICES_START);
    let start = ram_end
        .checked_sub(size)
        .map(|start| start / PAGE * PAGE)
        .filter(|start| *start >= kernel_end + KERNEL_NEEDS_BYTES)
        .ok_or_else(|| {
            KvmError::Config(format!(
                "{} MiB of memory are too little for this kernel (up to {} MiB) and an initramfs of {} MiB",
                ram_end >> 20,
                kernel_end.div_ceil(1 << 20),
                size.div_ceil(1 << 20)
            ))
        })?;
    memory
        .read_exact_volatile_from(GuestAddress(start), &mut initramfs, size as usize)
        .map_err(unreadable("initramfs"))?;
    Ok(hvm_modlist_entry {
        paddr: start,
        size,
        ..hvm_modlist_entry::default()
    })
}

fn unreadable<E: Display>(what: &str) -> impl FnOnce(E) -> KvmError {
    move |error| KvmError::Config(format!("the {what} cannot be read: {error}"))
}

fn write_start_info(
    memory: &GuestMemoryMmap,
    initramfs: &hvm_modlist_entry,
) -> Result<(), KvmError> {
    let map = memory_map(memory);
    let start_info = hvm_start_info {
        magic: START_INFO_MAGIC,
        version: 1,
        nr_modules: 1,
        modlist_paddr: layout::MODULES.0,
        cmdline_paddr: layout::CMDLINE.0,
        memmap_paddr: layout::MEMORY_MAP.0,
        memmap_entries: map.len() as u32,
        ..hvm_start_info::default()
    };
    let mut params = BootParams::new(&start_info, layout::START_INFO);
    params.set_sections(&map, layout::MEMORY_MAP);
    params.set_modules(&[*initramfs], layout::MODULES);
    PvhBootConfigurator::write_bootparams(&params, memory)
        .map_err(|error| KvmError::host("boot structures")(io::Error::other(error)))
}

fn memory_map(memory: &GuestMemoryMmap) -> Vec<hvm_memmap_table_entry> {
    let entry = |type_, from: u64, to: u64| hvm_memmap_table_entry {
        addr: from,
        size: to - from,
        type_,
        reserved: 0,
    };
    let end = memory.last_addr().0 + 1;
    let mut map = vec![
        entry(RAM, 0, layout::LOW_RAM_END),
        entry(RESERVED, layout::MP_TABLE.0, layout::HIGH_RAM_START),
        entry(RAM, layout::HIGH_RAM_START, end.min(layout::DEVICES_START)),
    ];
    if end > layout::RAM_ABOVE_DEVICES {
        map.push(entry(RAM, layout::RAM_ABOVE_DEVICES, end));
    }
    map
}
