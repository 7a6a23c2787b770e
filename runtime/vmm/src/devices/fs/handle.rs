//! The way to the device from the rest of the process.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// What the device and its handles share.
#[derive(Debug)]
pub(super) struct Shared {
    socket: Mutex<Option<OwnedFd>>,
    /// Readable when there is a new socket.
    pub(super) changed: EventFd,
}

impl Shared {
    /// The new socket, if there is one.
    pub(super) fn take(&self) -> Option<OwnedFd> {
        // Fails only when nothing was written since: then there is nothing to clear.
        let _ = self.changed.read();
        let mut socket = self.socket.lock().unwrap_or_else(PoisonError::into_inner);
        socket.take()
    }
}

/// The host's end of the device.
#[derive(Debug, Clone)]
pub struct FsHandle {
    shared: Arc<Shared>,
}

impl FsHandle {
    pub(super) fn new() -> io::Result<(Self, Arc<Shared>)> {
        let shared = Arc::new(Shared {
            socket: Mutex::default(),
            changed: EventFd::new(EFD_NONBLOCK)?,
        });
        let handle = Self {
            shared: Arc::clone(&shared),
        };
        Ok((handle, shared))
    }

    /// From now on the device's requests go to `socket`, a connected `SOCK_SEQPACKET`, one message each, and the answers
    /// come from there. What was sent to a socket before is answered with `ENOTCONN`.
    pub fn connect(&self, socket: OwnedFd) {
        let mut place = self
            .shared
            .socket
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        *place = Some(socket);
        // Fails only when it was written 2^64 times and not read: then the device will look anyway.
        let _ = self.shared.changed.write(1);
    }
}
