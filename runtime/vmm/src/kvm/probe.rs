//! Runs a tiny guest, to learn whether KVM here is good for a kernel.
//!
//! That `/dev/kvm` opens proves little: some cloud machines offer a software KVM (module `kvm_pvm`)
//! on which the first `lock cmpxchg16b` in kernel mode ends in KVM_EXIT_INTERNAL_ERROR. The guest
//! does, in 64-bit mode at CPL 0, what every kernel does in its first milliseconds: `lock cmpxchg16b`,
//! `int3` through an IDT, `iretq`, a wait for an interrupt of the local APIC's timer, port output. Takes
//! about a millisecond where KVM works.

use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_segment, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit};
use nix::errno::Errno;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

/// Why KVM cannot be used. Each is a sentence with its remedy.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// No device, though the CPU could.
    #[error("/dev/kvm is not there: load the kernel module kvm_intel or kvm_amd")]
    Missing,
    /// No device, and a CPU that could not.
    #[error(
        "/dev/kvm is not there, and this CPU offers no virtualisation: enable it in the firmware or, if this machine \
         is itself virtual, nested virtualisation at its host"
    )]
    NoVirtualisation,
    /// Not ours.
    #[error(
        "/dev/kvm cannot be opened, no permission: run as root, in a container with the device allowed"
    )]
    Permission,
    /// The probe guest could not be set up.
    #[error("KVM refuses {call}: {source}")]
    Call {
        /// The ioctl or step.
        call: &'static str,
        /// Its error.
        source: std::io::Error,
    },
    /// The probe guest ended in a way that no guest should.
    #[error("the probe guest ended with {0}: this KVM (a software one?) cannot run a stock kernel")]
    Exit(String),
}

const MEMORY: usize = 0x10000;
const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const PAGE_DIRECTORY: u64 = 0x3000;
const GDT: u64 = 0x4000;
const IDT: u64 = 0x5000;
const STACK_TOP: u64 = 0x7ff0;
const CODE: u64 = 0x8000;
const HANDLER: u64 = 0x8100;

/// Selector of the code segment: entry 1 of the GDT.
const CODE_SELECTOR: u16 = 1 << 3;

/// Vectors that the guest takes: the breakpoint's (Intel SDM 3A, 6.15) and the one it gives to the timer.
const BREAKPOINT: u64 = 3;
const TIMER: u64 = 0x20;

/// Where the guest writes how many of them it took.
const PORT: u16 = 0xf4;
const DONE: u8 = 2;

/// The local APIC's registers in x2APIC mode (Intel SDM 3A, table 10-6).
const IA32_APIC_BASE: u32 = 0x1b;
const X2APIC_SPURIOUS: u32 = 0x80f;
const X2APIC_TIMER: u32 = 0x832;
const X2APIC_TIMER_COUNT: u32 = 0x838;

/// The guest: 16 bytes at 0x9000 are compared and exchanged, a breakpoint is taken and returned from, the CPU halts
/// until its timer interrupts it, and the count goes to the port.
fn program() -> Vec<u8> {
    // The boot CPU's, at its usual address, enabled, in x2APIC mode.
    const APIC_BASE: u32 = super::layout::LOCAL_APIC | 1 << 11 | 1 << 10 | 1 << 8;
    const APIC_ENABLED: u32 = 1 << 8 | 0xff;
    let compare_and_exchange = [
        0xbf, 0x00, 0x90, 0x00, 0x00, // mov edi, 0x9000
        0x31, 0xc0, // xor eax, eax
        0x31, 0xd2, // xor edx, edx
        0xbb, 0x01, 0x00, 0x00, 0x00, // mov ebx, 1
        0xb9, 0x02, 0x00, 0x00, 0x00, // mov ecx, 2
        0xf0, 0x48, 0x0f, 0xc7, 0x0f, // lock cmpxchg16b [rdi]
        0xcc, // int3
    ];
    let wait_and_tell = [
        0xfb, // sti
        0xf4, // hlt
        0x89, 0xf0, // mov eax, esi
        0xe6, PORT as u8, // out PORT, al
        0xf4,       // hlt
    ];
    [
        &compare_and_exchange[..],
        &wrmsr(IA32_APIC_BASE, APIC_BASE),
        &wrmsr(X2APIC_SPURIOUS, APIC_ENABLED),
        // Once, by the counter, which is divided by 2 unless told otherwise.
        &wrmsr(X2APIC_TIMER, TIMER as u32),
        &wrmsr(X2APIC_TIMER_COUNT, 1000),
        &wait_and_tell,
    ]
    .concat()
}

fn wrmsr(msr: u32, value: u32) -> [u8; 14] {
    let mut code = [
        0xb9, 0, 0, 0, 0, // mov ecx, msr
        0xb8, 0, 0, 0, 0, // mov eax, value
        0x31, 0xd2, // xor edx, edx
        0x0f, 0x30, // wrmsr
    ];
    code[1..5].copy_from_slice(&msr.to_le_bytes());
    code[6..10].copy_from_slice(&value.to_le_bytes());
    code
}

/// Both vectors' handler: counts in ESI, which is 0 at first.
const COUNT_INTERRUPT: &[u8] = &[
    0xff, 0xc6, // inc esi
    0x48, 0xcf, // iretq
];

