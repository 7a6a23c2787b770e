//! Random numbers of the host's for the guest's kernel: virtio-rng.
//!
//! - `entropy`: where they come from
//! - `device`: the virtio device

mod device;
mod entropy;

pub use device::RngDevice;
