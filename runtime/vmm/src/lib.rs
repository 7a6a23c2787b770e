//! Virtual machines, and the virtio devices podvisor owns.
//!
//! - [`vm`]: what a VM is made of ([`VmConfig`]) and the trait that every backend implements ([`Vmm`]),
//!   [`start`]
//! - [`ram`]: how much memory a VM has, and more of it while it runs
//! - [`kvm`]: our own backend, a VM of KVM's in this process
//! - [`qemu`]: the backend that runs QEMU as a child process
//! - [`device`]: [`VirtioDevice`], the trait of our devices, which knows nothing of any transport
//! - [`devices`]: the devices: [`devices::disk`] (segments of files as one disk), [`devices::vsock`]
//!   (virtio-vsock in user space), [`devices::fs`] (volumes, answered by another process), [`devices::net`] (a tap),
//!   [`devices::balloon`] (unused memory back to the host) and [`devices::rng`] (random numbers)
//! - [`served`]: a device with its queues and counters, as every transport has it
//! - `vhost_user`: serves a [`VirtioDevice`] to QEMU
//! - [`seccomp`]: which system calls each kind of thread may make
//! - [`buffers`]: a descriptor chain as slices of guest memory, read and written by system calls directly

pub mod buffers;
pub mod device;
pub mod devices;
pub mod kvm;
pub mod qemu;
pub mod ram;
pub mod seccomp;
pub mod served;
#[cfg(test)]
mod test_queue;
mod vhost_user;
pub mod vm;

pub use device::{CONFIG_CHANGED, Counter, DeviceError, DeviceEvent, QueueRef, VirtioDevice};
pub use devices::balloon::{BalloonDevice, BalloonHandle};
pub use devices::disk::{Access, Segment, SegmentDisk, SegmentError, SegmentMap};
pub use devices::fs::{FsDevice, FsHandle};
pub use devices::net::{NetDevice, Tap};
pub use devices::rng::RngDevice;
pub use devices::vsock::{VsockDevice, VsockHandle, VsockListener};
pub use ram::{GrowError, Ram};
pub use served::{DeviceStats, QueueStats};
pub use vm::{
    Backend, ExitReason, NetConfig, StartError, VmConfig, VmCounters, VmStats, Vmm, start,
};
