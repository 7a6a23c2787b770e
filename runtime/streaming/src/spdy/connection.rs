//! What a client sends: streams are opened, their bytes arrive, in order.

use std::collections::HashMap;
use std::sync::{Arc, Weak};
use std::time::Duration;

use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::SpdyError;
use super::frame::{self, FLAG_FIN, GoAway, HEADER, Header, REFUSED_STREAM, kind};
use super::headers::{self, Headers};
use crate::wire::{CHUNK, INCOMING_CHUNKS, Idle, Incoming, Outbox, Output};

/// Streams that are open at a time.
pub const STREAM_LIMIT: usize = 512;

/// How long a client may hold up the frame that says that it is not understood.
const LAST_WORDS: Duration = Duration::from_secs(5);

/// Longest control frame, bytes.
const CONTROL_LIMIT: u32 = 16 * 1024;

/// Stream, associated stream, priority and slot before the headers of SYN_STREAM.
const SYN_STREAM_PREFIX: usize = 10;

/// A stream that the client has opened, and that we have replied to.
#[derive(Debug)]
pub struct Stream {
    /// Odd; grows.
    pub id: u32,
    /// What it is for.
    pub headers: Headers,
    /// Client to us; its end is the client's end of it.
    pub incoming: Incoming,
    /// Us to client.
    pub output: Output,
}

/// Reads what the client sends, until it ends.
pub struct Connection<R> {
    reader: R,
    outbox: Outbox,
    opened: mpsc::Sender<Stream>,
    idle: Arc<Idle>,
    inflate: headers::Reader,
    deflate: headers::Writer,
    last_id: u32,
    /// Those that are not over, and some that are.
    streams: HashMap<u32, Open>,
}

struct Open {
    /// None: the client has ended its direction, or nobody reads it.
    bytes: Option<mpsc::Sender<Bytes>>,
    /// Of the [`Output`], as long as there is one.
    reset: Weak<CancellationToken>,
}

impl Open {
    fn is_over(&self) -> bool {
        let unread = self.bytes.as_ref().is_none_or(mpsc::Sender::is_closed);
        unread && self.reset.strong_count() == 0
    }
}

impl<R: AsyncRead + Unpin> Connection<R> {
    /// Answers go to `outbox`, streams that the client opens to `opened`.
    pub fn new(reader: R, outbox: Outbox, opened: mpsc::Sender<Stream>, idle: Arc<Idle>) -> Self {
        Self {
            reader,
            outbox,
            opened,
            idle,
            inflate: headers::Reader::default(),
            deflate: headers::Writer::default(),
            last_id: 0,
            streams: HashMap::new(),
        }
    }

    /// Reads until the client ends the connection.
    ///
    /// # Errors
    /// The client does not speak SPDY/3, and has been told so.
    pub async fn run(mut self) -> Result<(), SpdyError> {
        let result = self.read_frames().await;
        if let Err(error) = &result
            && !matches!(error, SpdyError::Read(_) | SpdyError::Closed(_))
        {
            let goaway = frame::goaway(self.last_id, GoAway::ProtocolError);
            let _ = timeout(LAST_WORDS, self.outbox.frame(goaway)).await;
        }
        result
    }

    async fn read_frames(&mut self) -> Result<(), SpdyError> {
        loop {
            let mut header = [0; HEADER];
            if self.reader.read(&mut header[..1]).await? == 0 {
                return Ok(());
            }
            self.reader.read_exact(&mut header[1..]).await?;
            self.idle.touch();
            match Header::parse(header) {
                Header::Data { id, flags, length } => self.data(id, flags, length).await?,
                Header::Control {
                    version: 3,
                    kind,
                    flags,
                    length,
                } => {
                    if length > CONTROL_LIMIT {
                        return Err(SpdyError::Length { kind, length });
                    }
                    let mut payload = vec![0; length as usize];
                    self.reader.read_exact(&mut payload).await?;
                    self.control(kind, flags, &payload).await?;
                }
                Header::Control { version, .. } => return Err(SpdyError::Version(version)),
            }
        }
    }