/// Runs the probe guest.
///
/// # Errors
/// Why KVM cannot be used.
pub fn run() -> Result<(), ProbeError> {
    let kvm = Kvm::new().map_err(|error| match Errno::from_raw(error.errno()) {
        Errno::ENOENT | Errno::ENODEV | Errno::ENXIO => missing(),
        Errno::EACCES | Errno::EPERM => ProbeError::Permission,
        _ => call("opening /dev/kvm")(error),
    })?;
    let vm = kvm.create_vm().map_err(call("KVM_CREATE_VM"))?;
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), MEMORY)])
        .map_err(|error| setup(std::io::Error::other(error)))?;
    let host = memory
        .get_host_address(GuestAddress(0))
        .map_err(|error| setup(std::io::Error::other(error)))?;
    let region = kvm_userspace_memory_region {
        slot: 0,
        guest_phys_addr: 0,
        memory_size: MEMORY as u64,
        userspace_addr: host as u64,
        flags: 0,
    };
    // SAFETY: the mapping is `memory`'s, MEMORY bytes long, and `memory` outlives `vm`.
    unsafe { vm.set_user_memory_region(region) }.map_err(call("KVM_SET_USER_MEMORY_REGION"))?;
    load(&memory).map_err(|error| setup(std::io::Error::other(error)))?;

    vm.create_irq_chip().map_err(call("KVM_CREATE_IRQCHIP"))?;
    let mut vcpu = vm.create_vcpu(0).map_err(call("KVM_CREATE_VCPU"))?;
    let cpuid = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(call("KVM_GET_SUPPORTED_CPUID"))?;
    vcpu.set_cpuid2(&cpuid).map_err(call("KVM_SET_CPUID2"))?;
    let mut sregs = vcpu.get_sregs().map_err(call("KVM_GET_SREGS"))?;
    enter_long_mode(&mut sregs);
    vcpu.set_sregs(&sregs).map_err(call("KVM_SET_SREGS"))?;
    let mut regs = vcpu.get_regs().map_err(call("KVM_GET_REGS"))?;
    regs.rip = CODE;
    regs.rsp = STACK_TOP;
    regs.rflags = 0x2;
    vcpu.set_regs(&regs).map_err(call("KVM_SET_REGS"))?;

    match vcpu.run() {
        Ok(VcpuExit::IoOut(PORT, [DONE])) => Ok(()),
        Ok(exit) => Err(ProbeError::Exit(format!("{exit:?}"))),
        Err(error) => Err(ProbeError::Exit(error.to_string())),
    }
}

/// Page tables that map the first 2 MiB to themselves, a code segment, two gates, the program.
fn load(memory: &GuestMemoryMmap<()>) -> Result<(), vm_memory::GuestMemoryError> {
    const PRESENT_WRITABLE: u64 = 0b11;
    const LARGE_PAGE: u64 = 1 << 7;
    const CODE_64: u64 = 0x00af_9b00_0000_ffff;
    // Intel SDM 3A, 6.14.1: 64-bit interrupt gate; the addresses here fit the first 16 bits.
    let gate = HANDLER & 0xffff | u64::from(CODE_SELECTOR) << 16 | 0x8e00 << 32;
    memory.write_obj(PDPT | PRESENT_WRITABLE, GuestAddress(PML4))?;
    memory.write_obj(PAGE_DIRECTORY | PRESENT_WRITABLE, GuestAddress(PDPT))?;
    memory.write_obj(PRESENT_WRITABLE | LARGE_PAGE, GuestAddress(PAGE_DIRECTORY))?;
    memory.write_obj(CODE_64, GuestAddress(GDT + u64::from(CODE_SELECTOR)))?;
    for vector in [BREAKPOINT, TIMER] {
        memory.write_obj(gate, GuestAddress(IDT + vector * 16))?;
    }
    memory.write_slice(&program(), GuestAddress(CODE))?;
    memory.write_slice(COUNT_INTERRUPT, GuestAddress(HANDLER))
}

fn enter_long_mode(sregs: &mut kvm_bindings::kvm_sregs) {
    const CR0_PE_PG: u64 = 1 | 1 << 31;
    const CR4_PAE: u64 = 1 << 5;
    const EFER_LME_LMA: u64 = 1 << 8 | 1 << 10;
    let code = kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector: CODE_SELECTOR,
        type_: 0b1011,
        present: 1,
        dpl: 0,
        db: 0,
        s: 1,
        l: 1,
        g: 1,
        ..Default::default()
    };
    sregs.cs = code;
    let data = kvm_segment {
        selector: 0,
        type_: 0b0011,
        l: 0,
        db: 1,
        ..code
    };
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.gdt.base = GDT;
    sregs.gdt.limit = 2 * 8 - 1;
    sregs.idt.base = IDT;
    sregs.idt.limit = (TIMER as u16 + 1) * 16 - 1;
    sregs.cr3 = PML4;
    sregs.cr4 = CR4_PAE;
    sregs.cr0 |= CR0_PE_PG;
    sregs.efer = EFER_LME_LMA;
}

/// Why there is no /dev/kvm.
fn missing() -> ProbeError {
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let flags = cpuinfo.lines().find(|line| line.starts_with("flags"));
    let mut flags = flags.unwrap_or_default().split_whitespace();
    if flags.any(|flag| flag == "vmx" || flag == "svm") {
        ProbeError::Missing
    } else {
        ProbeError::NoVirtualisation
    }
}

fn call(call: &'static str) -> impl Fn(kvm_ioctls::Error) -> ProbeError {
    move |error| ProbeError::Call {
        call,
        source: error.into(),
    }
}

fn setup(source: std::io::Error) -> ProbeError {
    ProbeError::Call {
        call: "the probe guest's memory",
        source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the machine offers decides which answer is right; that there is one, with a sentence that
    /// says what to do or what happened, holds everywhere.
    #[test]
    fn the_probe_ends_with_an_answer() {
        match run() {
            Ok(()) => assert!(std::path::Path::new("/dev/kvm").exists()),
            Err(ProbeError::Missing | ProbeError::NoVirtualisation) => {
                assert!(!std::path::Path::new("/dev/kvm").exists());
            }
            Err(error) => assert!(!error.to_string().is_empty()),
        }
    }
}
