//! The store's database, and what becomes of it and of the layer files at open.

use std::collections::HashSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use redb::{ReadableDatabase, ReadableTable, TableDefinition};
use serde::{Deserialize, Serialize};
use tracing::{debug, warn};

use super::{Image, Inner, Layer, LayerUse, StoreError, remove_file};
use crate::reference::Digest;

/// Image id (`sha256:…` of its configuration) to a [`Record`] as JSON.
pub(super) const IMAGES: TableDefinition<&str, &[u8]> = TableDefinition::new("image_records");

/// An image as the database keeps it.
#[derive(Serialize, Deserialize)]
pub(super) struct Record {
    repo_tags: Vec<String>,
    repo_digests: Vec<String>,
    layers: Vec<LayerRecord>,
    /// The configuration's own bytes: the id is their digest.
    config: String,
    /// Since the epoch, nanoseconds.
    pulled_at: u64,
}

#[derive(Serialize, Deserialize)]
struct LayerRecord {
    diff_id: String,
    length: u64,
}

impl Record {
    pub(super) fn new(image: &Image, config: String) -> Self {
        Self {
            repo_tags: image.repo_tags.clone(),
            repo_digests: image.repo_digests.clone(),
            layers: image
                .layers
                .iter()
                .map(|layer| LayerRecord {
                    diff_id: layer.diff_id.clone(),
                    length: layer.length,
                })
                .collect(),
            config,
            pulled_at: image
                .pulled_at
                .duration_since(SystemTime::UNIX_EPOCH)
                .map_or(0, |since| since.as_nanos() as u64),
        }
    }

    pub(super) fn to_json(&self) -> Vec<u8> {
        // Strings and integers alone: there is nothing that JSON could not hold.
        serde_json::to_vec(self).unwrap_or_default()
    }
}

impl Inner {
    /// Writes the record of `image`, and the tags of images that lost some to it. All or nothing.
    pub(super) fn write_records(
        &self,
        image: &Image,
        config: &str,
        retagged: &[Arc<Image>],
    ) -> Result<(), StoreError> {
        let transaction = self.db.begin_write().map_err(StoreError::database)?;
        {
            let mut table = transaction
                .open_table(IMAGES)
                .map_err(StoreError::database)?;
            let record = Record::new(image, config.to_owned()).to_json();
            table
                .insert(image.id.as_str(), record.as_slice())
                .map_err(StoreError::database)?;
            for other in retagged {
                let id = other.id.as_str();
                let known = table.get(id).map_err(StoreError::database)?;
                // A record that cannot be read is dropped at the next open.
                let known =
                    known.and_then(|json| serde_json::from_slice::<Record>(json.value()).ok());
                if let Some(known) = known {
                    let record = Record {
                        repo_tags: other.repo_tags.clone(),
                        ..known
                    };
                    table
                        .insert(id, record.to_json().as_slice())
                        .map_err(StoreError::database)?;
                }
            }
        }
        transaction.commit().map_err(StoreError::database)
    }

    pub(super) fn delete_records(&self, ids: &[String]) -> Result<(), StoreError> {
        let transaction = self.db.begin_write().map_err(StoreError::database)?;
        {
            let mut table = transaction
                .open_table(IMAGES)
                .map_err(StoreError::database)?;
            for id in ids {
                table.remove(id.as_str()).map_err(StoreError::database)?;
            }
        }
        transaction.commit().map_err(StoreError::database)
    }

    /// Reads the database into memory.
    pub(super) fn load(&self) -> Result<(), StoreError> {
        // Makes the table if the database is new.
        self.delete_records(&[])?;
        let mut damaged = Vec::new();
        let transaction = self.db.begin_read().map_err(StoreError::database)?;
        let table = transaction
            .open_table(IMAGES)
            .map_err(StoreError::database)?;
        for row in table.iter().map_err(StoreError::database)? {
            let (id, json) = row.map_err(StoreError::database)?;
            match self.load_image(id.value(), json.value()) {
                Ok(image) => self.insert_loaded(image),
                Err(reason) => {
                    warn!(
                        image = id.value(),
                        reason, "image is damaged and will be dropped: pull it again"
                    );
                    damaged.push(id.value().to_owned());
                }
            }
        }
        if damaged.is_empty() {
            Ok(())
        } else {
            self.delete_records(&damaged)
        }
    }

    fn load_image(
        &self,
        id: &str,
        json: &[u8],
    ) -> Result<(Image, Vec<(Digest, LayerUse)>), String> {
        let record: Record =
            serde_json::from_slice(json).map_err(|error| format!("record: {error}"))?;
        let config = serde_json::from_str(&record.config)
            .map_err(|error| format!("configuration: {error}"))?;
        let mut size = record.config.len() as u64;
        let (mut layers, mut uses) = (Vec::new(), Vec::new());
        for LayerRecord { diff_id, length } in record.layers {
            let diff_id: Digest = diff_id.parse().map_err(|error| format!("{error}"))?;
            let path = self.layer_path(&diff_id);
            let metadata =
                fs::metadata(&path).map_err(|error| format!("{}: {error}", path.display()))?;
            if metadata.len() != length {
                return Err(format!(
                    "{}: {} bytes, {length} wanted",
                    path.display(),
                    metadata.len()
                ));
            }
            let disk_bytes = metadata.blocks() * 512;
            let layer = Layer {
                diff_id: diff_id.to_string(),
                path,
                length,
            };
            if !layers.contains(&layer) {
                size += disk_bytes;
            }
            layers.push(layer);
            uses.push((
                diff_id,
                LayerUse {
                    holders: 1,
                    length,
                    disk_bytes,
                },
            ));
        }
        let image = Image {
            id: id.to_owned(),
            repo_tags: record.repo_tags,
            repo_digests: record.repo_digests,
            size,
            config,
            layers,
            pulled_at: SystemTime::UNIX_EPOCH + Duration::from_nanos(record.pulled_at),
        };
        Ok((image, uses))
    }

    fn insert_loaded(&self, (image, uses): (Image, Vec<(Digest, LayerUse)>)) {
        let mut state = self.state();
        for (diff_id, layer) in uses {
            state
                .layers
                .entry(diff_id)
                .and_modify(|known| known.holders += 1)
                .or_insert(layer);
        }
        state.images.insert(image.id.clone(), Arc::new(image));
    }

    /// Removes every file that no image has: at open nothing is in progress.
    pub(super) fn remove_leftovers(&self) -> Result<(), StoreError> {
        let state = self.state();
        let kept: HashSet<PathBuf> = state
            .layers
            .keys()
            .map(|diff_id| self.layer_path(diff_id))
            .collect();
        for dir in [&self.layers_dir, &self.tmp_dir] {
            for entry in fs::read_dir(dir).map_err(StoreError::file("list", dir))? {
                let path = entry.map_err(StoreError::file("list", dir))?.path();
                if !kept.contains(&path) {
                    debug!(path = %path.display(), "removing what an interrupted pull left");
                    remove_file(&path);
                }
            }
        }
        drop(state);
        self.expire_partials();
        Ok(())
    }
}
