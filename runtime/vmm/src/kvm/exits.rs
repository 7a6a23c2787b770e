//! How often, and why, vCPUs come back from the guest.

use std::sync::atomic::{AtomicU64, Ordering};

/// Why `KVM_RUN` returned. What KVM does by itself (page faults, in-kernel interrupt controllers, ioeventfds) is not
/// seen here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// A register of a virtio-mmio device was read.
    MmioRead,
    /// A register of a virtio-mmio device was written.
    MmioWrite,
    /// The serial port was read.
    PortRead,
    /// The serial port, or the reset line, was written.
    PortWrite,
    /// We interrupted it.
    Kicked,
    /// The vCPU ended.
    Other,
}

const NAMES: [(Exit, &str); 6] = [
    (Exit::MmioRead, "mmio-read"),
    (Exit::MmioWrite, "mmio-write"),
    (Exit::PortRead, "port-read"),
    (Exit::PortWrite, "port-write"),
    (Exit::Kicked, "kicked"),
    (Exit::Other, "other"),
];

/// Counters of all vCPUs of a VM.
#[derive(Debug, Default)]
pub struct ExitCounters([AtomicU64; NAMES.len()]);

impl ExitCounters {
    /// Counts one.
    pub fn count(&self, exit: Exit) {
        self.0[exit as usize].fetch_add(1, Ordering::Relaxed);
    }

    /// Each reason with its count.
    pub fn read(&self) -> Vec<(&'static str, u64)> {
        NAMES
            .iter()
            .map(|(exit, name)| (*name, self.0[*exit as usize].load(Ordering::Relaxed)))
            .collect()
    }
}
