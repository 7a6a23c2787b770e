//! CRI's messages about what pods and containers use.

use std::borrow::Cow;
use std::sync::Arc;

use podvisor_proto::agent::{InterfaceCounters, InterfaceSample, Pressure, Stall, Usage};
use podvisor_proto::{cri, monitor};

use super::{Measured, Sample, working_set};
use crate::daemon::Daemon;
use crate::error::{Error, Result};
use crate::pod::{Container, Pod};
use crate::store::SandboxRecord;

/// The interface that a network plugin makes for a pod.
const DEFAULT_INTERFACE: &str = "eth0";

impl Daemon {
    /// What containers use: of those that do not run only the writable layer, as containerd has it.
    pub fn container_stats(
        &self,
        filter: Option<cri::ContainerStatsFilter>,
    ) -> impl Iterator<Item = cri::ContainerStats> + Send + use<> {
        let filter = filter.unwrap_or_default();
        let matches = move |container: &Container| {
            container.record.id.starts_with(&filter.id)
                && container.pod.id.starts_with(&filter.pod_sandbox_id)
                && container.has_labels(&filter.label_selector)
        };
        let mountpoint = self.images_dir().display().to_string();
        let containers = self.pods.all_containers().into_iter();
        containers
            .filter(move |container| matches(container))
            .map(move |container| container_stats(&container, &mountpoint))
    }

    /// What one container uses.
    ///
    /// # Errors
    /// NOT_FOUND, INVALID_ARGUMENT.
    pub fn stats_of_container(&self, id: &str) -> Result<cri::ContainerStats> {
        let container = self.pods.find_container(id)?;
        let mountpoint = self.images_dir().display().to_string();
        Ok(container_stats(&container, &mountpoint))
    }

    /// What pods use that are ready.
    pub fn pod_stats(
        self: &Arc<Self>,
        filter: Option<cri::PodSandboxStatsFilter>,
    ) -> impl Iterator<Item = cri::PodSandboxStats> + Send + use<> {
        let filter = filter.unwrap_or_default();
        let daemon = Arc::clone(self);
        let matches = move |pod: &Pod| {
            pod.id.starts_with(&filter.id)
                && pod.cri_state() == cri::PodSandboxState::SandboxReady
                && pod.has_labels(&filter.label_selector)
        };
        let pods = self.pods.all().into_iter();
        pods.filter(move |pod| matches(pod))
            .map(move |pod| daemon.pod_sandbox_stats(&pod))
    }

    /// What one pod uses.
    ///
    /// # Errors
    /// NOT_FOUND, INVALID_ARGUMENT; FAILED_PRECONDITION when it is not ready.
    pub fn stats_of_pod(&self, id: &str) -> Result<cri::PodSandboxStats> {
        let pod = self.pods.find(id)?;
        if pod.cri_state() != cri::PodSandboxState::SandboxReady {
            return Err(Error::Precondition(format!(
                "sandbox {} is not ready",
                pod.id
            )));
        }
        Ok(self.pod_sandbox_stats(&pod))
    }

    fn pod_sandbox_stats(&self, pod: &Pod) -> cri::PodSandboxStats {
        pod.samples.want();
        let (attributes, created_ns) = pod.look(|record| (attributes(record), record.created_ns));
        let sample = pod.samples.newest().unwrap_or_default();
        // A pod that was not looked at yet has used nothing since it was made.
        let time_ns = match sample.time_ns {
            0 => created_ns,
            time_ns => time_ns as i64,
        };
        let mountpoint = self.images_dir().display().to_string();
        let containers = self.pods.containers_of(&pod.id);
        let cost = &sample.cost;
        let processes = sample.containers.values();
        let processes = processes.filter_map(|container| container.sample.processes);
        cri::PodSandboxStats {
            attributes: Some(attributes),
            linux: Some(cri::LinuxPodSandboxStats {
                // All that the node pays for the pod, as where cAdvisor looks at the pod's group.
                cpu: Some(cpu(&cost.usage, cost.nano_cores, time_ns)),
                memory: Some(memory(&cost.usage, 0, time_ns)),
                network: Some(network(&sample.interfaces, time_ns)),
                process: Some(cri::ProcessUsage {
                    timestamp: time_ns,
                    process_count: value(processes.map(|sample| sample.processes).sum()),
                }),
                containers: containers
                    .iter()
                    .map(|container| container_stats(container, &mountpoint))
                    .collect(),
                io: Some(cri::IoUsage {
                    timestamp: time_ns,
                    psi: psi(cost.usage.io_pressure.as_ref()),
                }),
            }),
        }
    }
}

fn attributes(record: &SandboxRecord) -> cri::PodSandboxAttributes {
    let config = record.config.as_ref();
    cri::PodSandboxAttributes {
        id: record.id.clone(),
        metadata: config.and_then(|config| config.metadata.clone()),
        labels: config.map(|c| c.labels.clone()).unwrap_or_default(),
        annotations: config.map(|c| c.annotations.clone()).unwrap_or_default(),
    }
}

