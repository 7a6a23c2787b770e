//! How fast a volume is: our virtio-fs device with podvisor-fs behind it, beside QEMU's with Debian's virtiofsd (the
//! one in C, as QEMU comes with it, with its defaults), on the same directory, in the same VM, by turns:
//!
//! - a new file of 1 GiB, written and read by mebibytes, in the host's page cache;
//! - 4 KiB of it at random places;
//! - 10,000 files: made, looked at, removed.
//!
//! Needs root, QEMU, the guest's kernel and podvisor-fs as `make build` leaves them. On QEMU's emulation, or on KVM
//! with `PODVISOR_VMM=kvm`. An argument says how many rounds. Prints medians and the ratio, which is promised to be 1 at least.

mod beside;
#[path = "../tests/common/mod.rs"]
mod common;

use std::ffi::{CStr, CString};
use std::fs;
use std::io::Read as _;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use common::{Guest, PATIENCE};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, setsockopt, socketpair, sockopt};
use podvisor_vmm::qemu::{Accel, QemuConfig};
use podvisor_vmm::{Backend, FsDevice};

const ROUNDS: usize = 5;
const FILE_MEBIBYTES: u32 = 1024;
const PICKS: u32 = 10_000;
const FILES: u32 = 10_000;
/// Less than the file, so that the guest's cache does not hold it.
const GUEST_BYTES: u64 = 512 << 20;
const VIRTIOFSD: &str = "/usr/lib/qemu/virtiofsd";
/// As the agent mounts volumes.
const READ_AHEAD_KIBIBYTES: u32 = 512;
/// As podvisord has it (`volumes::server`).
const SOCKET_BYTES: usize = 2 << 20;

const NAMES: [&str; 4] = [
    "sequential write, MiB/s",
    "sequential read, MiB/s",
    "random read, 4 KiB each",
    "files made, seen, removed",
];

#[tokio::main(flavor = "current_thread")]
async fn main() {
    // The first subscriber stays: that of the tests shows more.
    tracing_subscriber::fmt().with_env_filter("warn").init();
    let target = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target");
    let server = target.join("release/podvisor-fs");
    for program in [&server, Path::new(VIRTIOFSD)] {
        if !program.exists() {
            println!("SKIPPED: {} is not there", program.display());
            return;
        }
    }
    let dir = tempfile::tempdir().unwrap();
    let volume = dir.path().join("volume");
    fs::create_dir(&volume).unwrap();

    let (virtiofsd, socket) = start_virtiofsd(dir.path(), &volume);
    let arguments = format!(
        "-chardev socket,id=own,path={} -device vhost-user-fs-device,chardev=own,tag=own",
        socket.display()
    );
    let accel = match std::env::var("PODVISOR_VMM").as_deref() {
        Ok("kvm") => Accel::Kvm,
        _ => Accel::Tcg,
    };
    let backend = Backend::Qemu(QemuConfig {
        binary: beside::qemu_with(dir.path(), &arguments),
        accel,
    });
    let (device, handle) = FsDevice::new().unwrap();
    let (podvisor_fs, connection) = start_podvisor_fs(&server, dir.path(), &volume);
    handle.connect(connection);
    let mut guest = Guest::boot_on(backend, |config| {
        config.fs = device;
        config.memory_bytes = GUEST_BYTES;
    })
    .await
    .expect("the guest's kernel");
    for (tag, ahead) in [("volumes", READ_AHEAD_KIBIBYTES), ("own", 0)] {
        let mounted = guest.command(&format!("volume {tag} {ahead}")).await;
        assert_eq!(mounted, "ok");
    }

    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    // The first touch of a page of the guest's memory is the host's work.
    let most = GUEST_BYTES * 3 / 4;
    assert_eq!(guest.command(&format!("touch {most}")).await, "ok");
    // Cargo's own argument is `--bench`.
    let rounds = std::env::args().find_map(|argument| argument.parse().ok());
    let rounds = rounds.unwrap_or(ROUNDS);
    for round in 1..=rounds {
        eprintln!("volumes: round {round} of {rounds}");
        let mut turns = [(&mut ours, "/volumes/0"), (&mut theirs, "/own")];
        if round % 2 == 0 {
            turns.reverse();
        }
        for (rounds, at) in turns {
            rounds.push(rates(&mut guest, &volume, at).await);
        }
    }
    guest.vmm.kill().await;
    for mut server in [podvisor_fs, virtiofsd] {
        server.wait().unwrap();
    }
    beside::print("per second", NAMES, "virtiofsd", &ours, &theirs, 1.0);
}

