//! Follows a CRI log file and gives back the bytes that the container wrote.
//!
//! A record is `TIME STREAM TAGS CONTENT\n`; the first of the `:`-separated tags is `F` when a
//! line ends with the record and `P` when it goes on (CRI's `logging.go`; what a record's content
//! must be joined with). The follower sleeps in inotify(7) until the file changes, and goes over
//! to the new file when the log is rotated.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::future::Future;
use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use tokio::fs::File;
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// Longest `TIME STREAM TAGS ` that is accepted; real ones have 45 bytes.
const MAX_HEADER_BYTES: usize = 256;
/// Bytes read at a time.
const CHUNK_BYTES: usize = 64 << 10;

/// Why a log cannot be followed.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// The file is not a CRI log.
    #[error("not a CRI log record: {0:?}")]
    Malformed(String),
    /// Reading the log, or waiting for it to grow, failed.
    #[error("cannot read the log: {0}")]
    Read(#[source] io::Error),
    /// The output could not be passed on.
    #[error("cannot write output: {0}")]
    Write(#[source] io::Error),
}

/// One of a container's output streams.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stream {
    /// Standard output; everything of a terminal.
    Stdout,
    /// Standard error.
    Stderr,
}

/// Output in the order of the log, neighbours of one stream joined.
pub type Output = Vec<(Stream, Vec<u8>)>;

/// Takes records apart. Keeps a header at most, whatever the length of a line.
#[derive(Debug, Default)]
pub struct RecordParser {
    header: Vec<u8>,
    /// Spaces in `header`.
    spaces: u8,
    /// Where the content belongs and whether a line ends with it, once the header is complete.
    content: Option<(Stream, bool)>,
}

impl RecordParser {
    /// Parses the next bytes of a log, cut anywhere, and appends what they say to `output`.
    pub fn feed(&mut self, mut bytes: &[u8], output: &mut Output) -> Result<(), LogError> {
        while !bytes.is_empty() {
            bytes = match self.content {
                None => self.feed_header(bytes)?,
                Some((stream, full)) => {
                    let end = bytes.iter().position(|&byte| byte == b'\n');
                    append(output, stream, &bytes[..end.unwrap_or(bytes.len())]);
                    if end.is_some() {
                        if full {
                            append(output, stream, b"\n");
                        }
                        self.content = None;
                    }
                    end.map_or(&[][..], |end| &bytes[end + 1..])
                }
            };
        }
        Ok(())
    }

    /// Takes header bytes up to the third space, and returns the rest.
    fn feed_header<'a>(&mut self, bytes: &'a [u8]) -> Result<&'a [u8], LogError> {
        for (index, &byte) in bytes.iter().enumerate() {
            if byte == b'\n' || self.header.len() == MAX_HEADER_BYTES {
                return Err(self.malformed());
            }
            if byte == b' ' {
                self.spaces += 1;
                if self.spaces == 3 {
                    self.content = Some(self.parse_header()?);
                    self.header.clear();
                    self.spaces = 0;
                    return Ok(&bytes[index + 1..]);
                }
            }
            self.header.push(byte);
        }
        Ok(&[])
    }

    fn parse_header(&self) -> Result<(Stream, bool), LogError> {
        let mut fields = self.header.split(|&byte| byte == b' ').skip(1);
        let stream = match fields.next() {
            Some(b"stdout") => Stream::Stdout,
            Some(b"stderr") => Stream::Stderr,
            _ => return Err(self.malformed()),
        };
        let first_tag = fields
            .next()
            .and_then(|tags| tags.split(|&byte| byte == b':').next());
        match first_tag {
            Some(b"F") => Ok((stream, true)),
            Some(b"P") => Ok((stream, false)),
            _ => Err(self.malformed()),
        }
    }

    fn malformed(&self) -> LogError {
        LogError::Malformed(String::from_utf8_lossy(&self.header).into_owned())
    }
}

fn append(output: &mut Output, stream: Stream, bytes: &[u8]) {
    match output.last_mut() {
        Some((last, text)) if *last == stream => text.extend_from_slice(bytes),
        _ if bytes.is_empty() => {}
        _ => output.push((stream, bytes.to_vec())),
    }
}

