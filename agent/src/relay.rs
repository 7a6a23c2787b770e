//! Moves bytes between a process and its streams, without keeping any: what the host does not read
//! stays in the pipe (64 KiB) and the socket, and then the process blocks.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::{SpliceFFlags, splice};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Most that one splice(2) moves: what a pipe holds.
const CHUNK: usize = 64 * 1024;
/// Buffer for terminals, which splice(2) cannot join to a socket.
const TERMINAL_CHUNK: usize = 4096;
/// Buffer between two sockets.
const SOCKET_CHUNK: usize = 32 * 1024;

/// Moves bytes until the end of `from`. One of the two is a pipe (splice(2) needs that).
///
/// # Errors
/// `to` was closed by its reader, or either side failed.
pub async fn pipe(from: &AsyncFd<OwnedFd>, to: &AsyncFd<OwnedFd>) -> io::Result<()> {
    loop {
        let mut readable = from.readable().await?;
        let mut writable = to.writable().await?;
        let flags = SpliceFFlags::SPLICE_F_MOVE | SpliceFFlags::SPLICE_F_NONBLOCK;
        match splice(from, None, to, None, CHUNK, flags) {
            Ok(0) => return Ok(()),
            Ok(_) | Err(Errno::EINTR) => {}
            Err(Errno::EAGAIN) => {
                // EAGAIN does not say which side was not ready.
                let (input, output) = ready_now(from, to)?;
                if !input {
                    readable.clear_ready();
                }
                if !output {
                    writable.clear_ready();
                }
            }
            Err(error) => return Err(error.into()),
        }
    }
}

/// Moves bytes from or to a terminal. The end of a terminal is EIO, see [`read`].
///
/// # Errors
/// As [`pipe`].
pub async fn terminal(from: &AsyncFd<OwnedFd>, to: &AsyncFd<OwnedFd>) -> io::Result<()> {
    match copy(from, to, &mut [0; TERMINAL_CHUNK]).await {
        Err(error) if error.raw_os_error() == Some(libc::EIO) => Ok(()),
        result => result,
    }
}

/// Moves bytes from one socket to another.
///
/// # Errors
/// As [`pipe`].
pub async fn sockets(from: &AsyncFd<OwnedFd>, to: &AsyncFd<OwnedFd>) -> io::Result<()> {
    copy(from, to, &mut vec![0; SOCKET_CHUNK]).await
}

async fn copy(from: &AsyncFd<OwnedFd>, to: &AsyncFd<OwnedFd>, buffer: &mut [u8]) -> io::Result<()> {
    loop {
        let read = |fd: &OwnedFd| read(fd, buffer);
        let count = from.async_io(Interest::READABLE, read).await?;
        if count == 0 {
            return Ok(());
        }
        write_all(to, &buffer[..count]).await?;
    }
}

/// Reads a terminal until its end.
pub async fn discard(from: &AsyncFd<OwnedFd>) -> io::Result<()> {
    let mut buffer = [0; TERMINAL_CHUNK];
    let mut read = |fd: &OwnedFd| read(fd, &mut buffer);
    while from.async_io(Interest::READABLE, &mut read).await? > 0 {}
    Ok(())
}

/// Reads what is there.
fn read(fd: &OwnedFd, buffer: &mut [u8]) -> io::Result<usize> {
    Ok(past_first_eio(|| nix::unistd::read(fd, &mut *buffer))?)
}

/// The first EIO of a terminal whose last user closed it may come before its last bytes: the kernel looks for bytes and
/// then for the end (Linux, `n_tty_read`), so who writes and closes in between is overtaken. A second one comes after all.
fn past_first_eio(mut read: impl FnMut() -> nix::Result<usize>) -> nix::Result<usize> {
    match read() {
        Err(Errno::EIO) => read(),
        result => result,
    }
}

