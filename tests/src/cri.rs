//! A gRPC client of the CRI socket, for what crictl cannot say. Calls block.

use std::future::Future;
use std::path::Path;
use std::time::Duration;

use podvisor_proto::cri::image_service_client::ImageServiceClient;
use podvisor_proto::cri::runtime_service_client::RuntimeServiceClient;
use podvisor_proto::cri::{self, ContainerStatus, PodSandbox, PodSandboxConfig};
use tokio::runtime::Runtime;
use tonic::transport::{Channel, Endpoint};
use tonic::{Response, Status, Streaming};
use tonic_health::pb::health_client::HealthClient;

use crate::eventually;
use crate::machine::patience;

/// As kubelets and crictl have it.
const MAX_MESSAGE: usize = 16 << 20;

/// A connection.
#[derive(Debug)]
pub struct Cri {
    // Before the runtime it lives in.
    runtime_service: RuntimeServiceClient<Channel>,
    image_service: ImageServiceClient<Channel>,
    channel: Channel,
    runtime: Runtime,
}

impl Cri {
    /// Connects to a socket.
    pub fn connect(socket: &Path) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .expect("threads can be started");
        let endpoint = Endpoint::from_shared(format!("unix://{}", socket.display()))
            .expect("a path is an endpoint")
            .timeout(patience());
        let channel = runtime
            .block_on(endpoint.connect())
            .unwrap_or_else(|error| panic!("{}: {error:?}", socket.display()));
        Self {
            runtime_service: RuntimeServiceClient::new(channel.clone())
                .max_decoding_message_size(MAX_MESSAGE),
            image_service: ImageServiceClient::new(channel.clone())
                .max_decoding_message_size(MAX_MESSAGE),
            channel,
            runtime,
        }
    }

    /// Makes one call of the runtime service: `cri.call(async |mut c| c.version(..).await)`.
    pub fn call<T, F>(
        &self,
        call: impl FnOnce(RuntimeServiceClient<Channel>) -> F,
    ) -> Result<T, Status>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        self.runtime
            .block_on(call(self.runtime_service.clone()))
            .map(Response::into_inner)
    }

    /// Makes one call of the image service.
    pub fn call_image<T, F>(
        &self,
        call: impl FnOnce(ImageServiceClient<Channel>) -> F,
    ) -> Result<T, Status>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        self.runtime
            .block_on(call(self.image_service.clone()))
            .map(Response::into_inner)
    }

    /// Waits for the next message of a stream that a call answered with; `None`: its end.
    pub fn next<T>(&self, stream: &mut Streaming<T>) -> Result<Option<T>, Status> {
        self.runtime.block_on(async {
            let next = tokio::time::timeout(patience(), stream.message()).await;
            next.unwrap_or_else(|_| panic!("nothing comes within {:?}", patience()))
        })
    }

    /// Makes one call of `grpc.health.v1.Health`.
    pub fn call_health<T, F>(
        &self,
        call: impl FnOnce(HealthClient<Channel>) -> F,
    ) -> Result<T, Status>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        let client = HealthClient::new(self.channel.clone());
        self.runtime
            .block_on(call(client))
            .map(Response::into_inner)
    }

    /// Begins a call of the runtime service and lets it run while `meanwhile` does, then cancels it:
    /// the client goes away.
    pub fn cancelled<T, F>(
        &self,
        call: impl FnOnce(RuntimeServiceClient<Channel>) -> F,
        meanwhile: impl FnOnce(),
    ) where
        T: Send + 'static,
        F: Future<Output = Result<Response<T>, Status>> + Send + 'static,
    {
        let task = self.runtime.spawn(call(self.runtime_service.clone()));
        meanwhile();
        assert!(
            !task.is_finished(),
            "the call ended before it was cancelled"
        );
        task.abort();
        let _ = self.runtime.block_on(task);
    }

    /// [`Cri::cancelled`], for the image service.
    pub fn cancelled_image<T, F>(
        &self,
        call: impl FnOnce(ImageServiceClient<Channel>) -> F,
        meanwhile: impl FnOnce(),
    ) where
        T: Send + 'static,
        F: Future<Output = Result<Response<T>, Status>> + Send + 'static,
    {
        let task = self.runtime.spawn(call(self.image_service.clone()));
        meanwhile();
        assert!(
            !task.is_finished(),
            "the call ended before it was cancelled"
        );
        task.abort();
        let _ = self.runtime.block_on(task);
    }

    /// All pods.
    pub fn pods(&self) -> Vec<PodSandbox> {
        self.call(async |mut c| {
            let all = cri::ListPodSandboxRequest::default();
            c.list_pod_sandbox(all).await
        })
        .expect("ListPodSandbox")
        .items
    }

    /// All containers.
    pub fn containers(&self) -> Vec<cri::Container> {
        self.call(async |mut c| {
            let all = cri::ListContainersRequest::default();
            c.list_containers(all).await
        })
        .expect("ListContainers")
        .items
    }

    /// `ContainerStatus` of a container that is there.
    pub fn status(&self, container: &str) -> ContainerStatus {
        self.try_status(container)
            .unwrap_or_else(|status| panic!("ContainerStatus {container}: {status}"))
    }

    /// `ContainerStatus`.
    pub fn try_status(&self, container: &str) -> Result<ContainerStatus, Status> {
        let request = cri::ContainerStatusRequest {
            container_id: container.into(),
            verbose: false,
        };
        self.call(async |mut c| c.container_status(request).await)
            .map(|response| response.status.expect("a status"))
    }

    /// `PodSandboxStatus` of a pod that is there.
    pub fn pod_status(&self, pod: &str) -> cri::PodSandboxStatus {
        let request = cri::PodSandboxStatusRequest {
            pod_sandbox_id: pod.into(),
            verbose: false,
        };
        self.call(async |mut c| c.pod_sandbox_status(request).await)
            .unwrap_or_else(|status| panic!("PodSandboxStatus {pod}: {status}"))
            .status
            .expect("a status")
    }

    /// Waits until a container has ended.
    pub fn wait_exit(&self, container: &str) -> ContainerStatus {
        eventually("the container ends", || {
            let status = self.status(container);
            (status.state() == cri::ContainerState::ContainerExited).then_some(status)
        })
    }

    /// Runs a pod. Its id.
    pub fn run_pod(&self, request: cri::RunPodSandboxRequest) -> Result<String, Status> {
        self.call(async |mut c| c.run_pod_sandbox(request).await)
            .map(|response| response.pod_sandbox_id)
    }

    /// Creates a container in a pod. Its id.
    pub fn create_container(&self, request: cri::CreateContainerRequest) -> Result<String, Status> {
        self.call(async |mut c| c.create_container(request).await)
            .map(|response| response.container_id)
    }

    /// Starts a container.
    pub fn start_container(&self, container: &str) -> Result<(), Status> {
        let request = cri::StartContainerRequest {
            container_id: container.into(),
        };
        self.call(async |mut c| c.start_container(request).await)
            .map(drop)
    }

    /// Kills a container, and waits for its end.
    pub fn stop_container(&self, container: &str) {
        let request = cri::StopContainerRequest {
            container_id: container.into(),
            timeout: 0,
        };
        self.call(async |mut c| c.stop_container(request).await)
            .expect("StopContainer");
    }

    /// Removes a container, whether or not it runs.
    pub fn remove_container(&self, container: &str) {
        let request = cri::RemoveContainerRequest {
            container_id: container.into(),
        };
        self.call(async |mut c| c.remove_container(request).await)
            .expect("RemoveContainer");
    }

    /// Stops a pod.
    pub fn stop_pod(&self, pod: &str) -> Result<(), Status> {
        let request = cri::StopPodSandboxRequest {
            pod_sandbox_id: pod.into(),
        };
        self.call(async |mut c| c.stop_pod_sandbox(request).await)
            .map(drop)
    }

    /// Stops and removes a pod.
    pub fn remove_pod(&self, pod: &str) {
        self.stop_pod(pod).expect("StopPodSandbox");
        let request = cri::RemovePodSandboxRequest {
            pod_sandbox_id: pod.into(),
        };
        self.call(async |mut c| c.remove_pod_sandbox(request).await)
            .expect("RemovePodSandbox");
    }

    /// Runs a command in a container.
    pub fn exec(
        &self,
        container: &str,
        command: &[&str],
        timeout: Duration,
    ) -> Result<cri::ExecSyncResponse, Status> {
        let request = cri::ExecSyncRequest {
            container_id: container.into(),
            cmd: command.iter().map(ToString::to_string).collect(),
            timeout: timeout.as_secs() as i64,
        };
        self.call(async |mut c| c.exec_sync(request).await)
    }

    /// Pulls an image without credentials.
    pub fn pull(&self, image: &str) -> Result<String, Status> {
        let request = cri::PullImageRequest {
            image: Some(image_spec(image)),
            ..Default::default()
        };
        self.call_image(async |mut c| c.pull_image(request).await)
            .map(|response| response.image_ref)
    }
}

/// An image by name.
pub fn image_spec(image: &str) -> cri::ImageSpec {
    cri::ImageSpec {
        image: image.into(),
        ..Default::default()
    }
}

/// A pod's configuration with what it must have.
pub fn sandbox_config(name: &str) -> PodSandboxConfig {
    PodSandboxConfig {
        metadata: Some(cri::PodSandboxMetadata {
            name: name.into(),
            uid: format!("uid-{name}"),
            namespace: "default".into(),
            attempt: 0,
        }),
        ..Default::default()
    }
}
