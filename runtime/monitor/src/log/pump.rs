//! A thread that moves a container's output streams into its log.
//!
//! A thread of its own, with blocking reads and writes, because the log's disk may be slow or hang:
//! then this container waits (nothing is read, so the guest's credit runs out and the process
//! blocks in `write`), and nothing else in the monitor does. It holds one read buffer and one batch,
//! and one unfinished line for each stream.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use podvisor_oci::stdio;
use tokio::sync::oneshot;
use tokio::time::{Instant, timeout, timeout_at};
use tracing::{debug, warn};

use super::LogSink;
use super::format::{Formatter, Stream};
use super::taps::Taps;

/// Bytes read at once.
const READ_SIZE: usize = 32 * 1024;

/// The thread needs little: no recursion, and its buffers are on the heap.
const STACK_SIZE: usize = 128 * 1024;

/// Read at most, bytes, of what a stream holds when it is cut: more than a socket's or a pipe's buffer.
const LAST_BYTES: u64 = 4 * 1024 * 1024;

/// How long a process that has ended may leave its streams open without writing. A process it left
/// behind in the background may hold them for ever.
const IDLE_GRACE: Duration = Duration::from_secs(2);

/// How long its streams are read at all after it has ended.
const DRAIN_LIMIT: Duration = Duration::from_secs(10);

/// Time for the thread to write what it had read when the streams were cut.
const FLUSH_LIMIT: Duration = Duration::from_secs(2);

/// The running pump of one container.
pub struct Pump {
    /// Its other end becomes readable when the streams shall be cut: this is dropped.
    cut: UnixStream,
    bytes_read: Arc<AtomicU64>,
    taps: Taps,
    ended: oneshot::Receiver<()>,
}

impl Pump {
    /// Starts to move `streams` into `log` until all have ended.
    ///
    /// # Errors
    /// When a descriptor cannot be doubled or the thread cannot be started.
    pub fn start(streams: Vec<(Stream, File)>, log: Arc<LogSink>) -> io::Result<Self> {
        for (_, stream) in &streams {
            let flags = OFlag::from_bits_truncate(fcntl(stream, FcntlArg::F_GETFL)?);
            fcntl(stream, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        }
        let (cut, is_cut) = UnixStream::pair()?;
        let bytes_read = Arc::new(AtomicU64::new(0));
        let taps = Taps::default();
        let (report_end, ended) = oneshot::channel();
        let thread = PumpThread {
            sources: streams.into_iter().map(Source::new).collect(),
            log,
            is_cut,
            bytes_read: Arc::clone(&bytes_read),
            taps: taps.clone(),
            batch: Vec::new(),
        };
        std::thread::Builder::new()
            .name("log".to_owned())
            .stack_size(STACK_SIZE)
            .spawn(move || {
                thread.run();
                // The receiver may be gone: nobody waits then.
                let _ = report_end.send(());
            })?;
        Ok(Self {
            cut,
            bytes_read,
            taps,
            ended,
        })
    }

    /// Who looks on.
    pub fn taps(&self) -> &Taps {
        &self.taps
    }

    /// Waits until all that the process wrote is in the log. Called after its end. Streams that stay
    /// open are cut after [`IDLE_GRACE`] without a byte, or [`DRAIN_LIMIT`] in any case.
    pub async fn drain(self) {
        self.drain_within(IDLE_GRACE, DRAIN_LIMIT).await;
    }

    /// As [`Pump::drain`], with at most `limit` for streams that should have ended already.
    pub async fn drain_for(self, limit: Duration) {
        self.drain_within(limit, limit).await;
    }

    async fn drain_within(mut self, idle: Duration, limit: Duration) {
        let limit = Instant::now() + limit;
        let mut seen = self.bytes_read.load(Ordering::Relaxed);
        while Instant::now() < limit {
            let pause = limit.min(Instant::now() + idle);
            if timeout_at(pause, &mut self.ended).await.is_ok() {
                return;
            }
            let now = self.bytes_read.load(Ordering::Relaxed);
            if now == seen {
                break;
            }
            seen = now;
        }
        debug!("cutting the streams of a process that has ended");
        self.cut().await;
    }

    /// Ends the streams: what has arrived on this side is still written, no more is read.
    pub async fn cut(self) {
        drop(self.cut);
        if timeout(FLUSH_LIMIT, self.ended).await.is_err() {
            warn!("the log's disk is slow: reporting the end before the log is complete");
        }
    }
}

struct Source {
    kind: Stream,
    stream: File,
    formatter: Formatter,
}

impl Source {
    fn new((kind, stream): (Stream, File)) -> Self {
        Self {
            kind,
            stream,
            formatter: Formatter::new(kind),
        }
    }
}

struct PumpThread {
    sources: Vec<Source>,
    log: Arc<LogSink>,
    is_cut: UnixStream,
    bytes_read: Arc<AtomicU64>,
    taps: Taps,
    batch: Vec<u8>,
}

impl PumpThread {
    fn run(mut self) {
        let mut buffer = vec![0; READ_SIZE];
        while !self.sources.is_empty() {
            let (readable, cut) = self.wait_readable();
            for index in readable.into_iter().rev() {
                if !self.read(index, &mut buffer) {
                    self.end(index);
                }
            }
            if cut {
                for index in (0..self.sources.len()).rev() {
                    self.read_what_has_arrived(index, &mut buffer);
                    self.end(index);
                }
            }
        }
        let lost = self.log.lost_bytes();
        if lost > 0 {
            warn!(lost_bytes = lost, "the log's last records were dropped");
        }
    }

