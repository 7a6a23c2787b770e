//! CRI's metrics: what a kubelet shows at /metrics/cadvisor when the runtime, not cAdvisor, looks at containers.

use std::path::Path;
use std::sync::Arc;

use podvisor_node::cgroup::hierarchy;
use podvisor_node::inventory;
use podvisor_proto::{cri, monitor};

use super::Sample;
use super::families::{self, ContainerFacts, Emit, Family, PodFacts};
use super::messages::Now;
use crate::daemon::Daemon;
use crate::pod::{Container, Pod};

/// Every family there is. The same for as long as podvisord runs.
pub fn descriptors() -> Vec<cri::MetricDescriptor> {
    let of_containers = families::CONTAINER.iter().map(Family::descriptor);
    let of_pods = families::POD.iter().map(Family::descriptor);
    of_containers.chain(of_pods).collect()
}

impl Daemon {
    /// The metrics of each pod that is ready, and of its containers that run.
    pub fn pod_metrics(
        self: &Arc<Self>,
    ) -> impl Iterator<Item = cri::PodSandboxMetrics> + Send + use<> {
        let daemon = Arc::clone(self);
        let pods = self.pods.all().into_iter();
        pods.filter(|pod| pod.cri_state() == cri::PodSandboxState::SandboxReady)
            .map(move |pod| daemon.metrics_of(&pod))
    }

    fn metrics_of(&self, pod: &Pod) -> cri::PodSandboxMetrics {
        pod.samples.want();
        let sample = pod.samples.newest().unwrap_or_default();
        let record = pod.record();
        let config = record.config.unwrap_or_default();
        let metadata = config.metadata.clone().unwrap_or_default();
        let parent = hierarchy::parent_path(&self.cgroup_parent(&config)).unwrap_or_default();
        let group = Path::new("/")
            .join(parent)
            .join(inventory::cgroup_leaf(&self.config.run_dir, &pod.id))
            .display()
            .to_string();
        let labels = Labels {
            id: group.clone(),
            name: pod.id.clone(),
            image: String::new(),
            namespace: metadata.namespace,
            pod: metadata.name,
            container: String::new(),
        };
        let facts = PodFacts {
            interfaces: &sample.interfaces,
            cost: &sample.cost,
        };
        let containers = self.pods.containers_of(&pod.id);
        cri::PodSandboxMetrics {
            metrics: metrics(
                families::POD,
                &labels,
                sample.time_ns as i64,
                |values, emit| values(&facts, emit),
            ),
            container_metrics: containers
                .iter()
                .filter_map(|container| of_container(container, &sample, &labels))
                .collect(),
            pod_sandbox_id: record.id,
        }
    }
}

/// Of one that runs. `pod`: its pod's labels.
fn of_container(
    container: &Container,
    sample: &Sample,
    pod: &Labels,
) -> Option<cri::ContainerMetrics> {
    let state = container.state();
    if state.state() != monitor::ContainerState::Running {
        return None;
    }
    let record = &container.record;
    let config = record.config.clone().unwrap_or_default();
    let labels = Labels {
        id: format!("{}/{}", pod.id, record.id),
        name: record.id.clone(),
        image: config.image.unwrap_or_default().image,
        container: config.metadata.unwrap_or_default().name,
        ..pod.clone()
    };
    let measured = sample.containers.get(&record.id);
    let now = Now::of(&state, sample, measured);
    let sampled = measured.map(|measured| &measured.sample);
    let facts = ContainerFacts {
        usage: &now.usage,
        processes: sampled.and_then(|s| s.processes).unwrap_or_default(),
        layer: sampled.and_then(|s| s.writable_layer).unwrap_or_default(),
        scratch: sample.scratch,
        limits: &container.limits(),
        started_ns: state.started_ns,
        time_ns: now.time_ns as u64,
    };
    Some(cri::ContainerMetrics {
        container_id: record.id.clone(),
        metrics: metrics(families::CONTAINER, &labels, now.time_ns, |values, emit| {
            values(&facts, emit);
        }),
    })
}

/// Values of [`families::LABELS`].
#[derive(Clone)]
struct Labels {
    id: String,
    name: String,
    image: String,
    namespace: String,
    pod: String,
    container: String,
}

impl Labels {
    fn values(&self) -> [&String; families::LABELS.len()] {
        [
            &self.id,
            &self.name,
            &self.image,
            &self.namespace,
            &self.pod,
            &self.container,
        ]
    }
}

