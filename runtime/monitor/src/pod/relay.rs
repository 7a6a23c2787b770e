//! Moves bytes between a process and the streams of a caller. One buffer each: who does not take bytes holds up who
//! gives them.

use std::fs::File;
use std::io::{self, Read, Write};
use std::ops::Deref;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream as StdUnixStream;
use std::sync::Arc;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{Shutdown, shutdown};
use podvisor_monitor::fd_table::FdTable;
use podvisor_oci::stdio;
use podvisor_proto::monitor;
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest, Ready};
use tokio::net::UnixStream;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::PodError;
use super::streams::asynchronous;

/// Moved at once, bytes.
const CHUNK: usize = 32 * 1024;

/// Our end of a process's stream.
pub type ProcessEnd = Arc<AsyncFd<File>>;

/// A caller's ends of the streams that it wants.
#[derive(Debug, Default)]
pub struct ClientStreams {
    /// To the process.
    pub stdin: Option<UnixStream>,
    /// From the process; all output of a terminal.
    pub stdout: Option<UnixStream>,
    /// From the process.
    pub stderr: Option<UnixStream>,
}

impl ClientStreams {
    /// Takes those that came by `fd.sock`.
    pub fn take(fds: &FdTable, wanted: &monitor::Streams) -> Result<Self, PodError> {
        let flags = [wanted.stdin, wanted.stdout, wanted.stderr];
        let count = flags.into_iter().filter(|&flag| flag).count();
        if count == 0 {
            return Ok(Self::default());
        }
        let sockets = fds.take_all(&wanted.fd_token, count);
        let sockets =
            sockets.ok_or_else(|| PodError::State("its streams did not come".to_owned()))?;
        let mut sockets = sockets.into_iter();
        let mut next = |wanted: bool| -> Result<Option<UnixStream>, PodError> {
            let socket = if wanted { sockets.next() } else { None };
            socket.map(socket_of).transpose().map_err(PodError::Stream)
        };
        Ok(Self {
            stdin: next(wanted.stdin)?,
            stdout: next(wanted.stdout)?,
            stderr: next(wanted.stderr)?,
        })
    }
}

/// Takes one stream of a caller's that came by `fd.sock`.
pub fn take_stream(fds: &FdTable, token: &[u8]) -> Result<ProcessEnd, PodError> {
    let socket = fds.take_all(token, 1).and_then(|mut sockets| sockets.pop());
    let socket = socket.ok_or_else(|| PodError::State("its stream did not come".to_owned()))?;
    asynchronous(socket).map(Arc::new).map_err(PodError::Stream)
}

/// Moves bytes between a caller and a port both ways until both have ended, or the caller has closed its stream.
pub async fn both_ways(caller: &AsyncFd<File>, port: &AsyncFd<File>) {
    let down = one_way(port, caller);
    let up = one_way(caller, port);
    let (mut down, mut up) = (std::pin::pin!(down), std::pin::pin!(up));
    tokio::select! {
        () = &mut down => up.await,
        () = &mut up => tokio::select! {
            () = down => {}
            // Nobody takes what may still come.
            () = closed(caller) => {}
        },
    }
}

async fn one_way(from: &AsyncFd<File>, to: &AsyncFd<File>) {
    let mut chunk = vec![0; CHUNK];
    loop {
        let read = from.async_io(Interest::READABLE, |mut file| file.read(&mut chunk));
        let Ok(count @ 1..) = read.await else { break };
        if write_all(to, &chunk[..count]).await.is_err() {
            break;
        }
    }
    let _ = shutdown(to.get_ref().as_raw_fd(), Shutdown::Write);
}

/// Ends when the other side of a socket has closed both directions.
async fn closed(socket: &AsyncFd<File>) {
    // An error of epoll's would be an end as well.
    while let Ok(mut ready) = socket.ready(Interest::WRITABLE).await {
        if ready.ready().is_write_closed() {
            return;
        }
        ready.clear_ready_matching(Ready::WRITABLE);
    }
}

/// A stream socket that came by `fd.sock`.
fn socket_of(fd: OwnedFd) -> io::Result<UnixStream> {
    let socket = StdUnixStream::from(fd);
    socket.set_nonblocking(true)?;
    UnixStream::from_std(socket)
}

/// For the reactor.
pub fn process_end(stream: Option<OwnedFd>) -> io::Result<Option<ProcessEnd>> {
    stream
        .map(|stream| asynchronous(stream).map(Arc::new))
        .transpose()
}

