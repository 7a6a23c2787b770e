//! The tree of a layer while it is built: in memory, with a bound on its size.

use std::collections::BTreeMap;

use super::Xattrs;
use crate::tar::Mtime;

/// Longest name in a directory (Linux's NAME_MAX).
const MAX_NAME: usize = 255;
/// Symbolic links followed in one path, as Linux does.
const MAX_LINKS: usize = 40;
/// Steps of one path, those through links included.
const MAX_STEPS: usize = 4096;

/// An inode's number in a [`Tree`].
pub(crate) type InodeId = u32;

/// What every inode has.
#[derive(Debug, Clone, Default)]
pub(crate) struct Attributes {
    /// Permission bits (0o7777).
    pub(crate) mode: u16,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) mtime: Mtime,
    pub(crate) xattrs: Xattrs,
}

/// What an inode is.
#[derive(Debug)]
pub(crate) enum Node {
    Directory(Box<Directory>),
    /// Data in consecutive blocks from `position`, bytes from the start of the image.
    File {
        position: u64,
        size: u64,
    },
    Symlink(Box<[u8]>),
    CharDevice {
        major: u32,
        minor: u32,
    },
    BlockDevice {
        major: u32,
        minor: u32,
    },
    Fifo,
}

/// A directory's names, in the order that EROFS wants.
#[derive(Debug, Default)]
pub(crate) struct Directory {
    pub(super) children: BTreeMap<Box<[u8]>, InodeId>,
    pub(super) parent: InodeId,
    /// What lower layers have here is hidden.
    pub(super) opaque: bool,
}

#[derive(Debug)]
pub(super) struct Inode {
    pub(super) attributes: Attributes,
    pub(super) node: Node,
    /// Names of this inode; 0 once it has been replaced.
    pub(super) names: u32,
}

/// Why an entry has no place in the tree.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum TreeError {
    #[error("{0:?} leaves the layer")]
    Escapes(String),
    #[error("a part of {0:?} is not a directory")]
    NotADirectory(String),
    #[error("{0:?} has too many symbolic links or parts")]
    TooManyLinks(String),
    #[error("the name {0:?} is longer than {MAX_NAME} bytes")]
    NameTooLong(String),
    #[error("the target of hard link {0:?} is not in the layer")]
    NoTarget(String),
    #[error("the target of hard link {0:?} is a directory")]
    DirectoryTarget(String),
    #[error("more than {0} entries in the layer")]
    TooManyEntries(usize),
    #[error("names, links and extended attributes of the layer take more than {0} bytes")]
    TooMuchMetadata(usize),
}

/// The tree. Inode 0 is the root.
#[derive(Debug)]
pub(crate) struct Tree {
    pub(super) inodes: Vec<Inode>,
    max_entries: usize,
    entries: usize,
    max_metadata: usize,
    metadata: usize,
}

pub(crate) const ROOT: InodeId = 0;

impl Tree {
    /// A tree with an empty root directory. `max_entries` names, and `max_metadata` bytes of names, symlink targets
    /// and attributes may be added, replaced ones included.
    pub(crate) fn new(max_entries: usize, max_metadata: usize) -> Self {
        let root = Inode {
            attributes: implied(),
            node: Node::Directory(Box::default()),
            names: 1,
        };
        Self {
            inodes: vec![root],
            max_entries,
            entries: 0,
            max_metadata,
            metadata: 0,
        }
    }

