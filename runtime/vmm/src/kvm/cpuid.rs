//! What the guest is told of its CPU.
//!
//! The policy: the guest sees the host's CPU as KVM can give it (`KVM_GET_SUPPORTED_CPUID`), so that programs find
//! their instructions, and the mitigations their bits, with these exceptions.
//!
//! | leaf | what | why |
//! |------|------|-----|
//! | 1, 0xb, 0x1f, 0x8000_001e | set: APIC id, number of CPUs | each vCPU is a core of one socket |
//! | 4, 0x8000_001d | changed: nobody shares caches | the host's topology is not the guest's |
//! | 1 ECX 31 | set: there is a hypervisor | guests look for KVM's leaves |
//! | 1 ECX 24 | set, where KVM has it: TSC deadline timer | one exit less per timer than the APIC's counter, and no calibration |
//! | 1 ECX 5, 0x8000_0001 ECX 2 | hidden: VMX, SVM | no VM in the VM: the largest part of KVM that a guest could reach |
//! | 1 ECX 3, 5, 0x8000_0001 ECX 29 | hidden: MONITOR/MWAIT | a vCPU that waits leaves the CPU to others |
//! | 1 ECX 15, 0xa, 0x8000_0001 ECX 23, 24, 28, 0x8000_0022 | hidden: performance counters | they see neighbours |
//! | 7 EBX 4, 11 | hidden: HLE, RTM | transactions speed side channels up |
//! | 7 EBX 2, 0x12 | hidden: SGX | enclaves need host support |
//! | 7 EBX 25, 0x14 | hidden: processor trace | it sees neighbours |
//! | 7 EDX 22, 24, 25, 0x1d, 0x1e | hidden: AMX | 8 KiB more state per thread, for a permission that containers do not ask for |
//! | 0x4000_0001 EAX | only known features of KVM's | a newer host offers no new surface by itself |

use kvm_bindings::{CpuId, kvm_cpuid_entry2};

/// Features of KVM's that guests may use (the kernel's Documentation/virt/kvm/x86/cpuid.rst). Not among them:
/// asynchronous page faults, by which a guest would run other tasks while the host reads a page. Ours are in memory or
/// in the page cache, and the guest's page fault handler stays the hardware's.
const KVM_FEATURES: u32 = 1 // clock
    | 1 << 1 // no delays after port accesses
    | 1 << 3 // clock, by its newer MSRs
    | 1 << 5 // steal time
    | 1 << 6 // end of interrupt without an exit
    | 1 << 7 // waiting for a lock lets others run
    | 1 << 9 // TLB flushes of vCPUs that do not run
    | 1 << 11 // interrupts to many vCPUs in one exit
    | 1 << 12 // no polling by the host while the guest polls
    | 1 << 13 // yield to the vCPU that an interrupt goes to
    | 1 << 24; // the clock never goes back, on any CPU

/// The vCPU whose CPUID is asked for.
#[derive(Debug, Clone, Copy)]
pub struct Topology {
    /// Its number, which is its APIC id.
    pub vcpu: u32,
    /// How many there are.
    pub vcpus: u32,
}

/// The host's CPUID as KVM gives it, made the guest's.
pub fn filter(cpuid: &mut CpuId, topology: Topology, tsc_deadline: bool) {
    for entry in cpuid.as_mut_slice() {
        filter_entry(entry, topology, tsc_deadline);
    }
}

