//! What the protocols have in common: the queue of frames to a client, chunks of streams, the end of idle sessions.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

use crate::spdy::frame as spdy_frame;
use crate::websocket::frame as websocket_frame;

/// Of a stream's bytes moved at once, at most.
pub const CHUNK: usize = 32 * 1024;

/// Chunks of one stream that wait for their reader.
pub const INCOMING_CHUNKS: usize = 4;

/// Frames that wait to be written to a client.
const OUTGOING_FRAMES: usize = 4;

/// Room before a chunk for the header of any protocol.
const HEADER_ROOM: usize = 16;

/// What a client sends in one stream.
pub type Incoming = mpsc::Receiver<Bytes>;

/// The client is gone, or wants no more of this stream.
#[derive(Debug, thiserror::Error)]
#[error("the client takes no more")]
pub struct Closed;

/// Frames to a client, written in order by [`write_frames`]. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Outbox(mpsc::Sender<Outgoing>);

#[derive(Debug)]
enum Outgoing {
    Frame(Bytes),
    End,
}

/// A queue, and its other end for [`write_frames`].
pub fn outbox() -> (Outbox, OutboxReader) {
    let (sender, receiver) = mpsc::channel(OUTGOING_FRAMES);
    (Outbox(sender), OutboxReader(receiver))
}

/// The end of an [`Outbox`] that is written from.
#[derive(Debug)]
pub struct OutboxReader(mpsc::Receiver<Outgoing>);

impl OutboxReader {
    /// Takes one frame and drops it; whether there was one. For who drives a reader without a client.
    pub async fn discard(&mut self) -> bool {
        matches!(self.0.recv().await, Some(Outgoing::Frame(_)))
    }
}

impl Outbox {
    /// Queues a whole frame; waits for room.
    pub async fn frame(&self, frame: impl Into<Bytes>) -> Result<(), Closed> {
        let frame = Outgoing::Frame(frame.into());
        self.0.send(frame).await.map_err(|_| Closed)
    }

    /// Nothing follows.
    pub async fn end(&self) {
        // Nobody writes any more: then it has ended.
        let _ = self.0.send(Outgoing::End).await;
    }
}

/// Writes what is queued until [`Outbox::end`], then closes that direction.
pub async fn write_frames(
    mut writer: impl AsyncWrite + Unpin,
    mut frames: OutboxReader,
    idle: &Idle,
) -> io::Result<()> {
    while let Some(Outgoing::Frame(frame)) = frames.0.recv().await {
        writer.write_all(&frame).await?;
        // A tunnel and TLS have buffers of their own.
        if frames.0.is_empty() {
            writer.flush().await?;
        }
        idle.touch();
    }
    writer.flush().await?;
    writer.shutdown().await
}

/// One stream to the client.
#[derive(Debug)]
pub struct Output {
    outbox: Outbox,
    framing: Framing,
}

#[derive(Debug)]
enum Framing {
    Spdy {
        id: u32,
        /// The client has reset the stream.
        reset: Arc<CancellationToken>,
    },
    WebSocket {
        channel: u8,
    },
}

impl Output {
    /// A SPDY stream.
    pub fn spdy(outbox: Outbox, id: u32, reset: Arc<CancellationToken>) -> Self {
        let framing = Framing::Spdy { id, reset };
        Self { outbox, framing }
    }

    /// A channel of a WebSocket.
    pub fn websocket(outbox: Outbox, channel: u8) -> Self {
        let framing = Framing::WebSocket { channel };
        Self { outbox, framing }
    }

    /// Sends bytes, at most [`CHUNK`].
    pub async fn send(&self, bytes: &[u8]) -> Result<(), Closed> {
        let mut buffer = Vec::with_capacity(HEADER_ROOM + bytes.len());
        buffer.resize(HEADER_ROOM, 0);
        buffer.extend_from_slice(bytes);
        self.send_buffer(buffer).await
    }

