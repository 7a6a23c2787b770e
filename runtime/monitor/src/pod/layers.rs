//! The image layers in the VM: each is one read-only segment of the pod's disk, shared by all
//! containers that name it.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use podvisor_monitor::fd_table::FdTable;
use podvisor_proto::{agent, monitor};
use podvisor_vmm::{Access, Segment, SegmentError, SegmentMap};
use thiserror::Error;

/// Most layers of one container, with those of its image volumes. Images have at most 127 (the limit of container
/// engines).
const MAX_LAYERS: usize = 256;

/// Why a container's layers cannot be mapped.
#[derive(Debug, Error)]
pub enum LayerError {
    /// More than [`MAX_LAYERS`].
    #[error("{0} layers: more than {MAX_LAYERS}")]
    TooMany(usize),
    /// A layer that the VM does not have yet came without its file.
    #[error("no file came for layer {0}")]
    NoFile(String),
    /// The disk refuses.
    #[error("layer {diff_id}: {source}")]
    Disk {
        /// The layer.
        diff_id: String,
        /// Why.
        source: SegmentError,
    },
}

/// The layers of the pod's disk.
///
/// A segment is unmapped only after the agent has said that it let go of it: a place on the disk
/// that is used again while the guest still has a partition there would show one layer under the
/// name of another. Layers that no container uses stay until then, and serve the next container.
pub struct Layers {
    disk: SegmentMap,
    mapped: Mutex<HashMap<String, Mapped>>,
}

struct Mapped {
    segment: Segment,
    /// Containers that name it, as often as they name it.
    users: usize,
}

impl Layers {
    /// No layers on `disk` yet.
    pub fn new(disk: SegmentMap) -> Self {
        Self {
            disk,
            mapped: Mutex::default(),
        }
    }

    /// The segments of `layers`, in order, each in use once more. Layers that the VM does not have
    /// are mapped; their files come from `fds`.
    ///
    /// # Errors
    /// See [`LayerError`]; nothing has changed then.
    pub fn acquire(
        &self,
        layers: &[monitor::Layer],
        fds: &FdTable,
    ) -> Result<Vec<agent::Segment>, LayerError> {
        if layers.len() > MAX_LAYERS {
            return Err(LayerError::TooMany(layers.len()));
        }
        let mut mapped = self.lock();
        let mut added = Vec::new();
        for layer in layers {
            // A retry may bring a file that is not needed: taking it closes it.
            let file = fds.take(&layer.fd_token);
            if mapped.contains_key(&layer.diff_id) {
                continue;
            }
            match self.map(layer, file) {
                Ok(segment) => {
                    added.push(layer.diff_id.clone());
                    mapped.insert(layer.diff_id.clone(), Mapped { segment, users: 0 });
                }
                Err(error) => {
                    // The guest has not heard of these.
                    for diff_id in added {
                        self.unmap_entry(&mut mapped, &diff_id);
                    }
                    return Err(error);
                }
            }
        }
        let mut segments = Vec::with_capacity(layers.len());
        for layer in layers {
            if let Some(entry) = mapped.get_mut(&layer.diff_id) {
                entry.users += 1;
                segments.push(agent::Segment {
                    start: entry.segment.start,
                    length: entry.segment.length,
                });
            }
        }
        Ok(segments)
    }

    /// One container less uses `diff_ids`.
    pub fn release(&self, diff_ids: &[String]) {
        let mut mapped = self.lock();
        for diff_id in diff_ids {
            if let Some(entry) = mapped.get_mut(diff_id) {
                entry.users = entry.users.saturating_sub(1);
            }
        }
    }

    /// Unmaps what the agent says it has let go of, except what a container uses meanwhile.
    pub fn unmap(&self, released: &[agent::Segment]) {
        let mut mapped = self.lock();
        for segment in released {
            let unused = mapped
                .iter()
                .find(|(_, entry)| entry.segment.start == segment.start && entry.users == 0);
            if let Some(diff_id) = unused.map(|(diff_id, _)| diff_id.clone()) {
                self.unmap_entry(&mut mapped, &diff_id);
            }
        }
    }

    fn map(
        &self,
        layer: &monitor::Layer,
        file: Option<std::fs::File>,
    ) -> Result<Segment, LayerError> {
        let diff_id = || layer.diff_id.clone();
        let file = file.ok_or_else(|| LayerError::NoFile(diff_id()))?;
        self.disk
            .insert(file, 0, layer.length, Access::ReadOnly)
            .map_err(|source| LayerError::Disk {
                diff_id: diff_id(),
                source,
            })
    }

    fn unmap_entry(&self, mapped: &mut HashMap<String, Mapped>, diff_id: &str) {
        if let Some(entry) = mapped.remove(diff_id)
            && let Err(error) = self.disk.remove(entry.segment.start)
        {
            tracing::error!(%error, diff_id, "the disk's map and the layers disagree");
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Mapped>> {
        // Nothing under the lock panics.
        self.mapped.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use podvisor_monitor::fd_socket::Token;

    use super::*;

    fn layer(fds: &FdTable, diff_id: &str) -> monitor::Layer {
        let token = Token::random();
        let file = tempfile::tempfile().expect("temporary file");
        file.set_len(8192).expect("length");
        assert!(fds.insert(token, vec![file.into()]));
        monitor::Layer {
            diff_id: diff_id.to_owned(),
            fd_token: token.to_vec(),
            length: 8192,
        }
    }

    #[tokio::test]
    async fn a_layer_is_mapped_once_and_unmapped_when_nobody_has_it() {
        let fds = FdTable::default();
        let layers = Layers::new(SegmentMap::new());
        let first = layers
            .acquire(&[layer(&fds, "a"), layer(&fds, "b")], &fds)
            .expect("mapped");
        // Known: no file needed.
        let known = monitor::Layer {
            diff_id: "b".to_owned(),
            length: 8192,
            ..monitor::Layer::default()
        };
        let second = layers.acquire(&[known], &fds).expect("mapped");
        assert_eq!(second, first[1..]);

        layers.release(&["a".to_owned(), "b".to_owned()]);
        layers.unmap(&first);
        assert_eq!(layers.lock().keys().collect::<Vec<_>>(), ["b"]);
        layers.release(&["b".to_owned()]);
        assert_eq!(layers.lock().len(), 1, "until the agent lets go of it");
        layers.unmap(&second);
        assert!(layers.lock().is_empty());
    }

    #[tokio::test]
    async fn a_missing_file_maps_nothing() {
        let fds = FdTable::default();
        let layers = Layers::new(SegmentMap::new());
        let missing = monitor::Layer {
            diff_id: "b".to_owned(),
            length: 8192,
            ..monitor::Layer::default()
        };
        let error = layers.acquire(&[layer(&fds, "a"), missing], &fds);
        assert!(matches!(error, Err(LayerError::NoFile(id)) if id == "b"));
        assert!(layers.lock().is_empty());
    }
}
