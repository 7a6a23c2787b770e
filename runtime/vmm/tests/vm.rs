//! Real VMs: a backend, the guest's kernel, and the devices between them. `PODVISOR_VMM=kvm` runs the same on our own.

mod common;

use std::io;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::os::unix::net::UnixListener;

use common::tap::open_tap;
use common::{Guest, PATIENCE, file_of};
use podvisor_vmm::{Access, ExitReason, GrowError, NetConfig, Segment, VmConfig};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::time::timeout;

/// Bytes that tell where they are, within 128 KiB and within a sector.
fn pattern(length: usize) -> Vec<u8> {
    let period: Vec<u8> = (0..128 << 10).map(|at| (at / 512 + at) as u8).collect();
    let mut bytes = period.repeat(length.div_ceil(period.len()));
    bytes.truncate(length);
    bytes
}

fn partition(number: u32, segment: Segment) -> String {
    format!("partition {number} {} {}", segment.start, segment.length)
}

#[tokio::test]
async fn a_vm_is_given_memory_while_it_runs() {
    let growing = |config: &mut VmConfig| config.max_memory_bytes = 512 << 20;
    let Some(mut guest) = Guest::boot_with(growing).await else {
        return;
    };
    guest.vmm.booted().unwrap();
    let before = guest.total_memory().await;
    assert!(
        before < 128 << 20,
        "{before}: the guest sees what it has not been given"
    );
    let error = guest.vmm.ram().grow(513 << 20).unwrap_err();
    assert!(matches!(error, GrowError::TooMuch { .. }), "{error}");

    guest.grow(300 << 20).await;
    assert_eq!(guest.vmm.ram().bytes(), 384 << 20);
    let after = guest.total_memory().await;
    assert_eq!(after - before, 256 << 20);
    assert_eq!(guest.command(&format!("touch {}", 256 << 20)).await, "ok");

    // Devices reach it: what is read is more than the guest had before.
    let content = pattern(130 << 20);
    let disk = guest
        .disk
        .insert(file_of(&content), 0, content.len() as u64, Access::ReadOnly);
    assert_eq!(guest.command(&partition(1, disk.unwrap())).await, "ok");
    assert!(guest.read(1, 0, content.len()).await == content);
}

#[tokio::test]
async fn the_disk_shows_segments_as_partitions() {
    let Some(mut guest) = Guest::boot().await else {
        return;
    };
    let layer = pattern(3 << 20);
    let scratch = file_of(&vec![1; 1 << 20]);
    // Added while the VM runs, as every layer is.
    let ro = guest
        .disk
        .insert(file_of(&layer), 0, layer.len() as u64, Access::ReadOnly)
        .unwrap();
    let rw = guest
        .disk
        .insert(scratch.try_clone().unwrap(), 0, 1 << 20, Access::ReadWrite)
        .unwrap();
    assert_eq!(guest.command(&partition(1, ro)).await, "ok");
    assert_eq!(guest.command(&partition(2, rw)).await, "ok");

    assert!(guest.read(1, 0, layer.len()).await == layer);
    assert_eq!(guest.command("write 1 0 4096 7").await, "EIO");
    assert_eq!(guest.command("write 2 8192 500000 7").await, "ok");
    let mut written = vec![0; 1 << 20];
    scratch.read_exact_at(&mut written, 0).unwrap();
    let expected = [
        vec![1; 8192],
        vec![7; 500_000],
        vec![1; (1 << 20) - 508_192],
    ]
    .concat();
    assert!(written == expected);

    let blocks = scratch.metadata().unwrap().blocks();
    assert_eq!(guest.command("discard 2 0 524288").await, "ok");
    assert!(scratch.metadata().unwrap().blocks() < blocks);
    assert_eq!(guest.read(2, 0, 4096).await, [0; 4096]);

    // A partition that reaches beyond its segment: what is outside is no one's.
    let beyond = Segment {
        start: rw.start + rw.length - 4096,
        length: 8192,
    };
    guest.disk.remove(ro.start).unwrap();
    assert_eq!(
        guest
            .command(&partition(
                3,
                Segment {
                    start: 5 << 40,
                    length: 1 << 20
                }
            ))
            .await,
        "ok"
    );
    assert_eq!(guest.command("write 3 0 4096 7").await, "EIO");
    assert_eq!(
        guest.command(&partition(4, beyond)).await,
        "EBUSY",
        "partitions do not overlap"
    );

    guest.tell("reboot").await;
    assert_eq!(
        timeout(PATIENCE, guest.vmm.exited()).await.unwrap(),
        ExitReason::GuestReset
    );
    assert_eq!(
        guest.vmm.exited().await,
        ExitReason::GuestReset,
        "the answer stays"
    );
}