    /// The directory in which the last part of `path` is, made where it is missing, and that last part. The root
    /// has no name: `None`. Symbolic links on the way are followed inside the layer, as unpacking in a chroot would.
    pub(crate) fn parent<'p>(
        &mut self,
        path: &'p [u8],
    ) -> Result<Option<(InodeId, &'p [u8])>, TreeError> {
        let Some((parents, name)) = split_last(path)? else {
            return Ok(None);
        };
        let directory = self.walk(path, parents, true)?;
        Ok(directory.map(|directory| (directory, name)))
    }

    /// The inode at `path`; its last part is not followed if it is a symbolic link.
    pub(crate) fn lookup(&mut self, path: &[u8]) -> Result<Option<InodeId>, TreeError> {
        let Some((parents, name)) = split_last(path)? else {
            return Ok(Some(ROOT));
        };
        let directory = self.walk(path, parents, false)?;
        Ok(directory.and_then(|directory| self.child(directory, name)))
    }

    pub(crate) fn child(&self, directory: InodeId, name: &[u8]) -> Option<InodeId> {
        match &self.inodes[directory as usize].node {
            Node::Directory(directory) => directory.children.get(name).copied(),
            _ => None,
        }
    }

    pub(crate) fn is_directory(&self, inode: InodeId) -> bool {
        matches!(self.inodes[inode as usize].node, Node::Directory(_))
    }

    /// Overlayfs's whiteout: a character device 0/0.
    pub(crate) fn is_whiteout(&self, inode: InodeId) -> bool {
        matches!(
            self.inodes[inode as usize].node,
            Node::CharDevice { major: 0, minor: 0 }
        )
    }

    pub(crate) fn set_attributes(
        &mut self,
        inode: InodeId,
        attributes: Attributes,
    ) -> Result<(), TreeError> {
        self.account(attributes.xattrs.bytes().len())?;
        self.inodes[inode as usize].attributes = attributes;
        Ok(())
    }

    /// Makes a directory hide what lower layers have in its place.
    pub(crate) fn set_opaque(&mut self, inode: InodeId) {
        if let Node::Directory(directory) = &mut self.inodes[inode as usize].node {
            directory.opaque = true;
        }
    }

    /// Adds an inode as `name` in `directory`, in place of what has that name.
    pub(crate) fn insert(
        &mut self,
        directory: InodeId,
        name: &[u8],
        attributes: Attributes,
        mut node: Node,
    ) -> Result<InodeId, TreeError> {
        let target = if let Node::Symlink(target) = &node {
            target.len()
        } else {
            0
        };
        self.account(attributes.xattrs.bytes().len() + target)?;
        if let Node::Directory(new) = &mut node {
            new.parent = directory;
        }
        let inode = self.inodes.len() as InodeId;
        self.inodes.push(Inode {
            attributes,
            node,
            names: 0,
        });
        self.name(directory, name, inode)?;
        Ok(inode)
    }

    /// Gives `inode`, not a directory, one more name.
    pub(crate) fn link(
        &mut self,
        directory: InodeId,
        name: &[u8],
        inode: InodeId,
    ) -> Result<(), TreeError> {
        if self.child(directory, name) == Some(inode) {
            return Ok(());
        }
        if self.is_directory(inode) {
            return Err(TreeError::DirectoryTarget(lossy(name)));
        }
        self.name(directory, name, inode)
    }

    fn name(&mut self, directory: InodeId, name: &[u8], inode: InodeId) -> Result<(), TreeError> {
        if name.len() > MAX_NAME {
            return Err(TreeError::NameTooLong(lossy(name)));
        }
        self.account(name.len())?;
        self.entries += 1;
        if self.entries > self.max_entries {
            return Err(TreeError::TooManyEntries(self.max_entries));
        }
        let replaced = match &mut self.inodes[directory as usize].node {
            Node::Directory(directory) => directory.children.insert(name.into(), inode),
            _ => return Err(TreeError::NotADirectory(lossy(name))),
        };
        self.inodes[inode as usize].names += 1;
        if let Some(replaced) = replaced {
            self.unname(replaced);
        }
        Ok(())
    }

    /// Takes a name from an inode. A directory's whole subtree goes with it.
    fn unname(&mut self, inode: InodeId) {
        let mut pending = vec![inode];
        while let Some(inode) = pending.pop() {
            let inode = &mut self.inodes[inode as usize];
            inode.names -= 1;
            if inode.names == 0 {
                inode.attributes.xattrs = Xattrs::default();
                if let Node::Directory(directory) = std::mem::replace(&mut inode.node, Node::Fifo) {
                    pending.extend(directory.children.into_values());
                }
            }
        }
    }

    /// Follows `parents` from the root. `None` if a part is missing and must not be made.
    fn walk(
        &mut self,
        path: &[u8],
        parents: &[u8],
        create: bool,
    ) -> Result<Option<InodeId>, TreeError> {
        let mut at = ROOT;
        let (mut links, mut steps) = (0, 0);
        // Parts still to go, the next one last.
        let mut parts: Vec<Box<[u8]>> = parts(parents).rev().map(Into::into).collect();
        while let Some(part) = parts.pop() {
            steps += 1;
            if steps > MAX_STEPS {
                return Err(TreeError::TooManyLinks(lossy(path)));
            }
            // Only a link's target has it here. The root is its own parent.
            if &*part == b".." {
                if let Node::Directory(directory) = &self.inodes[at as usize].node {
                    at = directory.parent;
                }
                continue;
            }
            let Some(child) = self
                .child(at, &part)
                .filter(|child| !(create && self.is_whiteout(*child)))
            else {
                if !create {
                    return Ok(None);
                }
                // A whiteout of that name says that a lower layer's directory must not shine through.
                let opaque = self.child(at, &part).is_some();
                at = self.insert(at, &part, implied(), Node::Directory(Box::default()))?;
                if opaque {
                    self.set_opaque(at);
                }
                continue;
            };
            match &self.inodes[child as usize].node {
                Node::Directory(_) => at = child,
                Node::Symlink(target) => {
                    links += 1;
                    if links > MAX_LINKS {
                        return Err(TreeError::TooManyLinks(lossy(path)));
                    }
                    if target.starts_with(b"/") {
                        at = ROOT;
                    }
                    parts.extend(self::parts(target).rev().map(Into::into));
                }
                _ => return Err(TreeError::NotADirectory(lossy(path))),
            }
        }
        Ok(Some(at))
    }

    fn account(&mut self, bytes: usize) -> Result<(), TreeError> {
        self.metadata += bytes;
        if self.metadata > self.max_metadata {
            return Err(TreeError::TooMuchMetadata(self.max_metadata));
        }
        Ok(())
    }
}

