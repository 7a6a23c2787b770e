//! What the pod and its containers use.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use podvisor_proto::agent::{ContainerSample, SampleResponse};
use podvisor_usage::{cgroup, network, processes, writable};
use tokio::time::timeout;

use super::{ContainerError, Pod, State};
use crate::cgroup::Cgroup;
use crate::rootfs;
use crate::sandbox::files;

/// How long a sample waits for the sizes of writable layers. Ones that take longer are in a later one.
const MEASURE_PATIENCE: Duration = Duration::from_millis(100);

/// What is looked at of one container.
struct Subject {
    id: String,
    /// Of one that runs: its control group and its first process.
    running: Option<(Cgroup, u32)>,
}

impl Pod {
    /// What the pod uses now.
    pub async fn sample(&self) -> Result<SampleResponse, ContainerError> {
        let subjects = self.subjects();
        let layers: Vec<(String, PathBuf)> = subjects
            .iter()
            .map(|subject| {
                let scratch = files::scratch().join(&subject.id);
                (subject.id.clone(), rootfs::upper(&scratch))
            })
            .collect();
        let shared = Arc::clone(&self.0);
        let measure = tokio::task::spawn_blocking(move || {
            shared.writable_layers.measure(&files::scratch(), &layers);
        });
        let _ = timeout(MEASURE_PATIENCE, measure).await;
        let pod = self.clone();
        Ok(tokio::task::spawn_blocking(move || pod.read(subjects)).await?)
    }

    fn subjects(&self) -> Vec<Subject> {
        let containers = self.table().values().cloned().collect::<Vec<_>>();
        let subject = |container: Arc<super::Container>| {
            let running = match &*container.state() {
                State::Started(started) if started.pidfd.is_some() => {
                    Some((started.cgroup.clone(), started.pid as u32))
                }
                State::Created | State::Started(_) | State::Removing => None,
            };
            Subject {
                id: container.id.clone(),
                running,
            }
        };
        containers.into_iter().map(subject).collect()
    }

    /// Blocks.
    fn read(&self, subjects: Vec<Subject>) -> SampleResponse {
        let in_namespace = if self.0.network_namespace.get().is_some() {
            // Any process of the pod is in there.
            let mut first = subjects
                .iter()
                .filter_map(|subject| subject.running.as_ref());
            first.next().map(|(_, pid)| pid.to_string())
        } else {
            Some("self".to_owned())
        };
        let read = |subject: Subject| ContainerSample {
            writable_layer: self.0.writable_layers.get(&subject.id),
            usage: subject
                .running
                .as_ref()
                .map(|(group, _)| Box::new(cgroup::unified(group.path()))),
            processes: subject
                .running
                .map(|(group, first)| processes::of_group(group.path(), first)),
            id: subject.id,
        };
        SampleResponse {
            total: Some(cgroup::unified(Cgroup::all_containers().path())),
            interfaces: in_namespace
                .map(|process| network::interfaces(&process))
                .unwrap_or_default(),
            scratch: Some(writable::file_system(&files::scratch())),
            containers: subjects.into_iter().map(read).collect(),
        }
    }
}
