//! A writer of uncompressed EROFS images, in one pass.
//!
//! On-disk format: `fs/erofs/erofs_fs.h` of Linux 6.12 and <https://erofs.docs.kernel.org/en/latest/core_ondisk.html>.
//! File data comes first, each file in consecutive 4 KiB blocks in the order in which it arrives, so that nothing is
//! held back; the tree is in memory and is written behind the data when it is complete; the superblock, which is
//! at the start, is written last:
//!
//! ```text
//! block 0       superblock at byte 1024
//! blocks        data of files (blocks of zeroes are holes of the host's file)
//! blocks        whole blocks of directories
//! meta_blkaddr  inodes: each with its extended attributes, then a symlink's target or a directory's last part
//! ```
//!
//! The same tree in the same order gives the same bytes.

mod data;
mod directory;
mod metadata;
mod tree;
mod xattr;

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

pub(crate) use data::DataWriter;
pub(crate) use tree::{Attributes, Node, ROOT, Tree, TreeError};
pub(crate) use xattr::{XattrError, Xattrs, is_storable};

/// The format's block size, and the host's page size.
pub(crate) const BLOCK: u64 = 4096;

const SUPERBLOCK_OFFSET: usize = 1024;
const MAGIC: u32 = 0xe0f5_e1e2;
const BLOCK_BITS: u8 = 12;
/// The superblock has a checksum.
const COMPAT_CHECKSUM: u32 = 0x1;
/// Time stamps are modification times.
const COMPAT_MTIME: u32 = 0x2;

/// Writes the tree behind the data, then the superblock. Returns the length of the image in bytes.
pub(crate) fn finish(tree: &Tree, data: DataWriter) -> io::Result<u64> {
    let (file, data_blocks) = data.finish()?;
    let layout = metadata::Layout::new(tree, data_blocks)?;
    layout.write(tree, &file)?;
    write_superblock(&layout, &file)?;
    let length = u64::from(layout.end_block) * BLOCK;
    file.set_len(length)?;
    Ok(length)
}

fn write_superblock(layout: &metadata::Layout, file: &File) -> io::Result<()> {
    let mut block = vec![0u8; BLOCK as usize];
    let superblock = &mut block[SUPERBLOCK_OFFSET..];
    let mut put = |offset: usize, bytes: &[u8]| {
        superblock[offset..offset + bytes.len()].copy_from_slice(bytes);
    };
    put(0, &MAGIC.to_le_bytes());
    put(8, &(COMPAT_CHECKSUM | COMPAT_MTIME).to_le_bytes());
    put(12, &[BLOCK_BITS]);
    put(14, &metadata::ROOT_NID.to_le_bytes());
    put(16, &layout.inodes.to_le_bytes());
    put(24, &layout.epoch.seconds.to_le_bytes());
    put(32, &layout.epoch.nanos.to_le_bytes());
    put(36, &layout.end_block.to_le_bytes());
    put(40, &layout.meta_block.to_le_bytes());
    // Computed with the field itself as zero, to the end of the block.
    let checksum = crc32c(&block[SUPERBLOCK_OFFSET..]);
    block[SUPERBLOCK_OFFSET + 4..][..4].copy_from_slice(&checksum.to_le_bytes());
    file.write_all_at(&block, 0)
}

/// CRC-32C as EROFS has it: begins with all ones, is not inverted at the end.
fn crc32c(bytes: &[u8]) -> u32 {
    const POLYNOMIAL: u32 = 0x82f6_3b78;
    bytes.iter().fold(u32::MAX, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| {
            (crc >> 1) ^ (POLYNOMIAL & (crc & 1).wrapping_neg())
        })
    })
}

#[cfg(test)]
mod tests;
