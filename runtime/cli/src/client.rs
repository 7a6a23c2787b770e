//! gRPC over unix sockets, and errors that say what to do.

use std::error::Error as _;
use std::fs::OpenOptions;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use hyper_util::rt::TokioIo;
use podvisor_proto::control::control_client::ControlClient;
use podvisor_proto::cri::image_service_client::ImageServiceClient;
use podvisor_proto::cri::runtime_service_client::RuntimeServiceClient;
use podvisor_proto::monitor::monitor_client::MonitorClient;
use podvisor_proto::monitor::{Snapshot, VmStatsRequest, VmStatsResponse, WatchRequest};
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Status};

/// Largest message, both ways: the kubelet's and crictl's own limit.
const MAX_MESSAGE_BYTES: usize = 16 << 20;

/// `sizeof(sun_path)`, with its terminating zero.
const MAX_SOCKET_PATH: usize = 108;

/// What an ordinary call may take: the kubelet's `--runtime-request-timeout`.
pub const CALL: Duration = Duration::from_mins(2);
/// What `RunPodSandbox` may take: the kubelet gives it twice the ordinary time.
pub const RUN_POD_SANDBOX: Duration = Duration::from_mins(4);

/// Why podvisord or a monitor did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// No socket.
    #[error(
        "podvisord is not running: there is no {}. Start it as root (`podvisord`), \
         or name its socket with --socket or --run-dir",
        .0.display()
    )]
    NotRunning(PathBuf),
    /// A socket that nobody listens on.
    #[error("podvisord has stopped: nobody listens on {}. Start it again as root (`podvisord`)", .0.display())]
    Stopped(PathBuf),
    /// The pod's monitor is not there.
    #[error("the pod has no virtual machine: nothing listens on {}", .0.display())]
    NoMonitor(PathBuf),
    /// Only root may connect.
    #[error("not allowed to open {}: run this as root", .0.display())]
    Permission(PathBuf),
    /// Anything else that hinders a connection.
    #[error("cannot connect to {}: {source}", path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The other side refused, or went away.
    #[error("{call}: {}", explain(status))]
    Rpc {
        /// The RPC's name.
        call: &'static str,
        /// Its answer.
        status: Box<Status>,
    },
}

impl ClientError {
    /// Whether the object that the call was about does not exist.
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::Rpc { status, .. } if status.code() == Code::NotFound)
    }
}

/// The clients of podvisord's socket; cheap to clone.
#[derive(Debug, Clone)]
pub struct Daemon {
    /// CRI runtime service.
    pub runtime: RuntimeServiceClient<Channel>,
    /// CRI image service.
    pub images: ImageServiceClient<Channel>,
    /// podvisor's own additions.
    pub control: ControlClient<Channel>,
}

impl Daemon {
    /// Connects to podvisord.
    pub async fn connect(socket: &Path) -> Result<Self, ClientError> {
        let channel = connect(socket).await.map_err(|source| {
            let path = socket.to_owned();
            match source.kind() {
                io::ErrorKind::NotFound => ClientError::NotRunning(path),
                io::ErrorKind::ConnectionRefused => ClientError::Stopped(path),
                io::ErrorKind::PermissionDenied => ClientError::Permission(path),
                _ => ClientError::Connect { path, source },
            }
        })?;
        Ok(Self {
            runtime: RuntimeServiceClient::new(channel.clone())
                .max_decoding_message_size(MAX_MESSAGE_BYTES)
                .max_encoding_message_size(MAX_MESSAGE_BYTES),
            images: ImageServiceClient::new(channel.clone())
                .max_decoding_message_size(MAX_MESSAGE_BYTES)
                .max_encoding_message_size(MAX_MESSAGE_BYTES),
            control: ControlClient::new(channel),
        })
    }
}

/// The folder of a pod.
pub fn sandbox_dir(run_dir: &Path, sandbox_id: &str) -> PathBuf {
    run_dir.join("sandboxes").join(sandbox_id)
}

/// Connects to the monitor of a pod, which serves root on the same host, with or without podvisord.
pub async fn monitor(
    run_dir: &Path,
    sandbox_id: &str,
) -> Result<MonitorClient<Channel>, ClientError> {
    let socket = sandbox_dir(run_dir, sandbox_id).join("monitor.sock");
    let channel = connect(&socket)
        .await
        .map_err(|source| match source.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
                ClientError::NoMonitor(socket.clone())
            }
            io::ErrorKind::PermissionDenied => ClientError::Permission(socket.clone()),
            _ => ClientError::Connect {
                path: socket.clone(),
                source,
            },
        })?;
    Ok(MonitorClient::new(channel).max_decoding_message_size(MAX_MESSAGE_BYTES))
}

/// What the monitor of a pod knows now.
pub async fn snapshot(run_dir: &Path, sandbox_id: &str) -> Result<Snapshot, ClientError> {
    let mut monitor = monitor(run_dir, sandbox_id).await?;
    let first = async {
        let mut snapshots = monitor.watch(WatchRequest {}).await?.into_inner();
        snapshots.message().await
    };
    let ended = || Status::unavailable("the monitor has ended");
    match tokio::time::timeout(CALL, first).await {
        Ok(Ok(Some(snapshot))) => Ok(snapshot),
        Ok(Ok(None)) => Err(failed("Watch")(ended())),
        Ok(Err(status)) => Err(failed("Watch")(status)),
        Err(_) => Err(failed("Watch")(Status::deadline_exceeded(
            "no answer in time",
        ))),
    }
}

