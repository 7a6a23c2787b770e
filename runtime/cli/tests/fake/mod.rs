//! A podvisord and the monitor of its one pod, scripted.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::{Arc, Condvar, Mutex};

use futures_util::{StreamExt, stream};
use nix::sys::stat::Mode;
use nix::unistd::mkfifo;
use podvisor_proto::control::control_server::{Control, ControlServer};
use podvisor_proto::cri::image_service_server::{ImageService, ImageServiceServer};
use podvisor_proto::cri::runtime_service_server::{RuntimeService, RuntimeServiceServer};
use podvisor_proto::monitor::monitor_server::{Monitor, MonitorServer};
use podvisor_proto::{control, cri, monitor};
use tokio::net::UnixListener;
use tokio::sync::watch;
use tokio_stream::wrappers::{UnixListenerStream, WatchStream};
use tonic::codegen::BoxStream;
use tonic::{Request, Response, Status, transport::Server};

const POD: &str = "aaaa";
const CONTAINER: &str = "cccc";

/// What comes of the pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Start {
    /// The container writes a line to each stream and exits.
    Exits(u32),
    /// It writes a line and runs until StopContainer.
    RunsUntilStopped,
    /// StartContainer fails.
    Fails,
    /// RunPodSandbox never answers; the pod is there.
    BootHangs,
    /// The monitor's stream ends after the container's output.
    MonitorDies,
}

/// The servers, on a thread of their own until the end of the test.
pub struct Fake {
    dir: tempfile::TempDir,
    shared: Arc<Shared>,
}

struct Shared {
    start: Start,
    calls: Mutex<Vec<String>>,
    called: Condvar,
    log: Mutex<PathBuf>,
    /// The folder that the pod's podvisor-fs serves: a pipe here, which keeps its reader running.
    shares: PathBuf,
    volume_server: Mutex<Option<Child>>,
    /// `None` ends the monitor's stream.
    snapshots: watch::Sender<Option<monitor::Snapshot>>,
}

impl Fake {
    pub fn serve(start: Start) -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("config.toml"), "").unwrap();
        let monitor_dir = dir.path().join("sandboxes").join(POD);
        fs::create_dir_all(&monitor_dir).unwrap();
        let shared = Arc::new(Shared {
            start,
            calls: Mutex::default(),
            called: Condvar::new(),
            log: Mutex::default(),
            shares: monitor_dir.join("shares"),
            volume_server: Mutex::default(),
            snapshots: watch::Sender::new(Some(monitor::Snapshot {
                monitor_pid: std::process::id(),
                ..Default::default()
            })),
        });
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let (daemon, monitor) = {
            let _guard = runtime.enter();
            (
                UnixListener::bind(dir.path().join("podvisor.sock")).unwrap(),
                UnixListener::bind(monitor_dir.join("monitor.sock")).unwrap(),
            )
        };
        let server = shared.clone();
        std::thread::spawn(move || {
            let daemon = Server::builder()
                .add_service(RuntimeServiceServer::from_arc(server.clone()))
                .add_service(ImageServiceServer::from_arc(server.clone()))
                .add_service(ControlServer::from_arc(server.clone()))
                .serve_with_incoming(UnixListenerStream::new(daemon));
            let monitor = Server::builder()
                .add_service(MonitorServer::from_arc(server))
                .serve_with_incoming(UnixListenerStream::new(monitor));
            runtime.block_on(async { tokio::join!(daemon, monitor) })
        });
        Self { dir, shared }
    }

    /// A folder of the test's own.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// `podvisor` with the options that lead to these servers.
    pub fn podvisor(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_podvisor"));
        command
            .arg("--config")
            .arg(self.dir.path().join("config.toml"))
            .arg("--run-dir")
            .arg(self.dir.path())
            .env_remove("PODVISOR_SOCKET");
        command
    }

    /// Names of the calls so far that change or look for something.
    pub fn calls(&self) -> Vec<String> {
        self.shared.calls.lock().unwrap().clone()
    }

    /// Waits until a call has come.
    pub fn wait_for(&self, call: &str) {
        let calls = self.shared.calls.lock().unwrap();
        drop(
            self.shared
                .called
                .wait_while(calls, |calls| !calls.iter().any(|name| name == call)),
        );
    }
}

impl Drop for Fake {
    fn drop(&mut self) {
        if let Some(mut server) = self.shared.volume_server.lock().unwrap().take() {
            server.kill().unwrap();
            server.wait().unwrap();
        }
    }
}

