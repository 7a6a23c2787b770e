//! A real agent: in namespaces of this machine with a loop device as the pod's disk ([`local`]), or in a
//! VM ([`vm`]). Needs root, `mkfs.erofs`, `mkfs.ext4`, `losetup` and a static busybox; the first needs
//! EROFS, ext4 and overlayfs in this machine's kernel.

// Each test binary uses its part.
#![allow(dead_code)]

pub mod local;
pub mod vm;

use std::collections::HashMap;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use podvisor_proto::agent::agent_client::AgentClient;
use podvisor_proto::agent::event::Kind;
use podvisor_proto::agent::{
    ConfigureSandboxRequest, CreateContainerRequest, Event, EventsRequest, ExecRequest,
    RemoveContainerRequest, SeccompFilter, Segment, StartContainerRequest, Stdio as StdioTokens,
    User,
};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::time::timeout;
use tonic::Status;
use tonic::transport::Channel;

/// Far more than anything here takes.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// A running agent and its client.
pub struct Guest {
    pub client: AgentClient<Channel>,
    /// One image layer with busybox.
    pub layer: Segment,
    streams: Streams,
    /// A process of this machine whose namespaces the agent is in.
    namespaces: Option<u32>,
    /// What has to live as long as the guest.
    _keep: Box<dyn std::any::Any + Send>,
}

/// How to reach the agent's streams.
enum Streams {
    Unix(PathBuf),
    Vsock(podvisor_vmm::VsockHandle),
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
    let applets = "sh cat echo sleep id stty ps kill head wc true false ls grep tr hostname env dd touch date mknod";
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
    /// Dials a stream and sends its token: 16 times the same byte.
    pub async fn stream(&self, token: u8) -> (Vec<u8>, UnixStream) {
        let token = vec![token; 16];
        let mut stream = match &self.streams {
            Streams::Unix(path) => UnixStream::connect(path).await.unwrap(),
            Streams::Vsock(vsock) => vsock.connect(1025).await.unwrap(),
        };
        stream.write_all(&token).await.unwrap();
        (token, stream)
    }

    /// Runs a program of this machine in the network and mount namespaces of the agent.
    pub fn enter(&self, arguments: &[&str]) -> String {
        let target = self.namespaces.expect("a local agent").to_string();
        command(
            "nsenter",
            &[&["--target", &target, "--net", "--mount"], arguments].concat(),
        )
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
            seccomp: Some(no_mkdir()),
            ..CreateContainerRequest::default()
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

/// The configuration of every test's sandbox.
pub fn sandbox(scratch: Segment) -> ConfigureSandboxRequest {
    ConfigureSandboxRequest {
        hostname: "pod-1".to_owned(),
        resolv_conf: "nameserver 192.0.2.1\n".to_owned(),
        hosts: "192.0.2.2 pod-1\n".to_owned(),
        sysctls: HashMap::from([("kernel.shm_rmid_forced".to_owned(), "1".to_owned())]),
        scratch: Some(scratch),
        // 0: this machine's clock stays as it is.
        time_ns: 0,
        shm_bytes: 0,
        user_namespace: None,
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
        },
    })
}

/// The filter of every container, as podvisord compiles it: EOPNOTSUPP for mkdir and mkdirat.
fn no_mkdir() -> SeccompFilter {
    let instruction = |code: libc::c_uint, when_true: u8, operand: u32| {
        let [code0, code1] = (code as u16).to_ne_bytes();
        let [k0, k1, k2, k3] = operand.to_ne_bytes();
        [code0, code1, when_true, 0, k0, k1, k2, k3]
    };
    let is = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
    let answer = libc::BPF_RET | libc::BPF_K;
    let program = [
        // The number of the call, at the beginning of `struct seccomp_data`.
        instruction(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0),
        instruction(is, 2, libc::SYS_mkdir as u32),
        instruction(is, 1, libc::SYS_mkdirat as u32),
        instruction(answer, 0, libc::SECCOMP_RET_ALLOW),
        instruction(answer, 0, libc::SECCOMP_RET_ERRNO | libc::EOPNOTSUPP as u32),
    ];
    SeccompFilter {
        program: program.concat(),
        flags: 0,
    }
}
