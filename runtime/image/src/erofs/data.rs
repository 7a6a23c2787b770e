//! The data area: files in consecutive blocks, written as they come.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use super::BLOCK;

/// What is collected before it is written.
const BUFFER: usize = 1 << 20;
static ZEROES: [u8; BLOCK as usize] = [0; BLOCK as usize];

/// Appends files to the data area.
pub(crate) struct DataWriter {
    file: File,
    /// Where the buffer belongs; a multiple of [`BLOCK`].
    position: u64,
    buffer: Vec<u8>,
}

impl DataWriter {
    /// Writes behind block 0 of `file`, which must be empty: blocks of zeroes are left out.
    pub(crate) fn new(file: File) -> Self {
        Self {
            file,
            position: BLOCK,
            buffer: Vec::with_capacity(BUFFER),
        }
    }

    /// Where the next byte goes, in bytes from the start of the image. What is written so far must be padded.
    pub(crate) fn position(&self) -> u64 {
        self.position + self.buffer.len() as u64
    }

    pub(crate) fn write(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let (now, later) = bytes.split_at(bytes.len().min(BUFFER - self.buffer.len()));
            self.buffer.extend_from_slice(now);
            bytes = later;
            if self.buffer.len() == BUFFER {
                self.flush()?;
            }
        }
        Ok(())
    }

    /// Writes `count` zeroes; whole blocks of them take no space and no time.
    pub(crate) fn write_zeroes(&mut self, count: u64) -> io::Result<()> {
        let to_block =
            (self.buffer.len() as u64).next_multiple_of(BLOCK) - self.buffer.len() as u64;
        let head = count.min(to_block);
        self.write(&ZEROES[..head as usize])?;
        let whole = (count - head) / BLOCK * BLOCK;
        if whole > 0 {
            self.flush()?;
            self.position += whole;
        }
        self.write(&ZEROES[..(count - head - whole) as usize])
    }

    /// Fills up the last block.
    pub(crate) fn pad(&mut self) -> io::Result<()> {
        let used = self.buffer.len() as u64 % BLOCK;
        if used > 0 {
            self.write(&ZEROES[used as usize..])
        } else {
            Ok(())
        }
    }

    /// The file and the number of blocks in use, block 0 included.
    pub(super) fn finish(mut self) -> io::Result<(File, u64)> {
        self.pad()?;
        self.flush()?;
        Ok((self.file, self.position / BLOCK))
    }

    /// Writes the buffer, which is padded or full, without its blocks of zeroes.
    fn flush(&mut self) -> io::Result<()> {
        let blocks: Vec<&[u8]> = self.buffer.chunks(BLOCK as usize).collect();
        let mut offset = self.position;
        for run in blocks.chunk_by(|a, b| is_zero(a) == is_zero(b)) {
            let length: usize = run.iter().map(|block| block.len()).sum();
            if !is_zero(run[0]) {
                let start = (offset - self.position) as usize;
                self.file
                    .write_all_at(&self.buffer[start..start + length], offset)?;
            }
            offset += length as u64;
        }
        self.position = offset;
        self.buffer.clear();
        Ok(())
    }
}

fn is_zero(block: &[u8]) -> bool {
    block == &ZEROES[..block.len()]
}
