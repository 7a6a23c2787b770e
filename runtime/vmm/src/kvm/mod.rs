//! Our own backend: a VM of KVM's in this process.
//!
//! - [`probe`]: whether the host's KVM can run a stock kernel at all
//! - `layout`: the guest's physical address space
//! - `memory`: guest memory, and files mapped into it
//! - `boot`, `mptable`: what is in it before the first instruction
//! - `cpuid`: what the guest is told of its CPU
//! - `vcpu`, `exits`: a vCPU's first state, its thread, why it comes back from the guest
//! - `bus`: what its accesses reach
//! - `virtio_mmio`: a device's registers
//! - `device_thread`: the thread of a group of devices
//! - here: all of it put together
//!
//! docs/vmm.md tells what the guest can reach, and why.

mod boot;
mod bus;
mod cpuid;
mod device_thread;
mod exits;
mod layout;
mod memory;
mod mptable;
pub mod probe;
mod vcpu;
mod virtio_mmio;

use std::convert::Infallible;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::mpsc;

use kvm_bindings::KVM_MAX_CPUID_ENTRIES;
use kvm_ioctls::{Cap, IoEventAddress, Kvm, VmFd};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use thiserror::Error;
use tokio::sync::watch;
use virtio_queue::{Queue, QueueT as _};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::device::VirtioDevice;
use crate::devices::disk::SegmentDisk;
use crate::served::{DeviceCounters, Served};
use crate::vm::{BoxFuture, ExitReason, VmConfig, VmStats, Vmm};
use bus::Bus;
use device_thread::Attached;
use exits::ExitCounters;
use vcpu::{Control, Vcpu};
use virtio_mmio::{DeviceLink, Shared, VirtioMmio};

/// Why a VM did not start.
#[derive(Debug, Error)]
pub enum KvmError {
    /// The VM as asked for cannot be.
    #[error("{0}")]
    Config(String),
    /// KVM refused a call.
    #[error("{call}: {source}")]
    Call {
        /// The ioctl.
        call: &'static str,
        /// Its error.
        source: io::Error,
    },
    /// The host refused a resource.
    #[error("{what}: {source}")]
    Host {
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        source: io::Error,
    },
}

impl KvmError {
    fn call(call: &'static str) -> impl Fn(kvm_ioctls::Error) -> Self {
        move |error| Self::Call {
            call,
            source: error.into(),
        }
    }

    fn host(what: &'static str) -> impl Fn(io::Error) -> Self {
        move |source| Self::Host { what, source }
    }
}

/// Starts a VM; returns when its vCPUs run.
///
/// # Errors
/// Nothing is left behind.
pub fn start(config: VmConfig) -> Result<Box<dyn Vmm>, KvmError> {
    let kvm = Kvm::new().map_err(KvmError::call("opening /dev/kvm"))?;
    let max_vcpus = (kvm.get_max_vcpus() as u32).min(mptable::MAX_CPUS);
    config.check(max_vcpus).map_err(KvmError::Config)?;
    let vm = kvm.create_vm().map_err(KvmError::call("KVM_CREATE_VM"))?;
    let memory = memory::create(config.memory_bytes)?;
    memory::register(&vm, &memory)?;
    vm.set_tss_address(layout::TSS)
        .map_err(KvmError::call("KVM_SET_TSS_ADDR"))?;
    vm.create_irq_chip()
        .map_err(KvmError::call("KVM_CREATE_IRQCHIP"))?;

    let stop = eventfd()?;
    let devices: [(&str, Box<dyn VirtioDevice>); 2] = [
        ("disk", Box::new(SegmentDisk::new(config.disk))),
        ("vsock", Box::new(config.vsock)),
    ];
    // By the keyboard controller's line, which tells a reset from a triple fault.
    let mut cmdline = format!("reboot=k {}", config.cmdline);
    let mut registers = Vec::new();
    let mut threads = Vec::new();
    let mut counters = Vec::new();
    for (slot, (name, device)) in devices.into_iter().enumerate() {
        let address = layout::VIRTIO_MMIO + slot as u64 * layout::VIRTIO_MMIO_BYTES;
        let irq = layout::VIRTIO_IRQ + slot as u32;
        let (on_bus, attached) = attach(&vm, name, device, address, irq)?;
        // The kernel's Documentation/admin-guide/kernel-parameters.txt.
        cmdline += &format!(" virtio_mmio.device=4K@{address:#x}:{irq}");
        counters.push(attached.served.counters());
        registers.push(on_bus);
        threads.push((name, attached));
    }

    let entry = boot::load(
        &memory,
        config.kernel,
        config.initramfs,
        &cmdline,
        config.vcpus,
    )?;
    let serial_interrupt = eventfd()?;
    vm.register_irqfd(&serial_interrupt, layout::SERIAL_IRQ)
        .map_err(KvmError::call("KVM_IRQFD"))?;
    let console = nonblocking(config.console).map_err(KvmError::host("the console"))?;
    let bus = Arc::new(Bus::new(registers, console, serial_interrupt));

    let exits = Arc::new(ExitCounters::default());
    let (alive, all_ended) = tokio::sync::mpsc::channel(1);
    let tsc_deadline = vm.check_extension(Cap::TscDeadlineTimer);
    let host_cpuid = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(KvmError::call("KVM_GET_SUPPORTED_CPUID"))?;
    let mut vcpus = Vec::new();
    for index in 0..config.vcpus {
        let fd = vm
            .create_vcpu(index.into())
            .map_err(KvmError::call("KVM_CREATE_VCPU"))?;
        let mut cpuid = host_cpuid.clone();
        let topology = cpuid::Topology {
            vcpu: index,
            vcpus: config.vcpus,
        };
        cpuid::filter(&mut cpuid, topology, tsc_deadline);
        fd.set_cpuid2(&cpuid)
            .map_err(KvmError::call("KVM_SET_CPUID2"))?;
        vcpu::init_cpu(&fd)?;
        if index == 0 {
            vcpu::enter_pvh(&fd, entry)?;
        }
        vcpus.push(Vcpu {
            index,
            fd,
            bus: Arc::clone(&bus),
            exits: Arc::clone(&exits),
            alive: alive.clone(),
        });
    }

    let device_stop = stop.try_clone().map_err(KvmError::host("eventfd"))?;
    let (control, ended) = Control::new(stop);
    let vm = KvmVm {
        control,
        ended,
        all_ended,
        exits,
        counters,
        _vm: vm,
        _memory: memory.clone(),
    };
    // From here on, dropping `vm` ends the threads.
    for (name, attached) in threads {
        let stop = device_stop.try_clone().map_err(KvmError::host("eventfd"))?;
        device_thread::start(name, vec![attached], memory.clone(), stop)
            .map_err(KvmError::host("a device's thread"))?;
    }
    for vcpu in vcpus {
        vcpu.start(&vm.control)
            .map_err(KvmError::host("a vCPU's thread"))?;
    }
    Ok(Box::new(vm))
}