/// Reads a log from its start, through rotations.
#[derive(Debug)]
pub struct Follower {
    path: PathBuf,
    name: OsString,
    changes: AsyncFd<Watch>,
    /// The file that is read, and the newer ones of the same name, oldest first.
    files: VecDeque<File>,
    /// Device and inode of the newest.
    newest: Option<(u64, u64)>,
    parser: RecordParser,
}

impl Follower {
    /// Begins to watch the directory of `path`, which must exist; the log itself may come later.
    /// Must be called within a tokio runtime.
    pub fn new(path: &Path) -> Result<Self, LogError> {
        let (Some(directory), Some(name)) = (path.parent(), path.file_name()) else {
            return Err(LogError::Read(io::ErrorKind::InvalidFilename.into()));
        };
        let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)
            .map_err(|errno| LogError::Read(errno.into()))?;
        inotify
            .add_watch(
                directory,
                AddWatchFlags::IN_MODIFY | AddWatchFlags::IN_CREATE | AddWatchFlags::IN_MOVED_TO,
            )
            .map_err(|errno| LogError::Read(errno.into()))?;
        // SAFETY: `Watch` owns its descriptor, always gives the same one, and closes it when it is
        // dropped, which `AsyncFd` does after it has deregistered it.
        let changes = unsafe {
            AsyncFd::register_with_interest(Watch(inotify), tokio::io::Interest::READABLE)
        };
        Ok(Self {
            path: path.to_owned(),
            name: name.to_owned(),
            changes: changes.map_err(|error| LogError::Read(error.into()))?,
            files: VecDeque::new(),
            newest: None,
            parser: RecordParser::default(),
        })
    }

    /// Passes the log on until `finished` is done and the log has been read to its end.
    ///
    /// The writer must have written all before `finished`.
    pub async fn follow(
        mut self,
        mut stdout: impl AsyncWrite + Unpin,
        mut stderr: impl AsyncWrite + Unpin,
        finished: impl Future<Output = ()>,
    ) -> Result<(), LogError> {
        tokio::pin!(finished);
        let mut at_end = false;
        self.open_newest().await?;
        loop {
            self.read_all(at_end, &mut stdout, &mut stderr).await?;
            if at_end {
                return Ok(());
            }
            tokio::select! {
                renamed = next_change(&self.changes, &self.name) => {
                    if renamed? {
                        self.open_newest().await?;
                    }
                }
                () = &mut finished => {
                    at_end = true;
                    self.open_newest().await?;
                }
            }
        }
    }

    /// Adds the file that now has the log's name, unless it is the newest already.
    async fn open_newest(&mut self) -> Result<(), LogError> {
        let file = match File::open(&self.path).await {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(LogError::Read(error)),
        };
        let metadata = file.metadata().await.map_err(LogError::Read)?;
        let identity = Some((metadata.dev(), metadata.ino()));
        if self.newest != identity {
            self.newest = identity;
            self.files.push_back(file);
        }
        Ok(())
    }

    /// Reads what there is. The oldest file is given up when the next one holds something: only
    /// then has the writer gone over to it, for rotation renames the old file and makes the
    /// new one before it tells the writer.
    async fn read_all(
        &mut self,
        at_end: bool,
        stdout: &mut (impl AsyncWrite + Unpin),
        stderr: &mut (impl AsyncWrite + Unpin),
    ) -> Result<(), LogError> {
        while let Some(file) = self.files.front_mut() {
            copy(file, &mut self.parser, stdout, stderr).await?;
            let Some(next) = self.files.get(1) else { break };
            let moved_on = at_end || next.metadata().await.map_err(LogError::Read)?.len() > 0;
            if !moved_on {
                break;
            }
            // Once more: the last record may have come after the read and before the switch.
            if let Some(mut old) = self.files.pop_front() {
                copy(&mut old, &mut self.parser, stdout, stderr).await?;
            }
        }
        Ok(())
    }
}

