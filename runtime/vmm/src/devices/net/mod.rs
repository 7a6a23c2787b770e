//! The pod's network device: virtio-net on a tap.
//!
//! - `tap`: the tap, or for tests a socket in its place; what it can be told of offloads
//! - `receiver`: frames from the tap into as many buffers of the driver's as each needs
//! - `device`: the virtio device; frames to the tap
//!
//! A frame moves by one system call between the tap and guest memory, the virtio-net header with it: the tap is told
//! which offloads the driver accepted, and its kernel checks what the driver puts into headers. What cannot be moved is
//! dropped and counted, as a network may.

mod device;
mod receiver;
mod tap;

pub use device::NetDevice;
pub use tap::Tap;
