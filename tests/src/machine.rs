//! What the tests run on, as whoever starts them says.

use std::env;
use std::time::Duration;

/// What runs the pods' VMs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backend {
    /// podvisor's own VMM.
    Kvm,
    /// QEMU, with KVM or without.
    Qemu,
}

impl Backend {
    /// Of this run: `PODVISOR_VMM`, or QEMU, which runs everywhere.
    pub fn here() -> Self {
        match env::var("PODVISOR_VMM").as_deref() {
            Ok("kvm") => Self::Kvm,
            Ok("qemu") | Err(_) => Self::Qemu,
            Ok(other) => panic!("PODVISOR_VMM={other}: kvm or qemu"),
        }
    }

    /// Its name in podvisor's configuration.
    pub fn name(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Qemu => "qemu",
        }
    }

    /// Name of the process that a pod's VM is in.
    pub fn vm_process(self) -> &'static str {
        match self {
            Self::Kvm => "podvisor-monitor",
            Self::Qemu => "qemu-system",
        }
    }
}

/// How many times longer than usual everything takes here: `PODVISOR_SLOWNESS`, or 1.
pub fn slowness() -> u32 {
    env::var("PODVISOR_SLOWNESS").map_or(1, |factor| {
        factor
            .parse()
            .unwrap_or_else(|_| panic!("PODVISOR_SLOWNESS={factor}: a whole number"))
    })
}

/// How long anything may take that a test waits for. Long: machines without KVM, under load.
pub fn patience() -> Duration {
    Duration::from_mins(2) * slowness()
}
