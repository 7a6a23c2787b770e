//! What podvisord does for one pod, without podvisord: sockets, disks, a monitor, its client.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::time::Duration;

use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket,
};
use podvisor_monitor::fd_socket::{self, Token};
use podvisor_monitor::launcher;
use podvisor_proto::agent::ConfigureSandboxRequest;
use podvisor_proto::monitor::monitor_client::MonitorClient;
use podvisor_proto::monitor::{
    ConfigureRequest, Container, ContainerState, CreateContainerRequest, ExecSyncRequest,
    ExecSyncResponse, Launch, Layer, Snapshot, StartContainerRequest, VmSpec, WatchRequest,
};
use prost::Message;
use serde_json::json;
use tempfile::TempDir;
use tokio::time::timeout;
use tonic::Status;
use tonic::transport::{Channel, Endpoint};

const QEMU: &str = "/usr/bin/qemu-system-x86_64";
const BUSYBOX: &str = "/bin/busybox";

/// For anything a guest is waited for; it is slow when the machine is busy.
pub const PATIENCE: Duration = Duration::from_mins(1);

/// Paths of kernel and initramfs. `None`, and a word about it: something is not there.
fn prerequisites() -> Option<[PathBuf; 2]> {
    let guest = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/guest");
    let image = [guest.join("vmlinux"), guest.join("initramfs.cpio")];
    let tools = [QEMU, BUSYBOX, "/usr/bin/mkfs.erofs", "/usr/sbin/mkfs.ext4"];
    for path in image
        .iter()
        .map(PathBuf::as_path)
        .chain(tools.map(Path::new))
    {
        if !path.exists() {
            println!("SKIPPED: {} is not there", path.display());
            return None;
        }
    }
    Some(image)
}

/// A pod's monitor.
pub struct Pod {
    pub client: MonitorClient<Channel>,
    pub monitor: Child,
    pub dir: TempDir,
}

impl Pod {
    /// Starts a monitor whose VM boots. `None`: a prerequisite is not there.
    pub fn launch(boot_timeout: Duration, cmdline: &str) -> Option<Self> {
        let [kernel, initramfs] = prerequisites()?;
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        let grpc = UnixListener::bind(path("monitor.sock")).unwrap();
        let vsock = UnixListener::bind(path("vsock.sock")).unwrap();
        let fd_socket = seqpacket_listener(&path("fd.sock"));
        let folder = File::open(dir.path()).unwrap();
        let kernel = File::open(kernel).unwrap();
        let initramfs = File::open(initramfs).unwrap();
        let scratch = scratch(&path("scratch.img"));
        let launch = Launch {
            sandbox_id: "5".repeat(64),
            vm: Some(VmSpec {
                vcpus: 1,
                memory_bytes: 256 << 20,
                kernel_fd: kernel.as_raw_fd(),
                initramfs_fd: initramfs.as_raw_fd(),
                cmdline: cmdline.to_owned(),
                tap_fd: -1,
                qemu: QEMU.to_owned(),
                accel: "tcg".to_owned(),
                ..VmSpec::default()
            }),
            grpc_fd: grpc.as_raw_fd(),
            fd_socket_fd: fd_socket.as_raw_fd(),
            vsock_fd: vsock.as_raw_fd(),
            dir_fd: folder.as_raw_fd(),
            scratch_fd: scratch.as_raw_fd(),
            scratch_bytes: scratch.metadata().unwrap().len(),
            boot_timeout_ms: boot_timeout.as_millis() as u64,
            requested_ns: now_ns(),
            log_filter: "debug,h2=warn,hyper_util=warn,tower=warn".to_owned(),
            ..Launch::default()
        };
        let log = File::create(path("monitor.log")).unwrap();
        let binary = Path::new(env!("CARGO_BIN_EXE_podvisor-monitor"));
        let mut monitor = launcher::command(binary, dir.path(), &launch, Stdio::from(log))
            .spawn()
            .unwrap();
        let mut stdin = monitor.stdin.take().unwrap();
        stdin.write_all(&launch.encode_to_vec()).unwrap();
        drop(stdin);
        let channel = Endpoint::from_shared(format!("unix://{}", path("monitor.sock").display()))
            .unwrap()
            .connect_lazy();
        let client = MonitorClient::new(channel).max_decoding_message_size(64 << 20);
        Some(Self {
            client,
            monitor,
            dir,
        })
    }

    /// A pod that is ready for containers.
    pub async fn ready() -> Option<Self> {
        let mut pod = Self::launch(PATIENCE, "")?;
        pod.configure().await.unwrap();
        Some(pod)
    }

    pub async fn configure(&mut self) -> Result<Snapshot, Status> {
        let sandbox = ConfigureSandboxRequest {
            hostname: "pod".to_owned(),
            ..ConfigureSandboxRequest::default()
        };
        let request = ConfigureRequest {
            sandbox: Some(sandbox),
            network: None,
        };
        let answer = timeout(PATIENCE, self.client.configure(request))
            .await
            .unwrap()?;
        Ok(answer.into_inner().snapshot.unwrap())
    }

    /// Hands a descriptor over.
    pub async fn send_fd(&self, fd: impl AsFd) -> Vec<u8> {
        let token = Token::random();
        fd_socket::send(&self.dir.path().join("fd.sock"), token, &[fd.as_fd()])
            .await
            .unwrap();
        token.to_vec()
    }

