//! The QEMU backend: `-M microvm` in a child process, our devices over vhost-user.
//!
//! - `command`: the command line
//! - `process`: the child
//! - `qmp`: its control socket
//! - `tsc`: what a guest under TCG must be told of the host's clock
//!
//! The child dies with this process, is always reaped, and its end is pushed, never polled.

mod command;
mod process;
mod qmp;
mod tsc;

use std::fs::File;
use std::io;
use std::os::fd::AsFd as _;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::ExitStatus;
use std::sync::Arc;

use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::memfd::{MFdFlags, memfd_create};
use thiserror::Error;
use tracing::debug;

use crate::device::VirtioDevice;
use crate::devices::disk::SegmentDisk;
use crate::ram::{Ram, RamSize};
use crate::served::DeviceCounters;
use crate::vhost_user;
use crate::vm::{BoxFuture, ExitReason, VmConfig, VmCounters, Vmm};
use command::Sockets;
use process::Process;
use qmp::Qmp;

pub use tsc::TscMeter;

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
        source: io::Error,
    },
    /// QEMU ended before the VM ran.
    #[error("QEMU ended at once ({status}): {stderr}")]
    Exited {
        /// How it ended.
        status: ExitStatus,
        /// The last of what it wrote to standard error.
        stderr: String,
    },
    /// QEMU's control socket broke or did not answer.
    #[error("QEMU's control socket: {0}")]
    Control(#[source] io::Error),
    /// The host refused a resource.
    #[error("{what}: {source}")]
    Host {
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        source: io::Error,
    },
}

impl QemuError {
    fn host(what: &'static str) -> impl Fn(io::Error) -> Self {
        move |source| Self::Host { what, source }
    }
}

/// What `-M microvm` takes.
const MAX_VCPUS: u32 = 288;

/// Starts a VM; returns when QEMU has set it up and the guest runs.
///
/// Must be called on a thread that lives as long as the VM (that of a single-threaded runtime): the kernel kills QEMU
/// when the thread that forked it ends, which is how the VM ends with this process however that ends.
///
/// # Errors
/// Nothing is left behind: QEMU is gone and so are the threads of the devices.
pub async fn start(config: VmConfig, qemu: QemuConfig) -> Result<Box<dyn Vmm>, QemuError> {
    check(&config)?;
    let (control, qemu_control) = UnixStream::pair().map_err(QemuError::host("control socket"))?;
    control
        .set_nonblocking(true)
        .map_err(QemuError::host("control socket"))?;
    let control =
        tokio::net::UnixStream::from_std(control).map_err(QemuError::host("control socket"))?;
    let (disk, qemu_disk) = UnixStream::pair().map_err(QemuError::host("disk's socket"))?;
    let (vsock, qemu_vsock) = UnixStream::pair().map_err(QemuError::host("vsock's socket"))?;
    let (fs, qemu_fs) = UnixStream::pair().map_err(QemuError::host("fs's socket"))?;

    let sockets = Sockets {
        control: qemu_control.into(),
        disk: qemu_disk.into(),
        vsock: qemu_vsock.into(),
        fs: qemu_fs.into(),
    };
    let ram = config.ram();
    let memory = memory(ram.reserved()).map_err(QemuError::host("guest memory"))?;
    let arguments = command::arguments(&config, qemu.accel, &sockets, memory.as_fd());
    debug!(arguments = arguments.arguments.join(" "), "starting QEMU");
    let mut process =
        Process::spawn(&qemu.binary, &arguments).map_err(|source| QemuError::Spawn {
            binary: qemu.binary.clone(),
            source,
        })?;
    // QEMU has its own copies. When it ends, ours of the other ends tell.
    drop(sockets);

    // The threads end when QEMU does, also when a later step here fails.
    let counters = vec![
        serve("disk", Box::new(SegmentDisk::new(config.disk)), disk)?,
        serve("vsock", Box::new(config.vsock), vsock)?,
        serve("fs", Box::new(config.fs), fs)?,
    ];

    match Qmp::connect(control).await {
        Ok(qmp) => Ok(Box::new(Qemu {
            process,
            qmp,
            killed: false,
            counters,
            // QEMU has all of it mapped from the beginning: only the guest's kernel has to be told.
            ram: Ram::new(ram, |_| Ok(())),
            memory,
            ram_size: ram,
        })),
        Err(error) => {
            // Either QEMU has ended, which says more than the broken socket, or it is stuck.
            let stuck = error.kind() == io::ErrorKind::TimedOut;
            if stuck {
                process.kill();
            }
            let (status, stderr) = process.ended().await;
            Err(if stuck {
                QemuError::Control(error)
            } else {
                QemuError::Exited { status, stderr }
            })
        }
    }
}

