//! Virtual machines, and the virtio devices podvisor owns.
//!
//! - [`vm`]: what a VM is made of ([`VmConfig`]) and the trait that every backend implements ([`Vmm`])
//! - [`kvm`]: our own backend; so far whether KVM works here
//! - [`qemu`]: the backend that runs QEMU as a child process
//! - [`device`]: [`VirtioDevice`], the trait of our devices, which knows nothing of any transport
//! - [`devices`]: the devices: [`devices::disk`] (segments of files as one disk), [`devices::vsock`]
//!   (virtio-vsock in user space), [`devices::net`] (a tap), [`devices::balloon`] (unused memory back to the host) and
//!   [`devices::rng`] (random numbers)
//! - `vhost_user`: serves a [`VirtioDevice`] to QEMU
//! - [`buffers`]: a descriptor chain as slices of guest memory, read and written by system calls directly

pub mod buffers;
pub mod device;
pub mod devices;
pub mod kvm;
pub mod qemu;
#[cfg(test)]
mod test_queue;
mod vhost_user;
pub mod vm;

pub use device::{CONFIG_CHANGED, Counter, DeviceError, DeviceEvent, QueueRef, VirtioDevice};
pub use devices::balloon::{BalloonDevice, BalloonHandle};
pub use devices::disk::{Access, Segment, SegmentDisk, SegmentError, SegmentMap};
pub use devices::net::{NetDevice, Tap};
pub use devices::rng::RngDevice;
pub use devices::vsock::{VsockDevice, VsockHandle, VsockListener};
pub use vm::{ExitReason, NetConfig, VmConfig, Vmm};
