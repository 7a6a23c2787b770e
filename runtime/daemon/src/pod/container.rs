//! A container of a pod: what was asked, its limits of now, and its state as the pod knows it.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use podvisor_proto::{cri, monitor};
use prost::Message;
use prost::bytes::Bytes;

use super::{Pod, has_labels};
use crate::ids::Reservation;
use crate::services::messages;
use crate::store::ContainerRecord;

/// A container.
#[derive(Debug)]
pub struct Container {
    /// What was asked.
    pub record: ContainerRecord,
    /// Where it runs.
    pub pod: Arc<Pod>,
    /// What lists say of it, but for its state.
    pub listed: Bytes,
    /// Serialises changes of its limits.
    pub updating: tokio::sync::Mutex<()>,
    limits: Mutex<cri::LinuxContainerResources>,
    /// Its state while it is removed: its monitor forgets it before the lists do.
    last: Mutex<Option<monitor::Container>>,
    _name: Reservation,
}

impl Container {
    /// A container of `pod`.
    pub fn new(record: ContainerRecord, pod: Arc<Pod>, name: Reservation) -> Self {
        let linux = record.config.as_ref().and_then(|c| c.linux.as_ref());
        let limits = linux
            .and_then(|linux| linux.resources.clone())
            .unwrap_or_default();
        Self {
            listed: messages::container_item(&record).encode_to_vec().into(),
            record,
            pod,
            updating: tokio::sync::Mutex::default(),
            limits: limits.into(),
            last: Mutex::default(),
            _name: name,
        }
    }

    /// Whether it has all labels of a selector.
    pub fn has_labels(&self, selector: &HashMap<String, String>) -> bool {
        let config = self.record.config.as_ref();
        has_labels(config.map(|config| &config.labels), selector)
    }

    /// Its limits.
    pub fn limits(&self) -> cri::LinuxContainerResources {
        self.limits
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// From now on these are its limits.
    pub fn set_limits(&self, limits: cri::LinuxContainerResources) {
        *self.limits.lock().unwrap_or_else(PoisonError::into_inner) = limits;
    }

    /// What was asked, with the limits of now.
    pub fn record(&self) -> ContainerRecord {
        let mut record = self.record.clone();
        let config = record.config.get_or_insert_default();
        config.linux.get_or_insert_default().resources = Some(self.limits());
        record
    }

    /// Its newest state.
    pub fn state(&self) -> monitor::Container {
        let last = self.last().clone();
        last.unwrap_or_else(|| self.pod.container_state(&self.record.id))
    }

    /// Whether it was created, runs, or has exited.
    pub fn phase(&self) -> monitor::ContainerState {
        if let Some(last) = &*self.last() {
            return last.state();
        }
        let pod = &self.pod;
        let phase = pod.look_at_container(&self.record.id, monitor::Container::state);
        phase.unwrap_or(monitor::ContainerState::Exited)
    }

    fn last(&self) -> MutexGuard<'_, Option<monitor::Container>> {
        self.last.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// It is being removed: its state stays as it is until the answer is dropped.
    pub fn removal(&self) -> Removal<'_> {
        let state = self.state();
        *self.last() = Some(state);
        Removal(self)
    }
}

/// See [`Container::removal`].
#[derive(Debug)]
pub struct Removal<'a>(&'a Container);

impl Drop for Removal<'_> {
    fn drop(&mut self) {
        *self.0.last() = None;
    }
}
