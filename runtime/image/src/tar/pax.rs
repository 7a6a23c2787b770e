//! Pax extended headers: `LENGTH KEY=VALUE\n` records that override fields of the entry after them.

use super::sparse::{MAX_SEGMENTS, Segment};
use super::{Mtime, TarError, sparse};

/// What an extended header says about its entry. An empty value means: as if the record were not there.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Pax {
    pub(super) path: Option<Vec<u8>>,
    pub(super) linkpath: Option<Vec<u8>>,
    pub(super) size: Option<u64>,
    pub(super) uid: Option<u32>,
    pub(super) gid: Option<u32>,
    pub(super) mtime: Option<Mtime>,
    pub(super) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    pub(super) sparse: SparseKeys,
}

/// `GNU.sparse.*`: three formats. 0.0 and 0.1 have the map here, 1.0 has it in front of the data.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct SparseKeys {
    /// The file's path; the entry's own is made up.
    pub(super) name: Option<Vec<u8>>,
    /// The file's logical size.
    pub(super) size: Option<u64>,
    major: Option<u64>,
    minor: Option<u64>,
    /// Offsets and lengths in turns.
    numbers: Vec<u64>,
    has_map: bool,
}

impl Pax {
    pub(super) fn parse(mut records: &[u8], at: u64) -> Result<Self, TarError> {
        let invalid = |what| TarError::Header { at, what };
        let mut pax = Self::default();
        while !records.is_empty() {
            let (key, value, rest) = record(records).ok_or(invalid("extended header"))?;
            records = rest;
            pax.set(key, value, at)?;
        }
        Ok(pax)
    }

    fn set(&mut self, key: &[u8], value: &[u8], at: u64) -> Result<(), TarError> {
        let invalid = |what| TarError::Header { at, what };
        if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
            self.xattrs.push((name.to_vec(), value.to_vec()));
            return Ok(());
        }
        let some = !value.is_empty();
        match key {
            b"path" => self.path = some.then(|| value.to_vec()),
            b"linkpath" => self.linkpath = some.then(|| value.to_vec()),
            b"size" => self.size = optional(value, invalid("size"))?,
            b"uid" => self.uid = optional(value, invalid("uid"))?,
            b"gid" => self.gid = optional(value, invalid("gid"))?,
            b"mtime" if some => self.mtime = Some(time(value).ok_or(invalid("modification time"))?),
            b"GNU.sparse.name" => {
                self.sparse.name = (some && !value.contains(&0)).then(|| value.to_vec());
            }
            b"GNU.sparse.major" => {
                self.sparse.major = optional(value, invalid("sparse version"))?;
            }
            b"GNU.sparse.minor" => {
                self.sparse.minor = optional(value, invalid("sparse version"))?;
            }
            b"GNU.sparse.size" | b"GNU.sparse.realsize" => {
                self.sparse.size = optional(value, invalid("sparse size"))?;
            }
            b"GNU.sparse.offset" | b"GNU.sparse.numbytes" => {
                // The two alternate, beginning with an offset.
                if (key == b"GNU.sparse.offset") != self.sparse.numbers.len().is_multiple_of(2) {
                    return Err(invalid("sparse map"));
                }
                self.sparse.has_map = true;
                self.sparse.push(value, at)?;
            }
            b"GNU.sparse.map" => {
                self.sparse.has_map = true;
                self.sparse.numbers.clear();
                if some {
                    value
                        .split(|byte| *byte == b',')
                        .try_for_each(|number| self.sparse.push(number, at))?;
                }
            }
            _ => {}
        }
        Ok(())
    }
}

impl SparseKeys {
    pub(super) fn is_version_1(&self) -> bool {
        (self.major, self.minor) == (Some(1), Some(0))
    }

