//! Byte streams between a process and the monitor. To the guest each is a vsock connection, named by
//! a token.

use std::fs::File;
use std::future::Future;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::pin::Pin;
use std::time::Duration;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use podvisor_monitor::fd_socket::Token;
use podvisor_oci::stdio::{Streams, Wanted};
use podvisor_proto::agent::Stdio;
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncWriteExt, Interest};
use tokio::net::UnixStream;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use crate::agent::STREAM_PORT;

/// Connects to a port of the guest.
pub type Dial =
    Box<dyn Fn(u32) -> Pin<Box<dyn Future<Output = io::Result<UnixStream>> + Send>> + Send + Sync>;

/// How long the guest may take to accept a stream.
const CONNECT_DEADLINE: Duration = Duration::from_secs(10);

/// Read from a stream at once, bytes.
const CHUNK: usize = 8 * 1024;

/// Read at most, bytes, of what has arrived when a stream is cut.
const LAST_BYTES: usize = 1024 * 1024;

/// Tokens of the streams of a process.
pub struct Tokens {
    stdin: Option<Token>,
    stdout: Token,
    stderr: Option<Token>,
}

impl Tokens {
    /// New tokens.
    pub fn new(wanted: Wanted) -> Self {
        let token = |wanted: bool| wanted.then(Token::random);
        Self {
            stdin: token(wanted.stdin && !wanted.terminal),
            stdout: Token::random(),
            stderr: token(!wanted.terminal),
        }
    }

    /// As the agent is told.
    pub fn stdio(&self) -> Stdio {
        let bytes = |token: Option<Token>| token.map(Token::to_vec).unwrap_or_default();
        Stdio {
            stdin: bytes(self.stdin),
            stdout: self.stdout.to_vec(),
            stderr: bytes(self.stderr),
            terminal: self.stderr.is_none(),
        }
    }

    /// Opens the streams, all at once.
    pub async fn open(&self, dial: &Dial) -> io::Result<Streams> {
        let (stdin, stdout, stderr) = tokio::try_join!(
            open_one(dial, self.stdin),
            open_one(dial, Some(self.stdout)),
            open_one(dial, self.stderr),
        )?;
        Ok(Streams {
            stdin,
            stdout,
            stderr,
        })
    }
}

async fn open_one(dial: &Dial, token: Option<Token>) -> io::Result<Option<OwnedFd>> {
    let Some(token) = token else { return Ok(None) };
    let stream = connect(dial, token).await?;
    Ok(Some(stream.into_std()?.into()))
}

/// Opens the stream that the agent knows as `token`.
pub async fn connect(dial: &Dial, token: Token) -> io::Result<UnixStream> {
    let connect = async {
        let mut stream = dial(STREAM_PORT).await?;
        stream.write_all(token.as_bytes()).await?;
        Ok(stream)
    };
    match timeout(CONNECT_DEADLINE, connect).await {
        Ok(result) => result,
        Err(_) => Err(io::ErrorKind::TimedOut.into()),
    }
}

/// Reads `stream` to its end, or until `grace` after `ended` is cancelled, and keeps the first
/// `limit` bytes.
pub async fn capture(
    stream: Option<OwnedFd>,
    limit: usize,
    grace: Duration,
    ended: CancellationToken,
) -> Vec<u8> {
    let mut kept = Vec::new();
    let Some(Ok(stream)) = stream.map(asynchronous) else {
        return kept;
    };
    let mut chunk = vec![0; CHUNK];
    let cut = async {
        ended.cancelled().await;
        sleep(grace).await;
    };
    let mut cut = std::pin::pin!(cut);
    loop {
        let read = tokio::select! {
            read = stream.async_io(Interest::READABLE, |mut file| file.read(&mut chunk)) => read,
            () = &mut cut => break,
        };
        match read {
            Ok(0) | Err(_) => return kept,
            Ok(count) => keep(&mut kept, &chunk[..count], limit),
        }
    }
    // What has arrived by now still counts.
    let mut last = 0;
    while last < LAST_BYTES {
        match stream.get_ref().read(&mut chunk) {
            Ok(0) | Err(_) => break,
            Ok(count) => {
                last += count;
                keep(&mut kept, &chunk[..count], limit);
            }
        }
    }
    kept
}

/// For the reactor: a socket, a pipe or a terminal.
pub fn asynchronous(stream: OwnedFd) -> io::Result<AsyncFd<File>> {
    let flags = OFlag::from_bits_truncate(fcntl(&stream, FcntlArg::F_GETFL)?);
    fcntl(&stream, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    // SAFETY: the AsyncFd owns the descriptor: it stays open for as long as it is registered.
    Ok(unsafe { AsyncFd::register(File::from(stream)) }?)
}

fn keep(kept: &mut Vec<u8>, bytes: &[u8], limit: usize) {
    let room = limit.saturating_sub(kept.len());
    kept.extend_from_slice(&bytes[..bytes.len().min(room)]);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn output_is_kept_up_to_the_limit_and_drained_beyond() {
        let (ours, mut guests) = UnixStream::pair().expect("socketpair");
        let ended = CancellationToken::new();
        let reading = tokio::spawn(capture(
            Some(ours.into_std().expect("std").into()),
            5,
            Duration::ZERO,
            ended,
        ));
        // Far beyond the socket's buffer: this ends only when all is read.
        guests.write_all(&vec![b'x'; 1 << 20]).await.expect("write");
        drop(guests);
        assert_eq!(reading.await.expect("captured"), b"xxxxx");
    }

    #[tokio::test]
    async fn a_cut_keeps_what_has_arrived() {
        let (ours, mut guests) = UnixStream::pair().expect("socketpair");
        guests.write_all(b"arrived").await.expect("write");
        let ended = CancellationToken::new();
        ended.cancel();
        let kept = capture(
            Some(ours.into_std().expect("std").into()),
            100,
            Duration::from_millis(10),
            ended,
        )
        .await;
        assert_eq!(kept, b"arrived");
        drop(guests);
    }
}
