//! Frames of SPDY/3 (draft-mbelshe-httpbis-spdy-00, section 2.2): eight bytes of header, then the payload.

/// Bytes of a frame's header.
pub const HEADER: usize = 8;

/// The stream ends in this direction.
pub const FLAG_FIN: u8 = 1;

/// Types of control frames.
pub mod kind {
    #![allow(missing_docs)]
    pub const SYN_STREAM: u16 = 1;
    pub const SYN_REPLY: u16 = 2;
    pub const RST_STREAM: u16 = 3;
    pub const PING: u16 = 6;
    pub const GOAWAY: u16 = 7;
    pub const HEADERS: u16 = 8;
}

/// Why a stream is reset.
pub const REFUSED_STREAM: u32 = 3;

/// Why a connection ends.
#[derive(Clone, Copy, Debug)]
pub enum GoAway {
    /// All is done.
    Ok = 0,
    /// The client's fault.
    ProtocolError = 1,
}

const CONTROL: u32 = 1 << 31;
const VERSION: u16 = 3;
const MAX_LENGTH: u32 = 0x00ff_ffff;

/// A frame's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Header {
    /// Bytes of a stream.
    Data {
        /// The stream.
        id: u32,
        /// [`FLAG_FIN`].
        flags: u8,
        /// Bytes that follow.
        length: u32,
    },
    /// Anything else.
    Control {
        /// Of the protocol: 3.
        version: u16,
        /// One of [`kind`].
        kind: u16,
        /// [`FLAG_FIN`] where streams can end.
        flags: u8,
        /// Bytes that follow.
        length: u32,
    },
}

impl Header {
    /// Any eight bytes are a header.
    pub fn parse(bytes: [u8; HEADER]) -> Self {
        let both = u64::from_be_bytes(bytes);
        let (first, second) = ((both >> 32) as u32, both as u32);
        let (flags, length) = ((second >> 24) as u8, second & MAX_LENGTH);
        if first & CONTROL == 0 {
            return Self::Data {
                id: first,
                flags,
                length,
            };
        }
        Self::Control {
            version: (first >> 16) as u16 & 0x7fff,
            kind: first as u16,
            flags,
            length,
        }
    }
}

/// Writes the header of a data frame into `room`; returns what it takes there.
pub fn data_header(room: &mut [u8], id: u32, length: usize, fin: bool) -> &[u8] {
    let length = (length as u32 & MAX_LENGTH) | (u32::from(fin) << 24);
    room[..4].copy_from_slice(&id.to_be_bytes());
    room[4..HEADER].copy_from_slice(&length.to_be_bytes());
    &room[..HEADER]
}

/// A control frame without flags.
pub fn control(kind: u16, payload: &[&[u8]]) -> Vec<u8> {
    let length: usize = payload.iter().map(|part| part.len()).sum();
    let first = CONTROL | (u32::from(VERSION) << 16) | u32::from(kind);
    let mut frame = Vec::with_capacity(HEADER + length);
    frame.extend_from_slice(&first.to_be_bytes());
    frame.extend_from_slice(&(length as u32 & MAX_LENGTH).to_be_bytes());
    for part in payload {
        frame.extend_from_slice(part);
    }
    frame
}

/// Ends a stream in both directions.
pub fn rst_stream(id: u32, status: u32) -> Vec<u8> {
    control(
        kind::RST_STREAM,
        &[&id.to_be_bytes(), &status.to_be_bytes()],
    )
}

/// No stream after `last` is looked at.
pub fn goaway(last: u32, status: GoAway) -> Vec<u8> {
    control(
        kind::GOAWAY,
        &[&last.to_be_bytes(), &(status as u32).to_be_bytes()],
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_are_parsed_as_they_are_written() {
        let mut room = [0; 16];
        let header = data_header(&mut room, 5, 70_000, true);
        assert_eq!(
            Header::parse(header.try_into().unwrap()),
            Header::Data {
                id: 5,
                flags: FLAG_FIN,
                length: 70_000
            }
        );
        let frame = rst_stream(7, REFUSED_STREAM);
        assert_eq!(
            Header::parse(frame[..HEADER].try_into().unwrap()),
            Header::Control {
                version: 3,
                kind: kind::RST_STREAM,
                flags: 0,
                length: 8
            }
        );
    }
}
