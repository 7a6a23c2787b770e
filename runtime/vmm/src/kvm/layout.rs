//! Where things are in the guest's physical address space, and which interrupt each has.
//!
//! ```text
//! 0x0000_6000  PVH start info, memory map, module list
//! 0x0002_0000  kernel command line
//! 0x000a_0000  hole up to 1 MiB; in it, at 0xf_0000, the MP table
//! 0x0100_0000  kernel, where its ELF header says
//!      ...     initramfs, at the end of the RAM below 3 GiB
//! 0xc000_0000  devices: virtio-mmio from 0xd000_0000, IOAPIC, local APIC
//! 0x1_0000_0000  RAM that does not fit below
//! ```

use vm_memory::GuestAddress;

/// The PVH start info structure; memory map and module list follow, all in one page.
pub const START_INFO: GuestAddress = GuestAddress(0x6000);
/// `struct hvm_memmap_table_entry`s.
pub const MEMORY_MAP: GuestAddress = GuestAddress(0x6100);
/// `struct hvm_modlist_entry`: the initramfs.
pub const MODULES: GuestAddress = GuestAddress(0x6f00);

/// The kernel's command line.
pub const CMDLINE: GuestAddress = GuestAddress(0x2_0000);
/// What Linux takes (`COMMAND_LINE_SIZE`), with the final zero.
pub const CMDLINE_BYTES: usize = 2048;

/// End of the RAM below the hole that PCs have there.
pub const LOW_RAM_END: u64 = 0xa_0000;
/// Where a BIOS would be, and where kernels look for the MP table.
pub const MP_TABLE: GuestAddress = GuestAddress(0xf_0000);
/// Begin of the RAM above the hole.
pub const HIGH_RAM_START: u64 = 0x10_0000;

/// RAM ends here; the rest of the first 4 GiB is the devices'.
pub const DEVICES_START: u64 = 0xc000_0000;
/// The rest of the RAM.
pub const RAM_ABOVE_DEVICES: u64 = 1 << 32;
/// What is between. QEMU's microvm machine has it at the same place.
pub const DEVICES_BYTES: u64 = RAM_ABOVE_DEVICES - DEVICES_START;

/// The first virtio-mmio device; the others follow.
pub const VIRTIO_MMIO: u64 = 0xd000_0000;
/// Distance between two.
pub const VIRTIO_MMIO_BYTES: u64 = 0x1000;
/// Interrupt of the first virtio-mmio device.
pub const VIRTIO_IRQ: u32 = 5;
/// Lines of the ISA bus, the only bus in the MP table.
pub const ISA_IRQS: u32 = 16;

/// The registers of the interrupt controllers, which KVM has in itself.
pub const IOAPIC: u32 = 0xfec0_0000;
/// See [`IOAPIC`].
pub const LOCAL_APIC: u32 = 0xfee0_0000;

/// Three pages that KVM needs for itself on some Intel CPUs, out of the guest's way.
pub const TSS: usize = 0xfffb_d000;

/// The first serial port.
pub const SERIAL_PORT: u16 = 0x3f8;
/// Its registers.
pub const SERIAL_PORTS: u16 = 8;
/// Its interrupt.
pub const SERIAL_IRQ: u32 = 4;

/// Command register of the keyboard controller, of which only the reset line is there.
pub const RESET_PORT: u16 = 0x64;
/// Pulls the CPU's reset line.
pub const RESET_COMMAND: u8 = 0xfe;
