//! A thread that moves a container's output streams into its log.
//!
//! A thread of its own, with blocking reads and writes, because the log's disk may be slow or hang:
//! then this container waits (nothing is read, so the guest's credit runs out and the process
//! blocks in `write`), and nothing else in the monitor does. It holds one read buffer and one batch,
//! and one unfinished line for each stream.

use std::io::{self, Read};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tokio::sync::oneshot;
use tokio::time::{Instant, timeout, timeout_at};
use tracing::{debug, warn};

use super::LogSink;
use super::format::{Formatter, Stream};

/// Bytes read at once.
const READ_SIZE: usize = 32 * 1024;

/// The thread needs little: no recursion, and its buffers are on the heap.
const STACK_SIZE: usize = 128 * 1024;

/// How long a process that has ended may leave its streams open without writing. A process it left
/// behind in the background may hold them for ever.
const IDLE_GRACE: Duration = Duration::from_secs(2);

/// How long its streams are read at all after it has ended.
const DRAIN_LIMIT: Duration = Duration::from_secs(10);

/// Time for the thread to write what it had read when the streams were cut.
const FLUSH_LIMIT: Duration = Duration::from_secs(2);

/// The running pump of one container.
pub struct Pump {
    /// Second descriptors of the streams, to cut them.
    streams: Vec<UnixStream>,
    bytes_read: Arc<AtomicU64>,
    ended: oneshot::Receiver<()>,
}

impl Pump {
    /// Starts to move `streams` into `log` until all have ended.
    ///
    /// # Errors
    /// When a descriptor cannot be doubled or the thread cannot be started.
    pub fn start(streams: Vec<(Stream, UnixStream)>, log: Arc<LogSink>) -> io::Result<Self> {
        let doubles = streams
            .iter()
            .map(|(_, stream)| stream.try_clone())
            .collect::<io::Result<Vec<_>>>()?;
        for (_, stream) in &streams {
            stream.set_nonblocking(true)?;
        }
        let bytes_read = Arc::new(AtomicU64::new(0));
        let (report_end, ended) = oneshot::channel();
        let thread = PumpThread {
            sources: streams.into_iter().map(Source::new).collect(),
            log,
            bytes_read: Arc::clone(&bytes_read),
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
            streams: doubles,
            bytes_read,
            ended,
        })
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
        for stream in &self.streams {
            // Bytes in the socket's buffer stay readable, then comes end of file (unix(7)). Fails
            // only when the stream has ended by itself.
            let _ = stream.shutdown(Shutdown::Both);
        }
        if timeout(FLUSH_LIMIT, self.ended).await.is_err() {
            warn!("the log's disk is slow: reporting the end before the log is complete");
        }
    }
}

struct Source {
    stream: UnixStream,
    formatter: Formatter,
}

impl Source {
    fn new((kind, stream): (Stream, UnixStream)) -> Self {
        Self {
            stream,
            formatter: Formatter::new(kind),
        }
    }
}

struct PumpThread {
    sources: Vec<Source>,
    log: Arc<LogSink>,
    bytes_read: Arc<AtomicU64>,
    batch: Vec<u8>,
}

impl PumpThread {
    fn run(mut self) {
        let mut buffer = vec![0; READ_SIZE];
        while !self.sources.is_empty() {
            for index in self.wait_readable().into_iter().rev() {
                if !self.read(index, &mut buffer) {
                    let mut source = self.sources.swap_remove(index);
                    source.formatter.finish(SystemTime::now(), &mut self.batch);
                    self.flush();
                }
            }
        }
        let lost = self.log.lost_bytes();
        if lost > 0 {
            warn!(lost_bytes = lost, "the log's last records were dropped");
        }
    }

    /// Indices of sources with something to read, rising.
    fn wait_readable(&self) -> Vec<usize> {
        let mut fds: Vec<PollFd<'_>> = self
            .sources
            .iter()
            .map(|source| PollFd::new(source.stream.as_fd(), PollFlags::POLLIN))
            .collect();
        // With EINTR no flag is set and the caller comes again; other errors (memory) show in the
        // read, so all are tried.
        let all = match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => false,
            Err(_) => true,
        };
        (0..fds.len())
            .filter(|&index| all || fds[index].any().unwrap_or(true))
            .collect()
    }

    /// Reads once and writes the records that this completes. False at the end of the stream.
    fn read(&mut self, index: usize, buffer: &mut [u8]) -> bool {
        let source = &mut self.sources[index];
        let count = match source.stream.read(buffer) {
            Ok(0) => return false,
            Ok(count) => count,
            Err(error) => {
                return matches!(
                    error.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
                );
            }
        };
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
    use std::io::{Seek, Write};

    use super::*;

    struct Rig {
        pump: Pump,
        stdout: UnixStream,
        stderr: UnixStream,
        file: std::fs::File,
    }

    fn rig() -> Rig {
        let file = tempfile::tempfile().expect("temporary file");
        let log = LogSink::new("c", Some(file.try_clone().expect("second descriptor")));
        let (stdout, guest_stdout) = UnixStream::pair().expect("socketpair");
        let (stderr, guest_stderr) = UnixStream::pair().expect("socketpair");
        let pump = Pump::start(
            vec![(Stream::Stdout, stdout), (Stream::Stderr, stderr)],
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
    fn text(mut file: std::fs::File) -> Vec<String> {
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
