//! How fast bytes move through the devices of our VMM, beside QEMU with the same guest on the same KVM, by turns:
//!
//! - disk: sequential reads past the guest's cache of a file in the host's, through our segment disk and through QEMU's own
//!   virtio-blk;
//! - vsock: a stream to the host, ours, and ours behind vhost-user (QEMU has none of its own);
//! - network: TCP to the host through a tap, ours and QEMU's own virtio-net.
//!
//! Needs KVM, root and QEMU; `scripts/bench-kvm` runs it in the nested host. Prints medians and the ratio.

mod beside;
#[path = "../tests/common/mod.rs"]
mod common;

use std::path::Path;
use std::process::Command;
use std::time::Instant;

use common::Guest;
use common::tap::open_named_tap;
use podvisor_vmm::qemu::{Accel, QemuConfig};
use podvisor_vmm::{Access, Backend, NetConfig};
use tokio::io::AsyncReadExt as _;
use tokio::net::TcpListener;

const ROUNDS: usize = 5;
const DISK_MEBIBYTES: u64 = 128;
const STREAM_MEBIBYTES: u64 = 32;
/// One end of the network; the guest has the other (tests/guest/init.c).
const HOST: &str = "10.99.0.1";
const TAP: &str = "pvbench";

/// MiB/s of one VM, in the order of [`NAMES`].
type Rates = [f64; NAMES.len()];
const NAMES: [&str; 3] = [
    "disk, sequential read",
    "vsock, to the host",
    "network, to the host",
];

#[tokio::main(flavor = "current_thread")]
async fn main() {
    // The first subscriber stays: that of the tests shows more.
    tracing_subscriber::fmt().with_env_filter("warn").init();
    if let Err(problem) = podvisor_vmm::kvm::probe::run() {
        println!("SKIPPED: {problem}");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let layer = dir.path().join("layer");
    let noise: Vec<u8> = (0..DISK_MEBIBYTES << 20).map(|i| (i % 251) as u8).collect();
    std::fs::write(&layer, noise).unwrap();
    // One device more: QEMU's own virtio-blk.
    let qemu = beside::qemu_with(
        dir.path(),
        &format!(
            "-drive file={},format=raw,readonly=on,if=none,id=own -device virtio-blk-device,drive=own",
            layer.display()
        ),
    );

    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for round in 1..=ROUNDS {
        eprintln!("throughput: round {round} of {ROUNDS}");
        ours.push(on_ours(&layer).await);
        theirs.push(on_qemu(&qemu).await);
    }
    beside::print("MiB/s", NAMES, "QEMU", &ours, &theirs, 0.9);
}

async fn on_ours(layer: &Path) -> Rates {
    let mut guest = boot(Backend::Kvm).await;
    let file = std::fs::File::open(layer).unwrap();
    let segment = guest
        .disk
        .insert(file, 0, DISK_MEBIBYTES << 20, Access::ReadOnly)
        .unwrap();
    let (start, length) = (segment.start, segment.length);
    assert_eq!(
        guest
            .command(&format!("partition 1 {start} {length}"))
            .await,
        "ok"
    );
    rates(guest, "vda1").await
}

async fn on_qemu(binary: &Path) -> Rates {
    let mut guest = boot(Backend::Qemu(QemuConfig {
        binary: binary.into(),
        accel: Accel::Kvm,
    }))
    .await;
    // The other is our segment disk, which is far larger.
    for name in ["vda", "vdb"] {
        if guest.command(&format!("size {name}")).await == (DISK_MEBIBYTES << 20).to_string() {
            return rates(guest, name).await;
        }
    }
    panic!("QEMU's disk is not there");
}

async fn boot(backend: Backend) -> Guest {
    let tap = open_named_tap(TAP).expect("a tap");
    for arguments in [
        ["addr", "add", "10.99.0.1/24", "dev", TAP].as_slice(),
        &["link", "set", TAP, "up"],
    ] {
        assert!(
            Command::new("ip")
                .args(arguments)
                .status()
                .unwrap()
                .success()
        );
    }
    let net = NetConfig {
        tap,
        mac: "02:01:02:03:04:05".into(),
    };
    Guest::boot_on(backend, |config| config.net = Some(net))
        .await
        .expect("all prerequisites")
}

async fn rates(mut guest: Guest, disk: &str) -> Rates {
    let microseconds = guest
        .command(&format!("scan {disk} {DISK_MEBIBYTES}"))
        .await;
    let microseconds: f64 = microseconds.parse().expect(&microseconds);

    let begin = Instant::now();
    let mut listener = guest.vsock.listen(9000);
    guest.tell(&format!("stream 9000 {STREAM_MEBIBYTES}")).await;
    receive(listener.accept().await.unwrap()).await;
    let vsock = begin.elapsed();
    assert_eq!(guest.answer().await, "ok");

    let listener = TcpListener::bind((HOST, 0)).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let begin = Instant::now();
    guest.tell(&format!("send {port} {STREAM_MEBIBYTES}")).await;
    receive(listener.accept().await.unwrap().0).await;
    let network = begin.elapsed();
    assert_eq!(guest.answer().await, "ok");

    guest.vmm.kill().await;
    [
        DISK_MEBIBYTES as f64 / (microseconds / 1e6),
        STREAM_MEBIBYTES as f64 / vsock.as_secs_f64(),
        STREAM_MEBIBYTES as f64 / network.as_secs_f64(),
    ]
}

/// Takes all that comes until its end.
async fn receive(mut stream: impl tokio::io::AsyncRead + Unpin) {
    let mut buffer = vec![0; 1 << 20];
    let mut received = 0;
    loop {
        match stream.read(&mut buffer).await.unwrap() {
            0 => break,
            count => received += count as u64,
        }
    }
    assert_eq!(received, STREAM_MEBIBYTES << 20);
}
