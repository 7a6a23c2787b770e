//! Extended attributes, in an inode's own area.

/// `struct erofs_xattr_ibody_header`.
pub(super) const HEADER: usize = 12;
/// The inode counts the area in units of 4 bytes, in 16 bits, the header as one.
const MAX_AREA: usize = HEADER + 4 * (u16::MAX as usize - 1);

/// The prefixes that a name is stored without, and what stands for each (`EROFS_XATTR_INDEX_*`).
const PREFIXES: [(&[u8], u8); 5] = [
    (b"user.", 1),
    (b"system.posix_acl_access", 2),
    (b"system.posix_acl_default", 3),
    (b"trusted.", 4),
    (b"security.", 6),
];

/// The extended attributes of an inode as they are on disk. Without attributes: no bytes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Xattrs(Box<[u8]>);

/// An attribute that the format cannot hold.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum XattrError {
    #[error("extended attribute with an invalid name {0:?}")]
    Name(String),
    #[error("value of extended attribute {0:?} longer than 65535 bytes")]
    Value(String),
    #[error("extended attributes of one file too large")]
    Total,
}

impl Xattrs {
    /// `attributes` are full names, each [storable](is_storable), and values; they are stored in that order.
    pub(crate) fn new<'a>(
        attributes: impl IntoIterator<Item = (&'a [u8], &'a [u8])>,
    ) -> Result<Self, XattrError> {
        let mut area = Vec::new();
        for (name, value) in attributes {
            append(&mut area, name, value)?;
        }
        Ok(Self(area.into()))
    }

    /// These and the mark of a directory that hides what lower layers have in its place.
    pub(super) fn with_opaque(&self) -> Result<Self, XattrError> {
        let mut area = self.0.to_vec();
        append(&mut area, b"trusted.overlay.opaque", b"y")?;
        Ok(Self(area.into()))
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.0
    }

    /// `i_xattr_icount`.
    pub(super) fn count(&self) -> u16 {
        match self.0.len() {
            0 => 0,
            length => ((length - HEADER) / 4 + 1) as u16,
        }
    }
}

fn append(area: &mut Vec<u8>, name: &[u8], value: &[u8]) -> Result<(), XattrError> {
    let shown = || String::from_utf8_lossy(name).into_owned();
    let (prefix, rest) = split(name).ok_or_else(|| XattrError::Name(shown()))?;
    let rest_length = u8::try_from(rest.len()).map_err(|_| XattrError::Name(shown()))?;
    let value_length = u16::try_from(value.len()).map_err(|_| XattrError::Value(shown()))?;
    if area.is_empty() {
        area.resize(HEADER, 0);
    }
    area.extend_from_slice(&[rest_length, prefix]);
    area.extend_from_slice(&value_length.to_le_bytes());
    area.extend_from_slice(rest);
    area.extend_from_slice(value);
    area.resize(area.len().next_multiple_of(4), 0);
    if area.len() > MAX_AREA {
        Err(XattrError::Total)
    } else {
        Ok(())
    }
}

/// Whether EROFS has a place for an attribute of this name. Others (`system.nfs4_acl`, `com.apple.…`) have no meaning
/// on Linux's file systems, where containerd fails to set them and goes on.
pub(crate) fn is_storable(name: &[u8]) -> bool {
    split(name).is_some()
}

fn split(name: &[u8]) -> Option<(u8, &[u8])> {
    PREFIXES.iter().find_map(|(prefix, index)| {
        let rest = name.strip_prefix(*prefix)?;
        // An ACL's name is all prefix, any other needs more.
        (prefix.ends_with(b".") != rest.is_empty() && !rest.contains(&0)).then_some((*index, rest))
    })
}
