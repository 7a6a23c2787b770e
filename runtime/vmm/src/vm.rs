//! What a VM is made of, and what every backend offers.

use std::fmt;
use std::future::Future;
use std::io;
use std::os::fd::OwnedFd;
use std::pin::Pin;
use std::process::ExitStatus;
use std::sync::{Arc, Mutex, PoisonError};

use nix::sys::stat::fstat;
use thiserror::Error;

use crate::devices::disk::SegmentMap;
use crate::devices::fs::FsDevice;
use crate::devices::vsock::VsockDevice;
use crate::kvm::exits::ExitCounters;
use crate::kvm::{self, KvmError};
use crate::qemu::{self, QemuConfig, QemuError};
use crate::ram::{Ram, RamSize};
use crate::served::{DeviceCounters, DeviceStats};

/// Least guest memory: the kernel and its initramfs unpacked, with nothing to spare.
const MIN_MEMORY_BYTES: u64 = 64 << 20;

/// A VM to start. The backend owns everything in it until the VM is gone.
#[derive(Debug)]
pub struct VmConfig {
    /// The sandbox's id: names the process.
    pub id: String,
    /// Virtual CPUs, at least one.
    pub vcpus: u32,
    /// Guest memory in bytes, a multiple of 1 MiB.
    pub memory_bytes: u64,
    /// Bytes that it may get to while the VM runs. Not more than `memory_bytes`: it stays as it is.
    pub max_memory_bytes: u64,
    /// Kernel: ELF with a PVH entry, or a bzImage.
    pub kernel: OwnedFd,
    /// Initial root file system.
    pub initramfs: OwnedFd,
    /// Kernel command line. The backend adds what its devices and its way to reset need.
    pub cmdline: String,
    /// The network device; `None`: the guest has no network.
    pub net: Option<NetConfig>,
    /// The pod's disk, `/dev/vda` in the guest.
    pub disk: SegmentMap,
    /// The vsock device.
    pub vsock: VsockDevice,
    /// The device for volumes.
    pub fs: FsDevice,
    /// Receives what the guest writes to its first serial port: the write end of a pipe that the caller drains.
    pub console: OwnedFd,
}

impl VmConfig {
    /// Whether such a VM can be, on a backend that has up to `max_vcpus`. What is wrong, otherwise.
    pub(crate) fn check(&self, max_vcpus: u32) -> Result<(), String> {
        if self.vcpus == 0 || self.vcpus > max_vcpus {
            return Err(format!(
                "{} virtual CPUs: from 1 to {max_vcpus} are possible",
                self.vcpus
            ));
        }
        if self.memory_bytes < MIN_MEMORY_BYTES || !self.memory_bytes.is_multiple_of(1 << 20) {
            return Err(format!(
                "{} bytes of memory: at least {MIN_MEMORY_BYTES} and whole mebibytes are needed",
                self.memory_bytes
            ));
        }
        check_image("kernel", &self.kernel)?;
        check_image("initramfs", &self.initramfs)
    }

    pub(crate) fn ram(&self) -> RamSize {
        RamSize {
            boot: self.memory_bytes,
            max: self.max_memory_bytes,
        }
    }
}

fn check_image(what: &str, image: &OwnedFd) -> Result<(), String> {
    match fstat(image) {
        Ok(stat) if stat.st_mode & libc::S_IFMT != libc::S_IFREG => {
            Err(format!("the {what} is not a regular file"))
        }
        Ok(stat) if stat.st_size == 0 => Err(format!("the {what} is empty")),
        Ok(_) => Ok(()),
        Err(error) => Err(format!("the {what} cannot be used: {error}")),
    }
}

/// The VM's network device.
#[derive(Debug)]
pub struct NetConfig {
    /// A tap opened with `IFF_TAP | IFF_NO_PI | IFF_VNET_HDR`.
    pub tap: OwnedFd,
    /// Address of the device, `52:54:00:12:34:56`.
    pub mac: String,
}

/// Why a VM is gone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ExitReason {
    /// The guest powered itself off.
    GuestShutdown,
    /// The guest reset itself. A kernel panic ends here too (`panic=-1`): the console says which it was.
    GuestReset,
    /// The guest reported a panic through a panic device.
    GuestPanic,
    /// The guest's CPU gave up: an exception in the handler of an exception's handler.
    TripleFault,
    /// A virtual CPU cannot go on, by no fault of the guest's own.
    VcpuFailed(String),
    /// [`Vmm::kill`] was called.
    Killed,
    /// The VMM's process ended without the guest or us having asked for it.
    VmmExited {
        /// How it ended.
        status: ExitStatus,
        /// The last of what it wrote to standard error.
        stderr: String,
    },
}