impl Shared {
    fn call(&self, name: impl Into<String>) {
        self.calls.lock().unwrap().push(name.into());
        self.called.notify_all();
    }

    /// A process with the command line of the pod's podvisor-fs.
    fn serve_volumes(&self) {
        let mut server = self.volume_server.lock().unwrap();
        if server.is_none() {
            mkfifo(&self.shares, Mode::S_IRWXU).unwrap();
            *server = Some(Command::new("cat").arg(&self.shares).spawn().unwrap());
        }
    }

    fn write_log(&self) {
        let time = "2026-11-21T10:00:00.000000000Z";
        let mut log = fs::File::create(&*self.log.lock().unwrap()).unwrap();
        write!(
            log,
            "{time} stdout P ou\n{time} stderr F err\n{time} stdout F t\n"
        )
        .unwrap();
    }

    fn exit(&self, code: u32) {
        self.snapshots.send_replace(Some(monitor::Snapshot {
            containers: vec![monitor::Container {
                id: CONTAINER.into(),
                state: monitor::ContainerState::Exited.into(),
                exit_code: code,
                ..Default::default()
            }],
            ..Default::default()
        }));
    }
}

type Answer<T> = Result<Response<T>, Status>;

#[tonic::async_trait]
impl RuntimeService for Shared {
    async fn run_pod_sandbox(
        &self,
        request: Request<cri::RunPodSandboxRequest>,
    ) -> Answer<cri::RunPodSandboxResponse> {
        let config = request.into_inner().config.unwrap();
        *self.log.lock().unwrap() = config.log_directory.into();
        self.call("RunPodSandbox");
        if self.start == Start::BootHangs {
            std::future::pending::<()>().await;
        }
        Ok(Response::new(cri::RunPodSandboxResponse {
            pod_sandbox_id: POD.into(),
        }))
    }

    async fn pod_sandbox_status(
        &self,
        _: Request<cri::PodSandboxStatusRequest>,
    ) -> Answer<cri::PodSandboxStatusResponse> {
        let timeline = r#"[{"phase":"vm start","start_ms":0.5,"end_ms":100.0},{"phase":"agent","start_ms":100.0,"end_ms":500.5}]"#;
        Ok(Response::new(cri::PodSandboxStatusResponse {
            info: [("timeline".to_owned(), timeline.to_owned())].into(),
            ..Default::default()
        }))
    }

    async fn list_pod_sandbox(
        &self,
        request: Request<cri::ListPodSandboxRequest>,
    ) -> Answer<cri::ListPodSandboxResponse> {
        self.call("ListPodSandbox");
        assert_eq!(request.into_inner().filter.unwrap().label_selector.len(), 1);
        Ok(Response::new(cri::ListPodSandboxResponse {
            items: vec![cri::PodSandbox {
                id: POD.into(),
                ..Default::default()
            }],
            encoded: vec![],
        }))
    }

    async fn stop_pod_sandbox(
        &self,
        request: Request<cri::StopPodSandboxRequest>,
    ) -> Answer<cri::StopPodSandboxResponse> {
        assert_eq!(request.into_inner().pod_sandbox_id, POD);
        self.call("StopPodSandbox");
        Ok(Response::new(cri::StopPodSandboxResponse {}))
    }

    async fn remove_pod_sandbox(
        &self,
        request: Request<cri::RemovePodSandboxRequest>,
    ) -> Answer<cri::RemovePodSandboxResponse> {
        assert_eq!(request.into_inner().pod_sandbox_id, POD);
        self.call("RemovePodSandbox");
        Ok(Response::new(cri::RemovePodSandboxResponse {}))
    }

    async fn create_container(
        &self,
        request: Request<cri::CreateContainerRequest>,
    ) -> Answer<cri::CreateContainerResponse> {
        self.call("CreateContainer");
        let config = request.into_inner().config.unwrap();
        if !config.log_path.is_empty() {
            self.log.lock().unwrap().push(config.log_path);
        }
        if !config.mounts.is_empty() {
            self.serve_volumes();
        }
        Ok(Response::new(cri::CreateContainerResponse {
            container_id: CONTAINER.into(),
        }))
    }

    async fn start_container(
        &self,
        _: Request<cri::StartContainerRequest>,
    ) -> Answer<cri::StartContainerResponse> {
        self.call("StartContainer");
        if self.start == Start::Fails {
            return Err(Status::unknown("no such file: nope"));
        }
        if !self.log.lock().unwrap().as_os_str().is_empty() {
            self.write_log();
        }
        match self.start {
            Start::Exits(code) => self.exit(code),
            Start::MonitorDies => drop(self.snapshots.send_replace(None)),
            _ => {}
        }
        Ok(Response::new(cri::StartContainerResponse {}))
    }

