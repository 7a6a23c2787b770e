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
pub(crate) mod exits;
pub(crate) mod layout;
mod memory;
mod mptable;
pub mod probe;
mod vcpu;
mod virtio_mmio;

use std::convert::Infallible;
use std::fmt::Write as _;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::mpsc;
use std::sync::{Arc, Mutex, PoisonError};

use kvm_bindings::KVM_MAX_CPUID_ENTRIES;
use kvm_ioctls::{Cap, IoEventAddress, Kvm, VcpuFd, VmFd};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use thiserror::Error;
use tokio::sync::watch;
use virtio_queue::{Queue, QueueT as _};
use vm_memory::{
    GuestAddress, GuestMemoryAtomic, GuestMemoryBackend as _, GuestMemoryMmap,
    GuestMemoryRegion as _,
};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::device::VirtioDevice;
use crate::devices::balloon::{BalloonDevice, BalloonHandle};
use crate::devices::disk::{SegmentDisk, SegmentMap};
use crate::devices::fs::FsDevice;
use crate::devices::net::{NetDevice, Tap};
use crate::devices::rng::RngDevice;
use crate::devices::vsock::VsockDevice;
use crate::ram::{Ram, RamSize};
use crate::served::Served;
use crate::vm::{BoxFuture, ExitReason, NetConfig, VmConfig, VmCounters, Vmm};
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
    let ram_size = config.ram();
    let memory = memory::create(ram_size.boot)?;
    let images = boot::load(&memory, config.kernel, config.initramfs)?;
    let vm = kvm.create_vm().map_err(KvmError::call("KVM_CREATE_VM"))?;
    memory::register(&vm, &memory)?;
    vm.set_tss_address(layout::TSS)
        .map_err(KvmError::call("KVM_SET_TSS_ADDR"))?;
    vm.create_irq_chip()
        .map_err(KvmError::call("KVM_CREATE_IRQCHIP"))?;

    let (balloon, balloon_handle) = BalloonDevice::new().map_err(KvmError::host("the balloon"))?;
    let groups = device_groups(config.disk, config.vsock, config.fs, config.net, balloon)?;
    let mut registers = Vec::new();
    let mut threads = Vec::new();
    let mut counters = Vec::new();
    // By the keyboard controller's line, which tells a reset from a triple fault.
    let mut cmdline = format!("reboot=k {}", config.cmdline);
    for (thread, devices) in groups {
        let mut group = Vec::new();
        for (name, device) in devices {
            let slot = registers.len();
            let address = layout::VIRTIO_MMIO + slot as u64 * layout::VIRTIO_MMIO_BYTES;
            let irq = layout::VIRTIO_IRQ + slot as u32;
            let (on_bus, attached) = attach(&vm, name, device, address, irq)?;
            // The kernel's Documentation/admin-guide/kernel-parameters.txt.
            let _ = write!(cmdline, " virtio_mmio.device=4K@{address:#x}:{irq}");
            counters.push(attached.served.counters());
            registers.push(on_bus);
            group.push(attached);
        }
        threads.push((thread, group));
    }
    let serial_interrupt = interrupt(&vm, layout::SERIAL_IRQ)?;
    let console = nonblocking(config.console).map_err(KvmError::host("the console"))?;
    let bus = Arc::new(Bus::new(registers, console, serial_interrupt));

    boot::describe(&memory, &images, &cmdline, config.vcpus)?;
    let vcpus = create_vcpus(&kvm, &vm, config.vcpus, images.entry)?;

    let stop = eventfd()?;
    let (control, ended) = Control::new(stop.try_clone().map_err(KvmError::host("eventfd"))?);
    let exits = Arc::new(ExitCounters::default());
    let (alive, all_ended) = tokio::sync::mpsc::channel(1);
    let places: Vec<_> = memory
        .iter()
        .map(|region| (region.as_ptr() as u64, region.len()))
        .collect();
    let machine = Arc::new(Machine {
        vm,
        memory: GuestMemoryAtomic::new(memory),
        places: Arc::new(Mutex::new(places)),
    });
    let vm = KvmVm {
        control,
        ended,
        all_ended,
        counters: VmCounters {
            exits: Some(Arc::clone(&exits)),
            devices: counters,
            guest_memory: Arc::clone(&machine.places),
        },
        _balloon: balloon_handle,
        ram: machine.ram(ram_size),
        machine,
    };
    // From here on, dropping `vm` ends the threads.
    for (name, group) in threads {
        let stop = stop.try_clone().map_err(KvmError::host("eventfd"))?;
        device_thread::start(name, group, vm.machine.memory.clone(), stop)
            .map_err(KvmError::host("a device's thread"))?;
    }
    for (index, fd) in vcpus.into_iter().enumerate() {
        let vcpu = Vcpu {
            index: index as u32,
            fd,
            bus: Arc::clone(&bus),
            exits: Arc::clone(&exits),
            _alive: alive.clone(),
        };
        vcpu.start(&vm.control)
            .map_err(KvmError::host("a vCPU's thread"))?;
    }
    Ok(Box::new(vm))
}