impl fmt::Display for ExitReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ExitReason::GuestShutdown => f.write_str("the guest shut down"),
            ExitReason::GuestReset => f.write_str("the guest reset itself"),
            ExitReason::GuestPanic => f.write_str("the guest's kernel panicked"),
            ExitReason::TripleFault => f.write_str("the guest's CPU shut down (triple fault)"),
            ExitReason::VcpuFailed(why) => write!(f, "a virtual CPU failed: {why}"),
            ExitReason::Killed => f.write_str("killed"),
            ExitReason::VmmExited { status, stderr } if stderr.is_empty() => {
                write!(f, "the VMM ended ({status})")
            }
            ExitReason::VmmExited { status, stderr } => {
                write!(f, "the VMM ended ({status}): {stderr}")
            }
        }
    }
}

/// A boxed future, so that [`Vmm`] can be used as `dyn Vmm`.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// Which VMM runs a VM.
#[derive(Debug, Clone)]
pub enum Backend {
    /// Ours, in this process.
    Kvm,
    /// QEMU, as a child process.
    Qemu(QemuConfig),
}

/// Why a VM did not start.
#[derive(Debug, Error)]
#[error(transparent)]
pub enum StartError {
    /// Ours.
    Kvm(#[from] KvmError),
    /// QEMU's.
    Qemu(#[from] QemuError),
}

/// Starts a VM; returns when the guest runs.
///
/// Must be called on a thread that lives as long as the VM: see [`qemu::start`].
///
/// # Errors
/// Nothing is left behind.
pub async fn start(config: VmConfig, backend: Backend) -> Result<Box<dyn Vmm>, StartError> {
    Ok(match backend {
        Backend::Kvm => kvm::start(config)?,
        Backend::Qemu(qemu) => qemu::start(config, qemu).await?,
    })
}

/// Counters of a VM, which can be read while something else waits for it, and after its end.
#[derive(Debug, Clone, Default)]
pub struct VmCounters {
    pub(crate) exits: Option<Arc<ExitCounters>>,
    pub(crate) devices: Vec<Arc<DeviceCounters>>,
    pub(crate) guest_memory: Arc<Mutex<Vec<(u64, u64)>>>,
}

impl VmCounters {
    /// What they say now.
    pub fn read(&self) -> VmStats {
        VmStats {
            exits: self
                .exits
                .as_ref()
                .map(|exits| exits.read())
                .unwrap_or_default(),
            devices: self.devices.iter().map(|device| device.read()).collect(),
            guest_memory: self
                .guest_memory
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .clone(),
        }
    }
}

/// What a VM has done so far.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct VmStats {
    /// How often the vCPUs came back to the VMM, by reason. Empty: the backend does not tell.
    pub exits: Vec<(&'static str, u64)>,
    /// Our devices.
    pub devices: Vec<DeviceStats>,
    /// Guest memory in this process's address space, as (start, length) in bytes. Empty: it is another process's.
    pub guest_memory: Vec<(u64, u64)>,
}

/// A running VM.
///
/// Dropping it kills the VM.
pub trait Vmm: Send {
    /// The VMM's process, when it is not ours.
    fn pid(&self) -> Option<u32>;

    /// The backend's name: "kvm", "qemu".
    fn backend(&self) -> &'static str;

    /// Ends when the VM is gone. May be dropped and called again; later calls give the same answer.
    fn exited(&mut self) -> BoxFuture<'_, ExitReason>;

    /// Ends the VM at once. When this returns, its process is gone and reaped.
    fn kill(&mut self) -> BoxFuture<'_, ()>;

    /// Stops the vCPUs, at once or in a moment, until [`resume`](Self::resume).
    ///
    /// # Errors
    /// The VMM does not answer.
    fn pause(&mut self) -> BoxFuture<'_, io::Result<()>>;

    /// Lets the vCPUs go on.
    ///
    /// # Errors
    /// The VMM does not answer.
    fn resume(&mut self) -> BoxFuture<'_, io::Result<()>>;

    /// What it counts.
    fn counters(&self) -> VmCounters;

    /// Its memory.
    fn ram(&self) -> Ram;

    /// The guest's kernel has started its init: what only the boot needed may go.
    ///
    /// # Errors
    /// It stays.
    fn booted(&mut self) -> io::Result<()>;
}
