#![allow(dead_code, reason = "each test binary uses its part")]

//! A VM with the tests' own init in it.

pub mod tap;

use std::fs::{self, File};
use std::io::{Read, Seek, Write};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Once, OnceLock};
use std::time::Duration;

use podvisor_vmm::qemu::{Accel, QemuConfig, TscMeter};
use podvisor_vmm::{Backend, FsDevice, SegmentMap, VmConfig, Vmm, VsockDevice, VsockHandle};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::time::timeout;

pub const QEMU: &str = "/usr/bin/qemu-system-x86_64";

/// For anything a guest is waited for; it is slow when the machine is busy.
pub const PATIENCE: Duration = Duration::from_mins(1);

/// Which backend the tests are for: QEMU (TCG), or what `PODVISOR_VMM` says.
pub fn backend() -> Backend {
    match std::env::var("PODVISOR_VMM").as_deref() {
        Ok("kvm") => Backend::Kvm,
        Ok("qemu") | Err(_) => Backend::Qemu(tcg(Path::new(QEMU))),
        Ok(other) => panic!("PODVISOR_VMM={other}"),
    }
}

pub fn tcg(binary: &Path) -> QemuConfig {
    QemuConfig {
        binary: binary.into(),
        accel: Accel::Tcg,
    }
}

/// The guest's kernel, if everything that the tests need is there; prints what is missing.
pub fn prerequisites() -> Option<PathBuf> {
    let kernel = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/guest/vmlinux");
    for path in [Path::new(QEMU), &kernel] {
        if !path.exists() {
            println!("SKIPPED: {} is not there", path.display());
            return None;
        }
    }
    Some(kernel)
}

/// A running VM and the connection that its init has dialled.
pub struct Guest {
    pub vmm: Box<dyn Vmm>,
    pub disk: SegmentMap,
    pub vsock: VsockHandle,
    pub control: BufReader<UnixStream>,
    /// What the guest writes to its console.
    pub console: std::io::PipeReader,
}

/// When glibc first gives memory of a thread's back, it opens a file to see whether it may (malloc/arena.c,
/// `check_may_shrink_heap`), which a confined thread must not. A monitor has one arena, which is no thread's; here
/// this makes it look before.
fn settle_malloc() {
    static ONCE: Once = Once::new();
    let many_small_pieces = || drop(vec![vec![1_u8; 4096].into_boxed_slice(); 1024]);
    ONCE.call_once(|| std::thread::spawn(many_small_pieces).join().unwrap());
}

impl Guest {
    /// Boots a VM. `None`: a prerequisite is not there.
    pub async fn boot() -> Option<Self> {
        Self::boot_with(|_| ()).await
    }

    /// Boots a VM that `change` has changed.
    pub async fn boot_with(change: impl FnOnce(&mut VmConfig)) -> Option<Self> {
        Self::boot_on(backend(), change).await
    }

    /// Boots a VM that `change` has changed, on `backend`.
    pub async fn boot_on(backend: Backend, change: impl FnOnce(&mut VmConfig)) -> Option<Self> {
        let kernel = prerequisites()?;
        podvisor_vmm::seccomp::report_violations();
        settle_malloc();
        // Shown when a test fails. There may be one already: another test's.
        let _ = tracing_subscriber::fmt()
            .with_env_filter("podvisor_vmm=debug")
            .with_test_writer()
            .try_init();
        let (mut config, vsock, console) = config_for(&backend, &kernel);
        change(&mut config);
        let mut control = vsock.listen(1024);
        let disk = config.disk.clone();
        let vmm = podvisor_vmm::start(config, backend).await.unwrap();
        let dialled = timeout(PATIENCE, control.accept()).await;
        let Ok(Some(control)) = dialled else {
            panic!(
                "the guest does not dial: {}",
                last_words(vmm, console).await
            )
        };
        Some(Self {
            vmm,
            disk,
            vsock,
            control: BufReader::new(control),
            console,
        })
    }

    /// Sends a command and returns the line that answers it.
    pub async fn command(&mut self, command: &str) -> String {
        self.tell(command).await;
        self.answer().await
    }

    /// The next line that the guest answers with.
    pub async fn answer(&mut self) -> String {
        self.answer_within(PATIENCE).await
    }

    /// The same, of a guest that may take that long.
    pub async fn answer_within(&mut self, limit: Duration) -> String {
        let mut answer = String::new();
        timeout(limit, self.control.read_line(&mut answer))
            .await
            .expect("no answer")
            .unwrap();
        answer.trim_end().to_owned()
    }

