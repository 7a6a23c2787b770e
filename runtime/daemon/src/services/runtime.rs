//! `runtime.v1.RuntimeService`.

use std::collections::HashMap;
use std::sync::Arc;

use podvisor_proto::cri;
use podvisor_proto::cri::runtime_service_server::RuntimeService;
use tonic::codegen::BoxStream;
use tonic::{Request, Response, Status};
use tracing::{Level, instrument};

use super::{answer, events, lists, messages, status};
use crate::daemon::{Daemon, now_ns};
use crate::error::Result;
use crate::heap;
use crate::pod::{Container, Pod};
use crate::stats::metrics;
use crate::streaming::StreamingServer;

/// Serves CRI's runtime half.
#[derive(Debug)]
pub struct Runtime {
    daemon: Arc<Daemon>,
    streaming: StreamingServer,
}

impl Runtime {
    /// A service for `daemon`.
    pub fn new(daemon: Arc<Daemon>, streaming: StreamingServer) -> Self {
        Self { daemon, streaming }
    }

    fn listed_pods(
        &self,
        filter: Option<cri::PodSandboxFilter>,
    ) -> impl Iterator<Item = (cri::PodSandboxState, Arc<Pod>)> + Send + 'static {
        let filter = filter.unwrap_or_default();
        let pods = self.daemon.pods.all().into_iter();
        pods.map(|pod| (pod.cri_state(), pod))
            .filter(move |(state, pod)| messages::pod_matches(pod, *state, &filter))
    }

    fn listed_containers(
        &self,
        filter: Option<cri::ContainerFilter>,
    ) -> impl Iterator<Item = (cri::ContainerState, Arc<Container>)> + Send + 'static {
        let filter = filter.unwrap_or_default();
        let containers = self.daemon.pods.all_containers().into_iter();
        containers
            .map(|container| (messages::cri_state(container.phase()), container))
            .filter(move |(state, container)| {
                messages::container_matches(container, *state, &filter)
            })
    }
}

#[tonic::async_trait]
impl RuntimeService for Runtime {
    async fn version(
        &self,
        _request: Request<cri::VersionRequest>,
    ) -> Result<Response<cri::VersionResponse>, Status> {
        answer(Level::DEBUG, Ok(status::version()))
    }

    #[instrument(skip_all, name = "Status")]
    async fn status(
        &self,
        request: Request<cri::StatusRequest>,
    ) -> Result<Response<cri::StatusResponse>, Status> {
        let verbose = request.into_inner().verbose;
        answer(
            Level::DEBUG,
            Ok(status::status(&self.daemon, verbose).await),
        )
    }

    async fn runtime_config(
        &self,
        _request: Request<cri::RuntimeConfigRequest>,
    ) -> Result<Response<cri::RuntimeConfigResponse>, Status> {
        answer(Level::DEBUG, Ok(status::runtime_config(&self.daemon)))
    }

    #[instrument(skip_all, name = "UpdateRuntimeConfig")]
    async fn update_runtime_config(
        &self,
        request: Request<cri::UpdateRuntimeConfigRequest>,
    ) -> Result<Response<cri::UpdateRuntimeConfigResponse>, Status> {
        let result = status::update_runtime_config(&self.daemon, request.into_inner());
        answer(
            Level::INFO,
            result.map(|()| cri::UpdateRuntimeConfigResponse {}),
        )
    }

    #[instrument(skip_all, name = "RunPodSandbox", fields(pod, sandbox))]
    async fn run_pod_sandbox(
        &self,
        request: Request<cri::RunPodSandboxRequest>,
    ) -> Result<Response<cri::RunPodSandboxResponse>, Status> {
        let request = request.into_inner();
        let config = request.config.unwrap_or_default();
        if let Some(metadata) = &config.metadata {
            let pod = format!("{}/{}", metadata.namespace, metadata.name);
            tracing::Span::current().record("pod", pod);
        }
        let result = self
            .daemon
            .run_pod_sandbox(config, request.runtime_handler)
            .await;
        if let Ok(id) = &result {
            tracing::Span::current().record("sandbox", id);
        }
        answer(
            Level::INFO,
            result.map(|pod_sandbox_id| cri::RunPodSandboxResponse { pod_sandbox_id }),
        )
    }

    #[instrument(skip_all, name = "StopPodSandbox", fields(sandbox = request.get_ref().pod_sandbox_id))]
    async fn stop_pod_sandbox(
        &self,
        request: Request<cri::StopPodSandboxRequest>,
    ) -> Result<Response<cri::StopPodSandboxResponse>, Status> {
        let id = request.into_inner().pod_sandbox_id;
        let result = self.daemon.stop_pod_sandbox(&id).await;
        answer(Level::INFO, result.map(|()| cri::StopPodSandboxResponse {}))
    }