    /// Sends all that `source` gives, to its end.
    pub async fn send_all(&self, mut source: impl AsyncRead + Unpin) -> Result<(), Closed> {
        loop {
            let mut buffer = Vec::with_capacity(HEADER_ROOM + CHUNK);
            buffer.resize(HEADER_ROOM, 0);
            // An error is an end as well: there is nobody to tell but the client, who sees the end.
            match source.read_buf(&mut buffer).await {
                Ok(0) | Err(_) => return Ok(()),
                Ok(_) => self.send_buffer(buffer).await?,
            }
        }
    }

    /// Puts the header into the room before the bytes.
    async fn send_buffer(&self, mut buffer: Vec<u8>) -> Result<(), Closed> {
        let length = buffer.len() - HEADER_ROOM;
        let mut header = [0; HEADER_ROOM];
        let header = match &self.framing {
            Framing::Spdy { id, reset } => {
                if reset.is_cancelled() {
                    return Err(Closed);
                }
                spdy_frame::data_header(&mut header, *id, length, false)
            }
            Framing::WebSocket { channel } => {
                websocket_frame::channel_header(&mut header, *channel, length)
            }
        };
        let start = HEADER_ROOM - header.len();
        buffer[start..HEADER_ROOM].copy_from_slice(header);
        self.outbox.frame(Bytes::from(buffer).slice(start..)).await
    }

    /// The stream's end. Channels of a WebSocket end with the connection.
    pub async fn finish(self) {
        if let Framing::Spdy { id, reset } = &self.framing
            && !reset.is_cancelled()
        {
            let mut header = [0; HEADER_ROOM];
            let frame = spdy_frame::data_header(&mut header, *id, 0, true).to_vec();
            // A client that is gone needs no end.
            let _ = self.outbox.frame(frame).await;
        }
    }

    /// Resolves when the client has reset the stream.
    pub async fn reset(&self) {
        match &self.framing {
            Framing::Spdy { reset, .. } => reset.cancelled().await,
            Framing::WebSocket { .. } => std::future::pending().await,
        }
    }
}

/// When the last byte was moved.
#[derive(Debug)]
pub struct Idle {
    last: Mutex<Instant>,
    limit: Duration,
}

impl Idle {
    /// Starts now.
    pub fn new(limit: Duration) -> Self {
        Self {
            last: Mutex::new(Instant::now()),
            limit,
        }
    }

    /// Something was moved.
    pub fn touch(&self) {
        *self.last.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
    }

    /// Resolves when nothing was moved for the limit.
    pub async fn expired(&self) {
        loop {
            let last = *self.last.lock().unwrap_or_else(PoisonError::into_inner);
            let deadline = last + self.limit;
            if deadline <= Instant::now() {
                return;
            }
            sleep_until(deadline).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_session_is_idle_from_the_last_byte_on() {
        let limit = Duration::from_secs(10);
        let begin = Instant::now();
        let idle = Arc::new(Idle::new(limit));
        let touched = Arc::clone(&idle);
        let touching = tokio::spawn(async move {
            sleep_until(begin + Duration::from_secs(7)).await;
            touched.touch();
        });
        idle.expired().await;
        assert_eq!(begin.elapsed(), Duration::from_secs(17));
        touching.await.unwrap();
    }

    #[tokio::test]
    async fn what_is_queued_is_written_to_the_end() {
        let (outbox, frames) = outbox();
        let (mut client, server) = tokio::io::duplex(3);
        let writing = tokio::spawn(async move {
            write_frames(server, frames, &Idle::new(Duration::from_secs(1))).await
        });
        for _ in 0..10 {
            outbox.frame(&b"frame"[..]).await.unwrap();
            if outbox.0.capacity() == 0 {
                break;
            }
        }
        let mut first = [0; 10];
        client.read_exact(&mut first).await.unwrap();
        assert_eq!(&first, b"frameframe");
        outbox.end().await;
        let mut rest = Vec::new();
        client.read_to_end(&mut rest).await.unwrap();
        assert!(rest.chunks(5).all(|frame| frame == b"frame"));
        writing.await.unwrap().unwrap();
    }
}
