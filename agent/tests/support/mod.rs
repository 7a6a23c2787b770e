//! An agent in namespaces of this machine, with a loop device as the pod's disk. Everything but vsock and
//! the guest's kernel is the real thing. Needs root, loop devices, EROFS, ext4 and overlayfs,
//! `mkfs.erofs`, `mkfs.ext4`, `losetup`, and a static busybox.

use std::collections::HashMap;
use std::io;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use hyper_util::rt::TokioIo;
use podvisor_proto::agent::agent_client::AgentClient;
use podvisor_proto::agent::event::Kind;
use podvisor_proto::agent::{
    ConfigureSandboxRequest, CreateContainerRequest, Event, EventsRequest, ExecRequest,
    RemoveContainerRequest, Segment, StartContainerRequest, Stdio as StdioTokens, User,
};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::time::timeout;
use tonic::Status;
use tonic::transport::{Channel, Endpoint};

/// Far more than anything here takes.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// Where the scratch area begins on the disk, and its size: 64 MiB.
const SCRATCH: Segment = Segment {
    start: 1 << 30,
    length: 64 << 20,
};

/// A running agent and its client.
pub struct Guest {
    pub client: AgentClient<Channel>,
    /// One image layer with busybox.
    pub layer: Segment,
    directory: tempfile::TempDir,
    _host: Host,
}

/// What an agent takes of this machine, given back when it is dropped.
struct Host {
    agent: Child,
    cgroup: PathBuf,
    loop_device: String,
}

fn command(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program)
        .args(arguments)
        .output()
        .unwrap_or_else(|error| panic!("{program}: {error}"));
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {}",
        text(&output.stderr)
    );
    text(&output.stdout)
}

/// The image: busybox, a user, and a program that only its owner may execute.
fn make_root(root: &Path) {
    for directory in ["bin", "etc", "proc", "sys", "dev", "tmp"] {
        std::fs::create_dir_all(root.join(directory)).unwrap();
    }
    std::fs::copy("/bin/busybox", root.join("bin/busybox")).unwrap();
    let applets =
        "sh cat echo sleep id stty ps kill head wc true false ls grep tr hostname env dd touch";
    for applet in applets.split(' ') {
        symlink("busybox", root.join("bin").join(applet)).unwrap();
    }
    std::fs::write(
        root.join("etc/passwd"),
        "root:x:0:0::/root:/bin/sh\nweb:x:33:34::/srv:/bin/sh\n",
    )
    .unwrap();
    std::fs::write(root.join("etc/group"), "www:x:34:\nextra:x:500:web\n").unwrap();
    let script = root.join("bin/own");
    std::fs::write(&script, "#!/bin/sh\necho own\n").unwrap();
    std::fs::set_permissions(&script, std::fs::Permissions::from_mode(0o700)).unwrap();
    std::fs::write(root.join("etc/plain"), "").unwrap();
}

impl Guest {
    /// Starts an agent and configures its sandbox.
    pub async fn start() -> Self {
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

        // A part of the hierarchy of its own: the agent takes what it sees for all there is.
        let cgroup = ["/sys/fs/cgroup/unified", "/sys/fs/cgroup"]
            .iter()
            .map(Path::new)
            .find(|mount| {
                mount.join("cgroup.procs").exists() && mount.join("cgroup.controllers").exists()
            })
            .expect("a cgroup2 mount")
            .join(format!(
                "agent-test-{}",
                loop_device.rsplit('/').next().unwrap()
            ));
        std::fs::create_dir_all(cgroup.join("outside")).unwrap();
        // The agent's root group must not have processes; unshare itself stays in "outside".
        let script = "echo 0 > $0/cgroup.procs && exec unshare --cgroup sh -c \
            'echo 0 > $0/outside/cgroup.procs && exec \"$@\"' \"$0\" \"$@\"";
        let unshare = [
            "unshare",
            "--fork",
            "--kill-child",
            "-pmiun",
            "--propagation",
            "private",
        ];
        let agent = Command::new("sh")
            .args(["-c", script])
            .arg(&cgroup)
            .args(unshare)
            .arg(env!("CARGO_BIN_EXE_podvisor-agent"))
            .args(["--listen", &format!("unix:{}", path("agent"))])
            .args(["--disk", &loop_device])
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let host = Host {
            agent,
            cgroup,
            loop_device,
        };
        let client = connect(directory.path().join("agent")).await;
        let mut guest = Self {
            client,
            layer,
            directory,
            _host: host,
        };
        guest.client.configure_sandbox(sandbox()).await.unwrap();
        guest
    }

