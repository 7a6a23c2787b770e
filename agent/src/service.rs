//! The API's calls. Each runs to its end even when the caller goes away: half a container is worse than
//! one that nobody asked for twice.

use futures_util::StreamExt;
use nix::time::{ClockId, clock_gettime};
use podvisor_proto::agent::agent_server::Agent;
use podvisor_proto::agent::{
    AddMemoryRequest, AddMemoryResponse, ConfigureNetworkRequest, ConfigureNetworkResponse,
    ConfigureSandboxRequest, ConfigureSandboxResponse, CreateContainerRequest,
    CreateContainerResponse, Event, EventsRequest, ExecRequest, ExecResponse, HelloRequest,
    HelloResponse, PortForwardRequest, PortForwardResponse, RemoveContainerRequest,
    RemoveContainerResponse, ResizeRequest, ResizeResponse, SampleRequest, SampleResponse,
    ShutdownRequest, ShutdownResponse, SignalRequest, SignalResponse, StartContainerRequest,
    StartContainerResponse, UpdateContainerRequest, UpdateContainerResponse,
};
use tonic::codegen::BoxStream;
use tonic::{Code, Request, Response, Status};

use crate::container::{ContainerError, Pod};
use crate::disk::DiskError;
use crate::guest;
use crate::image_volume::ImageVolumeError;
use crate::kmsg;
use crate::launcher::{FailureKind, LaunchError};
use crate::memory::{self, MemoryError};
use crate::network::{self, NetworkError};
use crate::resources::ResourcesError;
use crate::rootfs::RootfsError;
use crate::sandbox::SandboxError;
use crate::seccomp::SeccompFilterError;
use crate::streams::StreamError;
use crate::sysctl::SysctlError;
use podvisor_root::user::UserError;

/// Version of the API.
pub const VERSION: u32 = 1;

/// `CLOCK_BOOTTIME`, in nanoseconds.
pub fn boot_clock() -> u64 {
    clock_gettime(ClockId::CLOCK_BOOTTIME).map_or(0, |time| {
        time.tv_sec() as u64 * 1_000_000_000 + time.tv_nsec() as u64
    })
}

/// The API. Cheap to clone.
#[derive(Clone)]
pub struct Service {
    pod: Pod,
    init_started: u64,
    ready: std::sync::Arc<std::sync::OnceLock<u64>>,
}

impl Service {
    /// `init_started`: see [`boot_clock`].
    pub fn new(pod: Pod, init_started: u64) -> Self {
        Self {
            pod,
            init_started,
            ready: std::sync::Arc::default(),
        }
    }

    /// Notes the moment of readiness, the first time.
    pub fn mark_ready(&self) {
        let _ = self.ready.set(boot_clock());
    }
}

/// Runs a call to its end, in a task of its own.
async fn complete<T: Send + 'static, E: Into<ApiError> + Send + 'static>(
    call: impl Future<Output = Result<T, E>> + Send + 'static,
) -> Result<T, Status> {
    match tokio::spawn(call).await {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) => Err(error.into().into()),
        // A panic ends the guest, so the runtime is shutting down.
        Err(error) => Err(Status::unavailable(error.to_string())),
    }
}

#[tonic::async_trait]
impl Agent for Service {
    async fn hello(
        &self,
        request: Request<HelloRequest>,
    ) -> Result<Response<HelloResponse>, Status> {
        let version = request.get_ref().version;
        if version != VERSION {
            return Err(Status::failed_precondition(format!(
                "this agent speaks version {VERSION}, not {version}"
            )));
        }
        let (memory_total_bytes, memory_available_bytes) = memory::read();
        Ok(Response::new(HelloResponse {
            version: VERSION,
            agent_version: env!("CARGO_PKG_VERSION").to_owned(),
            kernel_release: nix::sys::utsname::uname()
                .map(|names| names.release().to_string_lossy().into_owned())
                .unwrap_or_default(),
            init_started_ns: self.init_started,
            ready_ns: self.ready.get().copied().unwrap_or_default(),
            memory_total_bytes,
            memory_available_bytes,
        }))
    }

    async fn configure_sandbox(
        &self,
        request: Request<ConfigureSandboxRequest>,
    ) -> Result<Response<ConfigureSandboxResponse>, Status> {
        let pod = self.pod.clone();
        complete(async move { pod.configure_sandbox(request.into_inner()).await }).await?;
        Ok(Response::new(ConfigureSandboxResponse {}))
    }

