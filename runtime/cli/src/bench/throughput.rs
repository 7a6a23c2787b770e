//! How fast bytes move between a pod and its host: disk, network, vsock.

use std::net::IpAddr;
use std::time::Instant;

use anyhow::Context as _;
use tokio::io::AsyncReadExt;
use tokio::net::TcpListener;

use super::pods::Running;
use super::stats::{Samples, Unit};

/// Enough to outlast what begins and ends a stream.
const MEBIBYTES: u64 = 32;
/// Less than an ExecSync's output may be.
const EXEC_MEBIBYTES: u64 = 8;

/// Each way once, in a pod that runs.
pub async fn measure(running: &Running, group: &str) -> anyhow::Result<Samples> {
    let mut samples = Samples::default();
    let mut add = |name: &str, mebibytes: u64, begin: Instant| {
        let rate = mebibytes as f64 / begin.elapsed().as_secs_f64();
        samples.add(format!("{group}/{name}"), Unit::MebibytesPerSecond, rate);
    };

    let count = format!("count={MEBIBYTES}");
    let begin = Instant::now();
    running
        .exec(&[
            "dd",
            "if=/dev/zero",
            "of=/file",
            "bs=1M",
            &count,
            "conv=fsync",
        ])
        .await?;
    add("disk: written and synced", MEBIBYTES, begin);
    let begin = Instant::now();
    running
        .exec(&["dd", "if=/file", "of=/dev/null", "bs=1M", "iflag=direct"])
        .await?;
    add("disk: read past the guest's cache", MEBIBYTES, begin);

    let begin = Instant::now();
    let count = format!("count={EXEC_MEBIBYTES}");
    running
        .exec(&["dd", "if=/dev/zero", "bs=1M", &count])
        .await?;
    add("vsock: a command's output", EXEC_MEBIBYTES, begin);

    let begin = Instant::now();
    send_to_host(running).await?;
    add("network: to the host", MEBIBYTES, begin);
    Ok(samples)
}

/// The pod sends by TCP, we count.
async fn send_to_host(running: &Running) -> anyhow::Result<()> {
    let listener = TcpListener::bind(("0.0.0.0", 0)).await?;
    let port = listener.local_addr()?.port();
    let host = gateway(running.ip().await?)?;
    let script = format!(
        "dd if=/dev/zero bs=64k count={} | nc {host} {port}",
        MEBIBYTES * 16
    );
    let receive = async {
        let (mut stream, _) = listener.accept().await?;
        let mut buffer = vec![0; 1 << 20];
        let mut received = 0;
        while received < MEBIBYTES << 20 {
            match stream.read(&mut buffer).await? {
                0 => anyhow::bail!("the pod's connection ended after {received} bytes"),
                count => received += count as u64,
            }
        }
        Ok(())
    };
    let command = ["sh", "-c", &script];
    tokio::try_join!(receive, async { running.exec(&command).await.map(drop) })?;
    Ok(())
}

/// The bridge's own address, by the rule of the CNI plugins "bridge" and "host-local".
fn gateway(pod: IpAddr) -> anyhow::Result<IpAddr> {
    match pod {
        IpAddr::V4(address) => {
            let [a, b, c, _] = address.octets();
            Ok(IpAddr::from([a, b, c, 1]))
        }
        IpAddr::V6(_) => None.context("the pod has no IPv4 address"),
    }
}
