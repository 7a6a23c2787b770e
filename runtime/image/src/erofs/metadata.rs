//! Inodes and directories: where each goes, and how it is written.

use std::borrow::Cow;
use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufWriter, Seek, SeekFrom, Write};

use super::directory::{self, Entry};
use super::tree::{Inode, InodeId, Node, ROOT, Tree};
use super::{BLOCK, Xattrs};
use crate::tar::Mtime;

/// Inodes are addressed in units of 32 bytes.
const SLOT: u64 = 32;
const COMPACT: u64 = 32;
const EXTENDED: u64 = 64;
/// fsck.erofs reads an attributes' header behind every inode, also where there are none: behind the last one, too, the
/// image must have that many bytes.
const XATTR_HEADER: u64 = super::xattr::HEADER as u64;
/// The first inode's slot. Not 0: that would be inode number 0, which readdir(3) has long taken for no entry.
const FIRST_SLOT: u64 = 2;
/// The root is the first inode, so that its number fits the superblock's 16 bits.
pub(super) const ROOT_NID: u16 = FIRST_SLOT as u16;

const LAYOUT_FLAT_PLAIN: u16 = 0;
const LAYOUT_FLAT_INLINE: u16 = 2;
/// In place of a block's address, where there is no data.
const NO_BLOCK: u32 = u32::MAX;

const S_IFIFO: u16 = 0o010_000;
const S_IFCHR: u16 = 0o020_000;
const S_IFDIR: u16 = 0o040_000;
const S_IFBLK: u16 = 0o060_000;
const S_IFREG: u16 = 0o100_000;
const S_IFLNK: u16 = 0o120_000;

/// Where everything is that is not file data.
pub(super) struct Layout {
    /// The most common modification time: inodes that have it can be of the compact kind.
    pub(super) epoch: Mtime,
    pub(super) inodes: u64,
    /// First block of the inodes.
    pub(super) meta_block: u32,
    /// First block behind them.
    pub(super) end_block: u32,
    /// First block of directories' and long links' content.
    content_block: u32,
    /// By place, the root first.
    order: Vec<Place>,
    /// By [`InodeId`]; 0 for those that were replaced.
    nids: Vec<u64>,
}

/// Where one inode is.
struct Place {
    inode: InodeId,
    /// First block of content that has blocks of its own, if any.
    block: u32,
    /// Bytes of content right behind the inode and its attributes.
    inline: u64,
    /// `i_nlink`.
    links: u32,
}

impl Layout {
    /// `data_blocks` are in use: the superblock's and the files'.
    pub(super) fn new(tree: &Tree, data_blocks: u64) -> io::Result<Self> {
        let epoch = most_common_mtime(tree);
        let mut nids = vec![0; tree.inodes.len()];
        let mut order = Vec::new();
        let mut at = FIRST_SLOT * SLOT;
        let mut content_blocks = 0;
        let mut pending = vec![ROOT];
        while let Some(id) = pending.pop() {
            // A hard link's inode is met once for each name.
            if nids[id as usize] != 0 {
                continue;
            }
            let inode = &tree.inodes[id as usize];
            let mut links = inode.names;
            if let Node::Directory(directory) = &inode.node {
                let is_directory = |child: &&InodeId| tree.is_directory(**child);
                links = 2 + directory.children.values().filter(is_directory).count() as u32;
                pending.extend(directory.children.values().rev());
            }
            let content = content_size(inode);
            let header = inode_size(inode, epoch, links) + xattrs(inode)?.bytes().len() as u64;
            let mut inline = content % BLOCK;
            // Content behind an inode must not cross a block's end; an inode with large attributes leaves no room.
            if header + inline > BLOCK {
                inline = 0;
            }
            let together = if inline > 0 {
                header + inline
            } else {
                EXTENDED
            };
            if at % BLOCK + together > BLOCK {
                at = at.next_multiple_of(BLOCK);
            }
            let blocks = (content - inline).div_ceil(BLOCK);
            let block = if blocks > 0 {
                block_number(data_blocks + content_blocks)?
            } else {
                NO_BLOCK
            };
            content_blocks += blocks;
            nids[id as usize] = at / SLOT;
            at = (at + header + inline).next_multiple_of(SLOT);
            order.push(Place {
                inode: id,
                block,
                inline,
                links,
            });
        }
        let meta_block = data_blocks + content_blocks;
        let end = at + XATTR_HEADER;
        Ok(Self {
            epoch,
            inodes: order.len() as u64,
            meta_block: block_number(meta_block)?,
            end_block: block_number(meta_block + end.div_ceil(BLOCK))?,
            content_block: block_number(data_blocks)?,
            order,
            nids,
        })
    }