    /// Dials a stream and sends its token: 16 times the same byte.
    pub async fn stream(&self, token: u8) -> (Vec<u8>, UnixStream) {
        let token = vec![token; 16];
        let mut stream = UnixStream::connect(self.directory.path().join("agent.streams"))
            .await
            .unwrap();
        stream.write_all(&token).await.unwrap();
        (token, stream)
    }

    pub async fn create(&mut self, id: &str, spec: &Value, user: &str) -> Result<Vec<u32>, Status> {
        let request = CreateContainerRequest {
            id: id.to_owned(),
            layers: vec![self.layer],
            spec: spec.to_string().into_bytes(),
            user: Some(User {
                name: user.to_owned(),
                merge_image_groups: true,
                ..User::default()
            }),
        };
        let user = self
            .client
            .create_container(request)
            .await?
            .into_inner()
            .user
            .unwrap();
        Ok([user.uid, user.gid]
            .into_iter()
            .chain(user.supplemental_groups)
            .collect())
    }

    /// Starts a container without streams.
    pub async fn start_quietly(&mut self, id: &str) -> Result<u32, Status> {
        let request = StartContainerRequest {
            id: id.to_owned(),
            stdio: None,
        };
        Ok(self.client.start_container(request).await?.into_inner().pid)
    }

    pub async fn remove(&mut self, id: &str) -> Vec<Segment> {
        let request = RemoveContainerRequest { id: id.to_owned() };
        self.client
            .remove_container(request)
            .await
            .unwrap()
            .into_inner()
            .released
    }

    /// Creates and starts a container, and waits for its end: output, errors, exit code.
    pub async fn run(&mut self, id: &str, spec: &Value, user: &str) -> (String, String, u32) {
        self.create(id, spec, user).await.unwrap();
        let (stdout, mut out) = self.stream(1).await;
        let (stderr, mut err) = self.stream(2).await;
        let request = StartContainerRequest {
            id: id.to_owned(),
            stdio: Some(StdioTokens {
                stdout,
                stderr,
                ..StdioTokens::default()
            }),
        };
        self.client.start_container(request).await.unwrap();
        let code = self.exit_code(id, "").await;
        (read(&mut out).await, read(&mut err).await, code)
    }

    /// Runs a command in a running container: output, errors, exit code.
    pub async fn exec(
        &mut self,
        id: &str,
        exec_id: &str,
        args: &[&str],
    ) -> Result<(String, String, u32), Status> {
        let (stdout, mut out) = self.stream(3).await;
        let (stderr, mut err) = self.stream(4).await;
        let request = ExecRequest {
            container_id: id.to_owned(),
            exec_id: exec_id.to_owned(),
            args: args.iter().map(|&arg| arg.to_owned()).collect(),
            stdio: Some(StdioTokens {
                stdout,
                stderr,
                ..StdioTokens::default()
            }),
            ..ExecRequest::default()
        };
        self.client.exec(request).await?;
        let code = self.exit_code(id, exec_id).await;
        Ok((read(&mut out).await, read(&mut err).await, code))
    }

    /// Waits for the exit of a process, past or future.
    pub async fn exit_code(&mut self, id: &str, exec_id: &str) -> u32 {
        let found = self
            .event(|event| match &event.kind {
                Some(Kind::Exit(exit)) => exit.container_id == id && exit.exec_id == exec_id,
                _ => false,
            })
            .await;
        match found.kind {
            Some(Kind::Exit(exit)) => exit.code,
            _ => unreachable!("an exit was asked for"),
        }
    }