/// `mountpoint`: a path of the file system that writable layers are on.
fn container_stats(container: &Container, mountpoint: &str) -> cri::ContainerStats {
    container.pod.samples.want();
    let sample = container.pod.samples.newest().unwrap_or_default();
    let measured = sample.containers.get(&container.record.id);
    let layer = measured.and_then(|measured| measured.sample.writable_layer);
    let layer = layer.unwrap_or_default();
    let config = container.record.config.as_ref();
    let mut stats = cri::ContainerStats {
        attributes: Some(cri::ContainerAttributes {
            id: container.record.id.clone(),
            metadata: config.and_then(|config| config.metadata.clone()),
            labels: config.map(|c| c.labels.clone()).unwrap_or_default(),
            annotations: config.map(|c| c.annotations.clone()).unwrap_or_default(),
        }),
        writable_layer: Some(cri::FilesystemUsage {
            timestamp: (sample.time_ns as i64).max(container.record.created_ns),
            fs_id: Some(cri::FilesystemIdentifier {
                mountpoint: mountpoint.to_owned(),
            }),
            used_bytes: value(layer.used_bytes),
            inodes_used: value(layer.inodes),
        }),
        ..cri::ContainerStats::default()
    };
    let state = container.state();
    if state.state() != monitor::ContainerState::Running {
        return stats;
    }
    let limits = container.limits();
    let limit = limits.memory_limit_in_bytes.max(0) as u64;
    // CRI's limit is that of memory and swap together.
    let swap_limit = limits.memory_swap_limit_in_bytes.max(0) as u64;
    let swap_limit = (swap_limit > 0).then(|| swap_limit.saturating_sub(limit));
    let now = Now::of(&state, &sample, measured);
    let usage = &*now.usage;
    stats.cpu = Some(cpu(usage, now.nano_cores, now.time_ns));
    stats.memory = Some(memory(usage, limit, now.time_ns));
    stats.swap = Some(cri::SwapUsage {
        timestamp: now.time_ns,
        swap_available_bytes: swap_limit
            .and_then(|limit| value(limit.saturating_sub(usage.swap_bytes))),
        swap_usage_bytes: value(usage.swap_bytes),
    });
    stats.io = Some(cri::IoUsage {
        timestamp: now.time_ns,
        psi: psi(usage.io_pressure.as_ref()),
    });
    stats
}

/// What is known of a running container's use.
#[derive(Debug)]
pub struct Now<'a> {
    /// When it was found, nanoseconds since the epoch.
    pub time_ns: i64,
    /// What was found.
    pub usage: Cow<'a, Usage>,
    /// See [`Measured`].
    pub nano_cores: Option<u64>,
}

impl<'a> Now<'a> {
    /// A container that was not looked at since its start has used nothing at its start.
    pub fn of(state: &monitor::Container, sample: &Sample, measured: Option<&'a Measured>) -> Self {
        match measured.and_then(|measured| measured.sample.usage.as_deref()) {
            Some(usage) => Self {
                time_ns: sample.time_ns as i64,
                usage: Cow::Borrowed(usage),
                nano_cores: measured.and_then(|measured| measured.nano_cores),
            },
            None => Self {
                time_ns: state.started_ns as i64,
                usage: Cow::Owned(Usage::default()),
                nano_cores: None,
            },
        }
    }
}

#[expect(clippy::unnecessary_wraps, reason = "CRI's fields are optional")]
fn value(value: u64) -> Option<cri::UInt64Value> {
    Some(cri::UInt64Value { value })
}

fn cpu(usage: &Usage, nano_cores: Option<u64>, timestamp: i64) -> cri::CpuUsage {
    cri::CpuUsage {
        timestamp,
        usage_core_nano_seconds: value(usage.cpu_ns),
        usage_nano_cores: nano_cores.and_then(value),
        psi: psi(usage.cpu_pressure.as_ref()),
    }
}

/// `limit`: bytes, 0 for none.
fn memory(usage: &Usage, limit: u64, timestamp: i64) -> cri::MemoryUsage {
    let working_set = working_set(usage);
    cri::MemoryUsage {
        timestamp,
        working_set_bytes: value(working_set),
        available_bytes: (limit > 0)
            .then(|| limit.saturating_sub(working_set))
            .and_then(value),
        usage_bytes: value(usage.memory_bytes),
        rss_bytes: value(usage.anonymous_bytes),
        page_faults: value(usage.page_faults),
        major_page_faults: value(usage.major_page_faults),
        psi: psi(usage.memory_pressure.as_ref()),
    }
}

fn psi(pressure: Option<&Pressure>) -> Option<cri::PsiStats> {
    let data = |stall: &Stall| cri::PsiData {
        // CRI counts in nanoseconds.
        total: stall.total_us.saturating_mul(1000),
        avg10: f64::from(stall.average_10) / 100.0,
        avg60: f64::from(stall.average_60) / 100.0,
        avg300: f64::from(stall.average_300) / 100.0,
    };
    let pressure = pressure?;
    Some(cri::PsiStats {
        full: pressure.full.as_ref().map(data),
        some: pressure.some.as_ref().map(data),
    })
}

