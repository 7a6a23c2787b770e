//! Streams as messages whose first byte is their number.

use std::collections::HashMap;

use bytes::Bytes;
use tokio::io::AsyncRead;
use tokio::sync::mpsc;

use super::WebSocketError;
use super::messages::{Messages, Piece};
use crate::wire::{INCOMING_CHUNKS, Incoming};

/// Streams of an exec or attach.
pub mod number {
    #![allow(missing_docs)]
    pub const STDIN: u8 = 0;
    pub const STDOUT: u8 = 1;
    pub const STDERR: u8 = 2;
    pub const ERROR: u8 = 3;
    pub const RESIZE: u8 = 4;
    /// Version 5: the next byte is the number of a channel that the client has ended.
    pub const CLOSE: u8 = 255;
}

/// Where a client's messages go.
#[derive(Debug, Default)]
pub struct Channels {
    open: HashMap<u8, mpsc::Sender<Bytes>>,
    /// The client can end a channel.
    closable: bool,
}

impl Channels {
    /// No channels; `closable`: version 5.
    pub fn new(closable: bool) -> Self {
        Self {
            open: HashMap::new(),
            closable,
        }
    }

    /// One more channel to read.
    pub fn open(&mut self, number: u8) -> Incoming {
        let (sender, incoming) = mpsc::channel(INCOMING_CHUNKS);
        self.open.insert(number, sender);
        incoming
    }

    /// Reads until the client ends the connection. What is for a channel that is not open, or that nobody reads
    /// any more, is dropped.
    ///
    /// # Errors
    /// The client does not speak the protocol.
    pub async fn run<R: AsyncRead + Unpin>(
        mut self,
        messages: &mut Messages<R>,
    ) -> Result<(), WebSocketError> {
        // Of the message that is being read, once its first byte is there.
        let mut channel = None;
        while let Some(Piece {
            first,
            last,
            mut bytes,
        }) = messages.next().await?
        {
            if first {
                channel = None;
            }
            if channel.is_none() && !bytes.is_empty() {
                channel = bytes.split_to(1).first().copied();
            }
            match channel {
                Some(number::CLOSE) if self.closable => {
                    if let Some(ended) = bytes.first() {
                        self.open.remove(ended);
                    }
                }
                Some(number) if !bytes.is_empty() => {
                    if let Some(sender) = self.open.get(&number)
                        && sender.send(bytes).await.is_err()
                    {
                        self.open.remove(&number);
                    }
                }
                _ => {}
            }
            if last {
                channel = None;
            }
        }
        Ok(())
    }
}
