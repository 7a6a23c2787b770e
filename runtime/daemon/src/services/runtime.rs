//! `runtime.v1.RuntimeService`.

use std::collections::HashMap;
use std::sync::Arc;

use podvisor_proto::cri::runtime_service_server::RuntimeService;
use podvisor_proto::{cri, monitor};
use tonic::{Request, Response, Status};
use tracing::{Level, instrument};

use super::{answer, status};
use crate::daemon::{Daemon, now_ns};
use crate::error::Result;
use crate::handlers::{ROUTED_BECAUSE, ROUTED_TO};
use crate::pod::{Container, Pod};
use crate::spec::signal;
use crate::store::SandboxRecord;
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

    #[instrument(skip_all, name = "PodSandboxStatus", fields(sandbox = request.get_ref().pod_sandbox_id))]
    async fn pod_sandbox_status(
        &self,
        request: Request<cri::PodSandboxStatusRequest>,
    ) -> Result<Response<cri::PodSandboxStatusResponse>, Status> {
        let request = request.into_inner();
        let result = self.daemon.pods.find(&request.pod_sandbox_id).map(|pod| {
            let containers = self.daemon.pods.containers_of(&pod.id);
            cri::PodSandboxStatusResponse {
                status: Some(pod_status(&pod)),
                info: if request.verbose {
                    status::pod_info(&pod)
                } else {
                    HashMap::new()
                },
                containers_statuses: containers
                    .iter()
                    .map(|container| container_status(container))
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
        let filter = request.into_inner().filter.unwrap_or_default();
        let items = self
            .daemon
            .pods
            .all()
            .iter()
            .map(|pod| pod_item(pod))
            .filter(|item| pod_matches(item, &filter))
            .collect();
        answer(Level::DEBUG, Ok(cri::ListPodSandboxResponse { items }))
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
        let filter = request.into_inner().filter.unwrap_or_default();
        let containers = self
            .daemon
            .pods
            .all_containers()
            .iter()
            .map(|container| container_item(container))
            .filter(|item| container_matches(item, &filter))
            .collect();
        answer(Level::DEBUG, Ok(cri::ListContainersResponse { containers }))
    }

    #[instrument(skip_all, name = "ContainerStatus", fields(container = request.get_ref().container_id))]
    async fn container_status(
        &self,
        request: Request<cri::ContainerStatusRequest>,
    ) -> Result<Response<cri::ContainerStatusResponse>, Status> {
        let request = request.into_inner();
        let found = self.daemon.pods.find_container(&request.container_id);
        let result = found.map(|container| cri::ContainerStatusResponse {
            status: Some(container_status(&container)),
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

fn pod_item(pod: &Pod) -> cri::PodSandbox {
    let record = pod.record();
    let annotations = annotations(&record);
    let config = record.config.unwrap_or_default();
    cri::PodSandbox {
        id: record.id,
        metadata: config.metadata,
        state: pod.cri_state() as i32,
        created_at: record.created_ns,
        labels: config.labels,
        annotations,
        runtime_handler: record.runtime_handler,
    }
}

fn pod_status(pod: &Pod) -> cri::PodSandboxStatus {
    let record = pod.record();
    let annotations = annotations(&record);
    let config = record.config.unwrap_or_default();
    let mut ips = record.ips.into_iter();
    cri::PodSandboxStatus {
        id: record.id,
        metadata: config.metadata,
        state: pod.cri_state() as i32,
        created_at: record.created_ns,
        network: Some(cri::PodSandboxNetworkStatus {
            ip: ips.next().unwrap_or_default(),
            additional_ips: ips.map(|ip| cri::PodIp { ip }).collect(),
        }),
        // The kubelet makes a new sandbox when these are not echoed (PodSandboxChanged).
        linux: Some(cri::LinuxPodSandboxStatus {
            namespaces: Some(cri::Namespace {
                options: Some(
                    config
                        .linux
                        .and_then(|linux| linux.security_context)
                        .and_then(|context| context.namespace_options)
                        .unwrap_or_default(),
                ),
            }),
        }),
        labels: config.labels,
        annotations,
        runtime_handler: record.runtime_handler,
    }
}

/// The pod's own, and for one that was routed where and why.
fn annotations(record: &SandboxRecord) -> HashMap<String, String> {
    let config = record.config.clone().unwrap_or_default();
    let mut annotations = config.annotations;
    if !record.routed.is_empty() {
        annotations.insert(ROUTED_TO.into(), record.handler.clone());
        annotations.insert(ROUTED_BECAUSE.into(), record.routed.clone());
    }
    annotations
}

fn pod_matches(item: &cri::PodSandbox, filter: &cri::PodSandboxFilter) -> bool {
    (filter.id.is_empty() || item.id.starts_with(&filter.id))
        && filter
            .state
            .as_ref()
            .is_none_or(|wanted| wanted.state == item.state)
        && labels_match(&item.labels, &filter.label_selector)
}

fn container_matches(item: &cri::Container, filter: &cri::ContainerFilter) -> bool {
    (filter.id.is_empty() || item.id.starts_with(&filter.id))
        && (filter.pod_sandbox_id.is_empty()
            || item.pod_sandbox_id.starts_with(&filter.pod_sandbox_id))
        && filter
            .state
            .as_ref()
            .is_none_or(|wanted| wanted.state == item.state)
        && labels_match(&item.labels, &filter.label_selector)
}

fn labels_match(labels: &HashMap<String, String>, selector: &HashMap<String, String>) -> bool {
    selector
        .iter()
        .all(|(key, value)| labels.get(key) == Some(value))
}

fn container_item(container: &Container) -> cri::Container {
    let record = &container.record;
    let config = record.config.clone().unwrap_or_default();
    cri::Container {
        id: record.id.clone(),
        pod_sandbox_id: record.sandbox_id.clone(),
        metadata: config.metadata,
        image: config.image,
        image_ref: record.image_id.clone(),
        state: cri_state(&container.state()) as i32,
        created_at: record.created_ns,
        labels: config.labels,
        annotations: config.annotations,
        image_id: record.image_id.clone(),
    }
}

fn container_status(container: &Container) -> cri::ContainerStatus {
    let record = &container.record;
    let config = record.config.clone().unwrap_or_default();
    let state = container.state();
    cri::ContainerStatus {
        id: record.id.clone(),
        metadata: config.metadata,
        state: cri_state(&state) as i32,
        created_at: record.created_ns,
        started_at: state.started_ns as i64,
        finished_at: state.finished_ns as i64,
        exit_code: state.exit_code as i32,
        image: config.image,
        image_ref: record.image_id.clone(),
        reason: state.reason,
        message: state.message,
        labels: config.labels,
        annotations: config.annotations,
        mounts: config.mounts,
        log_path: record.log_path.clone(),
        resources: Some(cri::ContainerResources {
            linux: Some(container.limits()),
        }),
        image_id: record.image_id.clone(),
        user: state.user.map(|user| cri::ContainerUser {
            linux: Some(cri::LinuxContainerUser {
                uid: user.uid.into(),
                gid: user.gid.into(),
                supplemental_groups: user
                    .supplemental_groups
                    .into_iter()
                    .map(i64::from)
                    .collect(),
            }),
        }),
        stop_signal: signal::named(record.stop_signal) as i32,
    }
}

fn cri_state(state: &monitor::Container) -> cri::ContainerState {
    match state.state() {
        monitor::ContainerState::Created => cri::ContainerState::ContainerCreated,
        monitor::ContainerState::Running => cri::ContainerState::ContainerRunning,
        monitor::ContainerState::Exited => cri::ContainerState::ContainerExited,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filters_are_joined_by_and() {
        let item = cri::Container {
            id: "abc".into(),
            pod_sandbox_id: "pod".into(),
            state: cri::ContainerState::ContainerExited as i32,
            labels: HashMap::from([("app".into(), "web".into()), ("x".into(), "y".into())]),
            ..Default::default()
        };
        let mut filter = cri::ContainerFilter::default();
        assert!(container_matches(&item, &filter));
        filter.label_selector.insert("app".into(), "web".into());
        filter.id = "ab".into();
        assert!(container_matches(&item, &filter));
        filter.state = Some(cri::ContainerStateValue {
            state: cri::ContainerState::ContainerRunning as i32,
        });
        assert!(!container_matches(&item, &filter));
        filter.state = None;
        filter.label_selector.insert("x".into(), "z".into());
        assert!(!container_matches(&item, &filter));
    }
}