fn serve(
    name: &'static str,
    device: Box<dyn VirtioDevice>,
    socket: UnixStream,
) -> Result<Arc<DeviceCounters>, QemuError> {
    vhost_user::serve(name, device, socket).map_err(QemuError::host(name))
}

/// A file for guest memory: none is there before the guest touches it.
fn memory(bytes: u64) -> io::Result<File> {
    let file = File::from(memfd_create(c"guest-memory", MFdFlags::MFD_CLOEXEC)?);
    file.set_len(bytes)?;
    Ok(file)
}

fn check(config: &VmConfig) -> Result<(), QemuError> {
    config.check(MAX_VCPUS).map_err(QemuError::Config)?;
    let wrong = |message: String| Err(QemuError::Config(message));
    // Commas and spaces have a meaning in QEMU's options.
    let plain =
        |text: &str, also: char| text.chars().all(|c| c.is_ascii_alphanumeric() || c == also);
    if !plain(&config.id, '-') {
        return wrong(format!(
            "a VM's id has letters, digits and dashes: {:?}",
            config.id
        ));
    }
    if let Some(net) = &config.net
        && !plain(&net.mac, ':')
    {
        return wrong(format!("not a MAC address: {:?}", net.mac));
    }
    Ok(())
}

/// A VM in a QEMU.
struct Qemu {
    process: Process,
    qmp: Qmp,
    killed: bool,
    counters: Vec<Arc<DeviceCounters>>,
    ram: Ram,
    /// Guest RAM.
    memory: File,
    ram_size: RamSize,
}

impl Vmm for Qemu {
    fn pid(&self) -> Option<u32> {
        self.process.pid()
    }

    fn backend(&self) -> &'static str {
        "qemu"
    }

    fn exited(&mut self) -> BoxFuture<'_, ExitReason> {
        Box::pin(async {
            let (status, stderr) = self.process.ended().await;
            if self.killed {
                return ExitReason::Killed;
            }
            match self.qmp.ended().await.as_deref() {
                Some("guest-shutdown") => ExitReason::GuestShutdown,
                Some("guest-reset") => ExitReason::GuestReset,
                Some("guest-panic") => ExitReason::GuestPanic,
                _ => ExitReason::VmmExited { status, stderr },
            }
        })
    }

    fn kill(&mut self) -> BoxFuture<'_, ()> {
        Box::pin(async {
            // A guest that was faster keeps its own reason.
            if self.process.pid().is_some() {
                self.killed = true;
                self.process.kill();
            }
            self.process.ended().await;
        })
    }

    fn pause(&mut self) -> BoxFuture<'_, io::Result<()>> {
        Box::pin(async { self.qmp.execute("stop").await.map(drop) })
    }

    fn resume(&mut self) -> BoxFuture<'_, io::Result<()>> {
        Box::pin(async { self.qmp.execute("cont").await.map(drop) })
    }

    fn counters(&self) -> VmCounters {
        VmCounters {
            devices: self.counters.clone(),
            ..VmCounters::default()
        }
    }

    fn ram(&self) -> Ram {
        self.ram.clone()
    }

    /// QEMU puts the initramfs at the end of the RAM below 4 GiB, where the guest may have none yet: then the kernel has
    /// moved it.
    fn booted(&mut self) -> io::Result<()> {
        let RamSize { boot, .. } = self.ram_size;
        let beyond = self.ram_size.reserved() - boot;
        if beyond == 0 {
            return Ok(());
        }
        let hole = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        // RAM is in the file in its own order.
        let (start, length) = (boot as libc::off_t, beyond as libc::off_t);
        Ok(fallocate(&self.memory, hole, start, length)?)
    }
}
