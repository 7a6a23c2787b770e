//! How much memory a VM has, and more of it while it runs.
//!
//! A VM's RAM is numbered from 0 on; what is beyond 3 GiB of it is at 4 GiB and above in the guest's address space, on
//! both backends. The guest begins with the first bytes of it. What it is given later begins at the next multiple of the
//! guest kernel's *memory block*, by which it takes memory (the kernel's
//! Documentation/admin-guide/mm/memory-hotplug.rst), and is not taken back.

use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use thiserror::Error;

use crate::kvm::layout;

/// Size of a memory block of a guest that boots with less than [`LARGE_BLOCKS_FROM`]: of a section of the memory map
/// (`probe_memory_block_size` in the kernel's arch/x86/mm/init_64.c).
const BLOCK_BYTES: u64 = 128 << 20;
/// The largest that others have.
const LARGE_BLOCK_BYTES: u64 = 2 << 30;
/// End of the RAM, in the guest's address space, from which on blocks may be larger.
const LARGE_BLOCKS_FROM: u64 = 64 << 30;

/// How much RAM there is and may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RamSize {
    /// Bytes that the guest boots with.
    pub boot: u64,
    /// Bytes that it may get to.
    pub max: u64,
}

impl RamSize {
    fn block(&self) -> u64 {
        if address(self.boot) < LARGE_BLOCKS_FROM {
            BLOCK_BYTES
        } else {
            LARGE_BLOCK_BYTES
        }
    }

    /// Where RAM that is added begins.
    fn added_start(&self) -> u64 {
        // A block is aligned in the address space, and one of 2 GiB is not in RAM that 1 GiB of devices is left out of.
        let start = address(self.boot).next_multiple_of(self.block());
        if start > layout::DEVICES_START {
            start - layout::DEVICES_BYTES
        } else {
            start
        }
    }

    /// Bytes that are to be added so that there are at least `wanted` in all, in whole blocks.
    fn added(&self, wanted: u64) -> u64 {
        wanted
            .saturating_sub(self.boot)
            .next_multiple_of(self.block())
    }

    /// RAM that there is to be room for, with what is left out before a block's begin.
    pub(crate) fn reserved(&self) -> u64 {
        match self.added(self.max) {
            0 => self.boot,
            added => self.added_start() + added,
        }
    }

    /// End of the RAM that the guest boots with, in its address space.
    pub(crate) fn boot_end(&self) -> u64 {
        address(self.boot)
    }
}

/// End, in the guest's address space, of the first `bytes` of RAM.
fn address(bytes: u64) -> u64 {
    if bytes > layout::DEVICES_START {
        bytes.saturating_add(layout::DEVICES_BYTES)
    } else {
        bytes
    }
}

/// A range of RAM, in the guest's address space: in two parts when the devices are between them.
fn addresses(ram: &Range<u64>) -> Vec<Range<u64>> {
    let low = ram.start..ram.end.min(layout::DEVICES_START);
    let high = ram.start.max(layout::DEVICES_START)..ram.end;
    let high = high.start + layout::DEVICES_BYTES..high.end + layout::DEVICES_BYTES;
    [low, high]
        .into_iter()
        .filter(|part| !part.is_empty())
        .collect()
}

/// Why a VM did not get more memory.
#[derive(Debug, Error)]
pub enum GrowError {
    /// More than it may get to.
    #[error("{asked} bytes of memory are more than the {max} that the VM may get to")]
    TooMuch {
        /// What was asked for.
        asked: u64,
        /// What it may get to.
        max: u64,
    },
    /// The host refused it.
    #[error("more memory for the VM: {0}")]
    Host(#[from] io::Error),
}

/// Makes addresses the guest's memory.
type Grant = Box<dyn Fn(&Range<u64>) -> io::Result<()> + Send + Sync>;

/// A VM's memory. Clones are the same VM's; it may outlive the VM.
#[derive(Clone)]
pub struct Ram(Arc<Inner>);

struct Inner {
    size: RamSize,
    /// Bytes that the guest has beyond those that it booted with.
    added: Mutex<u64>,
    grant: Grant,
}

impl Ram {
    pub(crate) fn new(
        size: RamSize,
        grant: impl Fn(&Range<u64>) -> io::Result<()> + Send + Sync + 'static,
    ) -> Self {
        Self(Arc::new(Inner {
            size,
            added: Mutex::new(0),
            grant: Box::new(grant),
        }))
    }

    /// Bytes that the guest may use.
    pub fn bytes(&self) -> u64 {
        self.0.size.boot + *self.added()
    }

    /// Gives the guest memory until it may use at least `bytes`. Returns all that it has been given since its boot, as
    /// physical addresses of whole memory blocks: the guest's kernel has to be told.
    ///
    /// # Errors
    /// It may not have as much, or the host has not. It then keeps what it has.
    pub fn grow(&self, bytes: u64) -> Result<Vec<Range<u64>>, GrowError> {
        let size = &self.0.size;
        let mut added = self.added();
        if bytes > size.boot + *added && bytes > size.max {
            return Err(GrowError::TooMuch {
                asked: bytes,
                max: size.max.max(size.boot),
            });
        }
        let start = size.added_start();
        let end = start + size.added(bytes).max(*added);
        for range in addresses(&(start + *added..end)) {
            (self.0.grant)(&range)?;
            *added += range.end - range.start;
        }
        Ok(addresses(&(start..end)))
    }