/// What the guest does in one second of each, with the volume that it has at `at`.
async fn rates(guest: &mut Guest, volume: &Path, at: &str) -> [f64; NAMES.len()] {
    let mut rates = [0.0; NAMES.len()];
    for (rate, (command, count)) in rates.iter_mut().zip([
        (format!("fill {at}/file {FILE_MEBIBYTES}"), FILE_MEBIBYTES),
        (format!("drain {at}/file {FILE_MEBIBYTES}"), FILE_MEBIBYTES),
        (format!("pick {at}/file {FILE_MEBIBYTES} {PICKS}"), PICKS),
        (format!("files {at}/files {FILES}"), FILES),
    ]) {
        guest.tell(&command).await;
        let microseconds = guest.answer_within(10 * PATIENCE).await;
        let microseconds: f64 = microseconds.parse().expect(&microseconds);
        *rate = f64::from(count) / (microseconds / 1e6);
    }
    fs::remove_file(volume.join("file")).unwrap();
    rates
}

/// It ends when QEMU is gone.
fn start_virtiofsd(dir: &Path, volume: &Path) -> (Child, PathBuf) {
    let path = dir.join("virtiofsd.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let mut command = Command::new(VIRTIOFSD);
    command
        .args(["--fd=0", "-o", "sandbox=chroot", "--rlimit-nofile=0", "-o"])
        .arg(format!("source={}", volume.display()))
        .stdin(OwnedFd::from(listener))
        .stderr(Stdio::null());
    (command.spawn().expect("virtiofsd"), path)
}

/// It ends when the socket's other end, which is returned, is closed.
fn start_podvisor_fs(binary: &Path, dir: &Path, volume: &Path) -> (Child, OwnedFd) {
    let shares = dir.join("shares");
    fs::create_dir_all(shares.join("0")).unwrap();
    let (ours, theirs) = socketpair(
        AddressFamily::Unix,
        SockType::SeqPacket,
        None,
        SockFlag::SOCK_CLOEXEC,
    )
    .unwrap();
    for socket in [&ours, &theirs] {
        setsockopt(socket, sockopt::SndBufForce, &SOCKET_BYTES).unwrap();
    }
    let mut server = Command::new(binary)
        .arg(shares)
        .stdin(theirs)
        .stdout(Stdio::piped())
        .spawn()
        .expect("podvisor-fs");
    let mut ready = [0];
    let output = server.stdout.as_mut().expect("a pipe");
    output.read_exact(&mut ready).expect("it serves");
    attach(volume, server.id(), c"/0");
    (server, ours)
}

/// Mounts `volume` at `place` in the mount namespace of a process, as podvisord does.
fn attach(volume: &Path, pid: u32, place: &CStr) {
    let volume = CString::new(volume.as_os_str().as_bytes()).unwrap();
    let namespace = fs::File::open(format!("/proc/{pid}/ns/mnt")).unwrap();
    let attached = std::thread::spawn({
        let place = place.to_owned();
        move || {
            let ok = |result: libc::c_long| nix::errno::Errno::result(result).unwrap();
            // SAFETY: descriptors, numbers, and strings that last as long.
            unsafe {
                let flags = libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC;
                let tree =
                    libc::syscall(libc::SYS_open_tree, libc::AT_FDCWD, volume.as_ptr(), flags);
                ok(tree);
                // Of this thread alone, which ends then.
                ok(libc::unshare(libc::CLONE_FS).into());
                ok(libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWNS).into());
                ok(libc::syscall(
                    libc::SYS_move_mount,
                    tree,
                    c"".as_ptr(),
                    libc::AT_FDCWD,
                    place.as_ptr(),
                    libc::MOVE_MOUNT_F_EMPTY_PATH,
                ));
                libc::close(tree as i32);
            }
        }
    });
    attached.join().unwrap();
}