    async fn configure_network(
        &self,
        request: Request<ConfigureNetworkRequest>,
    ) -> Result<Response<ConfigureNetworkResponse>, Status> {
        let pod = self.pod.clone();
        complete(async move {
            let namespace = pod.network_namespace().map_err(NetworkError::Namespace)?;
            network::configure(request.get_ref(), namespace.as_ref()).await
        })
        .await?;
        Ok(Response::new(ConfigureNetworkResponse {}))
    }

    async fn create_container(
        &self,
        request: Request<CreateContainerRequest>,
    ) -> Result<Response<CreateContainerResponse>, Status> {
        let pod = self.pod.clone();
        let user = complete(async move { pod.create(request.into_inner()).await }).await?;
        Ok(Response::new(CreateContainerResponse { user: Some(user) }))
    }

    async fn start_container(
        &self,
        request: Request<StartContainerRequest>,
    ) -> Result<Response<StartContainerResponse>, Status> {
        let pod = self.pod.clone();
        let pid = complete(async move { pod.start(request.into_inner()).await }).await?;
        Ok(Response::new(StartContainerResponse { pid: pid as u32 }))
    }

    async fn update_container(
        &self,
        request: Request<UpdateContainerRequest>,
    ) -> Result<Response<UpdateContainerResponse>, Status> {
        let pod = self.pod.clone();
        complete(async move { pod.update(request.into_inner()).await }).await?;
        Ok(Response::new(UpdateContainerResponse {}))
    }

    async fn remove_container(
        &self,
        request: Request<RemoveContainerRequest>,
    ) -> Result<Response<RemoveContainerResponse>, Status> {
        let pod = self.pod.clone();
        let released = complete(async move { pod.remove(&request.into_inner().id).await }).await?;
        Ok(Response::new(RemoveContainerResponse { released }))
    }

    async fn exec(&self, request: Request<ExecRequest>) -> Result<Response<ExecResponse>, Status> {
        let pod = self.pod.clone();
        let pid = complete(async move { pod.exec(request.into_inner()).await }).await?;
        Ok(Response::new(ExecResponse { pid: pid as u32 }))
    }

    async fn add_memory(
        &self,
        request: Request<AddMemoryRequest>,
    ) -> Result<Response<AddMemoryResponse>, Status> {
        let add = move || {
            memory::add(request.get_ref())?;
            // The kernel has made its own rules for as much memory.
            guest::tune_kernel();
            Ok::<_, MemoryError>(memory::read().0)
        };
        let added = tokio::task::spawn_blocking(add);
        // A panic ends the guest, so the runtime is shutting down.
        let ended = |error: tokio::task::JoinError| Status::unavailable(error.to_string());
        let memory_total_bytes = added.await.map_err(ended)?.map_err(ApiError::from)?;
        Ok(Response::new(AddMemoryResponse { memory_total_bytes }))
    }

    async fn signal(
        &self,
        request: Request<SignalRequest>,
    ) -> Result<Response<SignalResponse>, Status> {
        let pod = self.pod.clone();
        complete(async move { pod.signal(request.get_ref()).await }).await?;
        Ok(Response::new(SignalResponse {}))
    }

    async fn resize(
        &self,
        request: Request<ResizeRequest>,
    ) -> Result<Response<ResizeResponse>, Status> {
        self.pod.resize(request.get_ref()).map_err(ApiError::from)?;
        Ok(Response::new(ResizeResponse {}))
    }

    async fn port_forward(
        &self,
        request: Request<PortForwardRequest>,
    ) -> Result<Response<PortForwardResponse>, Status> {
        let pod = self.pod.clone();
        complete(async move { pod.port_forward(request.get_ref()).await }).await?;
        Ok(Response::new(PortForwardResponse {}))
    }

    async fn sample(
        &self,
        _request: Request<SampleRequest>,
    ) -> Result<Response<SampleResponse>, Status> {
        let sample = self.pod.sample().await.map_err(ApiError::from)?;
        Ok(Response::new(sample))
    }

    async fn events(
        &self,
        request: Request<EventsRequest>,
    ) -> Result<Response<BoxStream<Event>>, Status> {
        let events = self.pod.events().subscribe(request.get_ref().after);
        Ok(Response::new(Box::pin(events.map(Ok))))
    }

    async fn shutdown(
        &self,
        _request: Request<ShutdownRequest>,
    ) -> Result<Response<ShutdownResponse>, Status> {
        let pod = self.pod.clone();
        complete(async move { pod.shut_down().await }).await?;
        Ok(Response::new(ShutdownResponse {}))
    }
}