/// The attributes of directories that no entry describes.
fn implied() -> Attributes {
    Attributes {
        mode: 0o755,
        ..Attributes::default()
    }
}

/// A path without its last part, and that part.
type Split<'p> = (&'p [u8], &'p [u8]);

/// Everything before the last part of an entry's path, and the last part. `None` for the root.
///
/// An absolute path is taken from the layer's root, as tar and containerd do. `..` is refused even where it would stay
/// in the layer.
fn split_last(path: &[u8]) -> Result<Option<Split<'_>>, TreeError> {
    if parts(path).any(|part| part == b"..") {
        return Err(TreeError::Escapes(lossy(path)));
    }
    let Some(name) = parts(path).next_back() else {
        return Ok(None);
    };
    // `name` is a part of `path`: what is before it ends where it begins.
    let start = name.as_ptr() as usize - path.as_ptr() as usize;
    Ok(Some((&path[..start], name)))
}

fn parts(path: &[u8]) -> impl DoubleEndedIterator<Item = &[u8]> {
    path.split(|byte| *byte == b'/')
        .filter(|part| !part.is_empty() && *part != b".")
}

/// For messages; cut where it would fill a log.
fn lossy(path: &[u8]) -> String {
    const SHOWN: usize = 200;
    let text = String::from_utf8_lossy(&path[..path.len().min(SHOWN)]);
    if path.len() > SHOWN {
        format!("{text}…")
    } else {
        text.into_owned()
    }
}