async fn write_all(to: &AsyncFd<OwnedFd>, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        let count = to
            .async_io(Interest::WRITABLE, |fd| Ok(nix::unistd::write(fd, bytes)?))
            .await?;
        bytes = &bytes[count..];
    }
    Ok(())
}

/// Whether `from` has bytes (or its end, or an error) and `to` has room (or an error), now.
fn ready_now(from: &AsyncFd<OwnedFd>, to: &AsyncFd<OwnedFd>) -> io::Result<(bool, bool)> {
    let mut both = [
        PollFd::new(from.as_fd(), PollFlags::POLLIN),
        PollFd::new(to.as_fd(), PollFlags::POLLOUT),
    ];
    poll(&mut both, PollTimeout::ZERO)?;
    let [input, output] = both.map(|fd| fd.any().unwrap_or(true));
    Ok((input, output))
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::fcntl::{FcntlArg, OFlag, fcntl};
    use std::fs::File;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    fn unblocked(fd: OwnedFd) -> AsyncFd<OwnedFd> {
        fcntl(&fd, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).unwrap();
        crate::fd::register(fd, Interest::READABLE | Interest::WRITABLE).unwrap()
    }

    #[tokio::test]
    async fn every_byte_arrives_and_then_the_end() {
        let (reader, writer) = nix::unistd::pipe().unwrap();
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let sent: Vec<u8> = (0..3_000_000_u32).map(|n| (n % 251) as u8).collect();
        let expected = sent.clone();
        let producer = std::thread::spawn(move || File::from(writer).write_all(&sent).unwrap());
        let consumer = std::thread::spawn(move || {
            let mut got = Vec::new();
            theirs.read_to_end(&mut got).unwrap();
            got
        });
        let to = unblocked(ours.into());
        pipe(&unblocked(reader), &to).await.unwrap();
        drop(to);
        producer.join().unwrap();
        assert!(consumer.join().unwrap() == expected);
    }

    #[tokio::test]
    async fn a_writer_blocks_when_nobody_reads() {
        let (reader, writer) = nix::unistd::pipe().unwrap();
        let (ours, theirs) = UnixStream::pair().unwrap();
        let written = Arc::new(AtomicUsize::new(0));
        let counter = Arc::clone(&written);
        let producer = std::thread::spawn(move || {
            let mut file = File::from(writer);
            for _ in 0..10_000 {
                if file.write_all(&[0; 4096]).is_err() {
                    return;
                }
                counter.fetch_add(4096, Ordering::SeqCst);
            }
        });
        let relay = tokio::spawn(async move {
            let from = unblocked(reader);
            let to = unblocked(ours.into());
            pipe(&from, &to).await
        });
        // Long enough for an unbounded relay to swallow all 40 MB.
        let mut before = usize::MAX;
        while before != written.load(Ordering::SeqCst) {
            before = written.load(Ordering::SeqCst);
            tokio::time::sleep(std::time::Duration::from_millis(200)).await;
        }
        assert!(before < 4 * 1024 * 1024, "{before} bytes went nowhere");
        drop(theirs);
        assert!(relay.await.unwrap().is_err());
        producer.join().unwrap();
    }

    #[test]
    fn bytes_that_the_end_overtook_are_read() {
        let mut results = [Err(Errno::EIO), Ok(3), Err(Errno::EIO), Err(Errno::EIO)].into_iter();
        let mut read = || past_first_eio(|| results.next().unwrap());
        assert_eq!(read(), Ok(3));
        assert_eq!(read(), Err(Errno::EIO));
    }

    #[tokio::test]
    async fn a_terminal_ends_with_its_last_user() {
        let pty = nix::pty::openpty(None, None).unwrap();
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let user = std::thread::spawn(move || File::from(pty.slave).write_all(b"hello").unwrap());
        let to = unblocked(ours.into());
        terminal(&unblocked(pty.master), &to).await.unwrap();
        drop(to);
        user.join().unwrap();
        let mut got = String::new();
        theirs.read_to_string(&mut got).unwrap();
        assert_eq!(got, "hello");
    }
}
