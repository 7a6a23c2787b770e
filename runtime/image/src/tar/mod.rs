//! A streaming tar reader for layers: hostile input, bounded memory.
//!
//! Reads POSIX ustar and pax, GNU (long names, both kinds of sparse maps), star and V7 archives, and decides
//! unclear cases as Go's `archive/tar` does, since containerd, Docker and the tools that make images all use it.
//! Formats: pax(1) in POSIX.1-2017, and <https://www.gnu.org/software/tar/manual/html_section/Tar-Internals.html>.
//!
//! The crate tar-core was tried first. Its parser wants an entry's headers whole in one buffer and lets an archive
//! decide how large that gets (a chain of empty GNU sparse headers has no end), and it has no times before 1970.

mod header;
mod pax;
mod sparse;

use std::io::{self, BufRead, Read};

use header::{Block, Format, RawHeader};
use pax::Pax;
pub(crate) use sparse::Segment;

/// Headers and data are in blocks of this many bytes.
const BLOCK: usize = 512;
/// Largest pax header or GNU long name, as in Go.
const MAX_SPECIAL: u64 = 1 << 20;
/// Headers that may stand before the entry which they describe.
const MAX_SPECIAL_IN_ROW: usize = 16;

/// Why an archive cannot be read.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TarError {
    /// The stream under the archive failed.
    #[error("reading the archive: {0}")]
    Input(#[source] io::Error),
    /// The stream ends inside a header or a file.
    #[error("archive ends in the middle of an entry, at byte {at}")]
    Truncated { at: u64 },
    /// A header's checksum does not match.
    #[error("wrong header checksum at byte {at}")]
    Checksum { at: u64 },
    /// A field of a header.
    #[error("invalid {what} in the header at byte {at}")]
    Header { at: u64, what: &'static str },
    /// An entry of a type that no image has.
    #[error("entry of unknown type {flag:?} at byte {at}")]
    UnknownType { at: u64, flag: char },
    /// A header that would take more memory than is allowed.
    #[error("{what} too large in the header at byte {at}")]
    TooLarge { at: u64, what: &'static str },
}

/// An entry of the archive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Entry {
    /// As in the archive: may begin with `/`, contain `.` and `..`, end with `/`. Not empty, no NUL.
    pub(crate) path: Vec<u8>,
    pub(crate) kind: Kind,
    /// Permission bits alone (0o7777).
    pub(crate) mode: u16,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) mtime: Mtime,
    /// Names with their prefix (`security.capability`) and values; a name may be there twice: the last one counts.
    pub(crate) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

/// What an entry is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A regular file of this logical size. Its data comes from [`TarReader::data`].
    File {
        size: u64,
    },
    /// Another name of an entry before it.
    HardLink {
        target: Vec<u8>,
    },
    Symlink {
        target: Vec<u8>,
    },
    CharDevice {
        major: u32,
        minor: u32,
    },
    BlockDevice {
        major: u32,
        minor: u32,
    },
    Directory,
    Fifo,
}

/// Seconds since the epoch and nanoseconds (below 1 000 000 000) after them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub(crate) struct Mtime {
    pub(crate) seconds: i64,
    pub(crate) nanos: u32,
}

/// Reads entries one after the other.
pub(crate) struct TarReader<R> {
    input: R,
    /// Bytes of the archive read so far.
    at: u64,
    /// Data of the current entry not yet read.
    data_left: u64,
    /// Zero bytes after it, up to the next block.
    padding: u64,
    /// Where the current entry's data belongs in the file, in order. Cleared by [`TarReader::data`].
    segments: Vec<Segment>,
}

/// What special headers before an entry said about it.
#[derive(Default)]
struct Pending {
    pax: Pax,
    long_name: Option<Vec<u8>>,
    long_link: Option<Vec<u8>>,
}

impl<R: BufRead> TarReader<R> {
    pub(crate) fn new(input: R) -> Self {
        Self {
            input,
            at: 0,
            data_left: 0,
            padding: 0,
            segments: Vec::new(),
        }
    }

