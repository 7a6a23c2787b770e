//! The empty file system that a pod writes to: a sparse file with an ext4 of a given size.
//!
//! Written directly, not by mke2fs: it takes a handful of blocks, and well under a millisecond for any size, because
//! each block group but the first and the last is only *declared* empty (`uninit_bg`: the kernel makes a group's
//! bitmaps when it first allocates there) and the holes of a fresh file are the zeroed inode tables. Without a journal:
//! the disk does not outlive its virtual machine. Without copies of the superblock and without reserved blocks.
//!
//! On-disk format: <https://docs.kernel.org/filesystems/ext4/>. Oracle: `e2fsck -fn`.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

const BLOCK: u64 = 4096;
/// As many as a bitmap of one block has bits.
const BLOCKS_PER_GROUP: u64 = 8 * BLOCK;
const INODE_SIZE: u64 = 256;
/// One inode for 16 KiB, mke2fs's usual ratio.
const INODES_PER_GROUP: u64 = BLOCKS_PER_GROUP * BLOCK / 16384;
const INODE_TABLE_BLOCKS: u64 = INODES_PER_GROUP * INODE_SIZE / BLOCK;
/// `struct ext4_group_desc` without the feature 64bit.
const DESCRIPTOR: usize = 32;
/// Each group's: its two bitmaps and its part of the inode table.
const GROUP_OVERHEAD: u64 = 2 + INODE_TABLE_BLOCKS;
/// Smallest last group that is worth its overhead.
const MIN_GROUP: u64 = 2 * GROUP_OVERHEAD;

const ROOT_INODE: u32 = 2;
/// The first one that is not reserved. e2fsck wants it there.
const LOST_FOUND_INODE: u32 = 11;

const COMPAT_EXT_ATTR: u32 = 0x8;
const COMPAT_DIR_INDEX: u32 = 0x20;
/// Copies of the superblock only where `s_backup_bgs` says: nowhere.
const COMPAT_SPARSE_SUPER2: u32 = 0x200;
const INCOMPAT_FILETYPE: u32 = 0x2;
const INCOMPAT_EXTENTS: u32 = 0x40;
const RO_COMPAT_LARGE_FILE: u32 = 0x2;
const RO_COMPAT_HUGE_FILE: u32 = 0x8;
/// "uninit_bg": groups may be declared empty, and descriptors have checksums.
const RO_COMPAT_GDT_CSUM: u32 = 0x10;
const RO_COMPAT_DIR_NLINK: u32 = 0x20;
const RO_COMPAT_EXTRA_ISIZE: u32 = 0x40;

const BG_INODE_UNINIT: u16 = 0x1;
const BG_BLOCK_UNINIT: u16 = 0x2;
/// The inode table is zeroed: the kernel need not do it in the background.
const BG_INODE_ZEROED: u16 = 0x4;

/// No two of these file systems meet in one machine, and nothing looks for one by its UUID.
const UUID: [u8; 16] = *b"podvisor-scratch";

/// Smallest and largest file system, bytes.
const MIN_BYTES: u64 = 16 << 20;
const MAX_BYTES: u64 = 8 << 40;

/// Creates `path`, which must not exist, as an empty ext4 file system of `bytes` bytes (rounded down to 4 KiB) and
/// returns it open for reading and writing. The file is sparse: it takes some 30 KiB until the pod writes. Only root
/// may open it. A file that could not be completed is removed.
///
/// # Errors
/// `InvalidInput` below 16 MiB or above 8 TiB; else what the host's file system says.
pub fn create(path: &Path, bytes: u64) -> io::Result<File> {
    if !(MIN_BYTES..=MAX_BYTES).contains(&bytes) {
        let words = format!("a scratch disk of {bytes} bytes: {MIN_BYTES} to {MAX_BYTES} wanted");
        return Err(io::Error::new(io::ErrorKind::InvalidInput, words));
    }
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)?;
    let written = file
        .set_len(bytes / BLOCK * BLOCK)
        .and_then(|()| Geometry::new(bytes / BLOCK).write(&file));
    if let Err(error) = written {
        // The first error is the one to tell.
        let _ = std::fs::remove_file(path);
        return Err(error);
    }
    Ok(file)
}

