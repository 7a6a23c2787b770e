//! A blob on its way from the network to the thread that unpacks it.

use std::fs::File;
use std::io::{self, BufRead, Read};
use std::os::unix::fs::FileExt as _;

use bytes::{Buf, Bytes};
use sha2::{Digest as _, Sha256};
use tokio::sync::mpsc;

use crate::reference::Digest;

/// Pieces that may wait for the unpacking thread. A piece is what the network gave at once, at most some 100 KiB.
const PIECES: usize = 8;

/// What is read at once of the part that was there.
const CHUNK: u64 = 128 << 10;

/// Why a blob is not there.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BlobError {
    /// The sender went away: the pull was cancelled, or has its own error to tell.
    #[error("the download was cancelled")]
    Cancelled,
    #[error("blob {expected} has digest {actual}")]
    Digest { expected: Digest, actual: Digest },
    #[error("blob {digest} has {actual} bytes, {expected} wanted")]
    Size {
        digest: Digest,
        expected: u64,
        actual: u64,
    },
}

/// Where the network's side puts what arrives.
pub(crate) struct BlobSender(mpsc::Sender<Bytes>);

/// The unpacking thread's side. Reads to the end only if size and digest are right.
pub(crate) struct BlobReader {
    pieces: mpsc::Receiver<Bytes>,
    piece: Bytes,
    digest: Digest,
    size: u64,
    received: u64,
    /// Where the blob is kept as it comes.
    kept: Option<File>,
    /// Bytes of that file that were there before; the sender's come after them.
    there: u64,
    hash: Sha256,
    at_end: bool,
}

/// A channel for the blob with this digest and size. The reader keeps what it reads in the file, and begins with the `there`
/// bytes that are in it already.
pub(crate) fn channel(
    digest: Digest,
    size: u64,
    kept: Option<File>,
    there: u64,
) -> (BlobSender, BlobReader) {
    let (sender, pieces) = mpsc::channel(PIECES);
    let hash = Sha256::new();
    let reader = BlobReader {
        pieces,
        piece: Bytes::new(),
        digest,
        size,
        received: 0,
        kept,
        there,
        hash,
        at_end: false,
    };
    (BlobSender(sender), reader)
}

impl BlobSender {
    /// Waits until there is room. False if nobody reads any more: unpacking failed.
    pub(crate) async fn send(&self, piece: Bytes) -> bool {
        // An empty piece would be taken for the end.
        piece.is_empty() || self.0.send(piece).await.is_ok()
    }

    /// Says that this was all. Without it the reader takes the blob for cancelled.
    pub(crate) async fn finish(self) {
        // Nobody there to tell: unpacking failed, and says so itself.
        let _ = self.0.send(Bytes::new()).await;
    }
}

impl BlobReader {
    /// What comes next, at least four bytes of it unless the blob is shorter.
    pub(crate) fn peek(&mut self) -> io::Result<&[u8]> {
        self.fill_buf()?;
        while self.piece.len() < 4 && !self.at_end {
            let mut joined = self.piece.to_vec();
            self.piece = Bytes::new();
            self.next_piece()?;
            joined.extend_from_slice(&self.piece);
            self.piece = joined.into();
        }
        Ok(&self.piece)
    }

    fn next_piece(&mut self) -> io::Result<()> {
        let piece = if self.received < self.there {
            self.piece_from_file()?
        } else {
            self.piece_from_sender()?
        };
        if piece.is_empty() {
            self.at_end = true;
            return self.check();
        }
        self.hash.update(&piece);
        self.received += piece.len() as u64;
        if self.received > self.size {
            return self.check();
        }
        self.piece = piece;
        Ok(())
    }

    fn piece_from_file(&self) -> io::Result<Bytes> {
        let mut piece = vec![0; (self.there - self.received).min(CHUNK) as usize];
        if let Some(file) = &self.kept {
            file.read_exact_at(&mut piece, self.received)?;
        }
        Ok(piece.into())
    }

    fn piece_from_sender(&mut self) -> io::Result<Bytes> {
        let piece = self.pieces.blocking_recv();
        let piece = piece.ok_or_else(|| error(BlobError::Cancelled))?;
        if let Some(file) = &self.kept
            && file.write_all_at(&piece, self.received).is_err()
        {
            // The pull can do without.
            self.kept = None;
        }
        Ok(piece)
    }

    fn check(&self) -> io::Result<()> {
        let digest = self.digest.clone();
        if self.received != self.size {
            return Err(error(BlobError::Size {
                digest,
                expected: self.size,
                actual: self.received,
            }));
        }
        let actual = Digest::from(<[u8; 32]>::from(self.hash.clone().finalize()));
        if actual == digest {
            Ok(())
        } else {
            Err(error(BlobError::Digest {
                expected: digest,
                actual,
            }))
        }
    }
}

fn error(error: BlobError) -> io::Error {
    io::Error::other(error)
}

impl BufRead for BlobReader {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.piece.is_empty() && !self.at_end {
            self.next_piece()?;
        }
        Ok(&self.piece)
    }

    fn consume(&mut self, count: usize) {
        self.piece.advance(count);
    }
}

impl Read for BlobReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.fill_buf()?.read(buffer)?;
        self.consume(count);
        Ok(count)
    }
}
