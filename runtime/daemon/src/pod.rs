//! A pod and its containers in podvisord's memory: what was asked, and the newest state its monitor
//! told. Everything that the CRI lists is answered from here, never by asking a guest.

mod container;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use podvisor_proto::{cri, monitor};
use prost::Message;
use prost::bytes::Bytes;

use crate::error::{Error, Result};
use crate::events::{Events, Told, View};
use crate::ids::{self, Reservation};
use crate::monitor::Monitor;
use crate::services::messages;
use crate::stats::Samples;
use crate::store::{Phase, SandboxRecord};
use crate::volumes::FsServer;

pub use container::Container;

/// Exit code and reason of a container that died with its VM.
const KILLED: u32 = 137;

/// Reason of a container whose process could not be executed, as kubelets know it.
pub const START_ERROR: &str = "StartError";

/// A sandbox.
#[derive(Debug)]
pub struct Pod {
    /// 64 hexadecimal digits.
    pub id: String,
    /// Serialises stop and remove.
    pub lifecycle: tokio::sync::Mutex<()>,
    /// Its podvisor-fs, once a container has volumes, and who may use it now.
    pub volumes: tokio::sync::Mutex<Option<Arc<FsServer>>>,
    /// What it uses.
    pub samples: Arc<Samples>,
    /// What lists say of it, but for its state.
    pub listed: Bytes,
    _name: Reservation,
    state: Mutex<State>,
    /// To subscribers of events. Taken before the state and the lists are.
    told: Mutex<Told>,
}

#[derive(Debug)]
struct State {
    record: SandboxRecord,
    snapshot: monitor::Snapshot,
    monitor: Option<Arc<Monitor>>,
    stopping: bool,
}

