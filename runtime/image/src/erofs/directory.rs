//! Directories on disk: blocks of sorted entries, each block with its own names.

use super::BLOCK;

/// `struct erofs_dirent`.
const DIRENT: usize = 12;

/// A name in a directory, `.` and `..` included.
#[derive(Debug, Clone, Copy)]
pub(super) struct Entry<'a> {
    pub(super) name: &'a [u8],
    pub(super) nid: u64,
    pub(super) file_type: u8,
}

/// The size of a directory with these names, which must be sorted: whole blocks, and the bytes in the last one.
pub(super) fn size<'a>(names: impl Iterator<Item = &'a [u8]>) -> u64 {
    let (mut full, mut last) = (0, 0);
    for name in names {
        let entry = (DIRENT + name.len()) as u64;
        if last + entry > BLOCK {
            full += BLOCK;
            last = 0;
        }
        last += entry;
    }
    full + last
}

/// The content of a directory with these entries, which must be sorted.
///
/// In each block: the entries, then their names without gaps. The first entry's name offset tells how many there are.
/// Names do not end with NUL, but the rest of a block is zero.
pub(super) fn content(entries: &[Entry<'_>]) -> Vec<u8> {
    let mut content = Vec::new();
    let mut rest = entries;
    while !rest.is_empty() {
        let mut used = 0;
        let fits = |name: &&Entry<'_>| {
            used += DIRENT + name.name.len();
            used <= BLOCK as usize
        };
        let count = rest.iter().take_while(fits).count();
        let (block, more) = rest.split_at(count);
        write_block(block, &mut content);
        if !more.is_empty() {
            content.resize(content.len().next_multiple_of(BLOCK as usize), 0);
        }
        rest = more;
    }
    content
}

fn write_block(block: &[Entry<'_>], content: &mut Vec<u8>) {
    let mut name_offset = block.len() * DIRENT;
    for entry in block {
        content.extend_from_slice(&entry.nid.to_le_bytes());
        content.extend_from_slice(&(name_offset as u16).to_le_bytes());
        content.extend_from_slice(&[entry.file_type, 0]);
        name_offset += entry.name.len();
    }
    for entry in block {
        content.extend_from_slice(entry.name);
    }
}
