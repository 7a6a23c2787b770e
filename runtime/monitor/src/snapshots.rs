//! The stream of snapshots that `Follow` asks a monitor for (proto/monitor/v1/monitor.proto): each after its length.

use std::io;

use podvisor_proto::monitor::Snapshot;
use prost::Message;
use tokio::io::{AsyncRead, AsyncReadExt};

/// The largest that is read, here or from a file, bytes.
pub const MAX_SNAPSHOT: u32 = 4 << 20;

/// A snapshot as it is sent.
#[must_use]
pub fn encode(snapshot: &Snapshot) -> Vec<u8> {
    let length = snapshot.encoded_len();
    let mut message = Vec::with_capacity(size_of::<u32>() + length);
    message.extend((length as u32).to_be_bytes());
    snapshot.encode_raw(&mut message);
    message
}

/// The next snapshot. `None`: there will be no other.
///
/// # Errors
/// The stream broke, or ended within a snapshot; `InvalidData`: a monitor sends no such thing.
pub async fn read(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<Option<Snapshot>> {
    let length = match stream.read_u32().await {
        Ok(length @ ..=MAX_SNAPSHOT) => length,
        Ok(_) => return Err(io::Error::new(io::ErrorKind::InvalidData, "too large")),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        Err(error) => return Err(error),
    };
    let mut message = vec![0; length as usize];
    stream.read_exact(&mut message).await?;
    let snapshot = Snapshot::decode(message.as_slice());
    snapshot
        .map(Some)
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn snapshots_come_one_by_one_to_the_end() {
        let told: Vec<_> = (0..3)
            .map(|revision| Snapshot {
                revision,
                ..Snapshot::default()
            })
            .collect();
        let bytes: Vec<u8> = told.iter().flat_map(encode).collect();
        let mut stream = bytes.as_slice();
        for snapshot in told {
            assert_eq!(read(&mut stream).await.unwrap(), Some(snapshot));
        }
        assert_eq!(read(&mut stream).await.unwrap(), None);
    }

    #[tokio::test]
    async fn what_no_monitor_sends_is_an_error() {
        let too_large = (MAX_SNAPSHOT + 1).to_be_bytes();
        let cut = [0, 0, 0, 9, 1];
        let nonsense = [0, 0, 0, 1, 0xff];
        for (stream, kind) in [
            (&too_large[..], io::ErrorKind::InvalidData),
            (&cut, io::ErrorKind::UnexpectedEof),
            (&nonsense, io::ErrorKind::InvalidData),
        ] {
            let error = read(&mut &*stream).await.unwrap_err();
            assert_eq!(error.kind(), kind);
        }
    }
}
