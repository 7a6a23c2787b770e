//! The MP table (Intel `MultiProcessor` Specification 1.4): how a kernel without ACPI learns of its CPUs, of the
//! IOAPIC, and that the ISA interrupts are its first sixteen pins.

use vm_memory::{Bytes as _, GuestMemoryError, GuestMemoryMmap};

use super::layout;

/// What the local APICs and the IOAPIC of KVM answer.
const APIC_VERSION: u8 = 0x14;
const IOAPIC_VERSION: u8 = 0x11;
/// Interrupts to every CPU.
const ALL_CPUS: u8 = 0xff;
const ISA_BUS: u8 = 0;
/// Ids of local APICs are those of the CPUs, from 0; this is the largest that is not "all".
pub const MAX_CPUS: u32 = 254;

/// Kinds of entries (table 4-3).
const PROCESSOR: u8 = 0;
const BUS: u8 = 1;
const IOAPIC: u8 = 2;
const IO_INTERRUPT: u8 = 3;
const LOCAL_INTERRUPT: u8 = 4;

/// Kinds of interrupts (table 4-11).
const VECTORED: u8 = 0;
const NMI: u8 = 1;
const EXTINT: u8 = 3;

/// Writes the table for `cpus`, of which the first boots.
pub fn write(memory: &GuestMemoryMmap, cpus: u32) -> Result<(), GuestMemoryError> {
    let table = table(cpus as u8);
    let address = layout::MP_TABLE.0 as u32 + 16;
    memory.write_slice(&floating_pointer(address), layout::MP_TABLE)?;
    memory.write_slice(&table, vm_memory::GuestAddress(address.into()))
}

/// What kernels look for (section 4.1).
fn floating_pointer(table: u32) -> [u8; 16] {
    let mut pointer = [0; 16];
    pointer[..4].copy_from_slice(b"_MP_");
    pointer[4..8].copy_from_slice(&table.to_le_bytes());
    pointer[8] = 1; // length in units of 16 bytes
    pointer[9] = 4; // version 1.4
    pointer[10] = checksum(&pointer);
    pointer
}

fn table(cpus: u8) -> Vec<u8> {
    let ioapic_id = cpus;
    let mut entries = Vec::new();
    let mut count = 0_u16;
    let mut add = |entry: &[u8]| {
        entries.extend_from_slice(entry);
        count += 1;
    };
    for cpu in 0..cpus {
        let boots = u8::from(cpu == 0) << 1;
        let mut entry = [0; 20];
        // The kernel asks CPUID for what else the table could say of a CPU.
        entry[..4].copy_from_slice(&[PROCESSOR, cpu, APIC_VERSION, boots | 1]);
        add(&entry);
    }
    add(&[BUS, ISA_BUS, b'I', b'S', b'A', b' ', b' ', b' ']);
    let [a, b, c, d] = layout::IOAPIC.to_le_bytes();
    add(&[IOAPIC, ioapic_id, IOAPIC_VERSION, 1, a, b, c, d]);
    for irq in 0..layout::ISA_IRQS as u8 {
        add(&[IO_INTERRUPT, VECTORED, 0, 0, ISA_BUS, irq, ioapic_id, irq]);
    }
    for (pin, kind) in [(0, EXTINT), (1, NMI)] {
        add(&[LOCAL_INTERRUPT, kind, 0, 0, ISA_BUS, 0, ALL_CPUS, pin]);
    }

    let mut table = vec![0; 44];
    table[..4].copy_from_slice(b"PCMP");
    table[4..6].copy_from_slice(&(44 + entries.len() as u16).to_le_bytes());
    table[6] = 4;
    table[8..28].copy_from_slice(b"PODVISORVM          ");
    table[34..36].copy_from_slice(&count.to_le_bytes());
    table[36..40].copy_from_slice(&layout::LOCAL_APIC.to_le_bytes());
    table.extend_from_slice(&entries);
    table[7] = checksum(&table);
    table
}

/// The byte that makes the sum of all 0.
fn checksum(bytes: &[u8]) -> u8 {
    let sum = bytes.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte));
    sum.wrapping_neg()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_are_zero_and_lengths_right() {
        for cpus in [1, 2, MAX_CPUS as u8] {
            let table = table(cpus);
            assert_eq!(checksum(&table), 0);
            let length = u16::from_le_bytes([table[4], table[5]]);
            assert_eq!(usize::from(length), table.len());
            assert!(table.len() + 16 < 0x1_0000, "fits where a BIOS would be");
            let entries = u16::from_le_bytes([table[34], table[35]]);
            assert_eq!(entries, u16::from(cpus) + 1 + 1 + 16 + 2);
        }
        assert_eq!(checksum(&floating_pointer(0xf_0010)), 0);
    }
}