    /// The map of formats 0.0 and 0.1.
    pub(super) fn segments(&self, at: u64) -> Result<Option<Vec<Segment>>, TarError> {
        if !self.has_map {
            return Ok(None);
        }
        let (pairs, odd) = self.numbers.as_chunks::<2>();
        if !odd.is_empty() {
            return Err(TarError::Header {
                at,
                what: "sparse map",
            });
        }
        let mut segments = Vec::with_capacity(pairs.len());
        for &[offset, length] in pairs {
            sparse::push(&mut segments, Segment { offset, length }, at)?;
        }
        Ok(Some(segments))
    }

    fn push(&mut self, value: &[u8], at: u64) -> Result<(), TarError> {
        if self.numbers.len() >= 2 * MAX_SEGMENTS {
            return Err(TarError::TooLarge {
                at,
                what: "sparse map",
            });
        }
        self.numbers.push(decimal(value).ok_or(TarError::Header {
            at,
            what: "sparse map",
        })?);
        Ok(())
    }
}

/// The first record: key, value, and what follows it.
fn record(records: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let space = records.iter().position(|byte| *byte == b' ')?;
    let length: usize = decimal(&records[..space])?;
    let record = records.get(space + 1..length)?.strip_suffix(b"\n")?;
    let equals = record.iter().position(|byte| *byte == b'=')?;
    let key = &record[..equals];
    if key.is_empty() || key.contains(&0) {
        return None;
    }
    Some((key, &record[equals + 1..], &records[length..]))
}

pub(super) fn decimal<T: std::str::FromStr>(digits: &[u8]) -> Option<T> {
    // Not "+1", which parse() would take.
    if !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(digits).ok()?.parse().ok()
}

/// A number, or nothing.
fn optional<T: std::str::FromStr>(value: &[u8], invalid: TarError) -> Result<Option<T>, TarError> {
    if value.is_empty() {
        return Ok(None);
    }
    decimal(value).map(Some).ok_or(invalid)
}

/// `-?SECONDS[.FRACTION]`; digits beyond nanoseconds are cut.
fn time(value: &[u8]) -> Option<Mtime> {
    let (negative, value) = match value.strip_prefix(b"-") {
        Some(rest) => (true, rest),
        None => (false, value),
    };
    let mut parts = value.splitn(2, |byte| *byte == b'.');
    let seconds: i64 = decimal(parts.next()?)?;
    let fraction = parts.next().unwrap_or_default();
    if !fraction.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let digit = |i: usize| fraction.get(i).map_or(0, |digit| u32::from(digit - b'0'));
    let nanos = (0..9).fold(0, |nanos, i| nanos * 10 + digit(i));
    Some(match (negative, nanos) {
        (false, nanos) => Mtime { seconds, nanos },
        (true, 0) => Mtime {
            seconds: -seconds,
            nanos: 0,
        },
        (true, nanos) => Mtime {
            seconds: -seconds - 1,
            nanos: 1_000_000_000 - nanos,
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(records: &[u8]) -> Result<Pax, TarError> {
        Pax::parse(records, 0)
    }

    #[test]
    fn records() {
        let pax =
            parse(b"12 path=a/b\n29 SCHILY.xattr.user.x=a\0=\nb\n20 mtime=-1.5000001\n").unwrap();
        assert_eq!(pax.path.as_deref(), Some(&b"a/b"[..]));
        assert_eq!(pax.xattrs, [(b"user.x".to_vec(), b"a\0=\nb".to_vec())]);
        assert_eq!(
            pax.mtime,
            Some(Mtime {
                seconds: -2,
                nanos: 499_999_900
            })
        );
    }

    #[test]
    fn malformed_records_are_errors() {
        for records in [
            &b"x"[..],
            b"5",
            b"99 path=a\n",
            b"7 path=a\n",
            b"0 a=b\n",
            b"-1 a=b\n",
            b"+6 a=b\n",
            b"4 =\n",
            b"9 size=-\n",
            b"11 size=-1\n",
            b"18446744073709551616 a=b\n",
            b"14 uid=4294967296\n",
            b"3 \n",
            b"2 \n",
        ] {
            assert!(
                parse(records).is_err(),
                "{:?}",
                String::from_utf8_lossy(records)
            );
        }
    }
}
