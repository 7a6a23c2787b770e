//! The monitor's end of `fd.sock`: file descriptors that wait for the RPC that names them. The
//! protocol is in [`crate::fd_socket`].

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, IoSliceMut};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::fd_socket::{ACCEPTED, MAX_FDS, REFUSED, Token, register};
use nix::errno::Errno;
use nix::sys::socket::{
    Backlog, ControlMessageOwned, MsgFlags, SockFlag, accept4, listen, recvmsg, send,
};
use tokio::io::unix::AsyncFd;
use tokio::sync::Semaphore;
use tokio::task::AbortHandle;
use tracing::{debug, warn};

/// Tokens that may wait: those of as many execs as may begin at once, too.
const MAX_TOKENS: usize = 256;

/// How long a token may wait.
const LIFETIME: Duration = Duration::from_mins(1);

/// Connections served at a time; more wait in the listener's backlog.
const MAX_CONNECTIONS: usize = 8;

/// Descriptors by token. Cheap to clone.
#[derive(Clone, Default)]
pub struct FdTable {
    waiting: Arc<Mutex<HashMap<Token, Waiting>>>,
}

struct Waiting {
    fds: Vec<OwnedFd>,
    /// Drops the entry at the end of its life.
    expiry: AbortHandle,
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.expiry.abort();
    }
}

impl FdTable {
    /// Takes the one descriptor that came as `token`. `None` when none did, when it was used or has
    /// expired.
    pub fn take(&self, token: &[u8]) -> Option<File> {
        let token = Token::from_bytes(token)?;
        let mut waiting = self.lock().remove(&token)?;
        waiting.fds.pop().map(File::from)
    }

    /// Takes the descriptors that came as `token`: `count` of them. `None` when others did, or none.
    pub fn take_all(&self, token: &[u8], count: usize) -> Option<Vec<OwnedFd>> {
        let token = Token::from_bytes(token)?;
        let mut waiting = self.lock().remove(&token)?;
        let fds = std::mem::take(&mut waiting.fds);
        (fds.len() == count).then_some(fds)
    }

    /// Stores `fds`. False when the table is full or the token is taken.
    pub fn insert(&self, token: Token, fds: Vec<OwnedFd>) -> bool {
        self.insert_for(token, fds, LIFETIME)
    }

    fn insert_for(&self, token: Token, fds: Vec<OwnedFd>, lifetime: Duration) -> bool {
        let mut waiting = self.lock();
        if waiting.len() >= MAX_TOKENS || waiting.contains_key(&token) {
            return false;
        }
        let table = self.clone();
        let expiry = tokio::spawn(async move {
            tokio::time::sleep(lifetime).await;
            debug!(?token, "file descriptors were never used");
            table.lock().remove(&token);
        });
        let expiry = expiry.abort_handle();
        waiting.insert(token, Waiting { fds, expiry });
        true
    }

