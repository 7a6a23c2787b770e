//! The virtio devices that podvisor owns, one folder each, all of the same shape: `device.rs` moves requests between
//! the queues and the parts beside it, which know nothing of queues. The smallest is [`rng`].

pub mod balloon;
pub mod disk;
pub mod fs;
pub mod net;
pub mod rng;
pub mod vsock;