    pub(super) fn write(&self, tree: &Tree, file: &File) -> io::Result<()> {
        // Two passes over the directories, each writing forward: content blocks, then inodes.
        let mut out = BufWriter::with_capacity(1 << 20, file);
        out.seek(SeekFrom::Start(u64::from(self.content_block) * BLOCK))?;
        for place in self.order.iter().filter(|place| place.block != NO_BLOCK) {
            let content = self.content(tree, place.inode);
            let own = &content[..content.len() - place.inline as usize];
            out.write_all(own)?;
            write_zeroes(
                &mut out,
                own.len().next_multiple_of(BLOCK as usize) - own.len(),
            )?;
        }
        let mut at = 0;
        for place in &self.order {
            let inode = &tree.inodes[place.inode as usize];
            let start = self.nids[place.inode as usize] * SLOT;
            write_zeroes(&mut out, (start - at) as usize)?;
            let header = self.inode(place, inode)?;
            let xattrs = xattrs(inode)?;
            out.write_all(&header)?;
            out.write_all(xattrs.bytes())?;
            if place.inline > 0 {
                let content = self.content(tree, place.inode);
                out.write_all(&content[content.len() - place.inline as usize..])?;
            }
            at = start + header.len() as u64 + xattrs.bytes().len() as u64 + place.inline;
        }
        out.flush()
    }

    /// `struct erofs_inode_compact` or `struct erofs_inode_extended`.
    fn inode(&self, place: &Place, inode: &Inode) -> io::Result<Vec<u8>> {
        let attributes = &inode.attributes;
        let size = match inode.node {
            Node::File { size, .. } => size,
            _ => content_size(inode),
        };
        let layout = if place.inline > 0 {
            LAYOUT_FLAT_INLINE
        } else {
            LAYOUT_FLAT_PLAIN
        };
        let compact = inode_size(inode, self.epoch, place.links) == COMPACT;
        let union = match inode.node {
            Node::File { size: 0, .. } => NO_BLOCK,
            Node::File { position, .. } => block_number(position / BLOCK)?,
            Node::Directory(_) | Node::Symlink(_) => place.block,
            Node::CharDevice { major, minor } | Node::BlockDevice { major, minor } => {
                // Linux's new_encode_dev().
                (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12)
            }
            Node::Fifo => 0,
        };
        // The number that a 32-bit stat() shows.
        let number = self.nids[place.inode as usize] as u32;
        let mut bytes = Vec::with_capacity(EXTENDED as usize);
        bytes.extend(((layout << 1) | u16::from(!compact)).to_le_bytes());
        bytes.extend(xattrs(inode)?.count().to_le_bytes());
        bytes.extend((file_type_bits(&inode.node) | attributes.mode).to_le_bytes());
        if compact {
            bytes.extend((place.links as u16).to_le_bytes());
            bytes.extend((size as u32).to_le_bytes());
            bytes.extend([0; 4]);
            bytes.extend(union.to_le_bytes());
            bytes.extend(number.to_le_bytes());
            bytes.extend((attributes.uid as u16).to_le_bytes());
            bytes.extend((attributes.gid as u16).to_le_bytes());
            bytes.extend([0; 4]);
        } else {
            bytes.extend([0; 2]);
            bytes.extend(size.to_le_bytes());
            bytes.extend(union.to_le_bytes());
            bytes.extend(number.to_le_bytes());
            bytes.extend(attributes.uid.to_le_bytes());
            bytes.extend(attributes.gid.to_le_bytes());
            bytes.extend(attributes.mtime.seconds.to_le_bytes());
            bytes.extend(attributes.mtime.nanos.to_le_bytes());
            bytes.extend(place.links.to_le_bytes());
            bytes.extend([0; 16]);
        }
        Ok(bytes)
    }

