//! What a VM is made of, and what every backend offers.

use std::fmt;
use std::future::Future;
use std::os::fd::OwnedFd;
use std::pin::Pin;
use std::process::ExitStatus;

use crate::devices::disk::SegmentMap;
use crate::devices::vsock::VsockDevice;

/// A VM to start. The backend owns everything in it until the VM is gone.
#[derive(Debug)]
pub struct VmConfig {
    /// The sandbox's id: names the process.
    pub id: String,
    /// Virtual CPUs, at least one.
    pub vcpus: u32,
    /// Guest memory in bytes, a multiple of 1 MiB.
    pub memory_bytes: u64,
    /// Kernel: ELF with a PVH entry, or a bzImage.
    pub kernel: OwnedFd,
    /// Initial root file system.
    pub initramfs: OwnedFd,
    /// Kernel command line. The backend adds what its devices need.
    pub cmdline: String,
    /// The network device; `None`: the guest has no network.
    pub net: Option<NetConfig>,
    /// The pod's disk, `/dev/vda` in the guest.
    pub disk: SegmentMap,
    /// The vsock device.
    pub vsock: VsockDevice,
    /// Receives what the guest writes to its first serial port: the write end of a pipe that the caller drains.
    pub console: OwnedFd,
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

/// A running VM.
///
/// Dropping it kills the VM.
pub trait Vmm: Send {
    /// The VMM's process, when it is not ours.
    fn pid(&self) -> Option<u32>;

    /// The backend's name: "qemu".
    fn backend(&self) -> &'static str;

    /// Ends when the VM is gone. May be dropped and called again; later calls give the same answer.
    fn exited(&mut self) -> BoxFuture<'_, ExitReason>;

    /// Ends the VM at once. When this returns, its process is gone and reaped.
    fn kill(&mut self) -> BoxFuture<'_, ()>;
}