impl Pod {
    /// A pod whose monitor's first state is `snapshot`.
    pub fn new(
        record: SandboxRecord,
        name: Reservation,
        snapshot: monitor::Snapshot,
        monitor: Option<Arc<Monitor>>,
    ) -> Self {
        Self {
            id: record.id.clone(),
            listed: messages::pod_item(&record).encode_to_vec().into(),
            lifecycle: tokio::sync::Mutex::default(),
            volumes: tokio::sync::Mutex::default(),
            samples: Arc::default(),
            _name: name,
            state: Mutex::new(State {
                record,
                snapshot,
                monitor,
                stopping: false,
            }),
            told: Mutex::default(),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A copy of the record.
    pub fn record(&self) -> SandboxRecord {
        self.state().record.clone()
    }

    /// Looks at the record, for lists: a copy of it costs more than all that they show. `look` must not call back.
    pub fn look<R>(&self, look: impl FnOnce(&SandboxRecord) -> R) -> R {
        look(&self.state().record)
    }

    /// Whether it has all labels of a selector.
    pub fn has_labels(&self, selector: &HashMap<String, String>) -> bool {
        self.look(|record| {
            let config = record.config.as_ref();
            has_labels(config.map(|config| &config.labels), selector)
        })
    }

    /// Its podvisor-fs was started. Returns the record to be kept.
    pub fn set_fs(&self, pid: u32, start: u64) -> SandboxRecord {
        let mut state = self.state();
        state.record.fs_pid = pid;
        state.record.fs_start = start;
        state.record.clone()
    }

    /// From now on the pod may have this. Returns the record to be kept.
    pub fn set_limits(&self, updated: cri::LinuxPodSandboxConfig) -> SandboxRecord {
        let mut state = self.state();
        state.record.updated = Some(updated);
        state.record.clone()
    }

    /// The newest state.
    pub fn snapshot(&self) -> monitor::Snapshot {
        self.state().snapshot.clone()
    }

    fn apply(&self, snapshot: Option<monitor::Snapshot>) {
        let Some(snapshot) = snapshot else { return };
        let mut state = self.state();
        if snapshot.revision > state.snapshot.revision {
            state.snapshot = snapshot;
        }
    }

    /// SANDBOX_READY or SANDBOX_NOTREADY.
    pub fn cri_state(&self) -> cri::PodSandboxState {
        let state = self.state();
        if state.record.phase == Phase::Ready as i32
            && !state.stopping
            && state.snapshot.state == monitor::SandboxState::Ready as i32
        {
            cri::PodSandboxState::SandboxReady
        } else {
            cri::PodSandboxState::SandboxNotready
        }
    }

    /// The monitor, for calls that need a running pod.
    ///
    /// # Errors
    /// FAILED_PRECONDITION when the sandbox is not ready.
    pub fn ready_monitor(&self) -> Result<Arc<Monitor>> {
        if self.cri_state() != cri::PodSandboxState::SandboxReady {
            let state = self.state();
            let why = match state.snapshot.reason.as_str() {
                "" => String::new(),
                reason => format!(" ({reason}: {})", state.snapshot.message),
            };
            return Err(Error::Precondition(format!(
                "sandbox {} is not ready{why}",
                self.id
            )));
        }
        self.monitor()
            .ok_or_else(|| Error::MonitorUnreachable(format!("sandbox {} has no monitor", self.id)))
    }

    /// The monitor, when there is one.
    pub fn monitor(&self) -> Option<Arc<Monitor>> {
        self.state().monitor.clone()
    }

    fn begin_stop(&self) {
        self.state().stopping = true;
    }

    fn monitor_gone(
        &self,
        last: Option<monitor::Snapshot>,
        reason: &str,
        now_ns: u64,
    ) -> SandboxRecord {
        let mut state = self.state();
        state.monitor = None;
        if let Some(last) = last
            && last.revision > state.snapshot.revision
        {
            state.snapshot = last;
        }
        bury(&mut state.snapshot, reason, now_ns);
        state.record.last = Some(state.snapshot.clone());
        state.record.clone()
    }

    /// Everything the sandbox had on the host is released.
    pub fn stopped(&self) -> SandboxRecord {
        let mut state = self.state();
        state.record.phase = Phase::Stopped as i32;
        state.record.last = Some(state.snapshot.clone());
        state.record.clone()
    }

    /// The state of one container. One that the monitor never heard of (it died first) counts as
    /// exited for an unknown reason.
    pub fn container_state(&self, id: &str) -> monitor::Container {
        let found = self.look_at_container(id, Clone::clone);
        found.unwrap_or_else(|| monitor::Container {
            id: id.to_owned(),
            state: monitor::ContainerState::Exited as i32,
            exit_code: 255,
            reason: "Unknown".into(),
            message: "the sandbox's monitor was lost before it recorded the container".into(),
            ..Default::default()
        })
    }

    fn look_at_container<R>(
        &self,
        id: &str,
        look: impl FnOnce(&monitor::Container) -> R,
    ) -> Option<R> {
        let state = self.state();
        let mut containers = state.snapshot.containers.iter();
        containers.find(|container| container.id == id).map(look)
    }
}

fn has_labels(
    labels: Option<&HashMap<String, String>>,
    selector: &HashMap<String, String>,
) -> bool {
    let mut wanted = selector.iter();
    wanted.all(|(key, value)| labels.is_some_and(|labels| labels.get(key) == Some(value)))
}

/// Marks a dead VM's sandbox stopped and its containers exited.
fn bury(snapshot: &mut monitor::Snapshot, reason: &str, now_ns: u64) {
    if snapshot.state != monitor::SandboxState::Stopped as i32 {
        snapshot.state = monitor::SandboxState::Stopped as i32;
        snapshot.reason = "MonitorGone".into();
        reason.clone_into(&mut snapshot.message);
    }
    for container in &mut snapshot.containers {
        if container.state != monitor::ContainerState::Exited as i32 {
            container.state = monitor::ContainerState::Exited as i32;
            container.exit_code = KILLED;
            container.reason = "Error".into();
            reason.clone_into(&mut container.message);
            container.finished_ns = now_ns;
        }
    }
    snapshot.revision += 1;
}

/// All pods and containers, and who is told what becomes of them.
#[derive(Debug, Default)]
pub struct Pods {
    inner: RwLock<Inner>,
    /// Subscribers.
    pub events: Events,
}

#[derive(Debug, Default)]
struct Inner {
    pods: HashMap<String, Arc<Pod>>,
    containers: HashMap<String, Arc<Container>>,
    /// The containers again, by their pods' ids, oldest first.
    by_pod: HashMap<String, Vec<Arc<Container>>>,
}

impl Inner {
    fn insert_container(&mut self, container: Arc<Container>) {
        let siblings = self.by_pod.entry(container.pod.id.clone()).or_default();
        siblings.push(Arc::clone(&container));
        siblings.sort_by_key(|container| container.record.created_ns);
        self.containers
            .insert(container.record.id.clone(), container);
    }

    fn remove_container(&mut self, container: &Container) {
        self.containers.remove(&container.record.id);
        if let Some(siblings) = self.by_pod.get_mut(&container.pod.id) {
            siblings.retain(|sibling| sibling.record.id != container.record.id);
        }
    }

    fn remove(&mut self, pod: &Pod) {
        self.pods.remove(&pod.id);
        for container in self.by_pod.remove(&pod.id).unwrap_or_default() {
            self.containers.remove(&container.record.id);
        }
    }
}

impl Pods {
    fn read(&self) -> std::sync::RwLockReadGuard<'_, Inner> {
        self.inner.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> std::sync::RwLockWriteGuard<'_, Inner> {
        self.inner.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes a pod visible.
    pub fn insert(&self, pod: &Arc<Pod>) {
        let inserted = Arc::clone(pod);
        self.write().pods.insert(pod.id.clone(), inserted);
        self.publish(pod, false);
    }

    /// Makes a container visible.
    pub fn insert_container(&self, container: Arc<Container>) {
        let pod = Arc::clone(&container.pod);
        self.write().insert_container(container);
        self.publish(&pod, false);
    }

    /// Forgets a pod and its containers.
    pub fn remove(&self, pod: &Arc<Pod>) {
        self.write().remove(pod);
        self.publish(pod, true);
    }

    /// Forgets a container.
    pub fn remove_container(&self, container: &Container) {
        self.write().remove_container(container);
        self.publish(&container.pod, false);
    }

    /// Takes a newer state of a pod over. An older one, overtaken on the way, is dropped.
    pub fn apply(&self, pod: &Arc<Pod>, snapshot: Option<monitor::Snapshot>) {
        pod.apply(snapshot);
        self.publish(pod, false);
    }

    /// From now on the sandbox is NOTREADY and takes no new containers.
    pub fn begin_stop(&self, pod: &Arc<Pod>) {
        pod.begin_stop();
        self.publish(pod, false);
    }

    /// The monitor is gone: whatever still ran in the VM died with it. `last` is its state file, if
    /// it could be read. Returns the record to be kept.
    pub fn monitor_gone(
        &self,
        pod: &Arc<Pod>,
        last: Option<monitor::Snapshot>,
        reason: &str,
        now_ns: u64,
    ) -> SandboxRecord {
        let record = pod.monitor_gone(last, reason, now_ns);
        self.publish(pod, false);
        record
    }

    /// Tells subscribers what has changed of a pod. One at a time for each pod: what they are told is never older
    /// than what they were told before.
    fn publish(&self, pod: &Arc<Pod>, removed: bool) {
        let mut told = pod.told.lock().unwrap_or_else(PoisonError::into_inner);
        let containers = self.containers_of(&pod.id);
        let view = View {
            pod: Arc::clone(pod),
            state: pod.cri_state(),
            containers: containers
                .into_iter()
                .map(|container| {
                    let state = container.state();
                    (container, state)
                })
                .collect(),
        };
        self.events.publish(&mut told, view, removed);
    }

    /// The pod with this id or unambiguous beginning of one.
    ///
    /// # Errors
    /// NOT_FOUND, INVALID_ARGUMENT.
    pub fn find(&self, id: &str) -> Result<Arc<Pod>> {
        let inner = self.read();
        if let Some(pod) = inner.pods.get(id) {
            return Ok(Arc::clone(pod));
        }
        let id = ids::resolve("sandbox", id, inner.pods.keys().map(String::as_str))?;
        Ok(Arc::clone(&inner.pods[id]))
    }

    /// The container with this id or unambiguous beginning of one.
    ///
    /// # Errors
    /// NOT_FOUND, INVALID_ARGUMENT.
    pub fn find_container(&self, id: &str) -> Result<Arc<Container>> {
        let inner = self.read();
        if let Some(container) = inner.containers.get(id) {
            return Ok(Arc::clone(container));
        }
        let id = ids::resolve("container", id, inner.containers.keys().map(String::as_str))?;
        Ok(Arc::clone(&inner.containers[id]))
    }

    /// All pods, oldest first.
    pub fn all(&self) -> Vec<Arc<Pod>> {
        let mut pods: Vec<_> = self.read().pods.values().cloned().collect();
        pods.sort_by_cached_key(|pod| pod.state().record.created_ns);
        pods
    }

    /// All containers, oldest first.
    pub fn all_containers(&self) -> Vec<Arc<Container>> {
        let mut containers: Vec<_> = self.read().containers.values().cloned().collect();
        containers.sort_by_key(|container| container.record.created_ns);
        containers
    }

    /// The containers of one pod, oldest first.
    pub fn containers_of(&self, pod_id: &str) -> Vec<Arc<Container>> {
        self.read().by_pod.get(pod_id).cloned().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::Names;
    use crate::store::ContainerRecord;

    fn pod(names: &Names, revision: u64) -> Pod {
        let name = names.reserve("sandbox", "n".into(), "id").unwrap();
        let running = monitor::Container {
            id: "c".into(),
            state: monitor::ContainerState::Running as i32,
            ..Default::default()
        };
        let exited = monitor::Container {
            id: "d".into(),
            state: monitor::ContainerState::Exited as i32,
            exit_code: 3,
            ..Default::default()
        };
        Pod::new(
            SandboxRecord {
                id: "id".into(),
                phase: Phase::Ready as i32,
                ..Default::default()
            },
            name,
            monitor::Snapshot {
                state: monitor::SandboxState::Ready as i32,
                revision,
                containers: vec![running, exited],
                ..Default::default()
            },
            None,
        )
    }

    #[test]
    fn an_older_state_does_not_overwrite_a_newer_one() {
        let pod = pod(&Names::default(), 5);
        pod.apply(Some(monitor::Snapshot {
            revision: 4,
            ..Default::default()
        }));
        assert_eq!(pod.snapshot().containers.len(), 2);
        assert_eq!(pod.cri_state(), cri::PodSandboxState::SandboxReady);
    }

    #[test]
    fn a_dead_monitor_takes_what_ran_with_it_and_keeps_exit_codes() {
        let pod = pod(&Names::default(), 5);
        let record = pod.monitor_gone(None, "killed", 42);
        assert_eq!(pod.cri_state(), cri::PodSandboxState::SandboxNotready);
        let ran = pod.container_state("c");
        assert_eq!((ran.exit_code, ran.finished_ns), (137, 42));
        assert_eq!(pod.container_state("d").exit_code, 3);
        assert_eq!(pod.container_state("unheard of").exit_code, 255);
        assert_eq!(record.last.unwrap().containers.len(), 2);
    }

    #[test]
    fn a_pod_that_stops_takes_no_calls() {
        let pod = pod(&Names::default(), 5);
        pod.begin_stop();
        assert!(matches!(pod.ready_monitor(), Err(Error::Precondition(_))));
    }
    #[test]
    fn containers_are_listed_oldest_first_until_they_or_their_pod_are_gone() {
        let names = Names::default();
        let pods = Pods::default();
        let pod = Arc::new(pod(&names, 1));
        pods.insert(&pod);
        for (id, created_ns) in [("young", 2), ("old", 1), ("gone", 3)] {
            let record = ContainerRecord {
                id: id.into(),
                sandbox_id: pod.id.clone(),
                created_ns,
                ..Default::default()
            };
            let name = names.reserve("container", id.into(), id).unwrap();
            pods.insert_container(Arc::new(Container::new(record, Arc::clone(&pod), name)));
        }
        let ids = |containers: Vec<Arc<Container>>| -> Vec<_> {
            let ids = containers
                .iter()
                .map(|container| container.record.id.clone());
            ids.collect()
        };
        pods.remove_container(&pods.find_container("gone").unwrap());
        assert_eq!(ids(pods.containers_of(&pod.id)), ["old", "young"]);
        assert_eq!(ids(pods.all_containers()), ["old", "young"]);
        pods.remove(&pod);
        assert!(pods.containers_of(&pod.id).is_empty() && pods.all_containers().is_empty());
    }
}