    /// Waits for an event, past or future.
    pub async fn event(&mut self, wanted: impl Fn(&Event) -> bool) -> Event {
        let mut events = self
            .client
            .events(EventsRequest::default())
            .await
            .unwrap()
            .into_inner();
        timeout(PATIENCE, async {
            loop {
                let event = events.message().await.unwrap().expect("events go on");
                if wanted(&event) {
                    return event;
                }
            }
        })
        .await
        .expect("the event comes")
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // --kill-child takes the whole pid namespace along.
        let _ = self.agent.kill();
        let _ = self.agent.wait();
        let _ = std::fs::write(self.cgroup.join("cgroup.kill"), "1");
        let _ = Command::new("losetup")
            .args(["--detach", &self.loop_device])
            .status();
        remove_cgroups(&self.cgroup);
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
    // The only wait of these tests that looks again: a socket file tells nobody when it appears.
    while !socket.exists() {
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

/// The configuration of every test's sandbox.
pub fn sandbox() -> ConfigureSandboxRequest {
    ConfigureSandboxRequest {
        hostname: "pod-1".to_owned(),
        resolv_conf: "nameserver 192.0.2.1\n".to_owned(),
        hosts: "192.0.2.2 pod-1\n".to_owned(),
        sysctls: HashMap::from([("kernel.shm_rmid_forced".to_owned(), "1".to_owned())]),
        scratch: Some(SCRATCH),
        // 0: this machine's clock stays as it is.
        time_ns: 0,
        shm_bytes: 0,
    }
}

/// Reads a stream to its end.
pub async fn read(stream: &mut UnixStream) -> String {
    let mut text = String::new();
    timeout(PATIENCE, stream.read_to_string(&mut text))
        .await
        .expect("the stream ends")
        .unwrap();
    text
}

/// A spec as podvisord makes it.
pub fn spec(args: &[&str]) -> Value {
    let capabilities = json!([
        "CAP_CHOWN",
        "CAP_KILL",
        "CAP_SETUID",
        "CAP_SETGID",
        "CAP_NET_BIND_SERVICE"
    ]);
    json!({
        "ociVersion": "1.2.0",
        "process": {
            "args": args,
            "cwd": "/work/deep",
            "env": ["PATH=/bin", "GREETING=hello"],
            "user": { "uid": 0, "gid": 0 },
            "capabilities": {
                "bounding": capabilities, "effective": capabilities, "permitted": capabilities,
            },
            "rlimits": [{ "type": "RLIMIT_NOFILE", "soft": 99, "hard": 100 }],
        },
        "root": { "path": "" },
        "mounts": [
            { "destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"] },
            { "destination": "/dev", "type": "tmpfs", "source": "tmpfs",
              "options": ["nosuid", "strictatime", "mode=755", "size=65536k"] },
            { "destination": "/dev/pts", "type": "devpts", "source": "devpts",
              "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"] },
            { "destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue", "options": ["nosuid", "noexec", "nodev"] },
            { "destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "noexec", "nodev", "ro"] },
            { "destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup",
              "options": ["nosuid", "noexec", "nodev", "relatime", "ro"] },
        ],
        "linux": {
            "namespaces": [
                { "type": "mount" }, { "type": "pid" }, { "type": "cgroup" },
                { "type": "ipc", "path": "pod" }, { "type": "uts", "path": "pod" },
            ],
            "maskedPaths": ["/proc/kcore"],
            "readonlyPaths": ["/proc/sys"],
            "seccomp": {
                "defaultAction": "SCMP_ACT_ALLOW",
                "architectures": ["SCMP_ARCH_X86_64"],
                "syscalls": [{ "names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 95 }],
            },
        },
    })
}
