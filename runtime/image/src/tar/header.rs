//! The 512 byte header block.

use super::sparse::Segment;
use super::{BLOCK, Mtime, TarError, sparse, until_nul};

pub(super) type Block = [u8; BLOCK];

/// Descriptors in a block that extends a GNU sparse map.
pub(super) const SEGMENTS_PER_BLOCK: usize = 21;

/// Which fields a header has beyond those of V7.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Format {
    V7,
    Ustar,
    /// ustar with a shorter prefix.
    Star,
    Gnu,
}

/// A header whose checksum is right.
pub(super) struct RawHeader {
    block: Block,
    pub(super) at: u64,
    pub(super) format: Format,
    /// The type of the entry. NUL is an old way to say regular file.
    pub(super) flag: u8,
}

impl RawHeader {
    pub(super) fn parse(block: &Block, at: u64) -> Result<Self, TarError> {
        let stored = number(&block[148..156]).ok_or(TarError::Checksum { at })?;
        let checksum_field = 148..156;
        let bytes = || {
            block.iter().enumerate().map(|(i, byte)| {
                if checksum_field.contains(&i) {
                    b' '
                } else {
                    *byte
                }
            })
        };
        let unsigned: i64 = bytes().map(i64::from).sum();
        // Some old writers added up signed characters.
        let signed: i64 = bytes().map(|byte| i64::from(byte.cast_signed())).sum();
        if stored != unsigned && stored != signed {
            return Err(TarError::Checksum { at });
        }
        let format = match (&block[257..263], &block[263..265]) {
            (b"ustar\0", _) if &block[508..512] == b"tar\0" => Format::Star,
            (b"ustar\0", _) => Format::Ustar,
            (b"ustar ", b" \0") => Format::Gnu,
            _ => Format::V7,
        };
        Ok(Self {
            block: *block,
            at,
            format,
            flag: block[156],
        })
    }

    pub(super) fn path(&self) -> Vec<u8> {
        let name = until_nul(&self.block[0..100]);
        let prefix = match self.format {
            Format::Ustar => until_nul(&self.block[345..500]),
            Format::Star => until_nul(&self.block[345..476]),
            Format::V7 | Format::Gnu => &[],
        };
        if prefix.is_empty() {
            name.to_vec()
        } else {
            [prefix, b"/", name].concat()
        }
    }

    pub(super) fn link_name(&self) -> Vec<u8> {
        until_nul(&self.block[157..257]).to_vec()
    }

    pub(super) fn size(&self) -> Result<u64, TarError> {
        self.unsigned(&self.block[124..136], "size")
    }

    pub(super) fn mode(&self) -> Result<u16, TarError> {
        // Some writers keep the file's type here as well: the type flag decides.
        let mode = number(&self.block[100..108]).ok_or(self.invalid("mode"))?;
        Ok((mode & 0o7777) as u16)
    }

    pub(super) fn uid(&self) -> Result<u32, TarError> {
        self.unsigned(&self.block[108..116], "uid")
    }

    pub(super) fn gid(&self) -> Result<u32, TarError> {
        self.unsigned(&self.block[116..124], "gid")
    }

    pub(super) fn mtime(&self) -> Result<Mtime, TarError> {
        let seconds = number(&self.block[136..148]).ok_or(self.invalid("modification time"))?;
        Ok(Mtime { seconds, nanos: 0 })
    }

    /// Major and minor number, within Linux's 12 and 20 bits.
    pub(super) fn device(&self) -> Result<(u32, u32), TarError> {
        if self.format == Format::V7 {
            return Ok((0, 0));
        }
        let major: u32 = self.unsigned(&self.block[329..337], "device number")?;
        let minor: u32 = self.unsigned(&self.block[337..345], "device number")?;
        if major >= 1 << 12 || minor >= 1 << 20 {
            return Err(self.invalid("device number"));
        }
        Ok((major, minor))
    }

    /// GNU's old sparse format: the file's logical size.
    pub(super) fn sparse_size(&self) -> Result<u64, TarError> {
        self.unsigned(&self.block[483..495], "sparse size")
    }

    /// GNU's old sparse format: the map's first descriptors, and whether blocks with more of them follow.
    pub(super) fn sparse_segments(&self) -> Result<(Vec<Segment>, bool), TarError> {
        let mut segments = Vec::new();
        descriptors(&self.block[386..482], self.at, &mut segments)?;
        Ok((segments, self.block[482] != 0))
    }

    fn unsigned<T: TryFrom<i64>>(&self, field: &[u8], what: &'static str) -> Result<T, TarError> {
        number(field)
            .and_then(|value| T::try_from(value).ok())
            .ok_or(self.invalid(what))
    }

    fn invalid(&self, what: &'static str) -> TarError {
        TarError::Header { at: self.at, what }
    }
}

/// Descriptors of a block that follows a GNU sparse header; whether yet another block follows.
pub(super) fn extended_segments(
    block: &Block,
    at: u64,
    segments: &mut Vec<Segment>,
) -> Result<bool, TarError> {
    descriptors(&block[..SEGMENTS_PER_BLOCK * 24], at, segments)?;
    Ok(block[504] != 0)
}

fn descriptors(field: &[u8], at: u64, segments: &mut Vec<Segment>) -> Result<(), TarError> {
    for descriptor in field.chunks_exact(24) {
        let (offset, length) = descriptor.split_at(12);
        if offset[0] == 0 {
            break;
        }
        let value = |field| number(field).and_then(|value| u64::try_from(value).ok());
        let (Some(offset), Some(length)) = (value(offset), value(length)) else {
            return Err(TarError::Header {
                at,
                what: "sparse map",
            });
        };
        sparse::push(segments, Segment { offset, length }, at)?;
    }
    Ok(())
}

/// A number in octal digits, or big-endian two's complement with the first bit set ("base-256").
fn number(field: &[u8]) -> Option<i64> {
    let (&first, rest) = field.split_first()?;
    if first & 0x80 != 0 {
        // The marker bit is not part of the number; the next one is its sign.
        let negative = first & 0x40 != 0;
        let mut value: i128 = if negative {
            i128::from(first) - 0x100
        } else {
            i128::from(first & 0x7f)
        };
        for byte in rest {
            value = value.checked_mul(256)?.checked_add(i128::from(*byte))?;
        }
        return i64::try_from(value).ok();
    }
    let is_padding = |byte: &u8| *byte == b' ' || *byte == 0;
    let start = field
        .iter()
        .position(|byte| !is_padding(byte))
        .unwrap_or(field.len());
    let digits = &field[start..];
    let end = digits.iter().position(is_padding).unwrap_or(digits.len());
    digits[..end]
        .iter()
        .try_fold(0i64, |value, digit| match digit {
            b'0'..=b'7' => value.checked_mul(8)?.checked_add(i64::from(digit - b'0')),
            _ => None,
        })
}

#[cfg(test)]
mod tests {
    use super::number;

    #[test]
    fn numbers() {
        assert_eq!(number(b"0000644\0"), Some(0o644));
        assert_eq!(number(b"   644 \0"), Some(0o644));
        assert_eq!(number(b"\0\0\0\0\0\0\0\0"), Some(0));
        assert_eq!(number(b"00000009"), None);
        assert_eq!(number(b"777777777777"), Some(0o777_777_777_777));
        assert_eq!(
            number(&[0x80, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0]),
            Some(1 << 32)
        );
        assert_eq!(number(&[0xff; 12]), Some(-1));
        assert_eq!(
            number(&[
                0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xfe
            ]),
            Some(-2)
        );
        assert_eq!(
            number(&[
                0xbf, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff
            ]),
            None
        );
    }
}