    #[instrument(skip_all, name = "RemovePodSandbox", fields(sandbox = request.get_ref().pod_sandbox_id))]
    async fn remove_pod_sandbox(
        &self,
        request: Request<cri::RemovePodSandboxRequest>,
    ) -> Result<Response<cri::RemovePodSandboxResponse>, Status> {
        let id = request.into_inner().pod_sandbox_id;
        let result = self.daemon.remove_pod_sandbox(&id).await;
        answer(
            Level::INFO,
            result.map(|()| cri::RemovePodSandboxResponse {}),
        )
    }

    #[instrument(skip_all, name = "UpdatePodSandboxResources", fields(sandbox = request.get_ref().pod_sandbox_id))]
    async fn update_pod_sandbox_resources(
        &self,
        request: Request<cri::UpdatePodSandboxResourcesRequest>,
    ) -> Result<Response<cri::UpdatePodSandboxResourcesResponse>, Status> {
        let request = request.into_inner();
        let result = self.daemon.update_pod_sandbox_resources(request).await;
        answer(
            Level::INFO,
            result.map(|()| cri::UpdatePodSandboxResourcesResponse {}),
        )
    }

    #[instrument(skip_all, name = "PodSandboxStatus", fields(sandbox = request.get_ref().pod_sandbox_id))]
    async fn pod_sandbox_status(
        &self,
        request: Request<cri::PodSandboxStatusRequest>,
    ) -> Result<Response<cri::PodSandboxStatusResponse>, Status> {
        let request = request.into_inner();
        let result = self.daemon.pods.find(&request.pod_sandbox_id).map(|pod| {
            let containers = self.daemon.pods.containers_of(&pod.id);
            cri::PodSandboxStatusResponse {
                status: Some(messages::pod_status(&pod, pod.cri_state())),
                info: if request.verbose {
                    status::pod_info(&pod)
                } else {
                    HashMap::new()
                },
                containers_statuses: containers
                    .iter()
                    .map(|container| messages::container_status(container, container.state()))
                    .collect(),
                timestamp: now_ns() as i64,
            }
        });
        answer(Level::DEBUG, result)
    }

    async fn list_pod_sandbox(
        &self,
        request: Request<cri::ListPodSandboxRequest>,
    ) -> Result<Response<cri::ListPodSandboxResponse>, Status> {
        let pods = self.listed_pods(request.into_inner().filter);
        let list = cri::ListPodSandboxResponse {
            encoded: pods.map(messages::listed_pod).collect(),
            ..Default::default()
        };
        answer(Level::DEBUG, Ok(list))
    }

    async fn stream_pod_sandboxes(
        &self,
        request: Request<cri::StreamPodSandboxesRequest>,
    ) -> Result<Response<BoxStream<cri::StreamPodSandboxesResponse>>, Status> {
        let pods = self.listed_pods(request.into_inner().filter);
        let items = pods.map(|(state, pod)| cri::PodSandbox {
            state: state as i32,
            ..pod.look(messages::pod_item)
        });
        let message = |pod_sandboxes| cri::StreamPodSandboxesResponse { pod_sandboxes };
        answer(Level::DEBUG, Ok(lists::stream(items, message)))
    }

    #[instrument(skip_all, name = "CreateContainer", fields(sandbox = request.get_ref().pod_sandbox_id, container))]
    async fn create_container(
        &self,
        request: Request<cri::CreateContainerRequest>,
    ) -> Result<Response<cri::CreateContainerResponse>, Status> {
        let created = Box::pin(self.daemon.create_container(request.into_inner()));
        let result = created.await;
        if let Ok(id) = &result {
            tracing::Span::current().record("container", id);
        }
        answer(
            Level::INFO,
            result.map(|container_id| cri::CreateContainerResponse { container_id }),
        )
    }

    #[instrument(skip_all, name = "StartContainer", fields(container = request.get_ref().container_id))]
    async fn start_container(
        &self,
        request: Request<cri::StartContainerRequest>,
    ) -> Result<Response<cri::StartContainerResponse>, Status> {
        let id = request.into_inner().container_id;
        let result = self.daemon.start_container(&id).await;
        answer(Level::INFO, result.map(|()| cri::StartContainerResponse {}))
    }

    #[instrument(skip_all, name = "StopContainer", fields(container = request.get_ref().container_id, timeout = request.get_ref().timeout))]
    async fn stop_container(
        &self,
        request: Request<cri::StopContainerRequest>,
    ) -> Result<Response<cri::StopContainerResponse>, Status> {
        let request = request.into_inner();
        let result = self
            .daemon
            .stop_container(&request.container_id, request.timeout)
            .await;
        answer(Level::INFO, result.map(|()| cri::StopContainerResponse {}))
    }

