//! virtio-vsock in user space: stream sockets between the guest and processes of the host, without the host's kernel
//! knowing of them.
//!
//! - `device`: the virtio device: moves packets between the queues and the muxer
//! - `muxer`: all connections: which packet belongs to which, who may send next
//! - `link`: one connection with its host side, a unix stream
//! - `connection`: the protocol of one connection, without I/O: states, credit, half-closes
//! - `backlog`: what the guest sent and a slow host has not taken
//! - `packet`: the wire format
//! - `handle`: [`VsockHandle`], by which the rest of the process dials and listens
//! - `dialers`, `handshake`: the unix socket on which other processes dial (`CONNECT port\n`)
//!
//! Payload is moved by one system call between guest memory and the socket. When the host does not take it, the guest
//! runs out of credit and stops: nothing is dropped, and no more is kept than the credit that was given.

mod backlog;
mod connection;
mod device;
mod dialers;
mod handle;
mod handshake;
mod link;
mod muxer;
mod packet;

pub use device::VsockDevice;
pub use handle::{VsockHandle, VsockListener};
pub use packet::HOST_CID;
