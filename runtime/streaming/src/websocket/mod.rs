//! WebSocket (RFC 6455), the server's side.
//!
//! - [`frame`]: headers of frames, masks
//! - [`messages`]: what a client sends, piece by piece
//! - [`channels`]: streams as messages whose first byte is their number (`v4.channel.k8s.io` and its kin)
//! - [`tunnel`]: one byte stream in binary messages, for SPDY inside it

pub mod channels;
pub mod frame;
pub mod messages;
pub mod tunnel;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use ring::digest::{SHA1_FOR_LEGACY_USE_ONLY, digest};
use thiserror::Error;

/// The client does not speak the protocol.
#[derive(Debug, Error)]
pub enum WebSocketError {
    /// Reading from the client.
    #[error("reading a frame: {0}")]
    Read(#[from] std::io::Error),
    /// Clients mask all they send; nobody has agreed to extensions; lengths have 63 bits.
    #[error("a malformed frame")]
    Malformed,
    /// A piece of a message without its begin, or a message within another.
    #[error("a message out of order")]
    Order,
    /// We cannot answer any more.
    #[error(transparent)]
    Closed(#[from] crate::wire::Closed),
}

/// The answer to a client's `Sec-WebSocket-Key` (RFC 6455, section 1.3).
pub fn accept_key(key: &[u8]) -> String {
    let mut input = key.to_vec();
    input.extend_from_slice(b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11");
    STANDARD.encode(digest(&SHA1_FOR_LEGACY_USE_ONLY, &input))
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_key_of_the_rfc() {
        let answer = super::accept_key(b"dGhlIHNhbXBsZSBub25jZQ==");
        assert_eq!(answer, "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=");
    }
}