    async fn container_status(
        &self,
        _: Request<cri::ContainerStatusRequest>,
    ) -> Answer<cri::ContainerStatusResponse> {
        let (exit_code, reason, message) = match self.start {
            Start::Fails => (128, "StartError", "no such file: nope"),
            _ => (137, "Error", ""),
        };
        Ok(Response::new(cri::ContainerStatusResponse {
            status: Some(cri::ContainerStatus {
                id: CONTAINER.into(),
                state: cri::ContainerState::ContainerExited.into(),
                exit_code,
                reason: reason.into(),
                message: message.into(),
                ..Default::default()
            }),
            ..Default::default()
        }))
    }

    async fn version(&self, _: Request<cri::VersionRequest>) -> Answer<cri::VersionResponse> {
        Ok(Response::new(cri::VersionResponse {
            runtime_version: "0.0.1".into(),
            ..Default::default()
        }))
    }

    async fn exec_sync(
        &self,
        request: Request<cri::ExecSyncRequest>,
    ) -> Answer<cri::ExecSyncResponse> {
        self.call(format!("ExecSync {}", request.into_inner().cmd.join(" ")));
        Ok(Response::new(cri::ExecSyncResponse {
            stdout: "MemAvailable: 1 kB\n".into(),
            ..Default::default()
        }))
    }

    async fn stop_container(
        &self,
        request: Request<cri::StopContainerRequest>,
    ) -> Answer<cri::StopContainerResponse> {
        self.call(format!("StopContainer {}", request.into_inner().timeout));
        self.exit(143);
        Ok(Response::new(cri::StopContainerResponse {}))
    }
}

#[tonic::async_trait]
impl ImageService for Shared {
    async fn image_status(
        &self,
        request: Request<cri::ImageStatusRequest>,
    ) -> Answer<cri::ImageStatusResponse> {
        self.call("ImageStatus");
        let name = request.into_inner().image.unwrap().image;
        let image = (name != "absent").then(|| cri::Image {
            id: "sha256:1".into(),
            ..Default::default()
        });
        Ok(Response::new(cri::ImageStatusResponse {
            image,
            ..Default::default()
        }))
    }

    async fn pull_image(
        &self,
        _: Request<cri::PullImageRequest>,
    ) -> Answer<cri::PullImageResponse> {
        self.call("PullImage");
        Ok(Response::new(cri::PullImageResponse {
            image_ref: "sha256:1".into(),
        }))
    }

    async fn remove_image(
        &self,
        _: Request<cri::RemoveImageRequest>,
    ) -> Answer<cri::RemoveImageResponse> {
        self.call("RemoveImage");
        Ok(Response::new(cri::RemoveImageResponse {}))
    }
}

#[tonic::async_trait]
impl Control for Shared {
    async fn pull(
        &self,
        _: Request<control::PullRequest>,
    ) -> Answer<BoxStream<control::PullProgress>> {
        let layer = |done| control::PullProgress {
            layer: "sha256:0123456789abcdef".into(),
            done,
            total: 2,
            image_ref: String::new(),
        };
        let end = control::PullProgress {
            image_ref: "sha256:1".into(),
            ..Default::default()
        };
        let messages = [layer(0), layer(2), layer(2), end].map(Ok);
        Ok(Response::new(stream::iter(messages).boxed()))
    }
}

#[tonic::async_trait]
impl Monitor for Shared {
    async fn watch(
        &self,
        _: Request<monitor::WatchRequest>,
    ) -> Answer<BoxStream<monitor::Snapshot>> {
        let snapshots = WatchStream::new(self.snapshots.subscribe())
            .take_while(|snapshot| std::future::ready(snapshot.is_some()))
            .filter_map(|snapshot| std::future::ready(snapshot.map(Ok)));
        Ok(Response::new(snapshots.boxed()))
    }

    async fn vm_stats(
        &self,
        _: Request<monitor::VmStatsRequest>,
    ) -> Answer<monitor::VmStatsResponse> {
        Ok(Response::new(monitor::VmStatsResponse {
            backend: "qemu".to_owned(),
            vcpus: 1,
            memory_bytes: 512 << 20,
            ..Default::default()
        }))
    }
}