    /// A frame may be long: its bytes go on in chunks.
    async fn data(&mut self, id: u32, flags: u8, length: u32) -> Result<(), SpdyError> {
        if id == 0 || id > self.last_id {
            return Err(SpdyError::StreamId(id));
        }
        let mut left = length as usize;
        while left > 0 {
            let mut chunk = vec![0; left.min(CHUNK)];
            self.reader.read_exact(&mut chunk).await?;
            self.idle.touch();
            left -= chunk.len();
            // What nobody reads any more is dropped.
            if let Some(open) = self.streams.get_mut(&id)
                && let Some(bytes) = &open.bytes
                && bytes.send(chunk.into()).await.is_err()
            {
                open.bytes = None;
            }
        }
        if flags & FLAG_FIN != 0 {
            self.end_incoming(id);
        }
        Ok(())
    }

    async fn control(&mut self, kind: u16, flags: u8, payload: &[u8]) -> Result<(), SpdyError> {
        let wrong_length = || SpdyError::Length {
            kind,
            length: payload.len() as u32,
        };
        let number = |at: usize| -> Result<u32, SpdyError> {
            let bytes = payload.get(at..at + 4).ok_or_else(wrong_length)?;
            // Four bytes.
            Ok(bytes
                .iter()
                .fold(0, |number, byte| number << 8 | u32::from(*byte)))
        };
        match kind {
            kind::SYN_STREAM => {
                let id = number(0)?;
                let block = payload.get(SYN_STREAM_PREFIX..).ok_or_else(wrong_length)?;
                let headers = self.inflate.read(block)?;
                self.open(id, flags, headers).await
            }
            kind::HEADERS => {
                let id = number(0)?;
                // Of no use to us, but every block is part of the one compressed stream.
                self.inflate.read(&payload[4..])?;
                if flags & FLAG_FIN != 0 {
                    self.end_incoming(id);
                }
                Ok(())
            }
            kind::RST_STREAM => {
                if let Some(open) = self.streams.remove(&number(0)?)
                    && let Some(reset) = open.reset.upgrade()
                {
                    reset.cancel();
                }
                Ok(())
            }
            kind::PING => {
                let id = number(0)?;
                // Even numbers would be answers to pings of ours.
                if id % 2 == 1 {
                    let pong = frame::control(kind::PING, &[&id.to_be_bytes()]);
                    self.outbox.frame(pong).await?;
                }
                Ok(())
            }
            // We open no streams.
            kind::SYN_REPLY => Err(SpdyError::StreamId(number(0)?)),
            // SETTINGS, WINDOW_UPDATE: see the module; GOAWAY: what is open goes on.
            _ => Ok(()),
        }
    }

    async fn open(&mut self, id: u32, flags: u8, headers: Headers) -> Result<(), SpdyError> {
        if id <= self.last_id || id.is_multiple_of(2) || id > i32::MAX as u32 {
            return Err(SpdyError::StreamId(id));
        }
        self.last_id = id;
        self.streams.retain(|_, open| !open.is_over());
        if self.streams.len() >= STREAM_LIMIT {
            let refusal = frame::rst_stream(id, REFUSED_STREAM);
            return Ok(self.outbox.frame(refusal).await?);
        }
        // Before any data: the client drops what comes earlier.
        let block = self.deflate.write(&[]);
        let reply = frame::control(kind::SYN_REPLY, &[&id.to_be_bytes(), &block]);
        self.outbox.frame(reply).await?;
        let (bytes, incoming) = mpsc::channel(INCOMING_CHUNKS);
        let reset = Arc::new(CancellationToken::new());
        let open = Open {
            bytes: (flags & FLAG_FIN == 0).then_some(bytes),
            reset: Arc::downgrade(&reset),
        };
        let output = Output::spdy(self.outbox.clone(), id, reset);
        let stream = Stream {
            id,
            headers,
            incoming,
            output,
        };
        self.streams.insert(id, open);
        // Nobody wants streams any more: this one ends at once, as the connection soon does.
        let _ = self.opened.send(stream).await;
        Ok(())
    }

    fn end_incoming(&mut self, id: u32) {
        if let Some(open) = self.streams.get_mut(&id) {
            open.bytes = None;
        }
    }
}
