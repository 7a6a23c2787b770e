//! CRI's messages about pods and containers, made from what podvisord has in memory; filters of lists.

use std::collections::HashMap;

use podvisor_proto::{cri, monitor};

use crate::events::Event;
use crate::handlers::{ROUTED_BECAUSE, ROUTED_TO};
use crate::pod::{Container, Pod};
use crate::spec::signal;
use crate::store::SandboxRecord;

pub fn pod_item(pod: &Pod) -> cri::PodSandbox {
    let state = pod.cri_state() as i32;
    pod.look(|record| {
        let config = record.config.as_ref();
        cri::PodSandbox {
            id: record.id.clone(),
            metadata: config.and_then(|config| config.metadata.clone()),
            state,
            created_at: record.created_ns,
            labels: config.map_or_else(HashMap::new, |config| config.labels.clone()),
            annotations: annotations(record),
            runtime_handler: record.runtime_handler.clone(),
        }
    })
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

pub fn pod_matches(item: &cri::PodSandbox, filter: &cri::PodSandboxFilter) -> bool {
    (filter.id.is_empty() || item.id.starts_with(&filter.id))
        && filter
            .state
            .as_ref()
            .is_none_or(|wanted| wanted.state == item.state)
        && labels_match(&item.labels, &filter.label_selector)
}

pub fn container_matches(item: &cri::Container, filter: &cri::ContainerFilter) -> bool {
    (filter.id.is_empty() || item.id.starts_with(&filter.id))
        && (filter.pod_sandbox_id.is_empty()
            || item.pod_sandbox_id.starts_with(&filter.pod_sandbox_id))
        && filter
            .state
            .as_ref()
            .is_none_or(|wanted| wanted.state == item.state)
        && labels_match(&item.labels, &filter.label_selector)
}

/// Whether an object has all labels of a selector.
pub fn labels_match(labels: &HashMap<String, String>, selector: &HashMap<String, String>) -> bool {
    selector
        .iter()
        .all(|(key, value)| labels.get(key) == Some(value))
}

pub fn container_item(container: &Container) -> cri::Container {
    let record = &container.record;
    let config = record.config.as_ref();
    cri::Container {
        id: record.id.clone(),
        pod_sandbox_id: record.sandbox_id.clone(),
        metadata: config.and_then(|config| config.metadata.clone()),
        image: config.and_then(|config| config.image.clone()),
        image_ref: record.image_id.clone(),
        state: cri_state(container.phase()) as i32,
        created_at: record.created_ns,
        labels: config.map_or_else(HashMap::new, |config| config.labels.clone()),
        annotations: config.map_or_else(HashMap::new, |config| config.annotations.clone()),
        image_id: record.image_id.clone(),
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

fn cri_state(state: monitor::ContainerState) -> cri::ContainerState {
    match state {
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
