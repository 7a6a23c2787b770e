//! Who looks on while a container's output goes into its log.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use tokio::sync::mpsc;
use tokio::sync::mpsc::error::TrySendError;

use super::format::Stream;

/// Onlookers at a time.
const LIMIT: usize = 16;

/// Reads of one stream that wait for an onlooker. With more it is too slow: the log waits for nobody.
const BACKLOG: usize = 16;

/// The onlookers of one container. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Taps(Arc<Mutex<Table>>);

#[derive(Debug, Default)]
struct Table {
    taps: Vec<Tap>,
    /// Streams that have ended.
    ended: Vec<Stream>,
}

#[derive(Debug)]
struct Tap {
    stream: Stream,
    sender: mpsc::Sender<Bytes>,
    lost: Arc<AtomicBool>,
}

/// What an onlooker sees of one stream, from now on.
#[derive(Debug)]
pub struct Tapped {
    bytes: mpsc::Receiver<Bytes>,
    lost: Arc<AtomicBool>,
}

/// An onlooker was too slow.
#[derive(Debug, thiserror::Error)]
#[error("the client was too slow for the container's output")]
pub struct TooSlow;

impl Tapped {
    /// The next bytes; `None` at the stream's end.
    ///
    /// # Errors
    /// Bytes were lost: there are no more.
    pub async fn next(&mut self) -> Result<Option<Bytes>, TooSlow> {
        match self.bytes.recv().await {
            None if self.lost.load(Ordering::Relaxed) => Err(TooSlow),
            bytes => Ok(bytes),
        }
    }
}

impl Taps {
    /// Looks on at a stream. `None`: too many do.
    pub fn tap(&self, stream: Stream) -> Option<Tapped> {
        let mut table = self.lock();
        table.taps.retain(|tap| !tap.sender.is_closed());
        // Of a container's two streams each.
        if table.taps.len() >= 2 * LIMIT {
            return None;
        }
        let (sender, bytes) = mpsc::channel(BACKLOG);
        let lost = Arc::new(AtomicBool::new(false));
        if !table.ended.contains(&stream) {
            let lost = Arc::clone(&lost);
            table.taps.push(Tap {
                stream,
                sender,
                lost,
            });
        }
        Some(Tapped { bytes, lost })
    }

    /// Shows what was read. Waits for nobody.
    pub fn show(&self, stream: Stream, bytes: &[u8]) {
        let mut table = self.lock();
        if table.taps.is_empty() {
            return;
        }
        let bytes = Bytes::copy_from_slice(bytes);
        table.taps.retain(|tap| {
            if tap.stream != stream {
                return true;
            }
            match tap.sender.try_send(bytes.clone()) {
                Ok(()) => true,
                Err(TrySendError::Closed(_)) => false,
                Err(TrySendError::Full(_)) => {
                    tap.lost.store(true, Ordering::Relaxed);
                    false
                }
            }
        });
    }

    /// The stream has ended.
    pub fn end(&self, stream: Stream) {
        let mut table = self.lock();
        table.taps.retain(|tap| tap.stream != stream);
        table.ended.push(stream);
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        // Nothing under the lock panics.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn onlookers_see_what_comes_and_the_end() {
        let taps = Taps::default();
        taps.show(Stream::Stdout, b"before");
        let mut first = taps.tap(Stream::Stdout).expect("few");
        let mut errors = taps.tap(Stream::Stderr).expect("few");
        taps.show(Stream::Stdout, b"out");
        taps.show(Stream::Stderr, b"err");
        taps.end(Stream::Stdout);
        assert_eq!(first.next().await.expect("quick"), Some("out".into()));
        assert_eq!(first.next().await.expect("quick"), None);
        assert_eq!(errors.next().await.expect("quick"), Some("err".into()));
        let mut late = taps.tap(Stream::Stdout).expect("few");
        assert_eq!(late.next().await.expect("quick"), None);
    }

    #[tokio::test]
    async fn who_is_slow_is_told_and_holds_up_nobody() {
        let taps = Taps::default();
        let mut slow = taps.tap(Stream::Stdout).expect("few");
        let mut quick = taps.tap(Stream::Stdout).expect("few");
        for _ in 0..=BACKLOG {
            taps.show(Stream::Stdout, b"x");
            assert_eq!(quick.next().await.expect("quick"), Some("x".into()));
        }
        for _ in 0..BACKLOG {
            assert_eq!(slow.next().await.expect("what was kept"), Some("x".into()));
        }
        assert!(slow.next().await.is_err());
    }

    #[test]
    fn there_is_a_limit_and_who_leaves_makes_room() {
        let taps = Taps::default();
        let mut all: Vec<_> = (0..2 * LIMIT).map(|_| taps.tap(Stream::Stdout)).collect();
        assert!(all.iter().all(Option::is_some));
        assert!(taps.tap(Stream::Stderr).is_none());
        all.pop();
        assert!(taps.tap(Stream::Stderr).is_some());
    }
}