/// Any error of a call.
#[derive(Debug, thiserror::Error)]
enum ApiError {
    /// See [`ContainerError`].
    #[error(transparent)]
    Container(#[from] ContainerError),
    /// See [`NetworkError`].
    #[error(transparent)]
    Network(#[from] NetworkError),
    /// See [`MemoryError`].
    #[error(transparent)]
    Memory(#[from] MemoryError),
}

impl ApiError {
    /// Which gRPC code tells the caller what it can do about it.
    fn code(&self) -> Code {
        match self {
            Self::Container(error) => container_code(error),
            Self::Network(error) => match error {
                NetworkError::Malformed { .. } | NetworkError::TooMany => Code::InvalidArgument,
                NetworkError::NoInterface(_) => Code::NotFound,
                NetworkError::Kernel { .. } | NetworkError::Namespace(_) => Code::Internal,
            },
            Self::Memory(error) => match error {
                MemoryError::Blocks { .. } => Code::InvalidArgument,
                MemoryError::Add { source, .. }
                    if source.kind() == std::io::ErrorKind::OutOfMemory =>
                {
                    Code::ResourceExhausted
                }
                MemoryError::Mount(_) | MemoryError::File { .. } | MemoryError::Add { .. } => {
                    Code::Internal
                }
            },
        }
    }
}

fn container_code(error: &ContainerError) -> Code {
    match error {
        ContainerError::NotFound(_) => Code::NotFound,
        ContainerError::Exists(_) | ContainerError::Sandbox(SandboxError::Different) => {
            Code::AlreadyExists
        }
        ContainerError::State { .. }
        | ContainerError::Resources(ResourcesError::InUse { .. } | ResourcesError::Set { .. })
        | ContainerError::Sandbox(SandboxError::NotConfigured)
        | ContainerError::ImageVolume(ImageVolumeError::Empty | ImageVolumeError::SubPath { .. })
        | ContainerError::Port { .. }
        | ContainerError::Launch(LaunchError::Failed {
            kind: FailureKind::Program | FailureKind::Gone,
            ..
        }) => Code::FailedPrecondition,
        ContainerError::Id(_)
        | ContainerError::Invalid(_)
        | ContainerError::Spec(_)
        | ContainerError::Seccomp(SeccompFilterError::Length(_) | SeccompFilterError::Flags(_))
        | ContainerError::Resources(ResourcesError::Inconsistent(_) | ResourcesError::NoFile(_))
        | ContainerError::User(
            UserError::NoUser(_)
            | UserError::NoGroup(_)
            | UserError::Range(_)
            | UserError::TooManyGroups,
        )
        | ContainerError::Sandbox(
            SandboxError::NoScratch
            | SandboxError::Hostname
            | SandboxError::UserNamespace
            | SandboxError::Sysctl(SysctlError::Name(_) | SysctlError::Set { .. })
            | SandboxError::Disk(DiskError::Segment { .. }),
        )
        | ContainerError::Disk(DiskError::Segment { .. })
        | ContainerError::Rootfs(RootfsError::TooManyLayers(_))
        | ContainerError::Stream(StreamError::TokenLength(_) | StreamError::Duplicate) => {
            Code::InvalidArgument
        }
        ContainerError::TooMany(_)
        | ContainerError::Stream(StreamError::TooMany)
        | ContainerError::Disk(DiskError::Full)
        | ContainerError::Sandbox(SandboxError::Disk(DiskError::Full)) => Code::ResourceExhausted,
        ContainerError::Stream(StreamError::Missing)
        | ContainerError::Launch(LaunchError::Deadline) => Code::DeadlineExceeded,
        ContainerError::ShuttingDown => Code::Unavailable,
        ContainerError::User(UserError::Read(_))
        | ContainerError::Sandbox(SandboxError::Disk(_) | SandboxError::Kernel { .. })
        | ContainerError::Disk(_)
        | ContainerError::Rootfs(_)
        | ContainerError::ImageVolume(ImageVolumeError::Mount(_))
        | ContainerError::Seccomp(SeccompFilterError::Write(_))
        | ContainerError::Launch(_)
        | ContainerError::Kernel { .. } => Code::Internal,
    }
}

impl From<ApiError> for Status {
    fn from(error: ApiError) -> Self {
        let code = error.code();
        if code == Code::Internal {
            kmsg::error!("{error}");
        }
        Self::new(code, error.to_string())
    }
}
