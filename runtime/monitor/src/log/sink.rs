//! The file that a container's log goes to.

use std::fs::File;
use std::io::{self, Write};
use std::sync::{Mutex, PoisonError};

use tracing::{info, warn};

/// Where records are written. Batches and [`LogSink::reopen`] exclude each other, so a file changes
/// only between records.
///
/// A log that cannot be written (disk full, I/O error) must not stop the container: its records are
/// dropped and counted, and a warning says so at the first and after the last.
pub struct LogSink {
    container: String,
    target: Mutex<Target>,
}

struct Target {
    /// None: the container has no log.
    file: Option<File>,
    /// The last write left a piece of a record at the end of the file.
    torn: bool,
    /// Since the last write that succeeded.
    lost_bytes: u64,
}

impl LogSink {
    /// A sink for the log of `container`. `file` has to be open for append.
    pub fn new(container: &str, file: Option<File>) -> Self {
        Self {
            container: container.to_owned(),
            target: Mutex::new(Target {
                file,
                torn: false,
                lost_bytes: 0,
            }),
        }
    }

    /// Goes on in `file`. Blocks while a batch is being written.
    pub fn reopen(&self, file: File) {
        let mut target = self.lock();
        target.file = Some(file);
        target.torn = false;
    }

    /// Writes a batch of whole records. Blocks as long as the disk does.
    pub fn write(&self, batch: &[u8]) {
        let mut guard = self.lock();
        let target = &mut *guard;
        let Some(mut file) = target.file.as_ref() else {
            return;
        };
        let separator = if target.torn { &b"\n"[..] } else { b"" };
        let result =
            write_counted(&mut file, separator).and_then(|_| write_counted(&mut file, batch));
        match result {
            Ok(_) => {
                target.torn = false;
                let lost = std::mem::take(&mut target.lost_bytes);
                if lost > 0 {
                    info!(
                        container = self.container,
                        lost_bytes = lost,
                        "log is written again"
                    );
                }
            }
            Err(WriteFailed { written, error }) => {
                target.torn |= written > 0;
                if target.lost_bytes == 0 {
                    warn!(container = self.container, %error, "log cannot be written: dropping records");
                }
                target.lost_bytes += (batch.len() - written.min(batch.len())) as u64;
            }
        }
    }

    /// Bytes dropped since the last successful write.
    pub fn lost_bytes(&self) -> u64 {
        self.lock().lost_bytes
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Target> {
        // No code that can panic runs under the lock; a poisoned one is as good as any.
        self.target.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct WriteFailed {
    written: usize,
    error: io::Error,
}

/// `write_all` that tells how far it came.
fn write_counted(file: &mut impl Write, bytes: &[u8]) -> Result<usize, WriteFailed> {
    let mut written = 0;
    while written < bytes.len() {
        match file.write(&bytes[written..]) {
            Ok(0) => {
                let error = io::ErrorKind::WriteZero.into();
                return Err(WriteFailed { written, error });
            }
            Ok(count) => written += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(WriteFailed { written, error }),
        }
    }
    Ok(written)
}

#[cfg(test)]
mod tests {
    use std::fs::OpenOptions;

    use super::*;

    #[test]
    fn reopen_changes_the_file_between_batches() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let open = |name: &str| {
            OpenOptions::new()
                .create(true)
                .append(true)
                .open(dir.path().join(name))
                .expect("log file")
        };
        let sink = LogSink::new("c", Some(open("0.log")));
        sink.write(b"one\n");
        sink.reopen(open("1.log"));
        sink.write(b"two\n");
        let read = |name: &str| std::fs::read_to_string(dir.path().join(name)).expect("log file");
        assert_eq!(read("0.log"), "one\n");
        assert_eq!(read("1.log"), "two\n");
    }

    #[test]
    fn a_full_disk_drops_and_counts_then_recovers() {
        let full = OpenOptions::new()
            .append(true)
            .open("/dev/full")
            .expect("/dev/full");
        let sink = LogSink::new("c", Some(full));
        sink.write(b"12345\n");
        sink.write(b"678\n");
        assert_eq!(sink.lost_bytes(), 10);

        let mut file = tempfile::tempfile().expect("temporary file");
        sink.reopen(file.try_clone().expect("second descriptor"));
        sink.write(b"back\n");
        assert_eq!(sink.lost_bytes(), 0);
        let mut text = String::new();
        io::Seek::rewind(&mut file).expect("rewind");
        io::Read::read_to_string(&mut file, &mut text).expect("read");
        assert_eq!(text, "back\n");
    }

    #[test]
    fn a_torn_record_is_closed_before_the_next() {
        let mut file = tempfile::tempfile().expect("temporary file");
        let sink = LogSink::new("c", Some(file.try_clone().expect("second descriptor")));
        sink.lock().torn = true;
        sink.write(b"next\n");
        sink.write(b"after\n");
        let mut text = String::new();
        io::Seek::rewind(&mut file).expect("rewind");
        io::Read::read_to_string(&mut file, &mut text).expect("read");
        assert_eq!(text, "\nnext\nafter\n");
    }

    #[test]
    fn no_file_takes_everything() {
        let sink = LogSink::new("c", None);
        sink.write(b"gone\n");
        assert_eq!(sink.lost_bytes(), 0);
    }
}
