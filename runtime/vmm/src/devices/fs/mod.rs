//! virtio-fs: FUSE messages between virtqueues and a socket.
//!
//! This process answers none of them: it moves a request from its chain to the socket, and the answer from the socket to
//! the room that the chain had for it. What answers is another process (podvisor-fs), which in turn sees neither guest
//! memory nor virtqueues. Of a message, only the header's length, operation and number are looked at.
//!
//! - `device`: [`FsDevice`]
//! - `requests`: what is on its way: which chain an answer belongs to
//! - `handle`: [`FsHandle`], through which the socket comes, whenever that is
//!
//! Until there is a socket, and after its other end is closed, requests are answered with `ENOTCONN`.

mod device;
mod handle;
mod requests;

pub(crate) use device::QUEUE_SIZES;
pub use device::{FsDevice, TAG};
pub use handle::FsHandle;
