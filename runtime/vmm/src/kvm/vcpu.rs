//! One vCPU: its first state, its thread, and what ends its runs.

use std::cell::Cell;
use std::io;
use std::os::unix::thread::JoinHandleExt as _;
use std::ptr;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;

use kvm_bindings::{Msrs, kvm_fpu, kvm_msr_entry, kvm_regs, kvm_run, kvm_segment, kvm_sregs};
use kvm_ioctls::{VcpuExit, VcpuFd};
use nix::errno::Errno;
use tokio::sync::watch;
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::EventFd;

use super::bus::{Bus, Stop};
use super::exits::{Exit, ExitCounters};
use super::{KvmError, layout};
use crate::seccomp;
use crate::vm::ExitReason;

/// Deep enough for a device's register access; what is not used is not there.
const STACK_BYTES: usize = 128 << 10;

/// 32-bit protected mode without paging at `entry`, EBX = start info: what the PVH protocol asks for.
pub fn enter_pvh(vcpu: &VcpuFd, entry: GuestAddress) -> Result<(), KvmError> {
    let mut sregs = vcpu.get_sregs().map_err(KvmError::call("KVM_GET_SREGS"))?;
    protected_mode(&mut sregs);
    vcpu.set_sregs(&sregs)
        .map_err(KvmError::call("KVM_SET_SREGS"))?;
    let regs = kvm_regs {
        rip: entry.0,
        rbx: layout::START_INFO.0,
        rflags: 0x2, // the bit that is always set
        ..kvm_regs::default()
    };
    vcpu.set_regs(&regs).map_err(KvmError::call("KVM_SET_REGS"))
}

fn protected_mode(sregs: &mut kvm_sregs) {
    const CR0_PE: u64 = 1;
    const CR0_ET: u64 = 1 << 4;
    // Selectors are not looked up: the kernel loads its own table first.
    let code = kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector: 1 << 3,
        type_: 0b1011,
        present: 1,
        db: 1,
        s: 1,
        g: 1,
        ..kvm_segment::default()
    };
    let data = kvm_segment {
        selector: 2 << 3,
        type_: 0b0011,
        ..code
    };
    let task = kvm_segment {
        base: 0,
        limit: 0x67,
        selector: 3 << 3,
        type_: 0b1011,
        present: 1,
        ..kvm_segment::default()
    };
    sregs.cs = code;
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = task;
    sregs.cr0 = CR0_PE | CR0_ET;
    (sregs.cr4, sregs.efer) = (0, 0);
}

/// What a CPU has after reset and firmware, and KVM does not set: memory is cacheable (or Linux distrusts its MTRRs),
/// string instructions are fast, the FPU is as `FNINIT` leaves it.
pub fn init_cpu(vcpu: &VcpuFd) -> Result<(), KvmError> {
    const IA32_MISC_ENABLE: u32 = 0x1a0;
    const FAST_STRING: u64 = 1;
    const IA32_MTRR_DEF_TYPE: u32 = 0x2ff;
    const ENABLED_WRITE_BACK: u64 = 1 << 11 | 6;
    let entry = |index, data| kvm_msr_entry {
        index,
        data,
        ..kvm_msr_entry::default()
    };
    let entries = [
        entry(IA32_MISC_ENABLE, FAST_STRING),
        entry(IA32_MTRR_DEF_TYPE, ENABLED_WRITE_BACK),
    ];
    let msrs = Msrs::from_entries(&entries)
        .map_err(|error| KvmError::host("MSRs")(io::Error::other(format!("{error:?}"))))?;
    let set = vcpu
        .set_msrs(&msrs)
        .map_err(KvmError::call("KVM_SET_MSRS"))?;
    if set != entries.len() {
        let message = format!("MSR {:#x} was refused", entries[set].index);
        return Err(KvmError::host("KVM_SET_MSRS")(io::Error::other(message)));
    }
    let fpu = kvm_fpu {
        fcw: 0x37f,
        mxcsr: 0x1f80,
        ..kvm_fpu::default()
    };
    vcpu.set_fpu(&fpu).map_err(KvmError::call("KVM_SET_FPU"))
}