/// Devices by name.
type Devices = Vec<(&'static str, Box<dyn VirtioDevice>)>;

/// The VM's devices, by the thread that serves them: those that move much have one of their own.
fn device_groups(
    disk: SegmentMap,
    vsock: VsockDevice,
    fs: FsDevice,
    net: Option<NetConfig>,
    balloon: BalloonDevice,
) -> Result<Vec<(&'static str, Devices)>, KvmError> {
    let rng = RngDevice::new();
    let mut groups: Vec<(_, Devices)> = vec![
        ("disk", vec![("disk", Box::new(SegmentDisk::new(disk)))]),
        ("vsock", vec![("vsock", Box::new(vsock))]),
        ("fs", vec![("fs", Box::new(fs))]),
        (
            "rng-balloon",
            vec![("rng", Box::new(rng)), ("balloon", Box::new(balloon))],
        ),
    ];
    if let Some(net) = net {
        groups.push(("net", vec![("net", Box::new(net_device(net)?))]));
    }
    Ok(groups)
}

fn net_device(net: NetConfig) -> Result<NetDevice, KvmError> {
    let mac = parse_mac(&net.mac)
        .ok_or_else(|| KvmError::Config(format!("not a MAC address: {:?}", net.mac)))?;
    let tap = Tap::new(net.tap).map_err(KvmError::host("the tap"))?;
    NetDevice::new(tap, mac, None).map_err(KvmError::host("the network device"))
}

fn parse_mac(text: &str) -> Option<[u8; 6]> {
    let mut mac = [0; 6];
    let mut parts = text.split(':');
    for byte in &mut mac {
        let part = parts.next().filter(|part| part.len() == 2)?;
        *byte = u8::from_str_radix(part, 16).ok()?;
    }
    parts.next().is_none().then_some(mac)
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

    let interrupt = interrupt(vm, irq)?;
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
    let (sender, commands) = mpsc::sync_channel(4);
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

/// vCPUs in their first state; the first is to begin at `entry`, and to start the others.
fn create_vcpus(
    kvm: &Kvm,
    vm: &VmFd,
    count: u32,
    entry: GuestAddress,
) -> Result<Vec<VcpuFd>, KvmError> {
    let tsc_deadline = vm.check_extension(Cap::TscDeadlineTimer);
    let host_cpuid = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(KvmError::call("KVM_GET_SUPPORTED_CPUID"))?;
    let mut vcpus = Vec::new();
    for index in 0..count {
        let vcpu = vm
            .create_vcpu(index.into())
            .map_err(KvmError::call("KVM_CREATE_VCPU"))?;
        let mut cpuid = host_cpuid.clone();
        let topology = cpuid::Topology {
            vcpu: index,
            vcpus: count,
        };
        cpuid::filter(&mut cpuid, topology, tsc_deadline);
        vcpu.set_cpuid2(&cpuid)
            .map_err(KvmError::call("KVM_SET_CPUID2"))?;
        vcpu::init_cpu(&vcpu)?;
        if index == 0 {
            vcpu::enter_pvh(&vcpu, entry)?;
        }
        vcpus.push(vcpu);
    }
    Ok(vcpus)
}

/// A descriptor whose write raises the interrupt line `irq`.
fn interrupt(vm: &VmFd, irq: u32) -> Result<EventFd, KvmError> {
    let interrupt = eventfd()?;
    vm.register_irqfd(&interrupt, irq)
        .map_err(KvmError::call("KVM_IRQFD"))?;
    Ok(interrupt)
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
    counters: VmCounters,
    /// Kept: the device ends when its handle does.
    _balloon: BalloonHandle,
    ram: Ram,
    machine: Arc<Machine>,
}

/// What more memory is given to.
struct Machine {
    vm: VmFd,
    memory: GuestMemoryAtomic<GuestMemoryMmap>,
    /// Where it is in this process.
    places: Arc<Mutex<Vec<(u64, u64)>>>,
}

impl Machine {
    /// Its memory, for who may keep it longer than the VM lives.
    fn ram(self: &Arc<Self>, size: RamSize) -> Ram {
        let machine = Arc::downgrade(self);
        Ram::new(size, move |range| {
            let machine = machine.upgrade().ok_or(io::ErrorKind::NotConnected)?;
            let place = memory::add(&machine.vm, &machine.memory, range)?;
            let places = machine.places.lock();
            places.unwrap_or_else(PoisonError::into_inner).push(place);
            Ok(())
        })
    }
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

    fn counters(&self) -> VmCounters {
        self.counters.clone()
    }

    fn ram(&self) -> Ram {
        self.ram.clone()
    }

    /// The kernel gives what it booted from back itself, through the balloon.
    fn booted(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for KvmVm {
    fn drop(&mut self) {
        self.control.end(ExitReason::Killed);
    }
}