    fn end(&mut self, index: usize) {
        let mut source = self.sources.swap_remove(index);
        source.formatter.finish(SystemTime::now(), &mut self.batch);
        self.flush();
        self.taps.end(source.kind);
    }

    /// What a stream holds that is about to be cut; a process that goes on writing is not listened to for ever.
    fn read_what_has_arrived(&mut self, index: usize, buffer: &mut [u8]) {
        let begin = self.bytes_read.load(Ordering::Relaxed);
        loop {
            let before = self.bytes_read.load(Ordering::Relaxed);
            let goes_on = self.read(index, buffer);
            let after = self.bytes_read.load(Ordering::Relaxed);
            if !goes_on || after == before || after - begin > LAST_BYTES {
                return;
            }
        }
    }

    /// Indices of sources with something to read, rising, and whether to cut them.
    fn wait_readable(&self) -> (Vec<usize>, bool) {
        let mut fds: Vec<PollFd<'_>> = self
            .sources
            .iter()
            .map(|source| source.stream.as_fd())
            .chain([self.is_cut.as_fd()])
            .map(|fd| PollFd::new(fd, PollFlags::POLLIN))
            .collect();
        // With EINTR no flag is set and the caller comes again; other errors (memory) show in the
        // read, so all are tried.
        let all = match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => false,
            Err(_) => true,
        };
        let cut = fds.pop().is_some_and(|fd| fd.any().unwrap_or(true));
        let readable = (0..fds.len()).filter(|&index| all || fds[index].any().unwrap_or(true));
        (readable.collect(), cut)
    }

    /// Reads once and writes the records that this completes. False at the end of the stream.
    fn read(&mut self, index: usize, buffer: &mut [u8]) -> bool {
        let source = &mut self.sources[index];
        let count = match stdio::read(&source.stream, buffer) {
            Ok(0) => return false,
            Ok(count) => count,
            Err(error) => {
                return matches!(
                    error.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
                );
            }
        };
        self.taps.show(source.kind, &buffer[..count]);
        let time = SystemTime::now();
        let mut input = &buffer[..count];
        while !input.is_empty() {
            self.sources[index]
                .formatter
                .push(&mut input, time, &mut self.batch);
            self.flush();
        }
        // After the write, so that `drain` sees progress of the log and not only of the stream.
        self.bytes_read.fetch_add(count as u64, Ordering::Relaxed);
        true
    }

    fn flush(&mut self) {
        if !self.batch.is_empty() {
            self.log.write(&self.batch);
            self.batch.clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Seek, Write};
    use std::os::fd::OwnedFd;

    use super::*;

    struct Rig {
        pump: Pump,
        stdout: UnixStream,
        stderr: UnixStream,
        file: File,
    }

    fn rig() -> Rig {
        let file = tempfile::tempfile().expect("temporary file");
        let log = LogSink::new("c", Some(file.try_clone().expect("second descriptor")));
        let (stdout, guest_stdout) = UnixStream::pair().expect("socketpair");
        let (stderr, guest_stderr) = UnixStream::pair().expect("socketpair");
        let pump = Pump::start(
            vec![
                (Stream::Stdout, File::from(OwnedFd::from(stdout))),
                (Stream::Stderr, File::from(OwnedFd::from(stderr))),
            ],
            Arc::new(log),
        )
        .expect("pump");
        Rig {
            pump,
            stdout: guest_stdout,
            stderr: guest_stderr,
            file,
        }
    }

    /// The log without its timestamps.
    fn text(mut file: File) -> Vec<String> {
        let mut text = String::new();
        file.rewind().expect("rewind");
        file.read_to_string(&mut text).expect("read");
        let mut lines: Vec<String> = text
            .lines()
            .map(|line| line.split_once(' ').expect("timestamp").1.to_owned())
            .collect();
        lines.sort();
        lines
    }

    #[tokio::test]
    async fn both_streams_are_complete_when_they_have_ended() {
        let mut rig = rig();
        rig.stdout.write_all(b"out\nmore").expect("write");
        rig.stderr.write_all(b"err\n").expect("write");
        drop((rig.stdout, rig.stderr));
        rig.pump.drain().await;
        assert_eq!(
            text(rig.file),
            ["stderr F err", "stdout F out", "stdout P more"]
        );
    }

    #[tokio::test]
    async fn a_stream_that_stays_open_is_cut_without_loss_of_what_arrived() {
        let mut rig = rig();
        rig.stdout.write_all(b"before\n").expect("write");
        let idle = Duration::from_millis(50);
        rig.pump.drain_within(idle, DRAIN_LIMIT).await;
        assert_eq!(text(rig.file), ["stdout F before"]);
        assert!(rig.stdout.write_all(b"after\n").is_err());
        drop(rig.stderr);
    }
}
