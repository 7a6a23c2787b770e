//! virtio-fs: FUSE messages between virtqueues and a socket.
//!
//! What answers is another process (podvisor-fs), which sees neither guest memory nor virtqueues: a request goes from its
//! chain to the socket, and the answer from the socket to the room that the chain had for it. Of a file that is read or
//! written more than once podvisor-fs hands the descriptor over; its contents are then moved here, between file and guest
//! memory.
//!
//! - `device`: [`FsDevice`]
//! - `requests`: what is on its way: which chain an answer belongs to
//! - `files`: what was handed over
//! - `directory`: what the guest asks next when it has changed a directory
//! - `protocol`: what is looked at of a message
//! - `handle`: [`FsHandle`], through which the socket comes, whenever that is
//!
//! Until there is a socket, and after its other end is closed, requests are answered with `ENOTCONN`.

mod device;
mod directory;
mod files;
mod handle;
mod protocol;
mod requests;

pub(crate) use device::QUEUE_SIZES;
pub use device::{FsDevice, TAG};
pub use handle::FsHandle;
