//! What the containers use, from the host's own control groups.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use podvisor_proto::agent::{ContainerSample, SampleResponse};
use podvisor_usage::{cgroup, network, processes, writable};
use tokio::time::timeout;

use super::{Host, HostError, kernel};

/// Hierarchies of control groups, at their usual places (cgroups(7)): that of version 2 on hosts that have it alone, that of
/// hosts that have both, controllers of version 1.
const HIERARCHIES: [&str; 7] = ["", "unified", "cpu", "cpuacct", "memory", "pids", "blkio"];

/// How long a sample waits for the sizes of writable layers. Ones that take longer are in a later one.
const MEASURE_PATIENCE: Duration = Duration::from_millis(100);

/// What is looked at of one container.
struct Subject {
    id: String,
    groups: Vec<PathBuf>,
    /// Its first process, while it runs.
    first: Option<u32>,
}

impl Host {
    /// What the pod's containers use now.
    pub async fn sample(&self) -> Result<SampleResponse, HostError> {
        let subjects = self.subjects();
        let upper = |subject: &Subject| {
            let layer = self.writable_dir.join(&subject.id).join("upper");
            (subject.id.clone(), layer)
        };
        let layers: Vec<_> = subjects.iter().map(upper).collect();
        let known = Arc::clone(&self.writable_layers);
        let scratch = self.writable_dir.clone();
        let measure = tokio::task::spawn_blocking(move || known.measure(&scratch, &layers));
        let _ = timeout(MEASURE_PATIENCE, measure).await;

        let known = Arc::clone(&self.writable_layers);
        let scratch = self.writable_dir.clone();
        let sample = tokio::task::spawn_blocking(move || {
            let containers = subjects.iter().map(|subject| ContainerSample {
                writable_layer: known.get(&subject.id),
                ..read(subject)
            });
            SampleResponse {
                // podvisord sees the pod's group itself.
                total: None,
                containers: containers.collect(),
                interfaces: subjects
                    .iter()
                    .find_map(|subject| Some(interfaces(subject.first?)))
                    .unwrap_or_default(),
                scratch: Some(writable::file_system(&scratch)),
            }
        });
        sample
            .await
            .map_err(|error| kernel("reading control groups")(error.into()))
    }

    fn subjects(&self) -> Vec<Subject> {
        let containers = self.containers();
        let subjects = containers.iter().map(|(id, container)| Subject {
            id: id.clone(),
            groups: directories(&container.cgroup),
            first: container.processes().get("").map(|process| process.pid()),
        });
        subjects.collect()
    }
}

/// Directories of a group in all hierarchies that have it.
fn directories(group: &Path) -> Vec<PathBuf> {
    let below = group.strip_prefix("/").unwrap_or(group);
    HIERARCHIES
        .iter()
        .map(|hierarchy| Path::new("/sys/fs/cgroup").join(hierarchy).join(below))
        .filter(|directory| directory.is_dir())
        .collect()
}

fn read(subject: &Subject) -> ContainerSample {
    let group = subject.groups.first();
    let running = subject.first.zip(group);
    ContainerSample {
        id: subject.id.clone(),
        usage: running.map(|_| Box::new(cgroup::of_host(&subject.groups))),
        processes: running.map(|(first, group)| processes::of_group(group, first)),
        writable_layer: None,
    }
}

/// Interfaces of a process's network namespace. None of one that has the host's: they are no pod's.
fn interfaces(pid: u32) -> Vec<podvisor_proto::agent::InterfaceSample> {
    let namespace = |process: &str| fs::read_link(format!("/proc/{process}/ns/net")).ok();
    let process = pid.to_string();
    if namespace(&process) == namespace("self") {
        return Vec::new();
    }
    network::interfaces(&process)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hosts_interfaces_are_not_a_pods() {
        assert_eq!(interfaces(std::process::id()), []);
    }

    #[test]
    fn one_that_does_not_run_uses_nothing() {
        let subject = Subject {
            id: "a".to_owned(),
            groups: directories(Path::new("/")),
            first: None,
        };
        assert_eq!(read(&subject).usage, None);
        let running = Subject {
            first: Some(std::process::id()),
            ..subject
        };
        assert!(read(&running).usage.is_some_and(|usage| usage.cpu_ns > 0));
    }
}