fn metrics<V>(
    families: &[Family<V>],
    labels: &Labels,
    timestamp: i64,
    values: impl Fn(&V, Emit<'_>),
) -> Vec<cri::Metric> {
    let mut metrics = Vec::with_capacity(families.len());
    for family in families {
        values(&family.values, &mut |own, value| {
            debug_assert_eq!(own.len(), family.labels.len(), "{}", family.name);
            let all = labels.values().into_iter().cloned();
            metrics.push(cri::Metric {
                name: family.name.to_owned(),
                timestamp,
                metric_type: family.kind as i32,
                label_values: all.chain(own.iter().map(|&own| own.to_owned())).collect(),
                value: Some(cri::UInt64Value { value }),
            });
        });
    }
    metrics
}

#[cfg(test)]
mod tests {
    use super::*;
    use podvisor_proto::agent::{
        DeviceIo, FileSystemSample, InterfaceSample, Pressure, ProcessSample, Stall, Usage,
        WritableLayer,
    };
    use std::collections::{HashMap, HashSet};

    fn labels() -> Labels {
        Labels {
            id: "/a".into(),
            name: "n".into(),
            image: "i".into(),
            namespace: "ns".into(),
            pod: "p".into(),
            container: "c".into(),
        }
    }

    fn of_a_container(usage: &Usage) -> Vec<cri::Metric> {
        let limits = cri::LinuxContainerResources {
            cpu_quota: 20_000,
            memory_limit_in_bytes: -1,
            unified: HashMap::from([("memory.low".to_owned(), "4096".to_owned())]),
            ..Default::default()
        };
        let facts = ContainerFacts {
            usage,
            processes: ProcessSample::default(),
            layer: WritableLayer::default(),
            scratch: FileSystemSample::default(),
            limits: &limits,
            started_ns: 5_000_000_000,
            time_ns: 7_999_999_999,
        };
        metrics(families::CONTAINER, &labels(), 1, |values, emit| {
            values(&facts, emit);
        })
    }

    fn value(metrics: &[cri::Metric], name: &str) -> u64 {
        let found = metrics.iter().find(|metric| metric.name == name);
        found.unwrap().value.unwrap().value
    }

    #[test]
    fn every_family_has_values_and_all_labels() {
        let usage = Usage {
            io: vec![DeviceIo::default()],
            ..Usage::default()
        };
        let mut all = of_a_container(&usage);
        let facts = PodFacts {
            interfaces: &[InterfaceSample::default()],
            cost: &super::super::Cost::default(),
        };
        all.extend(metrics(families::POD, &labels(), 1, |values, emit| {
            values(&facts, emit);
        }));
        let descriptors = descriptors();
        let names: HashSet<_> = descriptors.iter().map(|d| &d.name).collect();
        assert_eq!(names.len(), descriptors.len(), "each name once");
        for descriptor in &descriptors {
            assert!(!descriptor.help.is_empty(), "{}", descriptor.name);
            let of_it = all.iter().filter(|metric| metric.name == descriptor.name);
            let counts: Vec<_> = of_it.map(|metric| metric.label_values.len()).collect();
            assert!(!counts.is_empty(), "{}", descriptor.name);
            assert!(
                counts
                    .iter()
                    .all(|&count| count == descriptor.label_keys.len())
            );
        }
    }

    #[test]
    fn units() {
        let stall = Stall {
            total_us: 3_500_000,
            ..Stall::default()
        };
        let usage = Usage {
            cpu_ns: 2_500_000_000,
            memory_bytes: 100,
            inactive_file_bytes: 30,
            io_pressure: Some(Pressure {
                some: None,
                full: Some(stall),
            }),
            ..Usage::default()
        };
        let all = of_a_container(&usage);
        for (name, expected) in [
            ("container_cpu_usage_seconds_total", 2),
            ("container_memory_working_set_bytes", 70),
            ("container_pressure_io_stalled_seconds_total", 3),
            ("container_pressure_io_waiting_seconds_total", 0),
            ("container_spec_cpu_quota", 20_000),
            ("container_spec_memory_limit_bytes", 0),
            ("container_spec_memory_reservation_limit_bytes", 4096),
            ("container_start_time_seconds", 5),
            ("container_last_seen", 7),
        ] {
            assert_eq!(value(&all, name), expected, "{name}");
        }
    }
}