/// Sends `data` in, and returns what comes back until the end.
async fn echo(stream: UnixStream, data: &[u8]) -> Vec<u8> {
    let (mut reader, mut writer) = stream.into_split();
    let mut back = Vec::new();
    let send = async {
        writer.write_all(data).await.unwrap();
        writer.shutdown().await.unwrap();
    };
    timeout(PATIENCE, async {
        tokio::join!(send, reader.read_to_end(&mut back))
    })
    .await
    .unwrap()
    .1
    .unwrap();
    back
}

#[tokio::test]
async fn vsock_carries_streams_both_ways() {
    let Some(mut guest) = Guest::boot().await else {
        return;
    };
    let data = pattern(4 << 20);

    // Several at once: their bytes stay apart, and each ends after its last byte.
    let streams = [
        guest.vsock.connect(1025).await,
        guest.vsock.connect(1025).await,
        guest.vsock.connect(1025).await,
    ];
    let [first, second, third] = streams.map(Result::unwrap);
    let (first, second, third) = tokio::join!(
        echo(first, &data),
        echo(second, &data[512..]),
        echo(third, &data[1 << 20..])
    );
    assert!(first == data && second == data[512..] && third == data[1 << 20..]);

    // Nobody listens, in either direction.
    assert_eq!(
        guest.vsock.connect(9).await.unwrap_err().kind(),
        io::ErrorKind::ConnectionRefused
    );
    assert_eq!(guest.command("dial 9").await, "ECONNRESET");
    let mut listener = guest.vsock.listen(7);
    assert_eq!(guest.command("dial 7").await, "ok");
    let mut dialled = listener.accept().await.unwrap();
    assert_eq!(
        dialled.read(&mut [0; 8]).await.unwrap(),
        0,
        "the guest has closed it"
    );

    // The pod's socket, for other processes.
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vsock.sock");
    guest
        .vsock
        .serve(UnixListener::bind(&path).unwrap())
        .unwrap();
    let mut stream = BufReader::new(UnixStream::connect(&path).await.unwrap());
    stream.write_all(b"CONNECT 1025\n").await.unwrap();
    let mut line = String::new();
    timeout(PATIENCE, stream.read_line(&mut line))
        .await
        .unwrap()
        .unwrap();
    assert!(line.starts_with("OK ") && line.ends_with('\n'), "{line:?}");
    assert!(echo(stream.into_inner(), &data[..100_000]).await == data[..100_000]);
    let mut refused = UnixStream::connect(&path).await.unwrap();
    refused.write_all(b"CONNECT 9\n").await.unwrap();
    assert_eq!(
        timeout(PATIENCE, refused.read(&mut [0; 8]))
            .await
            .unwrap()
            .unwrap(),
        0
    );

    // A host that does not read stops the guest, and loses nothing.
    let slow = guest.vsock.connect(1025).await.unwrap();
    let (mut reader, mut writer) = slow.into_split();
    let sender =
        tokio::spawn(async move { writer.write_all(&pattern(4 << 20)).await.map(|()| writer) });
    assert!(
        timeout(PATIENCE, guest.command("dial 9")).await.is_ok(),
        "others go on"
    );
    let mut back = vec![0; 4 << 20];
    timeout(PATIENCE, reader.read_exact(&mut back))
        .await
        .unwrap()
        .unwrap();
    assert!(back == data);
    sender.await.unwrap().unwrap();

    guest.vmm.kill().await;
    assert_eq!(guest.vmm.exited().await, ExitReason::Killed);
    assert_eq!(
        guest.vsock.connect(1025).await.unwrap_err().kind(),
        io::ErrorKind::ConnectionAborted
    );
    let mut end = Vec::new();
    guest.control.read_to_end(&mut end).await.unwrap();
}

#[tokio::test]
async fn a_panic_ends_the_vm_and_is_on_the_console() {
    let Some(mut guest) = Guest::boot().await else {
        return;
    };
    guest.tell("panic").await;
    assert_eq!(
        timeout(PATIENCE, guest.vmm.exited()).await.unwrap(),
        ExitReason::GuestReset
    );
    let console = guest.last_words().await;
    assert!(
        console.contains("Kernel panic - not syncing: Attempted to kill init"),
        "{console}"
    );
}

#[tokio::test]
async fn the_network_device_is_the_tap() {
    let Some(tap) = open_tap() else { return };
    let mac = "02:01:02:03:04:05";
    let net = NetConfig {
        tap,
        mac: mac.into(),
    };
    let Some(mut guest) = Guest::boot_with(|config| config.net = Some(net)).await else {
        return;
    };
    assert_eq!(guest.command("mac").await, mac);
}
