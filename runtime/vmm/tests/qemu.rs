//! What only QEMU as a process of its own can do wrong.

mod common;

use std::io;
use std::os::fd::{AsFd as _, FromRawFd as _, OwnedFd};
use std::path::Path;
use std::process::Stdio;

use common::{Guest, PATIENCE, file_of, tcg};
use nix::poll::{PollFd, PollFlags, PollTimeout};
use podvisor_vmm::ExitReason;
use podvisor_vmm::qemu::{self, QemuError};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::time::timeout;

#[tokio::test]
async fn a_killed_qemu_is_told_apart_and_reaped() {
    let Some(mut guest) = Guest::boot().await else {
        return;
    };
    let pid = guest.vmm.pid().unwrap();
    assert_eq!(guest.vmm.backend(), "qemu");
    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(pid as i32),
        nix::sys::signal::Signal::SIGABRT,
    )
    .unwrap();
    let reason = timeout(PATIENCE, guest.vmm.exited()).await.unwrap();
    assert!(matches!(reason, ExitReason::VmmExited { .. }), "{reason:?}");
    assert!(!Path::new(&format!("/proc/{pid}")).exists(), "not reaped");
    assert_eq!(guest.vmm.pid(), None);
}

/// Set in the process that `a_vm_ends_with_its_process` kills.
const KEEPER: &str = "PODVISOR_TEST_KEEPER";

#[tokio::test]
async fn a_vm_ends_with_its_process() {
    if std::env::var_os(KEEPER).is_some() {
        let guest = Guest::boot().await.unwrap();
        println!("\nqemu {}", guest.vmm.pid().unwrap());
        std::future::pending::<()>().await;
    }
    if common::prerequisites().is_none() {
        return;
    }
    let mut keeper = tokio::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "a_vm_ends_with_its_process", "--nocapture"])
        .env(KEEPER, "1")
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(keeper.stdout.take().unwrap()).lines();
    let pid = loop {
        let line = timeout(PATIENCE, lines.next_line())
            .await
            .unwrap()
            .unwrap()
            .expect("the VM does not start");
        if let Some(pid) = line.strip_prefix("qemu ") {
            break pid.parse().unwrap();
        }
    };
    let qemu = pidfd_open(pid);
    keeper.kill().await.unwrap();
    let mut ended = [PollFd::new(qemu.as_fd(), PollFlags::POLLIN)];
    assert_eq!(
        nix::poll::poll(&mut ended, PollTimeout::try_from(PATIENCE).unwrap()),
        Ok(1),
        "QEMU lives on"
    );
}

/// A descriptor that is readable once the process has ended.
fn pidfd_open(pid: i32) -> OwnedFd {
    // SAFETY: a system call without pointers.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    assert!(fd >= 0, "{}", io::Error::last_os_error());
    // SAFETY: just opened, and nobody else's.
    unsafe { OwnedFd::from_raw_fd(fd as i32) }
}

#[tokio::test]
async fn what_cannot_start_says_why() {
    let Some(kernel) = common::prerequisites() else {
        return;
    };
    let binary = Path::new(common::QEMU);

    let (config, ..) = common::config(&kernel);
    let error = qemu::start(config, tcg(Path::new("/nowhere/qemu")))
        .await
        .err()
        .unwrap();
    assert_eq!(
        error.to_string(),
        "cannot run /nowhere/qemu: No such file or directory (os error 2)"
    );

    let (mut config, ..) = common::config(&kernel);
    config.memory_bytes = 1 << 20;
    let error = qemu::start(config, tcg(binary)).await.err().unwrap();
    assert!(
        matches!(&error, QemuError::Config(text) if text.contains("1048576 bytes of memory")),
        "{error}"
    );

    let (mut config, ..) = common::config(&kernel);
    config.kernel = file_of(b"").into();
    let error = qemu::start(config, tcg(binary)).await.err().unwrap();
    assert_eq!(error.to_string(), "the kernel is empty");

    let (mut config, vsock, ..) = common::config(&kernel);
    config.kernel = file_of(b"no kernel at all").into();
    let error = qemu::start(config, tcg(binary)).await.err().unwrap();
    assert!(
        matches!(&error, QemuError::Exited { stderr, .. } if !stderr.is_empty()),
        "{error}"
    );
    assert_eq!(
        vsock.connect(1).await.unwrap_err().kind(),
        io::ErrorKind::ConnectionAborted
    );
}