    /// Accepts connections on `listener` for ever.
    ///
    /// # Errors
    /// When the socket does not listen or cannot be watched.
    pub async fn serve(self, listener: OwnedFd) -> io::Result<()> {
        // Idempotent for a socket that listens already, an error for what is no socket.
        listen(&listener, Backlog::MAXCONN)?;
        set_nonblocking(&listener)?;
        let listener = register(listener)?;
        let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        loop {
            let Ok(slot) = Arc::clone(&slots).acquire_owned().await else {
                return Ok(()); // The semaphore is never closed.
            };
            let connection = match accept(&listener).await {
                Ok(connection) => connection,
                Err(error) => {
                    // Out of descriptors: the connection stays in the backlog, and the event that
                    // ends this is a descriptor of ours being closed, which nobody announces.
                    warn!(%error, "cannot accept on fd.sock");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            let table = self.clone();
            tokio::spawn(async move {
                let _slot = slot;
                if let Err(error) = table.serve_connection(connection).await {
                    debug!(%error, "connection to fd.sock broke");
                }
            });
        }
    }

    async fn serve_connection(&self, connection: OwnedFd) -> io::Result<()> {
        let connection = register(connection)?;
        while let Some((token, fds)) = receive(&connection).await? {
            let stored = match token {
                Some(token) if !fds.is_empty() => self.insert(token, fds),
                _ => false,
            };
            let answer = if stored { ACCEPTED } else { REFUSED };
            // One byte a message; a peer that sends without reading the answers loses them and the
            // connection.
            send(connection.as_raw_fd(), &[answer], MsgFlags::MSG_NOSIGNAL)?;
        }
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Token, Waiting>> {
        // Whole entries are inserted and removed: a panic elsewhere leaves the map sound.
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn accept(listener: &AsyncFd<OwnedFd>) -> io::Result<OwnedFd> {
    loop {
        let mut ready = listener.readable().await?;
        let accepted = ready.try_io(|listener| {
            let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
            accept4(listener.as_raw_fd(), flags).map_err(io::Error::from)
        });
        match accepted {
            // SAFETY: accept4 returned a new descriptor that nothing else owns.
            Ok(Ok(fd)) => return Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
            Ok(Err(error)) if error.kind() == io::ErrorKind::ConnectionAborted => {}
            Ok(Err(error)) => return Err(error),
            Err(_would_block) => {}
        }
    }
}

/// One message: its token, unless it is malformed, and its descriptors. `None` at the end.
async fn receive(
    connection: &AsyncFd<OwnedFd>,
) -> io::Result<Option<(Option<Token>, Vec<OwnedFd>)>> {
    // One byte more than a token, to see that a message is too long.
    let mut bytes = [0; Token::LENGTH + 1];
    let mut control = nix::cmsg_space!([RawFd; MAX_FDS]);
    loop {
        let mut ready = connection.readable().await?;
        let received = ready.try_io(|connection| {
            let mut buffers = [IoSliceMut::new(&mut bytes)];
            let flags = MsgFlags::MSG_CMSG_CLOEXEC;
            let message = recvmsg::<()>(
                connection.as_raw_fd(),
                &mut buffers,
                Some(&mut control),
                flags,
            )?;
            let mut fds = Vec::new();
            // Descriptors beyond MAX_FDS were dropped by the kernel (MSG_CTRUNC); those that came
            // are owned here before anything is judged, so none leaks.
            for control_message in message.cmsgs().into_iter().flatten() {
                if let ControlMessageOwned::ScmRights(rights) = control_message {
                    // SAFETY: the kernel has just installed these for us; nothing else owns them.
                    fds.extend(
                        rights
                            .into_iter()
                            .map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }),
                    );
                }
            }
            let truncated = message
                .flags
                .intersects(MsgFlags::MSG_TRUNC | MsgFlags::MSG_CTRUNC);
            Ok((message.bytes, truncated, fds))
        });
        match received {
            Ok(Ok((0, _, _))) => return Ok(None),
            Ok(Ok((length, truncated, fds))) => {
                let token = Token::from_bytes(&bytes[..length]).filter(|_| !truncated);
                return Ok(Some((token, fds)));
            }
            Ok(Err(error)) => return Err(error),
            Err(_would_block) => {}
        }
    }
}

fn set_nonblocking(fd: &OwnedFd) -> Result<(), Errno> {
    use nix::fcntl::{FcntlArg, OFlag, fcntl};
    let flags = OFlag::from_bits_retain(fcntl(fd, FcntlArg::F_GETFL)?);
    fcntl(fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK)).map(drop)
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Seek, Write};
    use std::os::fd::AsFd;

    use crate::fd_socket::{self, FdSender};
    use nix::sys::socket::{AddressFamily, SockType, UnixAddr, bind, socket};

    use super::*;

    struct Rig {
        dir: tempfile::TempDir,
        table: FdTable,
    }

    impl Rig {
        fn new() -> Self {
            let dir = tempfile::tempdir().expect("temporary directory");
            let flags = SockFlag::SOCK_CLOEXEC;
            let listener = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None)
                .expect("seqpacket socket");
            let address = UnixAddr::new(&dir.path().join("fd.sock")).expect("address");
            bind(listener.as_raw_fd(), &address).expect("bind");
            listen(&listener, Backlog::MAXCONN).expect("listen");
            let table = FdTable::default();
            tokio::spawn(table.clone().serve(listener));
            Self { dir, table }
        }

        fn path(&self) -> std::path::PathBuf {
            self.dir.path().join("fd.sock")
        }
    }

    #[tokio::test]
    async fn a_descriptor_arrives_and_is_used_once() {
        let rig = Rig::new();
        let mut file = tempfile::tempfile().expect("temporary file");
        file.write_all(b"layer").expect("write");
        let token = Token::random();
        fd_socket::send(&rig.path(), token, &[file.as_fd()])
            .await
            .expect("stored");

        let mut received = rig.table.take(token.as_bytes()).expect("waiting");
        received.rewind().expect("rewind");
        let mut text = String::new();
        received.read_to_string(&mut text).expect("read");
        assert_eq!(text, "layer");
        assert!(rig.table.take(token.as_bytes()).is_none());
    }

    #[tokio::test]
    async fn many_go_over_one_connection_up_to_the_limit() {
        let rig = Rig::new();
        let file = tempfile::tempfile().expect("temporary file");
        let sender = FdSender::connect(&rig.path()).expect("connect");
        for _ in 0..MAX_TOKENS {
            sender
                .send(Token::random(), &[file.as_fd()])
                .await
                .expect("stored");
        }
        let refused = sender.send(Token::random(), &[file.as_fd()]).await;
        assert_eq!(
            refused.expect_err("full").kind(),
            io::ErrorKind::ConnectionRefused
        );
    }

    #[tokio::test]
    async fn a_message_without_descriptors_is_refused() {
        let rig = Rig::new();
        assert!(
            fd_socket::send(&rig.path(), Token::random(), &[])
                .await
                .is_err()
        );
    }

    #[tokio::test]
    async fn a_token_expires() {
        let table = FdTable::default();
        let file = tempfile::tempfile().expect("temporary file");
        let token = Token::random();
        let lifetime = Duration::from_millis(10);
        assert!(table.insert_for(token, vec![file.into()], lifetime));
        // Timers of one runtime fire in order.
        tokio::time::sleep(lifetime * 2).await;
        assert!(table.lock().is_empty());
    }
}