fn network(interfaces: &[InterfaceSample], timestamp: i64) -> cri::NetworkUsage {
    let is_default = |interface: &&InterfaceSample| interface.name == DEFAULT_INTERFACE;
    let default = interfaces.iter().find(is_default).or(interfaces.first());
    let others = interfaces
        .iter()
        .filter(|interface| default.is_some_and(|default| default.name != interface.name));
    cri::NetworkUsage {
        timestamp,
        default_interface: default.map(interface),
        interfaces: others.map(interface).collect(),
    }
}

fn interface(sample: &InterfaceSample) -> cri::NetworkInterfaceUsage {
    let received: InterfaceCounters = sample.received.unwrap_or_default();
    let sent = sample.sent.unwrap_or_default();
    cri::NetworkInterfaceUsage {
        name: sample.name.clone(),
        rx_bytes: value(received.bytes),
        rx_errors: value(received.errors),
        tx_bytes: value(sent.bytes),
        tx_errors: value(sent.errors),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::Names;
    use crate::stats::Cost;
    use crate::store::{ContainerRecord, SandboxRecord};
    use podvisor_proto::agent::{ContainerSample, SampleResponse, WritableLayer};

    /// Container "c" in this state.
    fn container(state: monitor::ContainerState) -> Container {
        let names = Names::default();
        let name = |kind| names.reserve(kind, kind.to_owned(), kind).unwrap();
        let snapshot = monitor::Snapshot {
            containers: vec![monitor::Container {
                id: "c".to_owned(),
                state: state as i32,
                started_ns: 5,
                ..monitor::Container::default()
            }],
            ..monitor::Snapshot::default()
        };
        let pod = Pod::new(SandboxRecord::default(), name("sandbox"), snapshot, None);
        let record = ContainerRecord {
            id: "c".to_owned(),
            created_ns: 4,
            ..ContainerRecord::default()
        };
        let container = Container::new(record, Arc::new(pod), name("container"));
        container.set_limits(cri::LinuxContainerResources {
            memory_limit_in_bytes: 100,
            memory_swap_limit_in_bytes: 150,
            ..cri::LinuxContainerResources::default()
        });
        container
    }

    fn with_sample(container: &Container) -> cri::ContainerStats {
        let usage = Usage {
            cpu_ns: 7,
            memory_bytes: 90,
            inactive_file_bytes: 30,
            swap_bytes: 20,
            ..Usage::default()
        };
        let sample = ContainerSample {
            id: "c".to_owned(),
            usage: Some(usage.into()),
            processes: None,
            writable_layer: Some(WritableLayer {
                used_bytes: 4096,
                inodes: 3,
            }),
        };
        let answer = SampleResponse {
            containers: vec![sample],
            ..SampleResponse::default()
        };
        container.pod.samples.take(9, answer, Cost::default());
        container_stats(container, "/images")
    }

    #[test]
    fn what_runs_has_what_its_limits_leave() {
        let stats = with_sample(&container(monitor::ContainerState::Running));
        let (cpu, memory, swap) = (
            stats.cpu.unwrap(),
            stats.memory.unwrap(),
            stats.swap.unwrap(),
        );
        assert_eq!((cpu.timestamp, cpu.usage_core_nano_seconds), (9, value(7)));
        assert_eq!(memory.working_set_bytes, value(60));
        assert_eq!(memory.available_bytes, value(40));
        assert_eq!(swap.swap_available_bytes, value(30));
        assert_eq!(stats.writable_layer.unwrap().used_bytes, value(4096));
    }

    #[test]
    fn what_has_just_started_has_used_nothing_then() {
        let stats = container_stats(&container(monitor::ContainerState::Running), "/images");
        let cpu = stats.cpu.unwrap();
        assert_eq!((cpu.timestamp, cpu.usage_core_nano_seconds), (5, value(0)));
        assert_eq!(stats.writable_layer.unwrap().timestamp, 4);
    }

    #[test]
    fn what_does_not_run_has_its_writable_layer_only() {
        let stats = with_sample(&container(monitor::ContainerState::Exited));
        assert!(stats.cpu.is_none() && stats.memory.is_none());
        let layer = stats.writable_layer.unwrap();
        assert_eq!((layer.timestamp, layer.inodes_used), (9, value(3)));
        assert_eq!(layer.fs_id.unwrap().mountpoint, "/images");
    }

    #[test]
    fn eth0_is_the_default_wherever_it_is() {
        let interface = |name: &str| InterfaceSample {
            name: name.to_owned(),
            ..InterfaceSample::default()
        };
        let names = |interfaces: &[&str]| {
            let samples: Vec<_> = interfaces.iter().map(|name| interface(name)).collect();
            let network = network(&samples, 1);
            let others: Vec<_> = network.interfaces.into_iter().map(|i| i.name).collect();
            (network.default_interface.map(|i| i.name), others)
        };
        let (default, others) = names(&["net1", "eth0"]);
        assert_eq!((default.as_deref(), others.len()), (Some("eth0"), 1));
        assert_eq!(names(&["net1"]), (Some("net1".to_owned()), Vec::new()));
        assert_eq!(names(&[]), (None, Vec::new()));
    }
}
