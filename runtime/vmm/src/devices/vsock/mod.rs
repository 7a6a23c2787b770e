//! virtio-vsock in user space.

use std::io;
use std::os::unix::net::UnixListener;

use tokio::net::UnixStream;
use tokio::sync::mpsc;

/// The address of the host in vsock.
pub const HOST_CID: u64 = 2;

/// The virtio-vsock device.
#[derive(Debug)]
pub struct VsockDevice {}

impl VsockDevice {
    /// A device for the guest with address `guest_cid`, and the handle to dial through it.
    ///
    /// # Errors
    /// The process has no file descriptors left.
    pub fn new(_guest_cid: u64) -> io::Result<(Self, VsockHandle)> {
        Ok((Self {}, VsockHandle {}))
    }
}

/// The host's end of the device: dials and listens. A cheap clone.
#[derive(Debug, Clone)]
pub struct VsockHandle {}

impl VsockHandle {
    /// Connects to a port of the guest. Resolves when the guest has accepted; the deadline is the caller's (dropping
    /// the future takes the request back).
    ///
    /// # Errors
    /// `ConnectionRefused`: nobody listens on the port. `ConnectionAborted`: the device is gone.
    /// `WouldBlock`: too many connections.
    pub async fn connect(&self, _port: u32) -> io::Result<UnixStream> {
        Err(io::ErrorKind::ConnectionAborted.into())
    }

    /// Accepts the guest's connections to `port` of the host. Replaces an earlier listener of the same port.
    pub fn listen(&self, _port: u32) -> VsockListener {
        VsockListener {
            incoming: mpsc::channel(1).1,
        }
    }

    /// Serves a unix socket on which any local process may dial the guest: it writes `CONNECT port\n`, reads
    /// `OK n\n`, and from there on has the connection.
    ///
    /// # Errors
    /// The socket cannot be made non-blocking.
    pub fn serve(&self, _listener: UnixListener) -> io::Result<()> {
        Ok(())
    }
}

/// Connections of the guest to one port of the host. Dropping it refuses later ones.
#[derive(Debug)]
pub struct VsockListener {
    incoming: mpsc::Receiver<std::os::unix::net::UnixStream>,
}

impl VsockListener {
    /// The next connection. `None`: the device is gone.
    ///
    /// # Panics
    /// Outside a tokio runtime with I/O enabled.
    pub async fn accept(&mut self) -> Option<UnixStream> {
        loop {
            let stream = self.incoming.recv().await?;
            if let Ok(stream) = UnixStream::from_std(stream) {
                return Some(stream);
            }
        }
    }
}