    /// Lets the VM have at least `bytes` of memory, and the kernel take them.
    pub async fn grow(&mut self, bytes: u64) {
        /// Of a guest as small as these.
        const BLOCK_BYTES: usize = 128 << 20;
        for range in self.vmm.ram().grow(bytes).unwrap() {
            for address in range.step_by(BLOCK_BYTES) {
                let answer = self.command(&format!("memory {address:#x}")).await;
                assert_eq!(answer, "ok", "{address:#x}");
            }
        }
    }

    /// Bytes of memory that the kernel has.
    pub async fn total_memory(&mut self) -> u64 {
        self.command("total").await.parse().unwrap()
    }

    /// Sends a command.
    pub async fn tell(&mut self, command: &str) {
        self.control
            .write_all(format!("{command}\n").as_bytes())
            .await
            .unwrap();
    }

    /// Reads from a partition.
    pub async fn read(&mut self, partition: u32, offset: u64, length: usize) -> Vec<u8> {
        self.tell(&format!("read {partition} {offset} {length}"))
            .await;
        let mut content = vec![0; length];
        timeout(PATIENCE, self.control.read_exact(&mut content))
            .await
            .expect("no data")
            .unwrap();
        content
    }

    /// Ends the VM and returns what the console says from the beginning on.
    pub async fn last_words(self) -> String {
        last_words(self.vmm, self.console).await
    }
}

async fn last_words(mut vmm: Box<dyn Vmm>, mut console: std::io::PipeReader) -> String {
    vmm.kill().await;
    let mut text = Vec::new();
    console.read_to_end(&mut text).unwrap();
    String::from_utf8_lossy(&text).into_owned()
}

/// A VM with 128 MiB and one CPU.
pub fn config(kernel: &Path) -> (VmConfig, VsockHandle, std::io::PipeReader) {
    config_for(&backend(), kernel)
}

fn config_for(backend: &Backend, kernel: &Path) -> (VmConfig, VsockHandle, std::io::PipeReader) {
    let (console, console_in) = std::io::pipe().unwrap();
    let (device, vsock) = VsockDevice::new(3).unwrap();
    let config = VmConfig {
        id: "test".into(),
        vcpus: 1,
        memory_bytes: 128 << 20,
        max_memory_bytes: 0,
        kernel: File::open(kernel).unwrap().into(),
        initramfs: initramfs(),
        cmdline: format!(
            "console=ttyS0 quiet panic=-1 random.trust_cpu=on no_timer_check {}",
            match backend {
                Backend::Qemu(qemu) if qemu.accel == Accel::Tcg => TscMeter::start().tcg_cmdline(),
                _ => String::new(),
            }
        ),
        net: None,
        disk: SegmentMap::new(),
        vsock: device,
        fs: FsDevice::new().unwrap().0,
        console: console_in.into(),
    };
    (config, vsock, console)
}

/// An initramfs with `tests/guest/init.c` as its init, built once.
fn initramfs() -> OwnedFd {
    static INIT: OnceLock<Vec<u8>> = OnceLock::new();
    let init = INIT.get_or_init(|| {
        let dir = tempfile::tempdir().unwrap();
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/guest/init.c");
        let binary = dir.path().join("init");
        let built = Command::new("cc")
            .args(["-static", "-Os", "-Wall", "-o"])
            .arg(&binary)
            .arg(source)
            .status();
        assert!(built.unwrap().success());
        fs::read(binary).unwrap()
    });
    let mut archive = Vec::new();
    add_entry(&mut archive, "dev", 0o040_755, &[]);
    add_entry(&mut archive, "sys", 0o040_755, &[]);
    add_entry(&mut archive, "init", 0o100_755, init);
    add_entry(&mut archive, "TRAILER!!!", 0, &[]);
    file_of(&archive).into()
}

/// One entry of a cpio archive (the kernel's Documentation/driver-api/early-userspace/buffer-format.rst).
fn add_entry(archive: &mut Vec<u8>, name: &str, mode: u32, content: &[u8]) {
    let fields = [
        0,
        mode,
        0,
        0,
        1,
        0,
        content.len() as u32,
        0,
        0,
        0,
        0,
        name.len() as u32 + 1,
        0,
    ];
    archive.extend_from_slice(b"070701");
    for field in fields {
        archive.extend_from_slice(format!("{field:08x}").as_bytes());
    }
    archive.extend_from_slice(name.as_bytes());
    archive.push(0);
    archive.resize(archive.len().next_multiple_of(4), 0);
    archive.extend_from_slice(content);
    archive.resize(archive.len().next_multiple_of(4), 0);
}

/// A file that holds `content`.
pub fn file_of(content: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(content).unwrap();
    file.rewind().unwrap();
    file
}
