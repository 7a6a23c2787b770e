//! Memory that the VM has been given while it runs, taken into use by the kernel (its
//! Documentation/admin-guide/mm/memory-hotplug.rst).

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;

use nix::fcntl::{OFlag, openat};
use nix::sys::stat::Mode;
use podvisor_proto::agent::{AddMemoryRequest, MemoryRange};

use crate::mount::{FileSystem, MountError};

/// In sysfs: an address that is written here is that of a block to be added.
const PROBE: &str = "devices/system/memory/probe";
/// Bytes of a block, in hexadecimal.
const BLOCK_BYTES: &str = "devices/system/memory/block_size_bytes";

/// Why memory is not in use.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// Not what the kernel takes.
    #[error("memory from {start:#x} on, {length:#x} bytes: not of whole blocks of {block:#x}")]
    Blocks {
        /// The range.
        start: u64,
        /// Its bytes.
        length: u64,
        /// The kernel's block.
        block: u64,
    },
    /// No sysfs.
    #[error("mounting sysfs: {0}")]
    Mount(#[from] MountError),
    /// A file of the kernel's.
    #[error("{file}: {source}")]
    File {
        /// In sysfs.
        file: &'static str,
        /// The kernel's reason.
        source: io::Error,
    },
    /// The kernel refused a block.
    #[error("adding memory at {address:#x}: {source}")]
    Add {
        /// Of the block.
        address: u64,
        /// The kernel's reason.
        source: io::Error,
    },
}

/// Takes what is new into use. Blocks.
pub fn add(request: &AddMemoryRequest) -> Result<(), MemoryError> {
    // Nowhere in the tree: containers that may have a sysfs mount their own.
    let sysfs = FileSystem::open(c"sysfs")?.mount(0)?;
    let mut text = String::new();
    open(sysfs.as_fd(), BLOCK_BYTES, OFlag::O_RDONLY)
        .and_then(|mut file| file.read_to_string(&mut text))
        .map_err(file(BLOCK_BYTES))?;
    let block = u64::from_str_radix(text.trim(), 16)
        .map_err(io::Error::other)
        .map_err(file(BLOCK_BYTES))?;
    let addresses = blocks(&request.ranges, block)?;
    let mut probe = open(sysfs.as_fd(), PROBE, OFlag::O_WRONLY).map_err(file(PROBE))?;
    for address in addresses {
        match probe.write_all(format!("{address:#x}").as_bytes()) {
            // It is there already.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            added => added.map_err(|source| MemoryError::Add { address, source })?,
        }
    }
    Ok(())
}

/// Addresses of the blocks, of `block` bytes each, that `ranges` are.
fn blocks(ranges: &[MemoryRange], block: u64) -> Result<Vec<u64>, MemoryError> {
    let mut addresses = Vec::new();
    for &MemoryRange { start, length } in ranges {
        let end = start.checked_add(length);
        match end {
            Some(end) if block > 0 && start % block == 0 && length % block == 0 => {
                addresses.extend((start..end).step_by(block as usize));
            }
            _ => {
                return Err(MemoryError::Blocks {
                    start,
                    length,
                    block,
                });
            }
        }
    }
    Ok(addresses)
}

fn open(sysfs: BorrowedFd<'_>, path: &str, flags: OFlag) -> io::Result<File> {
    let file = openat(
        sysfs,
        Path::new(path),
        flags | OFlag::O_CLOEXEC,
        Mode::empty(),
    )?;
    Ok(file.into())
}

fn file(file: &'static str) -> impl FnOnce(io::Error) -> MemoryError {
    move |source| MemoryError::File { file, source }
}

/// Total and available bytes, from /proc/meminfo; zeroes when that is not mounted yet.
pub fn read() -> (u64, u64) {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let bytes = |name: &str| {
        text.lines()
            .find_map(|line| line.strip_prefix(name))
            .and_then(|rest| rest.trim_start_matches(':').split_whitespace().next())
            .and_then(|kib| kib.parse::<u64>().ok())
            .unwrap_or(0)
            * 1024
    };
    (bytes("MemTotal"), bytes("MemAvailable"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const BLOCK: u64 = 128 << 20;

    fn range(start: u64, length: u64) -> MemoryRange {
        MemoryRange { start, length }
    }

    #[test]
    fn each_block_has_an_address() {
        let ranges = [range(4 * BLOCK, 2 * BLOCK), range(32 * BLOCK, BLOCK)];
        let addresses = blocks(&ranges, BLOCK).unwrap();
        assert_eq!(addresses, [4 * BLOCK, 5 * BLOCK, 32 * BLOCK]);
        assert!(blocks(&[], BLOCK).unwrap().is_empty());
    }

    #[test]
    fn only_whole_blocks() {
        for wrong in [
            range(BLOCK / 2, BLOCK),
            range(BLOCK, BLOCK / 2),
            range(u64::MAX - BLOCK + 1, 2 * BLOCK),
        ] {
            assert!(blocks(&[wrong], BLOCK).is_err(), "{wrong:?}");
        }
        assert!(blocks(&[range(0, 4096)], 0).is_err());
    }
}
