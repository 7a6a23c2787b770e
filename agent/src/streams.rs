//! Byte streams from the host. The host dials, sends the 16 bytes of a token, and from then on the
//! connection is the stream which that token names in some call, earlier or later.
//!
//! The table has two halves, both bounded: processes that wait for a stream, and streams that wait for
//! their process. Whatever waits too long is dropped.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::io::AsyncReadExt;
use tokio::sync::{Semaphore, oneshot};
use tokio::time::timeout;

use crate::kmsg;
use crate::socket::{Listener, Socket};

/// Bytes of a token.
pub const TOKEN_LENGTH: usize = 16;
/// Connections that have not sent their token yet or whose token nobody has named yet.
const PENDING_LIMIT: usize = 256;
/// Tokens that calls wait for.
const WAITER_LIMIT: usize = 1024;
/// From connection to the last byte of its token.
const TOKEN_DEADLINE: Duration = Duration::from_secs(5);
/// How long a connection waits for its call, and a call for its connections.
pub const MATCH_DEADLINE: Duration = Duration::from_secs(10);

/// Names one stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Token([u8; TOKEN_LENGTH]);

impl Token {
    /// A token from a request's field: 16 bytes, or none when the field is empty.
    ///
    /// # Errors
    /// Any other length.
    pub fn parse(bytes: &[u8]) -> Result<Option<Self>, StreamError> {
        if bytes.is_empty() {
            return Ok(None);
        }
        <[u8; TOKEN_LENGTH]>::try_from(bytes)
            .map(|token| Some(Self(token)))
            .map_err(|_| StreamError::TokenLength(bytes.len()))
    }
}

/// Why a process has no stream.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    /// A malformed request.
    #[error("a stream token has {TOKEN_LENGTH} bytes, not {0}")]
    TokenLength(usize),
    /// Two calls name one stream.
    #[error("another process waits for the same stream token")]
    Duplicate,
    /// See [`WAITER_LIMIT`].
    #[error("too many processes wait for streams")]
    TooMany,
    /// The host never dialled.
    #[error("the stream did not arrive within {} s", MATCH_DEADLINE.as_secs())]
    Missing,
}

/// The table of both halves. Cheap to clone.
#[derive(Clone, Default)]
pub struct Streams(Arc<Mutex<Table>>);

#[derive(Default)]
struct Table {
    waiting: HashMap<Token, oneshot::Sender<Socket>>,
    parked: HashMap<Token, Parked>,
}

struct Parked {
    socket: Socket,
    /// Dropped with the entry: ends the task that would expire it.
    _taken: oneshot::Sender<()>,
}

