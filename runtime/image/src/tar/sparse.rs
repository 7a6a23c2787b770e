//! Maps of sparse files.

use super::TarError;
use super::pax::decimal;

/// Most pieces of data in a sparse file. 1 MiB of memory; a file with more of them is no image's.
pub(super) const MAX_SEGMENTS: usize = 1 << 16;
/// Longest decimal number in a map.
const MAX_DIGITS: usize = 20;

/// A piece of a file that is stored in the archive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Segment {
    pub(crate) offset: u64,
    pub(crate) length: u64,
}

pub(super) fn push(segments: &mut Vec<Segment>, segment: Segment, at: u64) -> Result<(), TarError> {
    if segments.len() >= MAX_SEGMENTS {
        return Err(TarError::TooLarge {
            at,
            what: "sparse map",
        });
    }
    segments.push(segment);
    Ok(())
}

/// `Some` if the segments are in order, do not overlap, lie in a file of `size` bytes and take exactly `stored` bytes.
pub(super) fn check(segments: &[Segment], size: u64, stored: u64) -> Option<()> {
    let (mut end, mut total) = (0u64, 0u64);
    for segment in segments {
        if segment.offset < end {
            return None;
        }
        end = segment.offset.checked_add(segment.length)?;
        total = total.checked_add(segment.length)?;
    }
    (end <= size && total == stored).then_some(())
}

/// Pax sparse format 1.0: lines with the number of segments, then offset and length of each.
#[derive(Default)]
pub(super) struct MapParser {
    line: Vec<u8>,
    /// Numbers that are still to come; unknown before the first line.
    wanted: Option<u64>,
    offset: Option<u64>,
    segments: Vec<Segment>,
}

impl MapParser {
    /// Takes the next block; the map when it is complete. The rest of that block is padding.
    pub(super) fn feed(&mut self, block: &[u8], at: u64) -> Result<Option<Vec<Segment>>, TarError> {
        let invalid = TarError::Header {
            at,
            what: "sparse map",
        };
        for byte in block {
            if *byte != b'\n' {
                if self.line.len() == MAX_DIGITS {
                    return Err(invalid);
                }
                self.line.push(*byte);
                continue;
            }
            let Some(number) = decimal::<u64>(&self.line) else {
                return Err(invalid);
            };
            self.line.clear();
            match (self.wanted, self.offset.take()) {
                (None, _) if number > MAX_SEGMENTS as u64 => {
                    return Err(TarError::TooLarge {
                        at,
                        what: "sparse map",
                    });
                }
                (None, _) => self.wanted = Some(2 * number),
                (Some(wanted), None) => {
                    self.offset = Some(number);
                    self.wanted = Some(wanted - 1);
                }
                (Some(wanted), Some(offset)) => {
                    self.segments.push(Segment {
                        offset,
                        length: number,
                    });
                    self.wanted = Some(wanted - 1);
                }
            }
            if self.wanted == Some(0) {
                return Ok(Some(std::mem::take(&mut self.segments)));
            }
        }
        Ok(None)
    }
}