/// Copies a file's records from where it stands to its end.
async fn copy(
    file: &mut File,
    parser: &mut RecordParser,
    stdout: &mut (impl AsyncWrite + Unpin),
    stderr: &mut (impl AsyncWrite + Unpin),
) -> Result<(), LogError> {
    let mut chunk = vec![0; CHUNK_BYTES];
    let mut output = Output::new();
    loop {
        let length = file.read(&mut chunk).await.map_err(LogError::Read)?;
        if length == 0 {
            return Ok(());
        }
        output.clear();
        parser.feed(&chunk[..length], &mut output)?;
        for (stream, bytes) in &output {
            let written = match stream {
                Stream::Stdout => write(stdout, bytes).await,
                Stream::Stderr => write(stderr, bytes).await,
            };
            written.map_err(LogError::Write)?;
        }
    }
}

/// Writes at once: the reader of an interactive command waits for each line.
async fn write(to: &mut (impl AsyncWrite + Unpin), bytes: &[u8]) -> io::Result<()> {
    to.write_all(bytes).await?;
    to.flush().await
}

/// Waits for a change in the watched directory; whether a file took the name `name`.
async fn next_change(changes: &AsyncFd<Watch>, name: &OsString) -> Result<bool, LogError> {
    loop {
        let mut ready = changes.readable().await.map_err(LogError::Read)?;
        match changes.get_ref().0.read_events() {
            Ok(events) => {
                return Ok(events.iter().any(|event| {
                    // After an overflow anything may have happened.
                    event.mask.contains(AddWatchFlags::IN_Q_OVERFLOW)
                        || (event
                            .mask
                            .intersects(AddWatchFlags::IN_CREATE | AddWatchFlags::IN_MOVED_TO)
                            && event.name.as_ref() == Some(name))
                }));
            }
            Err(Errno::EAGAIN) => ready.clear_ready(),
            Err(errno) => return Err(LogError::Read(errno.into())),
        }
    }
}

/// `Inotify` as tokio wants it: nix gives only a borrowed descriptor.
#[derive(Debug)]
struct Watch(Inotify);

impl AsRawFd for Watch {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_fd().as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use tokio::sync::oneshot;

    use super::*;

    const TIME: &str = "2026-11-21T10:00:00.000000000Z";

    fn parse(chunks: &[&[u8]]) -> Result<Output, LogError> {
        let mut parser = RecordParser::default();
        let mut output = Output::new();
        for chunk in chunks {
            parser.feed(chunk, &mut output)?;
        }
        Ok(output)
    }

    #[test]
    fn partial_records_join_without_a_line_end() {
        let log = format!("{TIME} stdout P one \n{TIME} stdout P two\n{TIME} stdout F  three\n");
        assert_eq!(
            parse(&[log.as_bytes()]).unwrap(),
            [(Stream::Stdout, b"one two three\n".to_vec())]
        );
    }

    #[test]
    fn streams_keep_their_order_and_empty_lines_stay() {
        let log = format!(
            "{TIME} stdout F a\n{TIME} stderr F b\n{TIME} stderr F:tag \n{TIME} stdout F c\n"
        );
        assert_eq!(
            parse(&[log.as_bytes()]).unwrap(),
            [
                (Stream::Stdout, b"a\n".to_vec()),
                (Stream::Stderr, b"b\n\n".to_vec()),
                (Stream::Stdout, b"c\n".to_vec()),
            ]
        );
    }

    #[test]
    fn a_log_may_be_cut_anywhere() {
        let log = format!("{TIME} stdout P \n{TIME} stderr F x y\n{TIME} stdout F ä\n");
        let whole = parse(&[log.as_bytes()]).unwrap();
        for cut in 0..log.len() {
            let (head, tail) = log.as_bytes().split_at(cut);
            assert_eq!(parse(&[head, tail]).unwrap(), whole, "cut at {cut}");
        }
    }

    #[test]
    fn what_is_no_record_is_an_error() {
        for log in [
            "no log at all\n",
            "{\"log\":\"docker\"}\n",
            "t stdout X c\n",
            "t stdlog F c\n",
        ] {
            assert!(
                matches!(parse(&[log.as_bytes()]), Err(LogError::Malformed(_))),
                "{log:?}"
            );
        }
        let endless = vec![b'x'; 10_000];
        assert!(matches!(parse(&[&endless]), Err(LogError::Malformed(_))));
    }