    #[instrument(skip_all, name = "RemoveContainer", fields(container = request.get_ref().container_id))]
    async fn remove_container(
        &self,
        request: Request<cri::RemoveContainerRequest>,
    ) -> Result<Response<cri::RemoveContainerResponse>, Status> {
        let id = request.into_inner().container_id;
        let result = self.daemon.remove_container(&id).await;
        answer(
            Level::INFO,
            result.map(|()| cri::RemoveContainerResponse {}),
        )
    }

    async fn list_containers(
        &self,
        request: Request<cri::ListContainersRequest>,
    ) -> Result<Response<cri::ListContainersResponse>, Status> {
        let containers = self.listed_containers(request.into_inner().filter);
        let list = cri::ListContainersResponse {
            encoded: containers.map(messages::listed_container).collect(),
            ..Default::default()
        };
        answer(Level::DEBUG, Ok(list))
    }

    async fn stream_containers(
        &self,
        request: Request<cri::StreamContainersRequest>,
    ) -> Result<Response<BoxStream<cri::StreamContainersResponse>>, Status> {
        let containers = self.listed_containers(request.into_inner().filter);
        let items = containers.map(|(state, container)| cri::Container {
            state: state as i32,
            ..messages::container_item(&container.record)
        });
        let message = |containers| cri::StreamContainersResponse { containers };
        answer(Level::DEBUG, Ok(lists::stream(items, message)))
    }

    async fn get_container_events(
        &self,
        _request: Request<cri::GetEventsRequest>,
    ) -> Result<Response<BoxStream<cri::ContainerEventResponse>>, Status> {
        let stream = events::stream(&self.daemon.pods.events, self.daemon.ending.clone());
        answer(Level::DEBUG, Ok(stream))
    }

    #[instrument(skip_all, name = "ContainerStatus", fields(container = request.get_ref().container_id))]
    async fn container_status(
        &self,
        request: Request<cri::ContainerStatusRequest>,
    ) -> Result<Response<cri::ContainerStatusResponse>, Status> {
        let request = request.into_inner();
        let found = self.daemon.pods.find_container(&request.container_id);
        let result = found.map(|container| cri::ContainerStatusResponse {
            status: Some(messages::container_status(&container, container.state())),
            info: if request.verbose {
                status::container_info(&container)
            } else {
                HashMap::new()
            },
        });
        answer(Level::DEBUG, result)
    }

    #[instrument(skip_all, name = "UpdateContainerResources", fields(container = request.get_ref().container_id))]
    async fn update_container_resources(
        &self,
        request: Request<cri::UpdateContainerResourcesRequest>,
    ) -> Result<Response<cri::UpdateContainerResourcesResponse>, Status> {
        let request = request.into_inner();
        let result = self.daemon.update_container_resources(request).await;
        answer(
            Level::INFO,
            result.map(|()| cri::UpdateContainerResourcesResponse {}),
        )
    }

    #[instrument(skip_all, name = "ReopenContainerLog", fields(container = request.get_ref().container_id))]
    async fn reopen_container_log(
        &self,
        request: Request<cri::ReopenContainerLogRequest>,
    ) -> Result<Response<cri::ReopenContainerLogResponse>, Status> {
        let id = request.into_inner().container_id;
        let result = self.daemon.reopen_container_log(&id).await;
        answer(
            Level::INFO,
            result.map(|()| cri::ReopenContainerLogResponse {}),
        )
    }

    async fn container_stats(
        &self,
        request: Request<cri::ContainerStatsRequest>,
    ) -> Result<Response<cri::ContainerStatsResponse>, Status> {
        let id = request.into_inner().container_id;
        let stats = self.daemon.stats_of_container(&id);
        let message = |stats| cri::ContainerStatsResponse { stats: Some(stats) };
        answer(Level::DEBUG, stats.map(message))
    }

    async fn list_container_stats(
        &self,
        request: Request<cri::ListContainerStatsRequest>,
    ) -> Result<Response<cri::ListContainerStatsResponse>, Status> {
        let stats = self.daemon.container_stats(request.into_inner().filter);
        let stats = stats.collect();
        answer(Level::DEBUG, Ok(cri::ListContainerStatsResponse { stats }))
    }

    async fn stream_container_stats(
        &self,
        request: Request<cri::StreamContainerStatsRequest>,
    ) -> Result<Response<BoxStream<cri::StreamContainerStatsResponse>>, Status> {
        let stats = self.daemon.container_stats(request.into_inner().filter);
        let message = |container_stats| cri::StreamContainerStatsResponse { container_stats };
        answer(Level::DEBUG, Ok(lists::stream(stats, message)))
    }