/// Counters of a pod's VM.
pub async fn vm_stats(run_dir: &Path, sandbox_id: &str) -> Result<VmStatsResponse, ClientError> {
    let mut monitor = monitor(run_dir, sandbox_id).await?;
    let stats = monitor.vm_stats(within(CALL, VmStatsRequest {})).await;
    Ok(stats.map_err(failed("VmStats"))?.into_inner())
}

/// A request with a deadline, which both sides keep.
pub fn within<T>(deadline: Duration, message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(deadline);
    request
}

/// Names the call in its error; for `map_err`.
pub fn failed(call: &'static str) -> impl FnOnce(Status) -> ClientError {
    move |status| ClientError::Rpc {
        call,
        status: Box::new(status),
    }
}

/// The process that listens on a socket.
pub async fn listener_pid(socket: &Path) -> io::Result<u32> {
    let pid = stream(socket).await?.peer_cred()?.pid();
    pid.and_then(|pid| pid.try_into().ok())
        .ok_or_else(|| io::ErrorKind::NotFound.into())
}

async fn connect(socket: &Path) -> io::Result<Channel> {
    let path = socket.to_owned();
    let connector = tower::service_fn(move |_| {
        let path = path.clone();
        async move { stream(&path).await.map(TokioIo::new) }
    });
    // The address is never looked up: the connector knows where to go.
    Endpoint::from_static("http://podvisor")
        .connect_with_connector(connector)
        .await
        .map_err(root_cause)
}

/// A connection to a socket at a path of any length. unix(7) has room for 108 bytes, which a run
/// directory with a sandbox's id soon exceeds: those are reached through their opened directory.
async fn stream(path: &Path) -> io::Result<UnixStream> {
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(io::ErrorKind::InvalidFilename.into());
    };
    if path.as_os_str().len() < MAX_SOCKET_PATH {
        return UnixStream::connect(path).await;
    }
    let directory = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_PATH | libc::O_DIRECTORY)
        .open(parent)?;
    let short = PathBuf::from(format!("/proc/self/fd/{}", directory.as_raw_fd())).join(name);
    UnixStream::connect(short).await
}

/// The kernel's error in tonic's wrapping, for its kind.
fn root_cause(error: tonic::transport::Error) -> io::Error {
    let mut cause = error.source();
    while let Some(inner) = cause {
        if let Some(io) = inner.downcast_ref::<io::Error>() {
            return io::Error::new(io.kind(), io.to_string());
        }
        cause = inner.source();
    }
    io::Error::other(error)
}

/// A status in words: the message, which podvisord writes for people, or the code when there is none.
fn explain(status: &Status) -> String {
    match (status.code(), status.message()) {
        (code, "") => code.description().to_owned(),
        (Code::Unavailable, message) => format!("not available: {message}"),
        (Code::Internal, message) => format!("internal error: {message}"),
        (Code::Cancelled, message) if message.contains("Timeout expired") => {
            "no answer in time".to_owned()
        }
        (_, message) => message.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_missing_socket_tells_how_to_start_the_daemon() {
        let dir = tempfile::tempdir().unwrap();
        let error = Daemon::connect(&dir.path().join("podvisor.sock"))
            .await
            .unwrap_err();
        assert!(matches!(error, ClientError::NotRunning(_)), "{error:?}");
        assert!(error.to_string().contains("Start it"), "{error}");
    }

    #[tokio::test]
    async fn a_socket_without_a_listener_is_a_stopped_daemon() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("podvisor.sock");
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        let error = Daemon::connect(&path).await.unwrap_err();
        assert!(matches!(error, ClientError::Stopped(_)), "{error:?}");
    }

    #[tokio::test]
    async fn a_pod_without_a_monitor_says_so() {
        let dir = tempfile::tempdir().unwrap();
        let error = monitor(dir.path(), "ab").await.unwrap_err();
        assert!(matches!(error, ClientError::NoMonitor(_)), "{error:?}");
    }

    #[tokio::test]
    async fn sockets_with_long_paths_are_reached() {
        let dir = tempfile::tempdir().unwrap();
        let deep = dir.path().join("d".repeat(100));
        std::fs::create_dir(&deep).unwrap();
        let error = Daemon::connect(&deep.join("podvisor.sock"))
            .await
            .unwrap_err();
        assert!(matches!(error, ClientError::NotRunning(_)), "{error:?}");

        let short = dir.path().join("short");
        std::os::unix::fs::symlink(&deep, &short).unwrap();
        let listener = std::os::unix::net::UnixListener::bind(short.join("s")).unwrap();
        stream(&deep.join("s")).await.unwrap();
        listener.accept().unwrap();
    }

    #[test]
    fn a_status_reads_as_the_daemon_wrote_it() {
        let error = failed("CreateContainer")(Status::not_found("image \"x\" not found"));
        assert_eq!(error.to_string(), "CreateContainer: image \"x\" not found");
        assert!(error.is_not_found());
    }
}
