//! What a client sends: messages, in pieces, so that a long one takes no memory. Pings are answered here.

use std::sync::Arc;

use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncReadExt};

use super::WebSocketError;
use super::frame::{self, CONTROL_LIMIT, ShortLength, Start, opcode};
use crate::wire::{CHUNK, Idle, Outbox};

/// The piece of a message that came last.
#[derive(Debug)]
pub struct Piece {
    /// The message begins with it.
    pub first: bool,
    /// The message ends with it.
    pub last: bool,
    /// May be empty.
    pub bytes: Bytes,
}

/// Reads the frames of a client.
pub struct Messages<R> {
    reader: R,
    outbox: Outbox,
    idle: Arc<Idle>,
    /// Within a message: its first piece has been given.
    in_message: bool,
    /// What is left of the frame that is being read.
    frame: Option<Frame>,
}

struct Frame {
    fin: bool,
    mask: [u8; 4],
    read: u64,
    length: u64,
}

impl<R: AsyncRead + Unpin> Messages<R> {
    /// Answers to pings go to `outbox`.
    pub fn new(reader: R, outbox: Outbox, idle: Arc<Idle>) -> Self {
        Self {
            reader,
            outbox,
            idle,
            in_message: false,
            frame: None,
        }
    }

    /// The next piece; None: the client has ended the connection.
    ///
    /// # Errors
    /// The client does not speak the protocol.
    pub async fn next(&mut self) -> Result<Option<Piece>, WebSocketError> {
        let (mut frame, first) = match self.frame.take() {
            Some(frame) => (frame, false),
            None => match self.begin_frame().await? {
                Some(begun) => begun,
                None => return Ok(None),
            },
        };
        let length = (frame.length - frame.read).min(CHUNK as u64) as usize;
        let mut bytes = vec![0; length];
        self.reader.read_exact(&mut bytes).await?;
        self.idle.touch();
        frame::unmask(&mut bytes, frame.mask, (frame.read % 4) as usize);
        frame.read += length as u64;
        let frame_ends = frame.read == frame.length;
        let last = frame_ends && frame.fin;
        self.in_message = !last;
        if !frame_ends {
            self.frame = Some(frame);
        }
        let bytes = bytes.into();
        Ok(Some(Piece { first, last, bytes }))
    }

    /// Reads headers up to that of the next piece of a message, and whether the message begins with it.
    async fn begin_frame(&mut self) -> Result<Option<(Frame, bool)>, WebSocketError> {
        loop {
            let mut start = [0; 2];
            if self.reader.read(&mut start[..1]).await? == 0 {
                return Ok(None);
            }
            self.reader.read_exact(&mut start[1..]).await?;
            let Start {
                fin,
                opcode,
                length,
            } = Start::parse(start).ok_or(WebSocketError::Malformed)?;
            let length = match length {
                ShortLength::Is(length) => u64::from(length),
                ShortLength::Two => u64::from(self.reader.read_u16().await?),
                ShortLength::Eight => self.reader.read_u64().await?,
            };
            if length > i64::MAX as u64 {
                return Err(WebSocketError::Malformed);
            }
            let mut mask = [0; 4];
            self.reader.read_exact(&mut mask).await?;
            self.idle.touch();
            let frame = Frame {
                fin,
                mask,
                read: 0,
                length,
            };
            match (opcode, self.in_message) {
                (opcode::TEXT | opcode::BINARY, false) => return Ok(Some((frame, true))),
                (opcode::CONTINUATION, true) => return Ok(Some((frame, false))),
                (opcode::CLOSE | opcode::PING | opcode::PONG, _) => {
                    if !self.control(opcode, &frame).await? {
                        return Ok(None);
                    }
                }
                (opcode::CONTINUATION | opcode::TEXT | opcode::BINARY, _) => {
                    return Err(WebSocketError::Order);
                }
                _ => return Err(WebSocketError::Malformed),
            }
        }
    }

    /// Whether the connection goes on.
    async fn control(&mut self, opcode: u8, frame: &Frame) -> Result<bool, WebSocketError> {
        let mut payload = vec![0; frame.length.min(CONTROL_LIMIT) as usize];
        self.reader.read_exact(&mut payload).await?;
        frame::unmask(&mut payload, frame.mask, 0);
        match opcode {
            opcode::PING => {
                let pong = frame::message(opcode::PONG, &payload);
                self.outbox.frame(pong).await?;
            }
            opcode::CLOSE => return Ok(false),
            _ => {}
        }
        Ok(true)
    }
}
