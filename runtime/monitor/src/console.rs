//! The guest's console: the last [`CAPACITY`] bytes of it are kept, and followers see what comes.

use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures_util::Stream;
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;
use tokio::sync::watch;
use tokio::time::timeout;

use crate::text;

/// Bytes kept.
const CAPACITY: usize = 64 * 1024;

/// Bytes given to a follower at once.
const CHUNK: usize = 16 * 1024;

/// Bytes of the console in an error message.
const TAIL: usize = 2048;

/// How long [`Console::tail_at_end`] waits for the last bytes.
const END_DEADLINE: Duration = Duration::from_millis(500);

/// The console. A cheap handle.
#[derive(Clone)]
pub struct Console {
    ring: Arc<Mutex<Ring>>,
    /// Changes with every byte; true at the end.
    ended: watch::Receiver<bool>,
}

#[derive(Default)]
struct Ring {
    bytes: VecDeque<u8>,
    /// Position of the end of `bytes` in all that ever came.
    total: u64,
}

impl Console {
    /// A console, and the write end of the pipe that feeds it. Must be called in a tokio runtime.
    ///
    /// # Errors
    /// No file descriptors left.
    pub fn new() -> io::Result<(Self, OwnedFd)> {
        let (sender, receiver) = pipe::pipe()?;
        let ring = Arc::new(Mutex::new(Ring::default()));
        let (report, ended) = watch::channel(false);
        tokio::spawn(fill(receiver, Arc::clone(&ring), report));
        Ok((Self { ring, ended }, sender.into_blocking_fd()?))
    }

    /// What is kept, then, with `follow`, what comes until the VM is gone. A follower that is too
    /// slow misses what was dropped meanwhile.
    pub fn read(&self, follow: bool) -> impl Stream<Item = Bytes> + Send + use<> {
        let start = (self.clone(), 0_u64);
        futures_util::stream::unfold(start, move |(mut console, position)| async move {
            loop {
                let ended = *console.ended.borrow_and_update();
                let (chunk, position) = console.lock().chunk(position);
                if !chunk.is_empty() {
                    return Some((chunk, (console, position)));
                }
                if !follow || ended || console.ended.changed().await.is_err() {
                    return None;
                }
            }
        })
    }

    /// The last lines, as text for an error message.
    pub fn tail(&self) -> String {
        let ring = self.lock();
        let skip = ring.bytes.len().saturating_sub(TAIL);
        let bytes: Vec<u8> = ring.bytes.iter().skip(skip).copied().collect();
        let text = text::from_guest(&String::from_utf8_lossy(&bytes), TAIL);
        text.trim_end().to_owned()
    }

    /// [`Console::tail`] once the guest's last words have arrived. For a VM that is gone.
    pub async fn tail_at_end(&self) -> String {
        let mut ended = self.ended.clone();
        // Without an end in time: the tail as it is.
        let _ = timeout(END_DEADLINE, ended.wait_for(|ended| *ended)).await;
        self.tail()
    }

    fn lock(&self) -> MutexGuard<'_, Ring> {
        // A panic under the lock leaves at worst a wrong piece of console.
        self.ring.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Ring {
    fn push(&mut self, bytes: &[u8]) {
        let bytes_kept = &bytes[bytes.len().saturating_sub(CAPACITY)..];
        let excess = (self.bytes.len() + bytes_kept.len()).saturating_sub(CAPACITY);
        self.bytes.drain(..excess);
        self.bytes.extend(bytes_kept);
        self.total += bytes.len() as u64;
    }

    /// Bytes from `position` on, or from the oldest that is kept, and the position after them.
    fn chunk(&self, position: u64) -> (Bytes, u64) {
        let oldest = self.total - self.bytes.len() as u64;
        let position = position.clamp(oldest, self.total);
        let skip = (position - oldest) as usize;
        let chunk: Bytes = self.bytes.iter().skip(skip).take(CHUNK).copied().collect();
        let end = position + chunk.len() as u64;
        (chunk, end)
    }
}

/// Moves what the guest writes into the ring until all writers are gone.
async fn fill(mut pipe: pipe::Receiver, ring: Arc<Mutex<Ring>>, report: watch::Sender<bool>) {
    let mut buffer = [0; 2048];
    loop {
        let count = pipe.read(&mut buffer).await.unwrap_or(0);
        ring.lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(&buffer[..count]);
        let ended = count == 0;
        report.send_replace(ended);
        if ended {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Write;
    use std::pin::pin;

    use futures_util::StreamExt;

    use super::*;

    #[tokio::test]
    async fn a_follower_sees_past_future_and_end() {
        let (console, writer) = Console::new().expect("pipe");
        let mut writer = File::from(writer);
        writer.write_all(b"booting\r\n").expect("write");
        let mut follower = pin!(console.read(true));
        assert_eq!(follower.next().await.as_deref(), Some(&b"booting\r\n"[..]));
        writer.write_all(b"Kernel panic").expect("write");
        assert_eq!(follower.next().await.as_deref(), Some(&b"Kernel panic"[..]));
        drop(writer);
        assert_eq!(follower.next().await, None);
        assert_eq!(console.tail_at_end().await, "booting\nKernel panic");
        let all: Vec<Bytes> = console.read(false).collect().await;
        assert_eq!(all.concat(), b"booting\r\nKernel panic");
    }

    #[test]
    fn the_ring_keeps_the_newest() {
        let mut ring = Ring::default();
        for number in 0..20_u8 {
            ring.push(&[number; 10_000]);
        }
        assert_eq!(ring.bytes.len(), CAPACITY);
        let (chunk, end) = ring.chunk(0);
        assert_eq!(end, 200_000 - CAPACITY as u64 + chunk.len() as u64);
        let (rest, end) = ring.chunk(199_999);
        assert_eq!((&rest[..], end), (&[19][..], 200_000));
        ring.push(&vec![7; 2 * CAPACITY]);
        assert_eq!(ring.bytes.len(), CAPACITY);
        assert_eq!(ring.total, 200_000 + 2 * CAPACITY as u64);
    }
}