/// Makes `device` reachable at `address`, with the interrupt `irq`.
fn attach(
    vm: &VmFd,
    name: &'static str,
    device: Box<dyn VirtioDevice>,
    address: u64,
    irq: u32,
) -> Result<(VirtioMmio, Attached), KvmError> {
    use virtio_bindings::virtio_mmio::VIRTIO_MMIO_QUEUE_NOTIFY;

    let interrupt = eventfd()?;
    vm.register_irqfd(&interrupt, irq)
        .map_err(KvmError::call("KVM_IRQFD"))?;
    let mut kicks = Vec::new();
    let mut queues = Vec::new();
    for (index, size) in device.queue_sizes().iter().enumerate() {
        let kick = eventfd()?;
        let notify = IoEventAddress::Mmio(address + u64::from(VIRTIO_MMIO_QUEUE_NOTIFY));
        vm.register_ioevent(&kick, &notify, index as u32)
            .map_err(KvmError::call("KVM_IOEVENTFD"))?;
        kicks.push(kick);
        let queue = Queue::new(*size).map_err(|error| KvmError::Config(error.to_string()))?;
        queues.push(queue);
    }
    let doorbell = eventfd()?;
    let (sender, commands) = mpsc::channel();
    let link = DeviceLink {
        commands: sender,
        doorbell: doorbell.try_clone().map_err(KvmError::host("eventfd"))?,
    };
    let shared = Arc::new(Shared::new(device.as_ref(), interrupt));
    let registers = VirtioMmio::new(device.as_ref(), Arc::clone(&shared), link);
    let attached = Attached {
        name,
        served: Served::new(name, device, queues),
        commands,
        doorbell,
        kicks,
        shared,
        broken: false,
    };
    Ok((registers, attached))
}

fn eventfd() -> Result<EventFd, KvmError> {
    EventFd::new(EFD_NONBLOCK).map_err(KvmError::host("eventfd"))
}

/// The guest does not wait for who reads its console.
fn nonblocking(console: OwnedFd) -> io::Result<File> {
    let flags = OFlag::from_bits_retain(fcntl(&console, FcntlArg::F_GETFL)?);
    fcntl(&console, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    Ok(console.into())
}

/// A VM of KVM's.
struct KvmVm {
    control: Arc<Control>,
    ended: watch::Receiver<Option<ExitReason>>,
    /// Closed when the last vCPU's thread has ended.
    all_ended: tokio::sync::mpsc::Receiver<Infallible>,
    exits: Arc<ExitCounters>,
    counters: Vec<Arc<DeviceCounters>>,
    _vm: VmFd,
    _memory: GuestMemoryMmap,
}

impl Vmm for KvmVm {
    fn pid(&self) -> Option<u32> {
        None
    }

    fn backend(&self) -> &'static str {
        "kvm"
    }

    fn exited(&mut self) -> BoxFuture<'_, ExitReason> {
        Box::pin(async {
            // The sender lives in `control`.
            let ended = self.ended.wait_for(Option::is_some).await;
            let reason = ended.ok().and_then(|reason| reason.clone());
            reason.unwrap_or(ExitReason::Killed)
        })
    }

    fn kill(&mut self) -> BoxFuture<'_, ()> {
        Box::pin(async {
            self.control.end(ExitReason::Killed);
            let None = self.all_ended.recv().await;
        })
    }

    fn pause(&mut self) -> BoxFuture<'_, io::Result<()>> {
        self.control.pause();
        Box::pin(async { Ok(()) })
    }

    fn resume(&mut self) -> BoxFuture<'_, io::Result<()>> {
        self.control.resume();
        Box::pin(async { Ok(()) })
    }

    fn stats(&self) -> VmStats {
        VmStats {
            exits: self.exits.read(),
            devices: self.counters.iter().map(|device| device.read()).collect(),
        }
    }
}

impl Drop for KvmVm {
    fn drop(&mut self) {
        self.control.end(ExitReason::Killed);
    }
}
