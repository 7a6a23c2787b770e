//! From the entries of a layer's tar to a tree: what each entry does to the ones before it.
//!
//! The rules are those of the OCI image specification (layer.md) and, where it is silent, of containerd's
//! `archive.apply`. Whiteouts become what overlayfs wants: a character device 0/0 for a removed name, the attribute
//! `trusted.overlay.opaque` for a directory whose lower content is gone. A whiteout hides lower layers only, never what
//! its own layer has, in whatever order the two come.

use std::collections::BTreeMap;
use std::io::BufRead;

use super::LayerError;
use crate::erofs::{Attributes, BLOCK, DataWriter, Node, ROOT, Tree, Xattrs, is_storable};
use crate::limits::Limits;
use crate::tar::{Entry, Kind, TarReader};

const WHITEOUT: &[u8] = b".wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";
/// AUFS's own bookkeeping, which old images carry.
const AUFS: &[u8] = b".wh..wh.";
/// Overlayfs's own attributes: in a layer, whiteouts are the only way to say what they say.
const OVERLAY_XATTR: &[u8] = b"trusted.overlay.";

/// Reads the whole archive into `tree` and writes the files' data. What follows the archive's end is left in `tar`.
pub(super) fn unpack(
    tar: &mut dyn BufRead,
    tree: &mut Tree,
    data: DataWriter,
    limits: &Limits,
) -> Result<DataWriter, LayerError> {
    let mut unpack = Unpack { tree, data, limits };
    let mut tar = TarReader::new(tar);
    while let Some(entry) = tar.next()? {
        unpack.entry(&mut tar, entry)?;
    }
    Ok(unpack.data)
}

struct Unpack<'a> {
    tree: &'a mut Tree,
    data: DataWriter,
    limits: &'a Limits,
}

impl Unpack<'_> {
    fn entry(
        &mut self,
        tar: &mut TarReader<&mut dyn BufRead>,
        entry: Entry,
    ) -> Result<(), LayerError> {
        self.check_length("path", &entry.path, &entry.path)?;
        let Some((parent, name)) = self.tree.parent(&entry.path)? else {
            // The root itself. It is there already and cannot become anything else.
            if entry.kind == Kind::Directory {
                let attributes = self.attributes(&entry)?;
                self.tree.set_attributes(ROOT, attributes)?;
            }
            return Ok(());
        };
        if name == OPAQUE {
            self.tree.set_opaque(parent);
            return Ok(());
        }
        if name.starts_with(AUFS) {
            return Ok(());
        }
        if let Some(hidden) = name.strip_prefix(WHITEOUT) {
            return self.whiteout(parent, hidden, &entry);
        }

        let attributes = self.attributes(&entry)?;
        let present = self.tree.child(parent, name);
        let node = match entry.kind {
            Kind::HardLink { target } => {
                self.check_length("target", &target, &entry.path)?;
                let missing = || {
                    crate::erofs::TreeError::NoTarget(String::from_utf8_lossy(name).into_owned())
                };
                let inode = self.tree.lookup(&target)?.ok_or_else(missing)?;
                return Ok(self.tree.link(parent, name, inode)?);
            }
            Kind::Directory => match present {
                Some(directory) if self.tree.is_directory(directory) => {
                    return Ok(self.tree.set_attributes(directory, attributes)?);
                }
                _ => Node::Directory(Box::default()),
            },
            Kind::File { size } => self.file(tar, size)?,
            Kind::Symlink { target } => {
                self.check_length("target", &target, &entry.path)?;
                Node::Symlink(target.into())
            }
            Kind::CharDevice { major, minor } => Node::CharDevice { major, minor },
            Kind::BlockDevice { major, minor } => Node::BlockDevice { major, minor },
            Kind::Fifo => Node::Fifo,
        };
        let is_directory = matches!(node, Node::Directory(_));
        let replaces_whiteout = present.is_some_and(|present| self.tree.is_whiteout(present));
        let inode = self.tree.insert(parent, name, attributes, node)?;
        if is_directory && replaces_whiteout {
            self.tree.set_opaque(inode);
        }
        Ok(())
    }

    /// Hides `name` of lower layers.
    fn whiteout(&mut self, parent: u32, name: &[u8], entry: &Entry) -> Result<(), LayerError> {
        if name.is_empty() || name == b"." || name == b".." {
            let path = String::from_utf8_lossy(&entry.path).into_owned();
            return Err(crate::erofs::TreeError::Escapes(path).into());
        }
        if let Some(present) = self.tree.child(parent, name) {
            // What this layer has there hides the lower one, but a directory would be merged with it.
            self.tree.set_opaque(present);
            return Ok(());
        }
        let attributes = Attributes {
            mtime: entry.mtime,
            ..Attributes::default()
        };
        let node = Node::CharDevice { major: 0, minor: 0 };
        self.tree.insert(parent, name, attributes, node)?;
        Ok(())
    }

    /// Copies a file's data to the image.
    fn file(
        &mut self,
        tar: &mut TarReader<&mut dyn BufRead>,
        size: u64,
    ) -> Result<Node, LayerError> {
        let position = self.data.position();
        let end = size
            .checked_next_multiple_of(BLOCK)
            .and_then(|size| position.checked_add(size));
        if end.is_none_or(|end| end > self.limits.max_layer_bytes) {
            return Err(LayerError::TooLarge(self.limits.max_layer_bytes));
        }
        let data = &mut self.data;
        tar.data(|offset, piece| {
            let hole = position + offset - data.position();
            data.write_zeroes(hole)
                .and_then(|()| data.write(piece))
                .map_err(LayerError::Write)
        })?;
        let hole = position + size - data.position();
        data.write_zeroes(hole)
            .and_then(|()| data.pad())
            .map_err(LayerError::Write)?;
        Ok(Node::File { position, size })
    }

    fn attributes(&self, entry: &Entry) -> Result<Attributes, LayerError> {
        let mut xattrs: BTreeMap<&[u8], &[u8]> = BTreeMap::new();
        for (name, value) in &entry.xattrs {
            if is_storable(name) && !name.starts_with(OVERLAY_XATTR) {
                xattrs.insert(name, value);
            }
        }
        let path = || String::from_utf8_lossy(&entry.path).into_owned();
        let bytes: usize = xattrs
            .iter()
            .map(|(name, value)| name.len() + value.len())
            .sum();
        if bytes > self.limits.max_xattr_bytes {
            return Err(LayerError::TooLong {
                what: "extended attributes",
                path: path(),
            });
        }
        let xattrs = Xattrs::new(xattrs).map_err(|source| LayerError::Xattr {
            path: path(),
            source,
        })?;
        Ok(Attributes {
            mode: entry.mode,
            uid: entry.uid,
            gid: entry.gid,
            mtime: entry.mtime,
            xattrs,
        })
    }

    fn check_length(
        &self,
        what: &'static str,
        value: &[u8],
        path: &[u8],
    ) -> Result<(), LayerError> {
        if value.len() < self.limits.max_path_bytes {
            return Ok(());
        }
        let shown = &path[..path.len().min(200)];
        Err(LayerError::TooLong {
            what,
            path: String::from_utf8_lossy(shown).into_owned(),
        })
    }
}