/// What all vCPUs of a VM are told, and what the first that ends says.
#[derive(Debug)]
pub struct Control {
    wanted: Mutex<Wanted>,
    changed: Condvar,
    end: watch::Sender<Option<ExitReason>>,
    /// Ends the devices' threads.
    stop: EventFd,
    threads: Mutex<Vec<thread::JoinHandle<()>>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wanted {
    Run,
    Pause,
    End,
}

impl Control {
    /// For vCPUs that are yet to start. The receiver gets the reason of the end, and `stop` becomes readable.
    pub fn new(stop: EventFd) -> (Arc<Self>, watch::Receiver<Option<ExitReason>>) {
        let (end, ended) = watch::channel(None);
        let control = Self {
            wanted: Mutex::new(Wanted::Run),
            changed: Condvar::new(),
            end,
            stop,
            threads: Mutex::new(Vec::new()),
        };
        (Arc::new(control), ended)
    }

    /// Stops all vCPUs until [`resume`](Self::resume). They are on their way when this returns.
    pub fn pause(&self) {
        self.want(Wanted::Pause);
    }

    /// Undoes [`pause`](Self::pause).
    pub fn resume(&self) {
        self.want(Wanted::Run);
    }

    /// Ends all vCPUs, and the devices, for good. The first caller's reason counts.
    pub fn end(&self, reason: ExitReason) {
        self.want(Wanted::End);
        self.end.send_if_modified(|current| {
            let first = current.is_none();
            current.get_or_insert(reason);
            first
        });
        // Full only after 2^64 - 1 of these.
        let _ = self.stop.write(1);
    }

    fn want(&self, wanted: Wanted) {
        {
            let mut current = lock(&self.wanted);
            if *current == Wanted::End {
                return;
            }
            *current = wanted;
        }
        self.changed.notify_all();
        for thread in lock(&self.threads).iter() {
            // Fails only for a thread that has ended.
            // SAFETY: the handle is kept, so the thread's id is not another's.
            unsafe { libc::pthread_kill(thread.as_pthread_t(), kick_signal()) };
        }
    }

