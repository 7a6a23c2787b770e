//! SPDY/3.1, the server's side, as far as CRI clients use it: they open streams, we answer.
//!
//! - [`frame`]: headers of frames, and the frames that we send
//! - [`headers`]: compressed blocks of headers
//! - [`connection`]: what a client sends, by stream
//!
//! Flow-control windows are not kept: the clients' implementation (moby/spdystream) neither sends window updates nor
//! looks at ours, so waiting for a window would be waiting for ever. TCP's window does the work.

pub mod connection;
pub mod frame;
pub mod headers;

use thiserror::Error;

/// The client does not speak the protocol.
#[derive(Debug, Error)]
pub enum SpdyError {
    /// Reading from the client.
    #[error("reading a frame: {0}")]
    Read(#[from] std::io::Error),
    /// Not version 3.
    #[error("SPDY version {0}")]
    Version(u16),
    /// A control frame's length is not one of its kind, or beyond the limit.
    #[error("a control frame of type {kind} with {length} bytes")]
    Length {
        /// Type of the frame.
        kind: u16,
        /// Bytes.
        length: u32,
    },
    /// A stream that cannot be, or a reply to what was never asked.
    #[error("stream {0} is out of order")]
    StreamId(u32),
    /// A block of headers.
    #[error("headers: {0}")]
    Headers(&'static str),
    /// We cannot answer any more.
    #[error(transparent)]
    Closed(#[from] crate::wire::Closed),
}
