//! Frames of RFC 6455, section 5.2.

/// What a frame is.
pub mod opcode {
    #![allow(missing_docs)]
    pub const CONTINUATION: u8 = 0;
    pub const TEXT: u8 = 1;
    pub const BINARY: u8 = 2;
    pub const CLOSE: u8 = 8;
    pub const PING: u8 = 9;
    pub const PONG: u8 = 10;
}

/// Why a connection ends (section 7.4.1): all is done; the client's fault.
pub const NORMAL: u16 = 1000;
/// See [`NORMAL`].
pub const PROTOCOL_ERROR: u16 = 1002;

/// Longest payload of a control frame, bytes.
pub const CONTROL_LIMIT: u64 = 125;

const FIN: u8 = 0x80;
const MASKED: u8 = 0x80;

/// A client's frame's first two bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Start {
    /// The message ends with this frame.
    pub fin: bool,
    /// One of [`opcode`].
    pub opcode: u8,
    /// The payload's length, or what stands for more bytes of it.
    pub length: ShortLength,
}

/// How a length is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ShortLength {
    /// It is this.
    Is(u8),
    /// In the next two bytes.
    Two,
    /// In the next eight.
    Eight,
}

impl Start {
    /// None: reserved bits, no mask, or a control frame that is long or a piece.
    pub fn parse([first, second]: [u8; 2]) -> Option<Self> {
        let fin = first & FIN != 0;
        let opcode = first & 0x0f;
        if first & 0x70 != 0 || second & MASKED == 0 {
            return None;
        }
        let length = match second & 0x7f {
            126 => ShortLength::Two,
            127 => ShortLength::Eight,
            length => ShortLength::Is(length),
        };
        let is_control = opcode & 0x8 != 0;
        if is_control && (!fin || !matches!(length, ShortLength::Is(_))) {
            return None;
        }
        Some(Self {
            fin,
            opcode,
            length,
        })
    }
}

/// Applies `mask` to bytes that begin `offset` bytes into the payload.
pub fn unmask(bytes: &mut [u8], mask: [u8; 4], offset: usize) {
    let mut rotated = mask;
    rotated.rotate_left(offset % 4);
    for chunk in bytes.chunks_mut(4) {
        for (byte, mask) in chunk.iter_mut().zip(rotated) {
            *byte ^= mask;
        }
    }
}

/// Writes the header of one of our frames, a whole message, into `room`; returns what it takes there.
fn header(room: &mut [u8], opcode: u8, length: usize) -> usize {
    room[0] = FIN | opcode;
    match length {
        0..=125 => {
            room[1] = length as u8;
            2
        }
        126..=0xffff => {
            room[1] = 126;
            room[2..4].copy_from_slice(&(length as u16).to_be_bytes());
            4
        }
        _ => {
            room[1] = 127;
            room[2..10].copy_from_slice(&(length as u64).to_be_bytes());
            10
        }
    }
}

/// The header of a binary message of `length` bytes in a channel, with the channel's byte.
pub fn channel_header(room: &mut [u8], channel: u8, length: usize) -> &[u8] {
    let end = header(room, opcode::BINARY, length + 1);
    room[end] = channel;
    &room[..=end]
}

/// A whole message.
pub fn message(opcode: u8, payload: &[u8]) -> Vec<u8> {
    let mut room = [0; 10];
    let end = header(&mut room, opcode, payload.len());
    let mut frame = Vec::with_capacity(end + payload.len());
    frame.extend_from_slice(&room[..end]);
    frame.extend_from_slice(payload);
    frame
}

/// The end, for a reason such as [`NORMAL`].
pub fn close(code: u16) -> Vec<u8> {
    message(opcode::CLOSE, &code.to_be_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn lengths_have_three_forms() {
        let mut room = [0; 16];
        assert_eq!(channel_header(&mut room, 3, 124), [0x82, 125, 3]);
        assert_eq!(channel_header(&mut room, 3, 125), [0x82, 126, 0, 126, 3]);
        assert_eq!(
            channel_header(&mut room, 1, 0xffff),
            [0x82, 127, 0, 0, 0, 0, 0, 1, 0, 0, 1]
        );
    }

    proptest! {
        #[test]
        fn a_mask_applies_to_pieces_as_to_the_whole(
            payload in prop::collection::vec(any::<u8>(), 0..40), mask: [u8; 4], cut in 0..40usize)
        {
            let cut = cut.min(payload.len());
            let mut whole = payload.clone();
            unmask(&mut whole, mask, 0);
            let mut pieces = payload;
            unmask(&mut pieces[..cut], mask, 0);
            unmask(&mut pieces[cut..], mask, cut);
            prop_assert_eq!(whole, pieces);
        }
    }
}
