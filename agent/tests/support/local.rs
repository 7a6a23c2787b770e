//! The agent in namespaces of this machine. Everything but vsock and the guest's kernel is the real thing.

use std::io;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use hyper_util::rt::TokioIo;
use podvisor_proto::agent::Segment;
use podvisor_proto::agent::agent_client::AgentClient;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint};

use super::{Guest, PATIENCE, Streams, command, make_root, sandbox};

/// Where the scratch area begins on the disk, and its size: 64 MiB.
pub const SCRATCH: Segment = Segment {
    start: 1 << 30,
    length: 64 << 20,
};

/// What an agent takes of this machine, given back when it is dropped.
struct Host {
    agent: Child,
    cgroup: PathBuf,
    loop_device: String,
}

/// Starts an agent and configures its sandbox.
pub async fn start() -> Guest {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
    make_root(&directory.path().join("root"));
    command("mkfs.erofs", &["--quiet", &path("disk"), &path("root")]);
    let length = std::fs::metadata(path("disk")).unwrap().len();
    let layer = Segment {
        start: 0,
        length: length.next_multiple_of(4096),
    };
    let disk = std::fs::File::options()
        .write(true)
        .open(path("disk"))
        .unwrap();
    disk.set_len(SCRATCH.start + SCRATCH.length).unwrap();
    drop(disk);
    let offset = format!("offset={}", SCRATCH.start);
    command("mkfs.ext4", &["-q", "-E", &offset, &path("disk"), "64m"]);
    let loop_device = command(
        "losetup",
        &["--find", "--show", "--partscan", &path("disk")],
    );

    let socket = directory.path().join("agent");
    let host = spawn(&socket, loop_device);
    let mut client = connect(socket.clone()).await;
    client.configure_sandbox(sandbox(SCRATCH)).await.unwrap();
    Guest {
        client,
        layer,
        namespaces: Some(host.agent.id()),
        streams: Streams::Unix(socket.with_added_extension("streams")),
        _keep: Box::new((host, directory)),
    }
}

fn spawn(socket: &Path, loop_device: String) -> Host {
    // A part of the hierarchy of its own: the agent takes what it sees for all there is.
    let name = format!("agent-test-{}", loop_device.rsplit('/').next().unwrap());
    let cgroup = ["/sys/fs/cgroup/unified", "/sys/fs/cgroup"]
        .iter()
        .map(Path::new)
        .find(|mount| mount.join("cgroup.controllers").exists())
        .expect("a cgroup2 mount")
        .join(name);
    std::fs::create_dir_all(cgroup.join("outside")).unwrap();
    // The agent's root group must not have processes; unshare itself stays in "outside".
    let script = "ulimit -Sn 256 && echo 0 > $0/cgroup.procs && exec unshare --cgroup sh -c \
        'echo 0 > $0/outside/cgroup.procs && exec \"$@\"' \"$0\" \"$@\"";
    let agent = Command::new("sh")
        .args(["-c", script])
        .arg(&cgroup)
        .args(["unshare", "--fork", "--kill-child", "-pmiun"])
        .args(["--propagation", "private"])
        .arg(env!("CARGO_BIN_EXE_podvisor-agent"))
        .args(["--listen", &format!("unix:{}", socket.display())])
        .args(["--disk", &loop_device])
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    Host {
        agent,
        cgroup,
        loop_device,
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // --kill-child takes the whole pid namespace along.
        let _ = self.agent.kill();
        let _ = self.agent.wait();
        let _ = std::fs::write(self.cgroup.join("cgroup.kill"), "1");
        remove_cgroups(&self.cgroup);
        // Last: whoever gets the device next gives its group the same name.
        let _ = Command::new("losetup")
            .args(["--detach", &self.loop_device])
            .status();
    }
}

fn remove_cgroups(cgroup: &Path) {
    for entry in std::fs::read_dir(cgroup).into_iter().flatten().flatten() {
        if entry.path().is_dir() {
            remove_cgroups(&entry.path());
        }
    }
    // Killed processes leave their group a moment after they are reaped.
    for _ in 0..100 {
        if std::fs::remove_dir(cgroup).is_ok() {
            return;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

async fn connect(socket: PathBuf) -> AgentClient<Channel> {
    let deadline = tokio::time::Instant::now() + PATIENCE;
    // The only wait of these tests that looks again: a socket tells nobody when it begins to listen.
    while UnixStream::connect(&socket).await.is_err() {
        assert!(tokio::time::Instant::now() < deadline, "the agent listens");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let channel = Endpoint::from_static("http://agent")
        .connect_with_connector(tower::service_fn(move |_| {
            let socket = socket.clone();
            async move { Ok::<_, io::Error>(TokioIo::new(UnixStream::connect(socket).await?)) }
        }))
        .await
        .unwrap();
    AgentClient::new(channel)
}