/// Where everything is. All numbers are of blocks.
struct Geometry {
    blocks: u64,
    groups: u64,
    /// The superblock's block and the group descriptors, in front of group 0.
    head: u64,
}

impl Geometry {
    fn new(blocks: u64) -> Self {
        // What is too short to be a group is left unused.
        let rest = blocks % BLOCKS_PER_GROUP;
        let blocks = if rest < MIN_GROUP {
            blocks - rest
        } else {
            blocks
        };
        let groups = blocks.div_ceil(BLOCKS_PER_GROUP);
        let head = 1 + (groups * DESCRIPTOR as u64).div_ceil(BLOCK);
        Self {
            blocks,
            groups,
            head,
        }
    }

    /// First block of a group that is not the file system's own head.
    fn group_start(&self, group: u64) -> u64 {
        if group == 0 {
            self.head
        } else {
            group * BLOCKS_PER_GROUP
        }
    }

    fn group_blocks(&self, group: u64) -> u64 {
        (self.blocks - group * BLOCKS_PER_GROUP).min(BLOCKS_PER_GROUP)
    }

    /// Blocks in use in a group, all at its start.
    fn used_blocks(&self, group: u64) -> u64 {
        let directories = if group == 0 { 2 } else { 0 };
        self.group_start(group) % BLOCKS_PER_GROUP + GROUP_OVERHEAD + directories
    }

    fn root_block(&self) -> u64 {
        self.head + GROUP_OVERHEAD
    }

    fn write(&self, file: &File) -> io::Result<()> {
        let last = self.groups - 1;
        let mut head = vec![0; (self.head * BLOCK) as usize];
        self.superblock(&mut head[1024..2048]);
        for group in 0..self.groups {
            let start = BLOCK as usize + group as usize * DESCRIPTOR;
            self.descriptor(group, &mut head[start..start + DESCRIPTOR]);
        }
        file.write_all_at(&head, 0)?;
        file.write_all_at(&self.block_bitmap(0), self.group_start(0) * BLOCK)?;
        if last > 0 {
            file.write_all_at(&self.block_bitmap(last), self.group_start(last) * BLOCK)?;
        }
        let inode_bitmap = bitmap(0..u64::from(LOST_FOUND_INODE), INODES_PER_GROUP);
        file.write_all_at(&inode_bitmap, (self.head + 1) * BLOCK)?;

        let table = (self.head + 2) * BLOCK;
        let inode_at = |number: u32| table + u64::from(number - 1) * INODE_SIZE;
        let (root, lost_found) = (self.root_block(), self.root_block() + 1);
        file.write_all_at(&directory_inode(0o755, 3, root), inode_at(ROOT_INODE))?;
        file.write_all_at(
            &directory_inode(0o700, 2, lost_found),
            inode_at(LOST_FOUND_INODE),
        )?;
        let entries = [
            (ROOT_INODE, "."),
            (ROOT_INODE, ".."),
            (LOST_FOUND_INODE, "lost+found"),
        ];
        file.write_all_at(&directory(&entries), root * BLOCK)?;
        file.write_all_at(
            &directory(&[(LOST_FOUND_INODE, "."), (ROOT_INODE, "..")]),
            lost_found * BLOCK,
        )
    }

