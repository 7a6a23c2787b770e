//! CRI's messages about pods and containers, made from what podvisord has in memory; filters of lists.

use std::collections::HashMap;
use std::sync::Arc;

use podvisor_node::handlers::{ROUTED_BECAUSE, ROUTED_TO};
use podvisor_proto::list::Encoded;
use podvisor_proto::{cri, monitor};

use crate::events::Event;
use crate::pod::{Container, Pod};
use crate::spec::signal;
use crate::store::{ContainerRecord, SandboxRecord};

/// A pod in lists, without its state.
pub fn pod_item(record: &SandboxRecord) -> cri::PodSandbox {
    let config = record.config.as_ref();
    cri::PodSandbox {
        id: record.id.clone(),
        metadata: config.and_then(|config| config.metadata.clone()),
        created_at: record.created_ns,
        labels: config.map_or_else(HashMap::new, |config| config.labels.clone()),
        annotations: annotations(record),
        runtime_handler: record.runtime_handler.clone(),
        ..cri::PodSandbox::default()
    }
}

/// The same, encoded, with its state.
pub fn listed_pod((state, pod): (cri::PodSandboxState, Arc<Pod>)) -> Encoded<cri::PodSandbox> {
    Encoded {
        fixed: pod.listed.clone(),
        rest: cri::PodSandbox {
            state: state as i32,
            ..cri::PodSandbox::default()
        },
    }
}

pub fn pod_status(pod: &Pod, state: cri::PodSandboxState) -> cri::PodSandboxStatus {
    let record = pod.record();
    let annotations = annotations(&record);
    let config = record.config.unwrap_or_default();
    let mut ips = record.ips.into_iter();
    cri::PodSandboxStatus {
        id: record.id,
        metadata: config.metadata,
        state: state as i32,
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
    let config = record.config.as_ref();
    let mut annotations = config.map_or_else(HashMap::new, |config| config.annotations.clone());
    if !record.routed.is_empty() {
        annotations.insert(ROUTED_TO.into(), record.handler.clone());
        annotations.insert(ROUTED_BECAUSE.into(), record.routed.clone());
    }
    annotations
}

/// `state`: what the pod's was when it was looked at for this list.
pub fn pod_matches(pod: &Pod, state: cri::PodSandboxState, filter: &cri::PodSandboxFilter) -> bool {
    let wanted = filter.state.as_ref();
    pod.id.starts_with(&filter.id)
        && wanted.is_none_or(|wanted| wanted.state == state as i32)
        && pod.has_labels(&filter.label_selector)
}

/// `state`: what the container's was when it was looked at for this list.
pub fn container_matches(
    container: &Container,
    state: cri::ContainerState,
    filter: &cri::ContainerFilter,
) -> bool {
    let record = &container.record;
    let wanted = filter.state.as_ref();
    record.id.starts_with(&filter.id)
        && record.sandbox_id.starts_with(&filter.pod_sandbox_id)
        && wanted.is_none_or(|wanted| wanted.state == state as i32)
        && container.has_labels(&filter.label_selector)
}

/// A container in lists, without its state.
pub fn container_item(record: &ContainerRecord) -> cri::Container {
    let config = record.config.as_ref();
    cri::Container {
        id: record.id.clone(),
        pod_sandbox_id: record.sandbox_id.clone(),
        metadata: config.and_then(|config| config.metadata.clone()),
        image: config.and_then(|config| config.image.clone()),
        image_ref: record.image_id.clone(),
        created_at: record.created_ns,
        labels: config.map_or_else(HashMap::new, |config| config.labels.clone()),
        annotations: config.map_or_else(HashMap::new, |config| config.annotations.clone()),
        image_id: record.image_id.clone(),
        ..cri::Container::default()
    }
}

/// The same, encoded, with its state.
pub fn listed_container(
    (state, container): (cri::ContainerState, Arc<Container>),
) -> Encoded<cri::Container> {
    Encoded {
        fixed: container.listed.clone(),
        rest: cri::Container {
            state: state as i32,
            ..cri::Container::default()
        },
    }
}

pub fn container_status(container: &Container, state: monitor::Container) -> cri::ContainerStatus {
    let record = &container.record;
    let config = record.config.clone().unwrap_or_default();
    cri::ContainerStatus {
        id: record.id.clone(),
        metadata: config.metadata,
        state: cri_state(state.state()) as i32,
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

/// An event, with all of its pod as it was then.
pub fn event(event: &Event) -> cri::ContainerEventResponse {
    let pod = &event.view;
    cri::ContainerEventResponse {
        container_id: event.id.clone(),
        container_event_type: event.kind as i32,
        created_at: event.created_ns,
        pod_sandbox_status: Some(pod_status(&pod.pod, pod.state)),
        containers_statuses: pod
            .containers
            .iter()
            .map(|(container, state)| container_status(container, state.clone()))
            .collect(),
    }
}

pub fn cri_state(state: monitor::ContainerState) -> cri::ContainerState {
    match state {
        monitor::ContainerState::Created => cri::ContainerState::ContainerCreated,
        monitor::ContainerState::Running => cri::ContainerState::ContainerRunning,
        monitor::ContainerState::Exited => cri::ContainerState::ContainerExited,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::Names;

    #[test]
    fn filters_are_joined_by_and() {
        let map = |pairs: &[(&str, &str)]| -> HashMap<String, String> {
            let pairs = pairs.iter();
            pairs
                .map(|&(key, value)| (key.into(), value.into()))
                .collect()
        };
        let names = Names::default();
        let pod = SandboxRecord {
            id: "pod".into(),
            ..Default::default()
        };
        let name = names.reserve("sandbox", "pod".into(), "pod").unwrap();
        let pod = Arc::new(Pod::new(pod, name, monitor::Snapshot::default(), None));
        let record = ContainerRecord {
            id: "abc".into(),
            sandbox_id: "pod".into(),
            config: Some(cri::ContainerConfig {
                labels: map(&[("app", "web"), ("x", "y")]),
                ..Default::default()
            }),
            ..Default::default()
        };
        let name = names.reserve("container", "abc".into(), "abc").unwrap();
        let container = Container::new(record, pod, name);
        let exited = cri::ContainerState::ContainerExited;
        let matches = |filter: &_| container_matches(&container, exited, filter);
        let mut filter = cri::ContainerFilter::default();
        assert!(matches(&filter));
        filter.label_selector = map(&[("app", "web")]);
        filter.id = "ab".into();
        filter.pod_sandbox_id = "po".into();
        assert!(matches(&filter));
        for state in [exited, cri::ContainerState::ContainerRunning] {
            filter.state = Some(cri::ContainerStateValue {
                state: state as i32,
            });
            assert_eq!(matches(&filter), state == exited);
        }
        filter.state = None;
        filter.label_selector = map(&[("app", "web"), ("x", "z")]);
        assert!(!matches(&filter));
    }
}
