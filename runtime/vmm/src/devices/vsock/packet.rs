//! The packets of virtio-vsock (virtio 1.2, 5.10.6).

/// The address of the host.
pub const HOST_CID: u64 = 2;

/// Size of a packet's header in bytes.
pub(super) const HEADER_BYTES: usize = 44;

/// Largest payload of one packet in bytes: Linux's `VIRTIO_VSOCK_MAX_PKT_BUF_SIZE`.
pub(super) const MAX_PAYLOAD_BYTES: u32 = 64 << 10;

/// Reliable, ordered streams: the only type served.
pub(super) const TYPE_STREAM: u16 = 1;

/// In `Op::Shutdown`: the sender takes no more data.
pub(super) const SHUTDOWN_RECEIVE: u32 = 1;
/// In `Op::Shutdown`: the sender sends no more data.
pub(super) const SHUTDOWN_SEND: u32 = 2;
/// Both.
pub(super) const SHUTDOWN_BOTH: u32 = SHUTDOWN_RECEIVE | SHUTDOWN_SEND;

/// What a packet says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Op {
    Request,
    Response,
    Reset,
    Shutdown,
    Data,
    CreditUpdate,
    CreditRequest,
    /// Anything else.
    Unknown(u16),
}

impl Op {
    fn from_wire(op: u16) -> Self {
        match op {
            1 => Self::Request,
            2 => Self::Response,
            3 => Self::Reset,
            4 => Self::Shutdown,
            5 => Self::Data,
            6 => Self::CreditUpdate,
            7 => Self::CreditRequest,
            other => Self::Unknown(other),
        }
    }

    fn to_wire(self) -> u16 {
        match self {
            Self::Request => 1,
            Self::Response => 2,
            Self::Reset => 3,
            Self::Shutdown => 4,
            Self::Data => 5,
            Self::CreditUpdate => 6,
            Self::CreditRequest => 7,
            Self::Unknown(other) => other,
        }
    }
}

/// `struct virtio_vsock_hdr`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Header {
    pub source_cid: u64,
    pub destination_cid: u64,
    pub source_port: u32,
    pub destination_port: u32,
    /// Bytes of payload.
    pub length: u32,
    pub kind: u16,
    pub op: Op,
    pub flags: u32,
    /// The sender's receive buffer in bytes.
    pub buffer: u32,
    /// Bytes that the sender has taken out of its receive buffer since the connection began, modulo 2^32.
    pub forwarded: u32,
}

impl Header {
    pub(super) fn from_bytes(bytes: &[u8; HEADER_BYTES]) -> Self {
        let le16 = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let le32 = |at: usize| u32::from(le16(at)) | u32::from(le16(at + 2)) << 16;
        let le64 = |at: usize| u64::from(le32(at)) | u64::from(le32(at + 4)) << 32;
        Self {
            source_cid: le64(0),
            destination_cid: le64(8),
            source_port: le32(16),
            destination_port: le32(20),
            length: le32(24),
            kind: le16(28),
            op: Op::from_wire(le16(30)),
            flags: le32(32),
            buffer: le32(36),
            forwarded: le32(40),
        }
    }

    pub(super) fn to_bytes(self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        let mut put = |at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);
        put(0, &self.source_cid.to_le_bytes());
        put(8, &self.destination_cid.to_le_bytes());
        put(16, &self.source_port.to_le_bytes());
        put(20, &self.destination_port.to_le_bytes());
        put(24, &self.length.to_le_bytes());
        put(28, &self.kind.to_le_bytes());
        put(30, &self.op.to_wire().to_le_bytes());
        put(32, &self.flags.to_le_bytes());
        put(36, &self.buffer.to_le_bytes());
        put(40, &self.forwarded.to_le_bytes());
        bytes
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn every_header_survives(bytes in any::<[u8; 32]>(), tail in any::<[u8; 12]>()) {
            let mut wire = [0; HEADER_BYTES];
            wire[..32].copy_from_slice(&bytes);
            wire[32..].copy_from_slice(&tail);
            prop_assert_eq!(Header::from_bytes(&wire).to_bytes(), wire);
        }
    }

    #[test]
    fn layout() {
        let header = Header {
            source_cid: 2,
            destination_cid: 3,
            source_port: 0x0102_0304,
            destination_port: 1025,
            length: 7,
            kind: TYPE_STREAM,
            op: Op::Data,
            flags: 9,
            buffer: 0x1_0000,
            forwarded: 5,
        };
        #[rustfmt::skip]
        let expected = [
            2, 0, 0, 0, 0, 0, 0, 0,  3, 0, 0, 0, 0, 0, 0, 0,  4, 3, 2, 1,  1, 4, 0, 0,
            7, 0, 0, 0,  1, 0,  5, 0,  9, 0, 0, 0,  0, 0, 1, 0,  5, 0, 0, 0,
        ];
        assert_eq!(header.to_bytes(), expected);
    }
}