fn filter_entry(entry: &mut kvm_cpuid_entry2, topology: Topology, tsc_deadline: bool) {
    let Topology { vcpu, vcpus } = topology;
    // Bits of an APIC id that number the CPUs of the socket.
    let id_bits = u32::BITS - (vcpus - 1).leading_zeros();
    match (entry.function, entry.index) {
        (1, _) => {
            let logical = if vcpus > 1 { vcpus.min(0xff) } else { 1 };
            entry.ebx = entry.ebx & 0xffff | vcpu << 24 | logical << 16;
            entry.ecx &= !(1 << 3 | 1 << 5 | 1 << 15);
            entry.ecx |= 1 << 31;
            entry.ecx = with_bit(entry.ecx, 24, tsc_deadline);
            // HTT: the count in EBX holds.
            entry.edx = with_bit(entry.edx, 28, vcpus > 1);
        }
        // EAX 14..26: sharers of the cache; 26..32: cores of the socket; each less one.
        (4, _) if entry.eax & 0x1f != 0 => {
            entry.eax = entry.eax & 0x3fff | (vcpus - 1).min(0x3f) << 26;
        }
        (7, 0) => {
            entry.ebx &= !(1 << 2 | 1 << 4 | 1 << 11 | 1 << 25);
            entry.edx &= !(1 << 22 | 1 << 24 | 1 << 25);
        }
        (0xa | 0x12 | 0x14 | 0x1d | 0x1e | 0x8000_0022, _) => {
            (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0);
        }
        (0xb | 0x1f, level) => {
            (entry.eax, entry.ebx, entry.ecx) = match level {
                0 => (0, 1, 1 << 8),           // one thread in a core
                1 => (id_bits, vcpus, 2 << 8), // cores in the socket
                _ => (0, 0, 0),
            };
            entry.ecx |= level & 0xff;
            entry.edx = vcpu;
        }
        (0x4000_0001, _) => entry.eax &= KVM_FEATURES,
        (0x8000_0001, _) => {
            entry.ecx &= !(1 << 2 | 1 << 23 | 1 << 24 | 1 << 28 | 1 << 29);
        }
        // ECX 0..8: CPUs less one; 12..16: bits of the APIC id that number them.
        (0x8000_0008, _) => {
            entry.ecx = entry.ecx & !0xf0ff | (vcpus - 1).min(0xff) | id_bits << 12;
        }
        (0x8000_000a, _) => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
        // EAX 14..26: sharers of the cache less one.
        (0x8000_001d, _) => entry.eax &= 0x3fff,
        // APIC id; one thread per core; one node.
        (0x8000_001e, _) => (entry.eax, entry.ebx, entry.ecx) = (vcpu, vcpu & 0xff, 0),
        _ => {}
    }
}

fn with_bit(register: u32, bit: u32, set: bool) -> u32 {
    register & !(1 << bit) | u32::from(set) << bit
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filtered(function: u32, index: u32, vcpu: u32, vcpus: u32) -> kvm_cpuid_entry2 {
        let entry = kvm_cpuid_entry2 {
            function,
            index,
            eax: u32::MAX,
            ebx: u32::MAX,
            ecx: u32::MAX,
            edx: u32::MAX,
            ..kvm_cpuid_entry2::default()
        };
        let mut cpuid = CpuId::from_entries(&[entry]).unwrap();
        filter(&mut cpuid, Topology { vcpu, vcpus }, true);
        cpuid.as_slice()[0]
    }

    #[test]
    fn no_virtualisation_no_counters() {
        assert_eq!(filtered(1, 0, 0, 1).ecx & (1 << 5 | 1 << 15), 0);
        assert_eq!(filtered(0x8000_0001, 0, 0, 1).ecx & 1 << 2, 0);
        assert_eq!(filtered(0x8000_000a, 0, 0, 1).eax, 0);
        assert_eq!(filtered(0xa, 0, 0, 1).eax, 0);
        assert_eq!(filtered(0x4000_0001, 0, 0, 1).eax, KVM_FEATURES);
        let tsc_deadline = 1 << 24;
        assert_ne!(filtered(1, 0, 0, 1).ecx & tsc_deadline, 0);
    }

    #[test]
    fn each_vcpu_is_a_core_of_one_socket() {
        for (vcpus, bits) in [(1, 0), (2, 1), (3, 2), (4, 2), (254, 8)] {
            let last = vcpus - 1;
            let leaf = filtered(0xb, 1, last, vcpus);
            assert_eq!(
                (leaf.eax, leaf.ebx, leaf.ecx, leaf.edx),
                (bits, vcpus, 0x201, last)
            );
            let leaf = filtered(0xb, 0, last, vcpus);
            assert_eq!((leaf.eax, leaf.ebx, leaf.ecx), (0, 1, 0x100));
            assert_eq!(filtered(1, 0, last, vcpus).ebx >> 24, last);
            let leaf = filtered(0x8000_0008, 0, last, vcpus);
            assert_eq!((leaf.ecx & 0xff, leaf.ecx >> 12 & 0xf), (last, bits));
        }
    }
}
