//! The QEMU backend: `-M microvm` in a child process, our devices over vhost-user.

use std::path::PathBuf;

use thiserror::Error;

use crate::vm::{VmConfig, Vmm};

/// What executes the guest's instructions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accel {
    /// The kernel's virtualisation.
    Kvm,
    /// Translation in QEMU.
    Tcg,
}

/// How to run QEMU.
#[derive(Debug, Clone)]
pub struct QemuConfig {
    /// `qemu-system-x86_64`, absolute.
    pub binary: PathBuf,
    /// What executes the guest's instructions.
    pub accel: Accel,
}

/// Why a VM did not start.
#[derive(Debug, Error)]
pub enum QemuError {
    /// The VM as asked for cannot be.
    #[error("{0}")]
    Config(String),
    /// QEMU cannot be executed.
    #[error("cannot run {}: {source}", binary.display())]
    Spawn {
        /// The binary.
        binary: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// QEMU ended before the VM ran.
    #[error("QEMU ended at once ({status}): {stderr}")]
    Exited {
        /// How it ended.
        status: std::process::ExitStatus,
        /// The last of what it wrote to standard error.
        stderr: String,
    },
    /// QEMU's control socket broke or did not answer.
    #[error("QEMU's control socket: {0}")]
    Control(String),
    /// The host refused a resource.
    #[error("{what}: {source}")]
    Host {
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        source: std::io::Error,
    },
}

/// Starts a VM; returns when QEMU has set it up and the guest runs.
///
/// Must be called on a thread that lives as long as the process (a single-threaded runtime's): the kernel kills QEMU
/// when the thread that forked it ends.
///
/// # Errors
/// Nothing is left behind: QEMU is dead and the device threads are gone.
pub async fn start(_config: VmConfig, _qemu: QemuConfig) -> Result<Box<dyn Vmm>, QemuError> {
    Err(QemuError::Config("skeleton".into()))
}
