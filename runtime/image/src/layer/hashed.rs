//! A buffered reader that hashes everything it reads.

use std::io::{self, BufRead, Read};

use sha2::{Digest as _, Sha256};

use crate::reference::Digest;

/// Decompressors give better throughput, and the hash too, when asked for much at once.
const BUFFER: usize = 256 << 10;

/// Hashes what comes out of `inner`, and fails when it is more than allowed.
pub(super) struct Hashed<R> {
    inner: R,
    hash: Sha256,
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
    allowed: u64,
    limit: u64,
}

/// The stream is longer than this many bytes.
#[derive(Debug, thiserror::Error)]
#[error("more than {0} bytes")]
pub(super) struct TooLong(pub(super) u64);

impl<R: Read> Hashed<R> {
    pub(super) fn new(inner: R, limit: u64) -> Self {
        let buffer = vec![0; BUFFER].into_boxed_slice();
        Self {
            inner,
            hash: Sha256::new(),
            buffer,
            start: 0,
            end: 0,
            allowed: limit,
            limit,
        }
    }

    /// The digest of all that was read from `inner`.
    pub(super) fn digest(&self) -> Digest {
        Digest::from(<[u8; 32]>::from(self.hash.clone().finalize()))
    }

    /// Fills the empty buffer: with as much as fits, so that a decompressor's small pieces are hashed together.
    fn fill(&mut self) -> io::Result<()> {
        (self.start, self.end) = (0, 0);
        while self.end < BUFFER {
            match self.inner.read(&mut self.buffer[self.end..]) {
                Ok(0) => break,
                Ok(count) => self.end += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        self.allowed = self
            .allowed
            .checked_sub(self.end as u64)
            .ok_or_else(|| io::Error::new(io::ErrorKind::FileTooLarge, TooLong(self.limit)))?;
        self.hash.update(&self.buffer[..self.end]);
        Ok(())
    }
}

impl<R: Read> BufRead for Hashed<R> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.start == self.end {
            self.fill()?;
        }
        Ok(&self.buffer[self.start..self.end])
    }

    fn consume(&mut self, count: usize) {
        self.start += count;
    }
}

impl<R: Read> Read for Hashed<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.fill_buf()?.read(buffer)?;
        self.consume(count);
        Ok(count)
    }
}