impl Streams {
    /// Accepts streams until the listener fails.
    pub async fn serve(self, listener: Listener) {
        let pending = Arc::new(Semaphore::new(PENDING_LIMIT));
        loop {
            let Ok(permit) = Arc::clone(&pending).acquire_owned().await else {
                return;
            };
            match listener.accept().await {
                Ok(socket) => {
                    let streams = self.clone();
                    tokio::spawn(async move {
                        streams.admit(socket).await;
                        drop(permit);
                    });
                }
                Err(error) => {
                    // Out of descriptors or memory: the next accept would fail as well, so wait
                    // until a pending connection has gone.
                    kmsg::error!("cannot accept a stream: {error}");
                    drop(permit);
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }

    /// The stream that `token` names, when it is there or comes within [`MATCH_DEADLINE`].
    pub async fn claim(&self, token: Token) -> Result<Socket, StreamError> {
        let waiter = {
            let mut table = self.lock();
            if let Some(parked) = table.parked.remove(&token) {
                return Ok(parked.socket);
            }
            if table.waiting.len() >= WAITER_LIMIT {
                return Err(StreamError::TooMany);
            }
            if table.waiting.contains_key(&token) {
                return Err(StreamError::Duplicate);
            }
            let (sender, receiver) = oneshot::channel();
            table.waiting.insert(token, sender);
            Waiter {
                streams: self,
                token,
                receiver,
            }
        };
        waiter.wait().await
    }

    /// Reads a new connection's token and hands it over or parks it.
    async fn admit(&self, mut socket: Socket) {
        let mut token = [0; TOKEN_LENGTH];
        match timeout(TOKEN_DEADLINE, socket.read_exact(&mut token)).await {
            Ok(Ok(_)) => {}
            Ok(Err(_)) | Err(_) => return,
        }
        if let Some(taken) = self.offer(Token(token), socket)
            && timeout(MATCH_DEADLINE, taken).await.is_err()
        {
            self.lock().parked.remove(&Token(token));
        }
    }

    /// Hands the stream to its waiter, or parks it: then the result resolves when it was taken.
    fn offer(&self, token: Token, socket: Socket) -> Option<oneshot::Receiver<()>> {
        let mut table = self.lock();
        let socket = match table.waiting.remove(&token) {
            Some(waiter) => match waiter.send(socket) {
                Ok(()) => return None,
                Err(socket) => socket,
            },
            None => socket,
        };
        let (sender, receiver) = oneshot::channel();
        // A second connection with the same token replaces the first: the caller dialled again.
        table.parked.insert(
            token,
            Parked {
                socket,
                _taken: sender,
            },
        );
        Some(receiver)
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A call that waits; takes its entry away when the call gives up or is cancelled.
struct Waiter<'a> {
    streams: &'a Streams,
    token: Token,
    receiver: oneshot::Receiver<Socket>,
}

impl Waiter<'_> {
    async fn wait(mut self) -> Result<Socket, StreamError> {
        match timeout(MATCH_DEADLINE, &mut self.receiver).await {
            Ok(Ok(socket)) => Ok(socket),
            Ok(Err(_)) | Err(_) => Err(StreamError::Missing),
        }
    }
}

impl Drop for Waiter<'_> {
    fn drop(&mut self) {
        // The sender is ours as long as the receiver has got nothing.
        self.receiver.close();
        let mut table = self.streams.lock();
        if table
            .waiting
            .get(&self.token)
            .is_some_and(oneshot::Sender::is_closed)
        {
            table.waiting.remove(&self.token);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::socket::Address;
    use std::io::Write;
    use std::os::unix::net::UnixStream;
    use tokio::io::AsyncReadExt;

    fn token(byte: u8) -> Token {
        Token([byte; TOKEN_LENGTH])
    }

    /// A table that serves a socket in a directory of its own.
    fn serve() -> (tempfile::TempDir, std::path::PathBuf, Streams) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("streams");
        let listener = Listener::bind(&Address::Unix(path.clone())).unwrap();
        let streams = Streams::default();
        tokio::spawn(streams.clone().serve(listener));
        (directory, path, streams)
    }

    fn dial(path: &std::path::Path, token: u8, text: &[u8]) -> UnixStream {
        let mut stream = UnixStream::connect(path).unwrap();
        stream.write_all(&[token; TOKEN_LENGTH]).unwrap();
        stream.write_all(text).unwrap();
        stream
    }

    async fn text(mut socket: Socket, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        socket.read_exact(&mut bytes).await.unwrap();
        bytes
    }

    #[tokio::test]
    async fn a_stream_may_come_before_or_after_its_call() {
        let (_directory, path, streams) = serve();
        let _first = dial(&path, 1, b"one");
        assert_eq!(
            text(streams.claim(token(1)).await.unwrap(), 3).await,
            b"one"
        );

        let claim = tokio::spawn({
            let streams = streams.clone();
            async move { streams.claim(token(2)).await }
        });
        tokio::task::yield_now().await;
        let _second = dial(&path, 2, b"two");
        assert_eq!(text(claim.await.unwrap().unwrap(), 3).await, b"two");
    }

    #[tokio::test(start_paused = true)]
    async fn what_waits_too_long_is_dropped() {
        let streams = Streams::default();
        assert!(matches!(
            streams.claim(token(1)).await,
            Err(StreamError::Missing)
        ));
        assert!(streams.lock().waiting.is_empty());
    }

    #[tokio::test]
    async fn a_cancelled_call_leaves_no_entry() {
        let streams = Streams::default();
        let claim = tokio::spawn({
            let streams = streams.clone();
            async move { streams.claim(token(1)).await.map(drop) }
        });
        tokio::task::yield_now().await;
        assert_eq!(streams.lock().waiting.len(), 1);
        claim.abort();
        assert!(claim.await.is_err());
        assert!(streams.lock().waiting.is_empty());
    }

    #[tokio::test]
    async fn two_calls_cannot_share_a_stream() {
        let streams = Streams::default();
        let first = tokio::spawn({
            let streams = streams.clone();
            async move { streams.claim(token(1)).await.map(drop) }
        });
        tokio::task::yield_now().await;
        assert!(matches!(
            streams.claim(token(1)).await,
            Err(StreamError::Duplicate)
        ));
        first.abort();
    }

    #[test]
    fn tokens_have_one_length() {
        assert!(Token::parse(&[]).unwrap().is_none());
        assert_eq!(Token::parse(&[1; 16]).unwrap(), Some(token(1)));
        assert!(Token::parse(&[1; 15]).is_err());
        assert!(Token::parse(&[1; 17]).is_err());
    }
}
