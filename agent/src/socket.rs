//! Stream sockets without blocking: vsock in the guest, unix sockets in development.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::PathBuf;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, Backlog, Shutdown, SockFlag, SockType, SockaddrLike, UnixAddr, VsockAddr,
    accept4, bind, connect, getpeername, getsockopt, listen, shutdown, socket, sockopt,
};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};

use crate::fd::register;

/// The host's context id on every guest's vsock (vsock(7)).
pub const HOST_CID: u32 = libc::VMADDR_CID_HOST;

/// Where to listen or to connect.
#[derive(Clone, Debug)]
pub enum Address {
    /// Port of this guest or of the host.
    Vsock(u32),
    /// Development: a socket in the file system.
    Unix(PathBuf),
}

/// One connected stream.
#[derive(Debug)]
pub struct Socket(AsyncFd<OwnedFd>);

impl Socket {
    /// Connects to a port of the host. The deadline is the caller's.
    pub async fn connect_to_host(port: u32) -> io::Result<Self> {
        let fd = new_socket(AddressFamily::Vsock)?;
        match connect(fd.as_raw_fd(), &VsockAddr::new(HOST_CID, port)) {
            Ok(()) | Err(Errno::EINPROGRESS) => {}
            Err(error) => return Err(error.into()),
        }
        let socket = Self(register(fd, Interest::READABLE | Interest::WRITABLE)?);
        drop(socket.0.writable().await?);
        match getsockopt(&socket, sockopt::SocketError)? {
            0 => Ok(socket),
            code => Err(io::Error::from_raw_os_error(code)),
        }
    }

    /// For [`crate::relay`], which moves bytes itself.
    pub fn as_async_fd(&self) -> &AsyncFd<OwnedFd> {
        &self.0
    }

    /// Tells the other side that nothing more is sent. A side that is gone needs no telling.
    pub fn close_write(&self) {
        let _ = shutdown(self.as_raw_fd(), Shutdown::Write);
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for Socket {
    fn as_raw_fd(&self) -> i32 {
        self.0.as_raw_fd()
    }
}

/// A listening socket.
#[derive(Debug)]
pub struct Listener(AsyncFd<OwnedFd>);

impl Listener {
    /// Listens on `address`: a vsock port of this guest, or a path, which is replaced.
    pub fn bind(address: &Address) -> io::Result<Self> {
        let fd = match address {
            Address::Vsock(port) => {
                let fd = new_socket(AddressFamily::Vsock)?;
                bind(fd.as_raw_fd(), &VsockAddr::new(libc::VMADDR_CID_ANY, *port))?;
                fd
            }
            Address::Unix(path) => {
                let _ = std::fs::remove_file(path);
                let fd = new_socket(AddressFamily::Unix)?;
                bind(fd.as_raw_fd(), &UnixAddr::new(path)?)?;
                fd
            }
        };
        listen(&fd, Backlog::MAXCONN)?;
        Ok(Self(register(fd, Interest::READABLE | Interest::WRITABLE)?))
    }

    /// The next connection. One that does not come from the host is closed: processes of this guest
    /// have no business here.
    pub async fn accept(&self) -> io::Result<Socket> {
        loop {
            let accepted = self
                .0
                .async_io(Interest::READABLE, |fd| {
                    accept4(
                        fd.as_raw_fd(),
                        SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
                    )
                    .map_err(io::Error::from)
                })
                .await;
            let raw = match accepted {
                Ok(raw) => raw,
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => continue,
                Err(error) => return Err(error),
            };
            // SAFETY: accept4 has just returned this descriptor, nobody else has it.
            let fd = unsafe { OwnedFd::from_raw_fd(raw) };
            if from_host(&fd) {
                return Ok(Socket(register(
                    fd,
                    Interest::READABLE | Interest::WRITABLE,
                )?));
            }
        }
    }
}

/// Whether the peer is the host (or a unix socket's owner).
fn from_host(fd: &OwnedFd) -> bool {
    match getpeername::<VsockAddr>(fd.as_raw_fd()) {
        Ok(peer) => peer.cid() == HOST_CID,
        // Not a vsock address.
        Err(_) => getpeername::<UnixAddr>(fd.as_raw_fd())
            .is_ok_and(|peer| peer.family() == Some(AddressFamily::Unix)),
    }
}

fn new_socket(family: AddressFamily) -> io::Result<OwnedFd> {
    Ok(socket(
        family,
        SockType::Stream,
        SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
        None,
    )?)
}

impl AsyncRead for Socket {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            let mut guard = ready!(self.0.poll_read_ready(context))?;
            let result = guard.try_io(|fd| {
                nix::unistd::read(fd, buffer.initialize_unfilled()).map_err(io::Error::from)
            });
            match result {
                Ok(Ok(count)) => {
                    buffer.advance(count);
                    return Poll::Ready(Ok(()));
                }
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(Err(error)) => return Poll::Ready(Err(error)),
                Err(_would_block) => {}
            }
        }
    }
}

impl AsyncWrite for Socket {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        loop {
            let mut guard = ready!(self.0.poll_write_ready(context))?;
            match guard.try_io(|fd| nix::unistd::write(fd, bytes).map_err(io::Error::from)) {
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(result) => return Poll::Ready(result),
                Err(_would_block) => {}
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.close_write();
        Poll::Ready(Ok(()))
    }
}