    /// The next entry; what is left of the one before is skipped. `None` at the end of the archive.
    pub(crate) fn next(&mut self) -> Result<Option<Entry>, TarError> {
        self.skip_data()?;
        let mut pending = Pending::default();
        for _ in 0..MAX_SPECIAL_IN_ROW {
            let start = self.at;
            let Some(block) = self.header_block()? else {
                return Ok(None);
            };
            let header = RawHeader::parse(&block, start)?;
            match header.flag {
                b'x' => pending.pax = Pax::parse(&self.special(&header)?, start)?,
                // Global headers (Go and containerd do not apply them; what git and others put there is a comment)
                // and GNU's label of the whole archive.
                b'g' | b'V' => drop(self.special(&header)?),
                b'L' => pending.long_name = Some(until_nul(&self.special(&header)?).to_vec()),
                b'K' => pending.long_link = Some(until_nul(&self.special(&header)?).to_vec()),
                _ => return self.entry(&header, pending).map(Some),
            }
        }
        Err(TarError::TooLarge {
            at: self.at,
            what: "chain of extended headers",
        })
    }

    /// Gives the current file's data to `sink`, piece by piece with each piece's offset in the file. Offsets grow;
    /// what lies between pieces and after them is zeroes.
    pub(crate) fn data<E: From<TarError>>(
        &mut self,
        mut sink: impl FnMut(u64, &[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        for segment in std::mem::take(&mut self.segments) {
            let mut offset = segment.offset;
            let mut left = segment.length;
            while left > 0 {
                let piece = self.input.fill_buf().map_err(TarError::Input)?;
                if piece.is_empty() {
                    return Err(TarError::Truncated { at: self.at }.into());
                }
                let length = piece.len().min(usize::try_from(left).unwrap_or(usize::MAX));
                sink(offset, &piece[..length])?;
                self.input.consume(length);
                self.at += length as u64;
                self.data_left -= length as u64;
                offset += length as u64;
                left -= length as u64;
            }
        }
        Ok(())
    }

    fn entry(&mut self, header: &RawHeader, pending: Pending) -> Result<Entry, TarError> {
        let at = header.at;
        let Pending {
            pax,
            long_name,
            long_link,
        } = pending;
        let path = pax.path.or(long_name).unwrap_or_else(|| header.path());
        if path.is_empty() || path.contains(&0) {
            return Err(TarError::Header { at, what: "path" });
        }
        let target = pax
            .linkpath
            .or(long_link)
            .unwrap_or_else(|| header.link_name());
        let flag = match header.flag {
            // Before ustar, a slash at the end was all that made a directory.
            0 if path.ends_with(b"/") => b'5',
            flag => flag,
        };
        let kind = match flag {
            0 | b'0' | b'7' | b'S' => {
                let stored = pax.size.map_or_else(|| header.size(), Ok)?;
                let size = self.begin_data(header, stored, &pax.sparse)?;
                Kind::File { size }
            }
            b'1' | b'2' if target.is_empty() || target.contains(&0) => {
                return Err(TarError::Header {
                    at,
                    what: "link target",
                });
            }
            b'1' => Kind::HardLink { target },
            b'2' => Kind::Symlink { target },
            b'3' => header
                .device()
                .map(|(major, minor)| Kind::CharDevice { major, minor })?,
            b'4' => header
                .device()
                .map(|(major, minor)| Kind::BlockDevice { major, minor })?,
            b'5' => Kind::Directory,
            b'6' => Kind::Fifo,
            flag => {
                return Err(TarError::UnknownType {
                    at,
                    flag: char::from(flag),
                });
            }
        };
        Ok(Entry {
            path: pax.sparse.name.unwrap_or(path),
            kind,
            mode: header.mode()?,
            uid: pax.uid.map_or_else(|| header.uid(), Ok)?,
            gid: pax.gid.map_or_else(|| header.gid(), Ok)?,
            mtime: pax.mtime.map_or_else(|| header.mtime(), Ok)?,
            xattrs: pax.xattrs,
        })
    }

    /// Prepares reading of a file's data: `stored` bytes in the archive. Returns the file's logical size.
    fn begin_data(
        &mut self,
        header: &RawHeader,
        stored: u64,
        map: &pax::SparseKeys,
    ) -> Result<u64, TarError> {
        let at = header.at;
        let stored_end = stored.checked_next_multiple_of(BLOCK as u64);
        let stored_end = stored_end.ok_or(TarError::Header { at, what: "size" })?;
        self.data_left = stored;
        self.padding = stored_end - stored;
        let (size, segments) = if header.flag == b'S' {
            if header.format != Format::Gnu {
                return Err(TarError::Header {
                    at,
                    what: "sparse file",
                });
            }
            let (mut segments, more) = header.sparse_segments()?;
            if more {
                self.extended_sparse_headers(at, &mut segments)?;
            }
            (header.sparse_size()?, segments)
        } else if map.is_version_1() {
            let segments = self.sparse_map_in_data(at)?;
            (
                map.size.ok_or(TarError::Header {
                    at,
                    what: "sparse size",
                })?,
                segments,
            )
        } else if let Some(segments) = map.segments(at)? {
            (
                map.size.ok_or(TarError::Header {
                    at,
                    what: "sparse size",
                })?,
                segments,
            )
        } else {
            (
                stored,
                vec![Segment {
                    offset: 0,
                    length: stored,
                }],
            )
        };
        sparse::check(&segments, size, self.data_left).ok_or(TarError::Header {
            at,
            what: "sparse map",
        })?;
        self.segments = segments;
        Ok(size)
    }

    /// GNU's old format: more of the map in blocks that follow the header.
    fn extended_sparse_headers(
        &mut self,
        at: u64,
        segments: &mut Vec<Segment>,
    ) -> Result<(), TarError> {
        // Counted in blocks too: a block may be empty and still announce another.
        for _ in 0..=sparse::MAX_SEGMENTS / header::SEGMENTS_PER_BLOCK {
            let block = self.block()?;
            if !header::extended_segments(&block, at, segments)? {
                return Ok(());
            }
        }
        Err(TarError::TooLarge {
            at,
            what: "sparse map",
        })
    }

    /// Pax sparse format 1.0: the map is decimal lines in front of the data, padded to a block.
    fn sparse_map_in_data(&mut self, at: u64) -> Result<Vec<Segment>, TarError> {
        let mut map = sparse::MapParser::default();
        loop {
            let left = self.data_left.checked_sub(BLOCK as u64);
            self.data_left = left.ok_or(TarError::Header {
                at,
                what: "sparse map",
            })?;
            let block = self.block()?;
            if let Some(segments) = map.feed(&block, at)? {
                return Ok(segments);
            }
        }
    }

    /// The next header block, or `None` at the end: two blocks of zeroes, or the stream's end between entries.
    fn header_block(&mut self) -> Result<Option<Block>, TarError> {
        if self.input.fill_buf().map_err(TarError::Input)?.is_empty() {
            return Ok(None);
        }
        let block = self.block()?;
        if block.iter().any(|byte| *byte != 0) {
            return Ok(Some(block));
        }
        if self.input.fill_buf().map_err(TarError::Input)?.is_empty() {
            return Ok(None);
        }
        let start = self.at;
        if self.block()?.iter().any(|byte| *byte != 0) {
            return Err(TarError::Header {
                at: start,
                what: "end of archive",
            });
        }
        Ok(None)
    }

    fn block(&mut self) -> Result<Block, TarError> {
        let mut block = [0; BLOCK];
        self.read_exact(&mut block)?;
        Ok(block)
    }

    /// The content of a header that describes the next entry.
    fn special(&mut self, header: &RawHeader) -> Result<Vec<u8>, TarError> {
        let size = header.size()?;
        if size > MAX_SPECIAL {
            return Err(TarError::TooLarge {
                at: header.at,
                what: "extended header",
            });
        }
        let mut content = vec![0; (size as usize).next_multiple_of(BLOCK)];
        self.read_exact(&mut content)?;
        content.truncate(size as usize);
        Ok(content)
    }

    fn read_exact(&mut self, buffer: &mut [u8]) -> Result<(), TarError> {
        self.input
            .read_exact(buffer)
            .map_err(|error| match error.kind() {
                io::ErrorKind::UnexpectedEof => TarError::Truncated { at: self.at },
                _ => TarError::Input(error),
            })?;
        self.at += buffer.len() as u64;
        Ok(())
    }

    fn skip_data(&mut self) -> Result<(), TarError> {
        let skip = self.data_left + self.padding;
        (self.data_left, self.padding) = (0, 0);
        self.segments.clear();
        let skipped = io::copy(&mut self.input.by_ref().take(skip), &mut io::sink())
            .map_err(TarError::Input)?;
        self.at += skipped;
        if skipped < skip {
            return Err(TarError::Truncated { at: self.at });
        }
        Ok(())
    }
}

fn until_nul(bytes: &[u8]) -> &[u8] {
    bytes.split(|byte| *byte == 0).next().unwrap_or_default()
}

#[cfg(test)]
mod tests;