    fn added(&self) -> std::sync::MutexGuard<'_, u64> {
        // A number that is right after each step.
        self.0.added.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl std::fmt::Debug for Ram {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ram")
            .field("size", &self.0.size)
            .field("bytes", &self.bytes())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;
    const GIB: u64 = 1 << 30;

    /// What a VM has been given when it was to have at least `bytes`.
    fn grown(ram: &Ram, bytes: u64) -> Vec<(u64, u64)> {
        let ranges = ram.grow(bytes).unwrap().into_iter();
        ranges.map(|range| (range.start, range.end)).collect()
    }

    /// Begins and ends of what has been granted.
    type Granted = Arc<Mutex<Vec<(u64, u64)>>>;

    fn ram(boot: u64, max: u64) -> (Ram, Granted) {
        let granted = Granted::default();
        let seen = Arc::clone(&granted);
        let grant = move |range: &Range<u64>| {
            seen.lock().unwrap().push((range.start, range.end));
            Ok(())
        };
        (Ram::new(RamSize { boot, max }, grant), granted)
    }

    #[test]
    fn what_is_added_begins_at_a_block() {
        let (ram, granted) = ram(500 * MIB, 2 * GIB);
        assert_eq!(ram.bytes(), 500 * MIB);
        let all = grown(&ram, 501 * MIB);
        assert_eq!(all, [(512 * MIB, 640 * MIB)]);
        assert_eq!(ram.bytes(), 628 * MIB);
        // Enough is there.
        assert_eq!(grown(&ram, 600 * MIB), all);
        assert_eq!(grown(&ram, 0), all);
        assert_eq!(grown(&ram, 700 * MIB), [(512 * MIB, 768 * MIB)]);
        let granted = granted.lock().unwrap();
        assert_eq!(*granted, [(512 * MIB, 640 * MIB), (640 * MIB, 768 * MIB)]);
    }

    #[test]
    fn a_vm_has_an_upper_limit() {
        let (small, granted) = ram(512 * MIB, GIB);
        let error = small.grow(GIB + 1).unwrap_err();
        assert!(matches!(error, GrowError::TooMuch { max: GIB, .. }));
        assert!(small.grow(GIB).is_ok());
        assert_eq!(small.bytes(), GIB);
        assert_eq!(granted.lock().unwrap().len(), 1);
        // It is as large as it may get to, or larger.
        let (fixed, granted) = ram(GIB, 0);
        assert_eq!(grown(&fixed, GIB), []);
        assert!(fixed.grow(GIB + 1).is_err());
        assert!(granted.lock().unwrap().is_empty());
    }

    #[test]
    fn devices_are_between() {
        let (large, granted) = ram(3 * GIB - 128 * MIB, 8 * GIB);
        let all = grown(&large, 3 * GIB + MIB);
        let parts = [
            (3 * GIB - 128 * MIB, 3 * GIB),
            (4 * GIB, 4 * GIB + 128 * MIB),
        ];
        assert_eq!(all, parts);
        assert_eq!(*granted.lock().unwrap(), parts);
        // One that begins above.
        let (larger, _) = ram(3 * GIB + MIB, 8 * GIB);
        let all = grown(&larger, 4 * GIB);
        assert_eq!(all, [(4 * GIB + 128 * MIB, 5 * GIB + 128 * MIB)]);
    }

    #[test]
    fn blocks_of_large_guests_are_large() {
        let size = RamSize {
            boot: 64 * GIB,
            max: 65 * GIB,
        };
        assert_eq!(size.reserved(), 67 * GIB);
        let (huge, _) = ram(size.boot, size.max);
        assert_eq!(grown(&huge, 65 * GIB), [(66 * GIB, 68 * GIB)]);
    }

    #[test]
    fn room_is_for_whole_blocks() {
        let reserved = |boot, max| RamSize { boot, max }.reserved();
        assert_eq!(reserved(500 * MIB, 500 * MIB), 500 * MIB);
        assert_eq!(reserved(500 * MIB, 0), 500 * MIB);
        assert_eq!(reserved(500 * MIB, 501 * MIB), 640 * MIB);
    }

    #[test]
    fn what_failed_can_be_tried_again() {
        let refusals = Mutex::new(1);
        let size = RamSize {
            boot: GIB,
            max: 2 * GIB,
        };
        let ram = Ram::new(size, move |_| {
            let mut left = refusals.lock().unwrap();
            if *left == 0 {
                return Ok(());
            }
            *left -= 1;
            Err(io::ErrorKind::OutOfMemory.into())
        });
        assert!(matches!(ram.grow(2 * GIB), Err(GrowError::Host(_))));
        assert_eq!(ram.bytes(), GIB);
        assert_eq!(grown(&ram, 2 * GIB), [(GIB, 2 * GIB)]);
        assert_eq!(ram.bytes(), 2 * GIB);
    }
}
