//! The host's wish, for the rest of the process.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::pages::PAGE_BYTES;

/// What the device and its handles share.
#[derive(Debug)]
pub(super) struct Shared {
    /// Pages that the host wants in the balloon.
    pub(super) target: AtomicU32,
    /// Pages that are in it, as the driver says.
    pub(super) actual: AtomicU32,
    /// Readable when the target has changed.
    pub(super) changed: EventFd,
}

/// The host's end of the device.
#[derive(Debug, Clone)]
pub struct BalloonHandle {
    shared: Arc<Shared>,
}

impl BalloonHandle {
    pub(super) fn new() -> io::Result<(Self, Arc<Shared>)> {
        let shared = Arc::new(Shared {
            target: AtomicU32::new(0),
            actual: AtomicU32::new(0),
            changed: EventFd::new(EFD_NONBLOCK)?,
        });
        let handle = Self {
            shared: shared.clone(),
        };
        Ok((handle, shared))
    }

    /// Asks the guest to do without `bytes` of its memory from now on, rounded down to pages. It gives what it can,
    /// when it can, and takes some back rather than kill a process for want of memory.
    pub fn set_target(&self, bytes: u64) {
        let pages = u32::try_from(bytes / PAGE_BYTES).unwrap_or(u32::MAX);
        self.shared.target.store(pages, Ordering::Relaxed);
        // Fails only when it was written 2^64 times and not read: then the device will look anyway.
        let _ = self.shared.changed.write(1);
    }

    /// Bytes that the guest does without, by its own account: whether so or not shows in the memory of the process.
    pub fn actual(&self) -> u64 {
        u64::from(self.shared.actual.load(Ordering::Relaxed)) * PAGE_BYTES
    }
}