    /// Waits until the vCPU may run. False: it has to end.
    fn may_run(&self) -> bool {
        let current = lock(&self.wanted);
        let current = self
            .changed
            .wait_while(current, |wanted| *wanted == Wanted::Pause)
            .unwrap_or_else(PoisonError::into_inner);
        *current == Wanted::Run
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A vCPU with what its exits reach.
pub struct Vcpu {
    /// Its number.
    pub index: u32,
    /// The vCPU, ready to run.
    pub fd: VcpuFd,
    /// What its accesses reach.
    pub bus: Arc<Bus>,
    /// Where its exits are counted.
    pub exits: Arc<ExitCounters>,
    /// Dropped when its thread ends.
    pub _alive: tokio::sync::mpsc::Sender<std::convert::Infallible>,
}

impl Vcpu {
    /// Starts the thread, which runs the vCPU until `control` says otherwise or the guest ends.
    pub fn start(mut self, control: &Arc<Control>) -> io::Result<()> {
        let shared = Arc::clone(control);
        // Held until the thread is in the list: a kick in between would miss it.
        let mut threads = lock(&control.threads);
        let thread = thread::Builder::new()
            .name(format!("vcpu-{}", self.index))
            .stack_size(STACK_BYTES)
            .spawn(move || {
                receive_kicks(self.fd.get_kvm_run());
                let ended = match seccomp::confine(seccomp::Thread::Vcpu) {
                    Ok(()) => self.run(&shared),
                    Err(error) => Some(ExitReason::VcpuFailed(format!("seccomp: {error}"))),
                };
                if let Some(reason) = ended {
                    shared.end(reason);
                }
                RUN.set(ptr::null_mut());
            })?;
        threads.push(thread);
        Ok(())
    }

    fn run(&mut self, control: &Control) -> Option<ExitReason> {
        while control.may_run() {
            loop {
                match self.step() {
                    Ok(true) => {}
                    Ok(false) => break,
                    Err(reason) => return Some(reason),
                }
            }
        }
        None
    }

    /// Runs the vCPU once, and serves what it asks for. False: it was kicked.
    fn step(&mut self) -> Result<bool, ExitReason> {
        let exit = match self.fd.run() {
            Ok(exit) => exit,
            Err(error) => match Errno::from_raw(error.errno()) {
                Errno::EINTR => {
                    self.fd.set_kvm_immediate_exit(0);
                    self.exits.count(Exit::Kicked);
                    return Ok(false);
                }
                Errno::EAGAIN => return Ok(true),
                errno => return Err(ExitReason::VcpuFailed(format!("KVM_RUN: {errno}"))),
            },
        };
        let (kind, stop) = match exit {
            VcpuExit::MmioRead(address, data) => {
                self.bus.mmio_read(address, data);
                (Exit::MmioRead, None)
            }
            VcpuExit::MmioWrite(address, data) => {
                self.bus.mmio_write(address, data);
                (Exit::MmioWrite, None)
            }
            VcpuExit::IoIn(port, data) => {
                self.bus.port_read(port, data);
                (Exit::PortRead, None)
            }
            VcpuExit::IoOut(port, data) => {
                let stop = self.bus.port_write(port, data);
                (
                    Exit::PortWrite,
                    stop.map(|Stop::Reset| ExitReason::GuestReset),
                )
            }
            VcpuExit::Shutdown => (Exit::Other, Some(ExitReason::TripleFault)),
            VcpuExit::FailEntry(reason, cpu) => {
                let message =
                    format!("the hardware refuses to enter the guest: {reason:#x} on CPU {cpu}");
                (Exit::Other, Some(ExitReason::VcpuFailed(message)))
            }
            VcpuExit::InternalError => {
                let message = internal_error(self.fd.get_kvm_run());
                (Exit::Other, Some(ExitReason::VcpuFailed(message)))
            }
            other => {
                let message = format!("an exit that no guest should cause: {other:?}");
                (Exit::Other, Some(ExitReason::VcpuFailed(message)))
            }
        };
        self.exits.count(kind);
        stop.map_or(Ok(true), Err)
    }
}

fn internal_error(run: &kvm_run) -> String {
    // SAFETY: the exit's reason says that this member is the one that KVM wrote; all values are valid.
    let internal = unsafe { run.__bindgen_anon_1.internal };
    let what = match internal.suberror {
        1 => "an instruction that KVM cannot emulate",
        2 => "exceptions while others were delivered",
        3 => "an exception while an event was delivered",
        4 => "an exit that KVM does not know",
        _ => "unknown",
    };
    let count = (internal.ndata as usize).min(internal.data.len());
    format!(
        "KVM internal error {}: {what} {:x?}",
        internal.suberror,
        &internal.data[..count]
    )
}

thread_local! {
    /// This thread's vCPU, while it has one.
    static RUN: Cell<*mut kvm_run> = const { Cell::new(ptr::null_mut()) };
}

fn kick_signal() -> libc::c_int {
    libc::SIGRTMIN()
}

/// Makes the kick's signal end this thread's `KVM_RUN`, also one that is only about to begin.
fn receive_kicks(run: &mut kvm_run) {
    RUN.set(run);
    // SAFETY: the handler does only what signal handlers may.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = handle_kick as extern "C" fn(libc::c_int) as libc::sighandler_t;
        libc::sigaction(kick_signal(), &raw const action, ptr::null_mut());
    }
}

extern "C" fn handle_kick(_: libc::c_int) {
    let run = RUN.get();
    if !run.is_null() {
        // SAFETY: this thread owns the vCPU whose mapping this is, and takes the pointer back before it drops it. The
        // thread itself touches the field only in the same way, by a plain store.
        unsafe { (&raw mut (*run).immediate_exit).write_volatile(1) };
    }
}