/// Gives the process what the caller sends. A stream that is given is closed then; a terminal, which is lent, outlives
/// who types.
pub async fn input<P>(client: Option<UnixStream>, process: Option<P>)
where
    P: Deref<Target = AsyncFd<File>>,
{
    if let (Some(mut client), Some(process)) = (client, process) {
        // A process that takes no more is no failure.
        let _ = copy_input(&mut client, &process).await;
    }
}

/// Gives the process what the caller sends, to the end of it.
///
/// # Errors
/// The process takes no more.
pub async fn copy_input(client: &mut UnixStream, process: &AsyncFd<File>) -> io::Result<()> {
    let mut chunk = vec![0; CHUNK];
    while let Ok(count @ 1..) = client.read(&mut chunk).await {
        write_all(process, &chunk[..count]).await?;
    }
    Ok(())
}

/// Whether the caller has closed the stream, and not only ended one direction.
pub fn is_gone(client: &UnixStream) -> bool {
    // POLLHUP is not asked for: it comes by itself (poll(2)).
    let mut fds = [PollFd::new(client.as_fd(), PollFlags::empty())];
    let polled = poll(&mut fds, PollTimeout::ZERO);
    polled.is_err() || fds[0].any().unwrap_or(true)
}

/// Writes all of it.
///
/// # Errors
/// Nobody takes it any more.
pub async fn write_all(process: &AsyncFd<File>, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        let write = |mut file: &File| file.write(bytes);
        let count = process.async_io(Interest::WRITABLE, write).await?;
        bytes = &bytes[count..];
    }
    Ok(())
}

/// Gives the caller what the process writes, to the end of its stream, or until nothing has come for `grace` once
/// `ended` is cancelled: another process may hold the stream for ever. However slow the caller is, it gets all.
pub async fn output(
    process: Option<ProcessEnd>,
    client: Option<UnixStream>,
    grace: Duration,
    ended: &CancellationToken,
) {
    let Some(process) = process else { return };
    let mut client = client;
    let mut chunk = vec![0; CHUNK];
    loop {
        let read = {
            let read = process.async_io(Interest::READABLE, |file| stdio::read(file, &mut chunk));
            let mut read = std::pin::pin!(read);
            tokio::select! {
                read = &mut read => Some(read),
                () = ended.cancelled() => timeout(grace, read).await.ok(),
            }
        };
        // The end of a terminal is an error.
        let Some(Ok(count @ 1..)) = read else { return };
        // What the caller does not want is dropped: the process is not to stop.
        if let Some(socket) = &mut client
            && socket.write_all(&chunk[..count]).await.is_err()
        {
            client = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::AsyncReadExt;

    fn pair() -> (UnixStream, UnixStream) {
        UnixStream::pair().expect("socketpair")
    }

    fn end(stream: UnixStream) -> Option<ProcessEnd> {
        process_end(Some(stream.into_std().expect("std").into())).expect("reactor")
    }

    #[tokio::test]
    async fn a_slow_caller_gets_all_although_the_process_has_ended() {
        let (ours, mut process) = pair();
        let (client, mut caller) = pair();
        let ended = CancellationToken::new();
        ended.cancel();
        let grace = Duration::from_millis(50);
        let relaying = tokio::spawn(async move {
            output(end(ours), Some(client), grace, &ended).await;
        });
        // More than both sockets hold: it is taken only when the caller reads.
        let writing = tokio::spawn(async move {
            process
                .write_all(&vec![b'x'; 4 << 20])
                .await
                .expect("write");
            process
        });
        tokio::time::sleep(grace * 3).await;
        let mut received = Vec::new();
        caller.read_to_end(&mut received).await.expect("read");
        assert_eq!(received.len(), 4 << 20);
        relaying.await.expect("relay");
        // Its stream was never closed: the grace was the end.
        drop(writing.await.expect("written"));
    }

    #[tokio::test]
    async fn the_callers_end_is_the_end_of_the_input() {
        let (ours, mut process) = pair();
        let (client, mut caller) = pair();
        let relaying = tokio::spawn(input(Some(client), end(ours)));
        caller.write_all(b"typed").await.expect("write");
        drop(caller);
        let mut received = Vec::new();
        process.read_to_end(&mut received).await.expect("read");
        assert_eq!(received, b"typed");
        relaying.await.expect("relay");
    }
}