    /// A directory's entries or a symbolic link's target.
    fn content<'t>(&self, tree: &'t Tree, id: InodeId) -> Cow<'t, [u8]> {
        let directory = match &tree.inodes[id as usize].node {
            Node::Directory(directory) => directory,
            Node::Symlink(target) => return Cow::Borrowed(target),
            _ => return Cow::Borrowed(&[]),
        };
        let dots = [(&b"."[..], id), (&b".."[..], directory.parent)];
        let mut entries: Vec<_> = directory
            .children
            .iter()
            .map(|(name, child)| (&**name, *child))
            .chain(dots)
            .collect();
        entries.sort_unstable_by_key(|(name, _)| *name);
        let names: Vec<Entry<'_>> = entries
            .into_iter()
            .map(|(name, child)| Entry {
                name,
                nid: self.nids[child as usize],
                file_type: dirent_type(&tree.inodes[child as usize].node),
            })
            .collect();
        Cow::Owned(directory::content(&names))
    }
}

/// Bytes that a directory or a symbolic link has in the metadata.
fn content_size(inode: &Inode) -> u64 {
    match &inode.node {
        Node::Directory(directory) => {
            // "." and ".." go where they sort, which decides how the blocks are packed.
            let mut names: Vec<&[u8]> = directory
                .children
                .keys()
                .map(|name| &**name)
                .chain([&b"."[..], b".."])
                .collect();
            names.sort_unstable();
            directory::size(names.into_iter())
        }
        Node::Symlink(target) => target.len() as u64,
        _ => 0,
    }
}

fn inode_size(inode: &Inode, epoch: Mtime, links: u32) -> u64 {
    let attributes = &inode.attributes;
    let small = |number: u32| u16::try_from(number).is_ok();
    let size_fits = !matches!(inode.node, Node::File { size, .. } if u32::try_from(size).is_err());
    let compact = attributes.mtime == epoch
        && small(attributes.uid)
        && small(attributes.gid)
        && small(links)
        && size_fits;
    if compact { COMPACT } else { EXTENDED }
}

fn xattrs(inode: &Inode) -> io::Result<Cow<'_, Xattrs>> {
    match &inode.node {
        Node::Directory(directory) if directory.opaque => {
            let with_opaque = inode.attributes.xattrs.with_opaque();
            with_opaque
                .map(Cow::Owned)
                .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
        }
        _ => Ok(Cow::Borrowed(&inode.attributes.xattrs)),
    }
}

fn most_common_mtime(tree: &Tree) -> Mtime {
    let mut counts: HashMap<Mtime, u32> = HashMap::new();
    for inode in tree.inodes.iter().filter(|inode| inode.names > 0) {
        *counts.entry(inode.attributes.mtime).or_default() += 1;
    }
    // The earliest of the most common: a map's order is not the same twice.
    let best = counts
        .into_iter()
        .max_by_key(|(mtime, count)| (*count, std::cmp::Reverse(*mtime)));
    best.map(|(mtime, _)| mtime).unwrap_or_default()
}

fn file_type_bits(node: &Node) -> u16 {
    match node {
        Node::Directory(_) => S_IFDIR,
        Node::File { .. } => S_IFREG,
        Node::Symlink(_) => S_IFLNK,
        Node::CharDevice { .. } => S_IFCHR,
        Node::BlockDevice { .. } => S_IFBLK,
        Node::Fifo => S_IFIFO,
    }
}

/// `EROFS_FT_*`.
fn dirent_type(node: &Node) -> u8 {
    match node {
        Node::File { .. } => 1,
        Node::Directory(_) => 2,
        Node::CharDevice { .. } => 3,
        Node::BlockDevice { .. } => 4,
        Node::Fifo => 5,
        Node::Symlink(_) => 7,
    }
}

/// Addresses are 32 bits: an image is below 16 TiB.
fn block_number(block: u64) -> io::Result<u32> {
    match u32::try_from(block) {
        Ok(number) if number != NO_BLOCK => Ok(number),
        _ => Err(io::Error::new(
            io::ErrorKind::FileTooLarge,
            "more than 16 TiB in one layer",
        )),
    }
}

fn write_zeroes(out: &mut impl Write, count: usize) -> io::Result<()> {
    io::copy(&mut io::Read::take(io::repeat(0), count as u64), out).map(drop)
}