    /// `struct ext4_super_block`.
    fn superblock(&self, out: &mut [u8]) {
        let used: u64 = (0..self.groups).map(|group| self.used_blocks(group)).sum();
        let inodes = self.groups * INODES_PER_GROUP;
        let mut put =
            |offset: usize, bytes: &[u8]| out[offset..offset + bytes.len()].copy_from_slice(bytes);
        for (offset, value) in [
            (0x00, inodes),
            (0x04, self.blocks),
            (0x0c, self.blocks - used),
            (0x10, inodes - u64::from(LOST_FOUND_INODE)),
            // Block and cluster size: 1024 << 2.
            (0x18, 2),
            (0x1c, 2),
            (0x20, BLOCKS_PER_GROUP),
            (0x24, BLOCKS_PER_GROUP),
            (0x28, INODES_PER_GROUP),
            // Revision 1: features, inodes of any size.
            (0x4c, 1),
            (0x54, u64::from(LOST_FOUND_INODE)),
            (
                0x5c,
                u64::from(COMPAT_EXT_ATTR | COMPAT_DIR_INDEX | COMPAT_SPARSE_SUPER2),
            ),
            (0x60, u64::from(INCOMPAT_FILETYPE | INCOMPAT_EXTENTS)),
            // Hashes of directory entries are of signed characters.
            (0x160, 1),
        ] {
            put(offset, &(value as u32).to_le_bytes());
        }
        let ro_compat = RO_COMPAT_LARGE_FILE
            | RO_COMPAT_HUGE_FILE
            | RO_COMPAT_GDT_CSUM
            | RO_COMPAT_DIR_NLINK
            | RO_COMPAT_EXTRA_ISIZE;
        put(0x64, &ro_compat.to_le_bytes());
        // Never checked for having been mounted often.
        put(0x36, &u16::MAX.to_le_bytes());
        put(0x38, &0xef53u16.to_le_bytes());
        // Clean; on errors: go on.
        put(0x3a, &1u16.to_le_bytes());
        put(0x3c, &1u16.to_le_bytes());
        put(0x58, &(INODE_SIZE as u16).to_le_bytes());
        put(0x68, &UUID);
        put(0x78, b"scratch");
        put(0xec, &UUID);
        // Directory hash: half MD4.
        put(0xfc, &[1]);
        // Room for the newer fields of an inode: at least, and wanted.
        put(0x15c, &32u16.to_le_bytes());
        put(0x15e, &32u16.to_le_bytes());
    }

    fn descriptor(&self, group: u64, out: &mut [u8]) {
        let start = self.group_start(group);
        let used_inodes = if group == 0 {
            u64::from(LOST_FOUND_INODE)
        } else {
            0
        };
        let directories: u16 = if group == 0 { 2 } else { 0 };
        let flags = match group {
            0 => BG_INODE_ZEROED,
            // The kernel wants the last group's bitmap to know its end.
            last if last + 1 == self.groups => BG_INODE_ZEROED | BG_INODE_UNINIT,
            _ => BG_INODE_ZEROED | BG_INODE_UNINIT | BG_BLOCK_UNINIT,
        };
        let free_blocks = self.group_blocks(group) - self.used_blocks(group);
        let free_inodes = (INODES_PER_GROUP - used_inodes) as u16;
        let mut put =
            |offset: usize, bytes: &[u8]| out[offset..offset + bytes.len()].copy_from_slice(bytes);
        put(0x00, &(start as u32).to_le_bytes());
        put(0x04, &(start as u32 + 1).to_le_bytes());
        put(0x08, &(start as u32 + 2).to_le_bytes());
        put(0x0c, &(free_blocks as u16).to_le_bytes());
        put(0x0e, &free_inodes.to_le_bytes());
        put(0x10, &directories.to_le_bytes());
        put(0x12, &flags.to_le_bytes());
        put(0x1c, &free_inodes.to_le_bytes());
        let checksum = crc16(&[&UUID[..], &(group as u32).to_le_bytes(), &out[..0x1e]]);
        out[0x1e..0x20].copy_from_slice(&checksum.to_le_bytes());
    }

    fn block_bitmap(&self, group: u64) -> Vec<u8> {
        bitmap(0..self.used_blocks(group), self.group_blocks(group))
    }
}

/// A block of bits: those in `used` are set, and those from `end` on, which stand for nothing.
fn bitmap(used: std::ops::Range<u64>, end: u64) -> Vec<u8> {
    let mut bits = vec![0u8; BLOCK as usize];
    for bit in used.chain(end..8 * BLOCK) {
        bits[(bit / 8) as usize] |= 1 << (bit % 8);
    }
    bits
}