    pub fn log_file(&self, id: char) -> File {
        OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.dir.path().join(format!("{id}.log")))
            .unwrap()
    }

    /// Records of a log: without their timestamps.
    pub fn log(&self, id: char) -> Vec<String> {
        let text = fs::read_to_string(self.dir.path().join(format!("{id}.log"))).unwrap();
        text.lines()
            .map(|line| line.split_once(' ').expect("timestamp").1.to_owned())
            .collect()
    }

    /// Creates a container of busybox; its id is one character 64 times.
    pub async fn create(&mut self, id: char, args: &[&str]) -> String {
        let layer = layer();
        let request = CreateContainerRequest {
            id: id.to_string().repeat(64),
            layers: vec![Layer {
                diff_id: "sha256:busybox".to_owned(),
                fd_token: self.send_fd(&layer).await,
                length: layer.metadata().unwrap().len(),
            }],
            spec: spec(args),
            log_fd_token: self.send_fd(self.log_file(id)).await,
            ..CreateContainerRequest::default()
        };
        let id = request.id.clone();
        let created = timeout(PATIENCE, self.client.create_container(request))
            .await
            .unwrap();
        created.unwrap();
        id
    }

    pub async fn start(&mut self, id: &str) -> Container {
        let request = StartContainerRequest { id: id.to_owned() };
        let started = timeout(PATIENCE, self.client.start_container(request))
            .await
            .unwrap();
        container(&started.unwrap().into_inner().snapshot.unwrap(), id)
    }

    pub async fn exec(
        &mut self,
        id: &str,
        args: &[&str],
        timeout_ms: u64,
    ) -> Result<ExecSyncResponse, Status> {
        let request = ExecSyncRequest {
            container_id: id.to_owned(),
            args: args.iter().map(|&arg| arg.to_owned()).collect(),
            timeout_ms,
            output_limit: 16 << 20,
        };
        let done = timeout(PATIENCE, self.client.exec_sync(request))
            .await
            .unwrap();
        Ok(done?.into_inner())
    }

    /// The first state in which `condition` holds.
    pub async fn state_when(&mut self, condition: impl Fn(&Snapshot) -> bool) -> Snapshot {
        let mut states = self
            .client
            .watch(WatchRequest {})
            .await
            .unwrap()
            .into_inner();
        let seen = async {
            loop {
                let state = states.message().await.unwrap().expect("a state");
                if condition(&state) {
                    return state;
                }
            }
        };
        timeout(PATIENCE, seen).await.unwrap()
    }

    pub async fn exited(&mut self, id: &str) -> Container {
        let exited = |state: &Snapshot| container(state, id).state() == ContainerState::Exited;
        let state = self.state_when(exited).await;
        container(&state, id)
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        if std::thread::panicking()
            && let Ok(log) = fs::read_to_string(self.dir.path().join("monitor.log"))
        {
            println!("--- the monitor's log\n{log}");
        }
        let _ = self.monitor.kill();
        let _ = self.monitor.wait();
    }
}

pub fn container(snapshot: &Snapshot, id: &str) -> Container {
    let found = snapshot
        .containers
        .iter()
        .find(|container| container.id == id);
    found.expect("a container of this id").clone()
}

pub fn now_ns() -> u64 {
    let now = std::time::SystemTime::now();
    now.duration_since(std::time::UNIX_EPOCH)
        .unwrap()
        .as_nanos() as u64
}

fn seqpacket_listener(path: &Path) -> OwnedFd {
    let flags = SockFlag::SOCK_CLOEXEC;
    let listener = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None).unwrap();
    bind(listener.as_raw_fd(), &UnixAddr::new(path).unwrap()).unwrap();
    listen(&listener, Backlog::MAXCONN).unwrap();
    listener
}

/// An empty ext4.
fn scratch(path: &Path) -> File {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .open(path)
        .unwrap();
    file.set_len(256 << 20).unwrap();
    run(Command::new("/usr/sbin/mkfs.ext4")
        .args(["-q", "-F"])
        .arg(path));
    file
}

/// An EROFS image with busybox in it, made once.
fn layer() -> File {
    static IMAGE: OnceLock<(TempDir, PathBuf)> = OnceLock::new();
    let (_, path) = IMAGE.get_or_init(|| {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("root");
        for name in ["bin", "dev", "etc", "proc", "sys", "tmp"] {
            fs::create_dir_all(root.join(name)).unwrap();
        }
        fs::copy(BUSYBOX, root.join("bin/busybox")).unwrap();
        for applet in [
            "sh", "echo", "cat", "sleep", "true", "false", "head", "yes", "seq", "touch",
        ] {
            std::os::unix::fs::symlink("busybox", root.join("bin").join(applet)).unwrap();
        }
        let image = dir.path().join("busybox.erofs");
        run(Command::new("/usr/bin/mkfs.erofs").arg(&image).arg(&root));
        (dir, image)
    });
    File::open(path).unwrap()
}

fn spec(args: &[&str]) -> Vec<u8> {
    let spec = json!({
        "ociVersion": "1.2.0",
        "process": {
            "terminal": false,
            "args": args,
            "env": ["PATH=/bin"],
            "cwd": "/",
            "user": { "uid": 0, "gid": 0 },
        },
        "mounts": [
            { "destination": "/proc", "type": "proc", "source": "proc" },
            { "destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"] },
        ],
        "linux": {
            "namespaces": [
                { "type": "pid" },
                { "type": "mount" },
                { "type": "ipc", "path": "pod" },
                { "type": "uts", "path": "pod" },
            ],
        },
    });
    spec.to_string().into_bytes()
}

fn run(command: &mut Command) {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {output:?}");
}
