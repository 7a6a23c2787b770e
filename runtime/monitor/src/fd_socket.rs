//! Hands file descriptors to a monitor.
//!
//! A descriptor travels over the sandbox's `fd.sock` (`SOCK_SEQPACKET`) under a random [`Token`];
//! the RPC that needs it names the token. One message is the token's bytes plus the descriptors
//! (`SCM_RIGHTS`), answered with one byte: [`ACCEPTED`], or [`REFUSED`] when the message is
//! malformed or too many tokens wait to be used.

use std::fmt;
use std::io::{self, IoSlice};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::path::Path;
use std::time::Duration;

use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, UnixAddr, connect, recv, sendmsg,
    socket,
};
use tokio::io::unix::AsyncFd;
use tokio::time::timeout;

/// Answer: the descriptors are stored.
pub const ACCEPTED: u8 = 0;

/// Answer: the descriptors are dropped.
pub const REFUSED: u8 = 1;

/// Most descriptors of one message.
pub const MAX_FDS: usize = 16;

/// How long a monitor may take to answer.
const ANSWER_DEADLINE: Duration = Duration::from_secs(5);

/// Names descriptors, or a stream between monitor and guest: 16 random bytes.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Token([u8; Token::LENGTH]);

impl Token {
    /// Bytes.
    pub const LENGTH: usize = 16;

    /// A new token from the kernel's random number generator.
    pub fn random() -> Self {
        let mut bytes = [0; Self::LENGTH];
        // SAFETY: the pointer and the length are those of `bytes`.
        let count = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
        // Up to 256 bytes come whole once the generator is seeded, which it is long before any
        // daemon runs (getrandom(2)).
        assert_eq!(count, Self::LENGTH as isize, "getrandom");
        Self(bytes)
    }

    /// The token in `bytes`; `None` unless there are exactly [`Token::LENGTH`].
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        bytes.try_into().ok().map(Self)
    }

    /// The token's bytes, as RPCs carry them.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// The token's bytes, owned.
    pub fn to_vec(self) -> Vec<u8> {
        self.0.to_vec()
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for byte in self.0 {
            write!(f, "{byte:02x}")?;
        }
        Ok(())
    }
}

/// A connection to a monitor's `fd.sock`. Needs a tokio runtime with I/O and time.
pub struct FdSender {
    socket: AsyncFd<OwnedFd>,
}

impl FdSender {
    /// Connects to the socket at `path`.
    ///
    /// # Errors
    /// Of `socket` and `connect`: nobody listens, or (`EAGAIN`) its backlog is full.
    pub fn connect(path: &Path) -> io::Result<Self> {
        let socket = socket(
            AddressFamily::Unix,
            SockType::SeqPacket,
            SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
            None,
        )?;
        connect(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
        Ok(Self {
            socket: register(socket)?,
        })
    }

    /// Sends `fds` as `token`. When this returns the monitor has them, for 60 s or until an RPC uses
    /// them.
    ///
    /// # Errors
    /// `ConnectionRefused` when the monitor refuses the message, `TimedOut` when it does not answer,
    /// `UnexpectedEof` when it ends.
    pub async fn send(&self, token: Token, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let exchange = async {
            self.send_message(token, fds).await?;
            self.receive_answer().await
        };
        match timeout(ANSWER_DEADLINE, exchange).await {
            Ok(result) => result,
            Err(_) => Err(io::ErrorKind::TimedOut.into()),
        }
    }

    async fn send_message(&self, token: Token, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        loop {
            let mut ready = self.socket.writable().await?;
            let sent = ready.try_io(|socket| {
                let bytes = [IoSlice::new(token.as_bytes())];
                let rights = [ControlMessage::ScmRights(&raw)];
                let flags = MsgFlags::MSG_NOSIGNAL;
                sendmsg::<()>(socket.as_raw_fd(), &bytes, &rights, flags, None)
                    .map_err(io::Error::from)
            });
            if let Ok(result) = sent {
                return result.map(drop);
            }
        }
    }

    async fn receive_answer(&self) -> io::Result<()> {
        let mut answer = [0];
        loop {
            let mut ready = self.socket.readable().await?;
            let received = ready.try_io(|socket| {
                recv(socket.as_raw_fd(), &mut answer, MsgFlags::empty()).map_err(io::Error::from)
            });
            let Ok(result) = received else { continue };
            return match (result?, answer[0]) {
                (0, _) => Err(io::ErrorKind::UnexpectedEof.into()),
                (_, ACCEPTED) => Ok(()),
                _ => Err(io::Error::new(
                    io::ErrorKind::ConnectionRefused,
                    "the monitor refused the file descriptors",
                )),
            };
        }
    }
}

/// Connects to the `fd.sock` at `path` and sends `fds` as `token`.
///
/// # Errors
/// Those of [`FdSender::connect`] and [`FdSender::send`].
pub async fn send(path: &Path, token: Token, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    FdSender::connect(path)?.send(token, fds).await
}

/// Watches a non-blocking descriptor. Must be called in a tokio runtime.
///
/// # Errors
/// Of epoll: the descriptor cannot be watched.
pub fn register(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd stays open, and the same, until it is dropped.
    Ok(unsafe { AsyncFd::register(fd) }?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_sixteen_bytes_and_differ() {
        let token = Token::random();
        assert_eq!(Token::from_bytes(token.as_bytes()), Some(token));
        assert_eq!(Token::from_bytes(&[0; 15]), None);
        assert_eq!(Token::from_bytes(&[]), None);
        assert_ne!(token, Token::random());
    }
}