    type Outputs = (Vec<u8>, Vec<u8>);

    /// A follower at work: its end, and the outputs, once `finish` was sent.
    fn start(path: &Path) -> (oneshot::Sender<()>, tokio::task::JoinHandle<Outputs>) {
        let (finish, finished) = oneshot::channel();
        let follower = Follower::new(path).unwrap();
        let task = tokio::spawn(async move {
            let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
            follower
                .follow(&mut stdout, &mut stderr, async {
                    finished.await.unwrap();
                })
                .await
                .unwrap();
            (stdout, stderr)
        });
        (finish, task)
    }

    fn record(file: &mut std::fs::File, stream: &str, content: &str) {
        file.write_all(format!("{TIME} {stream} F {content}\n").as_bytes())
            .unwrap();
    }

    #[tokio::test]
    async fn what_is_written_before_the_end_is_complete() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("0.log");
        let (finish, task) = start(&path);
        let mut file = std::fs::File::create(&path).unwrap();
        for index in 0..5_000 {
            record(
                &mut file,
                if index % 2 == 0 { "stdout" } else { "stderr" },
                &format!("{index}"),
            );
        }
        finish.send(()).unwrap();
        let (stdout, stderr) = task.await.unwrap();
        let lines = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap().lines().count();
        assert_eq!((lines(stdout), lines(stderr)), (2_500, 2_500));
    }

    #[tokio::test]
    async fn output_comes_while_the_container_runs() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("0.log");
        let follower = Follower::new(&path).unwrap();
        let (mut reader, writer) = tokio::io::duplex(1024);
        let task = tokio::spawn(follower.follow(writer, tokio::io::sink(), std::future::pending()));
        let mut file = std::fs::File::create(&path).unwrap();
        for text in ["first", "second"] {
            record(&mut file, "stdout", text);
            let mut line = vec![0; text.len() + 1];
            reader.read_exact(&mut line).await.unwrap();
            assert_eq!(line, format!("{text}\n").as_bytes());
        }
        task.abort();
    }

    #[tokio::test]
    async fn rotation_loses_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("0.log");
        let follower = Follower::new(&path).unwrap();
        let (mut reader, writer) = tokio::io::duplex(1024);
        let (finish, finished) = oneshot::channel();
        let task = tokio::spawn(follower.follow(writer, tokio::io::sink(), async {
            finished.await.unwrap();
        }));
        let mut old = std::fs::File::create(&path).unwrap();
        record(&mut old, "stdout", "1");
        let mut line = [0; 2];
        reader.read_exact(&mut line).await.unwrap();

        // As the kubelet does it: rename, make the new file, tell the writer. Until the writer
        // is told, it writes to the old file.
        std::fs::rename(&path, dir.path().join("0.log.1")).unwrap();
        let mut new = std::fs::File::create(&path).unwrap();
        record(&mut old, "stdout", "2");
        reader.read_exact(&mut line).await.unwrap();
        assert_eq!(&line, b"2\n");
        record(&mut old, "stdout", "3");
        record(&mut new, "stdout", "4");
        finish.send(()).unwrap();
        task.await.unwrap().unwrap();
        let mut rest = String::new();
        reader.read_to_string(&mut rest).await.unwrap();
        assert_eq!(rest, "3\n4\n");
    }

    #[tokio::test]
    async fn a_container_without_output_ends_without_a_log() {
        let dir = tempfile::tempdir().unwrap();
        let (finish, task) = start(&dir.path().join("0.log"));
        finish.send(()).unwrap();
        assert_eq!(task.await.unwrap(), (Vec::new(), Vec::new()));
    }

    #[tokio::test]
    async fn a_reader_that_went_away_is_a_write_error() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("0.log");
        record(&mut std::fs::File::create(&path).unwrap(), "stdout", "x");
        let (reader, writer) = tokio::io::duplex(16);
        drop(reader);
        let result = Follower::new(&path)
            .unwrap()
            .follow(writer, tokio::io::sink(), std::future::pending())
            .await;
        assert!(
            matches!(&result, Err(LogError::Write(error)) if error.kind() == io::ErrorKind::BrokenPipe),
            "{result:?}"
        );
    }
}