    async fn pod_sandbox_stats(
        &self,
        request: Request<cri::PodSandboxStatsRequest>,
    ) -> Result<Response<cri::PodSandboxStatsResponse>, Status> {
        let id = request.into_inner().pod_sandbox_id;
        let stats = self.daemon.stats_of_pod(&id);
        let message = |stats| cri::PodSandboxStatsResponse { stats: Some(stats) };
        answer(Level::DEBUG, stats.map(message))
    }

    async fn list_pod_sandbox_stats(
        &self,
        request: Request<cri::ListPodSandboxStatsRequest>,
    ) -> Result<Response<cri::ListPodSandboxStatsResponse>, Status> {
        let stats = self.daemon.pod_stats(request.into_inner().filter);
        let stats = stats.collect();
        heap::give_back();
        answer(Level::DEBUG, Ok(cri::ListPodSandboxStatsResponse { stats }))
    }

    async fn stream_pod_sandbox_stats(
        &self,
        request: Request<cri::StreamPodSandboxStatsRequest>,
    ) -> Result<Response<BoxStream<cri::StreamPodSandboxStatsResponse>>, Status> {
        let stats = self.daemon.pod_stats(request.into_inner().filter);
        let message = |pod_sandbox_stats| cri::StreamPodSandboxStatsResponse { pod_sandbox_stats };
        answer(Level::DEBUG, Ok(lists::stream(stats, message)))
    }

    async fn list_metric_descriptors(
        &self,
        _request: Request<cri::ListMetricDescriptorsRequest>,
    ) -> Result<Response<cri::ListMetricDescriptorsResponse>, Status> {
        let descriptors = metrics::descriptors();
        answer(
            Level::DEBUG,
            Ok(cri::ListMetricDescriptorsResponse { descriptors }),
        )
    }

    async fn list_pod_sandbox_metrics(
        &self,
        _request: Request<cri::ListPodSandboxMetricsRequest>,
    ) -> Result<Response<cri::ListPodSandboxMetricsResponse>, Status> {
        let pod_metrics = self.daemon.pod_metrics().collect();
        // 16 KiB for each container.
        heap::give_back();
        answer(
            Level::DEBUG,
            Ok(cri::ListPodSandboxMetricsResponse { pod_metrics }),
        )
    }

    async fn stream_pod_sandbox_metrics(
        &self,
        _request: Request<cri::StreamPodSandboxMetricsRequest>,
    ) -> Result<Response<BoxStream<cri::StreamPodSandboxMetricsResponse>>, Status> {
        let message = |pod_sandbox_metrics| cri::StreamPodSandboxMetricsResponse {
            pod_sandbox_metrics,
        };
        let metrics = self.daemon.pod_metrics();
        answer(Level::DEBUG, Ok(lists::stream(metrics, message)))
    }

    #[instrument(skip_all, name = "ExecSync", fields(container = request.get_ref().container_id))]
    async fn exec_sync(
        &self,
        request: Request<cri::ExecSyncRequest>,
    ) -> Result<Response<cri::ExecSyncResponse>, Status> {
        let result = self.daemon.exec_sync(request.into_inner()).await;
        answer(
            Level::DEBUG,
            result.map(|done| cri::ExecSyncResponse {
                stdout: done.stdout,
                stderr: done.stderr,
                exit_code: done.exit_code as i32,
            }),
        )
    }

    #[instrument(skip_all, name = "Exec", fields(container = request.get_ref().container_id))]
    async fn exec(
        &self,
        request: Request<cri::ExecRequest>,
    ) -> Result<Response<cri::ExecResponse>, Status> {
        let exec = self.daemon.check_exec(request.into_inner());
        let result = exec.and_then(|exec| Ok(self.streaming.exec(exec)?));
        answer(Level::INFO, result.map(|url| cri::ExecResponse { url }))
    }

    #[instrument(skip_all, name = "Attach", fields(container = request.get_ref().container_id))]
    async fn attach(
        &self,
        request: Request<cri::AttachRequest>,
    ) -> Result<Response<cri::AttachResponse>, Status> {
        let attach = self.daemon.check_attach(request.into_inner());
        let result = attach.and_then(|attach| Ok(self.streaming.attach(attach)?));
        answer(Level::INFO, result.map(|url| cri::AttachResponse { url }))
    }

    #[instrument(skip_all, name = "PortForward", fields(sandbox = request.get_ref().pod_sandbox_id))]
    async fn port_forward(
        &self,
        request: Request<cri::PortForwardRequest>,
    ) -> Result<Response<cri::PortForwardResponse>, Status> {
        let forward = self.daemon.check_port_forward(request.into_inner());
        let result = forward.and_then(|forward| Ok(self.streaming.port_forward(forward)?));
        answer(
            Level::INFO,
            result.map(|url| cri::PortForwardResponse { url }),
        )
    }
}