/// `struct ext4_inode` of a directory with one block.
fn directory_inode(permissions: u16, links: u16, block: u64) -> Vec<u8> {
    let mut inode = vec![0; INODE_SIZE as usize];
    let mut put =
        |offset: usize, bytes: &[u8]| inode[offset..offset + bytes.len()].copy_from_slice(bytes);
    put(0x00, &(0o040_000 | permissions).to_le_bytes());
    put(0x04, &(BLOCK as u32).to_le_bytes());
    put(0x1a, &links.to_le_bytes());
    // In sectors.
    put(0x1c, &(BLOCK as u32 / 512).to_le_bytes());
    // EXT4_EXTENTS_FL.
    put(0x20, &0x8_0000u32.to_le_bytes());
    // An extent header (magic, entries, room, depth) and one extent (of block 0, one block long).
    put(0x28, &0xf30au16.to_le_bytes());
    put(0x2a, &1u16.to_le_bytes());
    put(0x2c, &4u16.to_le_bytes());
    put(0x38, &1u16.to_le_bytes());
    put(0x3c, &(block as u32).to_le_bytes());
    put(0x80, &32u16.to_le_bytes());
    inode
}

/// A block of `struct ext4_dir_entry_2`, all of them directories; the last one takes what is left.
fn directory(entries: &[(u32, &str)]) -> Vec<u8> {
    let mut block = Vec::with_capacity(BLOCK as usize);
    for (i, (inode, name)) in entries.iter().enumerate() {
        let length = if i + 1 == entries.len() {
            BLOCK as usize - block.len()
        } else {
            (8 + name.len()).next_multiple_of(4)
        };
        let end = block.len() + length;
        block.extend(inode.to_le_bytes());
        block.extend((length as u16).to_le_bytes());
        block.extend([name.len() as u8, 2]);
        block.extend(name.as_bytes());
        block.resize(end, 0);
    }
    block
}

/// CRC-16 as the kernel's `crc16()` has it, begun with all ones.
fn crc16(parts: &[&[u8]]) -> u16 {
    const POLYNOMIAL: u16 = 0xa001;
    parts.iter().copied().flatten().fold(u16::MAX, |crc, byte| {
        (0..8).fold(crc ^ u16::from(*byte), |crc, _| {
            (crc >> 1) ^ (POLYNOMIAL & (crc & 1).wrapping_neg())
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;
    use std::process::Command;

    const MIB: u64 = 1 << 20;

    #[test]
    fn e2fsck_finds_nothing_at_any_size() {
        let dir = tempfile::tempdir().unwrap();
        let group = BLOCKS_PER_GROUP * BLOCK;
        let sizes = [
            MIN_BYTES,
            100 * MIB + 12_345,
            group,
            group + BLOCK,
            group + MIN_GROUP * BLOCK,
            3 * group - BLOCK,
            10 << 30,
            // More than one block of group descriptors.
            129 * group + 7 * MIB,
        ];
        for bytes in sizes {
            let path = dir.path().join(bytes.to_string());
            let file = create(&path, bytes).unwrap();
            let metadata = file.metadata().unwrap();
            assert_eq!(metadata.len(), bytes / BLOCK * BLOCK);
            assert!(
                metadata.blocks() * 512 < 128 << 10,
                "{bytes}: {} sectors",
                metadata.blocks()
            );
            let check = Command::new("e2fsck")
                .arg("-fn")
                .arg(&path)
                .output()
                .unwrap();
            assert!(
                check.status.success(),
                "{bytes}: {}",
                String::from_utf8_lossy(&check.stdout)
            );
        }
    }

    #[test]
    fn refuses_other_sizes_and_files_that_exist() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        for bytes in [0, MIN_BYTES - 1, MAX_BYTES + 1, u64::MAX] {
            assert_eq!(
                create(&path, bytes).unwrap_err().kind(),
                io::ErrorKind::InvalidInput
            );
            assert!(!path.exists());
        }
        create(&path, MIN_BYTES).unwrap();
        assert_eq!(
            create(&path, MIN_BYTES).unwrap_err().kind(),
            io::ErrorKind::AlreadyExists
        );
        assert!(path.exists());
    }
}
