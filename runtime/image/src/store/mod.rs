//! What is on this node: images in redb and in memory, layer files on disk, and who uses them.
//!
//! In the store's directory: `layers/<diff_id>.erofs`, each a finished layer, `tmp/`, files being written or
//! about to be unlinked, and `partial/` ([`partial`]). A layer file lives as long as someone holds it: an image in the database, or a pull in
//! progress through a [`LayerLease`]. Both counts are in memory and rebuilt at open, when nothing is in progress.

mod partial;
mod records;

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use oci_spec::image::ImageConfiguration;
use redb::Database;
use tempfile::NamedTempFile;
use tracing::warn;

use crate::hosts::Registries;
use crate::jobs::Jobs;
use crate::layer::NewLayer;
use crate::limits::Limits;
use crate::pull::{self, Credentials, Progress, PullError};
use crate::reference::{Digest, Reference, Target, is_sha256_hex};
pub(crate) use partial::Partial;

/// The images of this node. Clones share one store.
#[derive(Clone)]
pub struct ImageStore {
    inner: Arc<Inner>,
}

pub(crate) struct Inner {
    db: Arc<Database>,
    layers_dir: PathBuf,
    tmp_dir: PathBuf,
    partial_dir: PathBuf,
    pub(crate) registries: Registries,
    pub(crate) limits: Limits,
    pub(crate) jobs: Jobs,
    state: Mutex<State>,
    /// Held from a change's transaction until [`State`] shows it, so that both change in the same order.
    change: Mutex<()>,
    trash_counter: AtomicU64,
}

#[derive(Default)]
struct State {
    images: BTreeMap<String, Arc<Image>>,
    layers: HashMap<Digest, LayerUse>,
}

struct LayerUse {
    /// Images and leases that hold the file.
    holders: usize,
    length: u64,
    disk_bytes: u64,
}

/// An image that is complete on this node.
#[derive(Debug, Clone, PartialEq)]
pub struct Image {
    /// `sha256:` digest of the configuration.
    pub id: String,
    /// Tags that point here, normalised: `docker.io/library/busybox:latest`. Empty if pulled by digest only.
    pub repo_tags: Vec<String>,
    /// `repository@sha256:…` for each digest (of the index if there was one) by which this image was resolved.
    pub repo_digests: Vec<String>,
    /// Bytes on this node's disk, shared layers included. Never 0.
    pub size: u64,
    /// The image's configuration: environment, command, user, …
    pub config: ImageConfiguration,
    /// Bottom first.
    pub layers: Vec<Layer>,
    /// When the last pull of this image ended.
    pub pulled_at: SystemTime,
}

/// A layer of an image: an EROFS file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layer {
    /// `sha256:` digest of the layer's uncompressed tar.
    pub diff_id: String,
    /// The EROFS file. It stays while an image has this layer; open it before the image can be removed.
    pub path: PathBuf,
    /// Length of the file in bytes, a multiple of 4096.
    pub length: u64,
}

/// What the images take on disk.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// Allocated bytes.
    pub bytes: u64,
    /// Inodes, directories included.
    pub inodes: u64,
}

/// Why the store could not be read or changed.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// A file or directory of the store.
    #[error("image store: {action} {path}: {source}", path = path.display())]
    File {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// How it failed.
        source: io::Error,
    },
    /// The database.
    #[error("image database: {0}")]
    Database(#[source] Box<redb::Error>),
}

impl StoreError {
    fn file(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::File {
            action,
            path,
            source,
        }
    }

    fn database(error: impl Into<redb::Error>) -> Self {
        Self::Database(Box::new(error.into()))
    }
}

/// An image whose layers are all there, about to become visible.
pub(crate) struct NewImage {
    pub(crate) id: Digest,
    pub(crate) config_json: String,
    pub(crate) config: ImageConfiguration,
    /// Bottom first; the same layer may be there twice.
    pub(crate) layers: Vec<Arc<LayerLease>>,
    pub(crate) reference: Reference,
    pub(crate) resolved: Digest,
}

/// Keeps a layer's file while a pull needs it. The last holder's end removes the file.
pub(crate) struct LayerLease {
    inner: Arc<Inner>,
    diff_id: Digest,
}

impl Drop for LayerLease {
    fn drop(&mut self) {
        let trash = self.inner.release(&mut self.inner.state(), &self.diff_id);
        unlink_later(trash);
    }
}

impl ImageStore {
    /// Opens the store in `dir`, made if missing. Removes what killed pulls left, and drops images whose layer
    /// files are missing or short, with a warning: they can be pulled again. Blocks.
    pub fn open(
        db: Arc<Database>,
        dir: &Path,
        registries: Registries,
        limits: Limits,
    ) -> Result<Self, StoreError> {
        let [layers_dir, tmp_dir, partial_dir] =
            ["layers", "tmp", "partial"].map(|name| dir.join(name));
        for path in [&layers_dir, &tmp_dir, &partial_dir] {
            fs::create_dir_all(path).map_err(StoreError::file("create", path))?;
        }
        let inner = Inner {
            db,
            layers_dir,
            tmp_dir,
            partial_dir,
            registries,
            limits,
            jobs: Jobs::default(),
            state: Mutex::default(),
            change: Mutex::default(),
            trash_counter: AtomicU64::new(0),
        };
        inner.load()?;
        inner.remove_leftovers()?;
        Ok(Self {
            inner: Arc::new(inner),
        })
    }

    /// Pulls `reference` and makes it visible at once, when all of it is there. What is already on this node is
    /// not downloaded again; concurrent pulls share their layers' downloads. After a failure, the next pull goes on
    /// where this one was. Dropping the future cancels the pull and leaves nothing behind.
    ///
    /// `progress` is called from the task that polls the future, for each piece of a layer that arrived.
    pub async fn pull(
        &self,
        reference: &str,
        credentials: Option<Credentials>,
        progress: &(dyn Fn(Progress) + Send + Sync),
    ) -> Result<Arc<Image>, PullError> {
        pull::pull(&self.inner, reference.parse()?, credentials, progress).await
    }

    /// All images, by id. From memory.
    pub fn list(&self) -> Vec<Arc<Image>> {
        self.inner.state().images.values().cloned().collect()
    }

    /// The image that `name` means: an id (with or without `sha256:`), a tag, a digest, or an unambiguous prefix
    /// of an id. From memory.
    pub fn resolve(&self, name: &str) -> Option<Arc<Image>> {
        self.inner.state().resolve(name)
    }

    /// Removes the image that `name` means with all its tags and digests, and the layers that nothing else uses.
    /// False if there is none.
    pub async fn remove(&self, name: &str) -> Result<bool, StoreError> {
        let inner = Arc::clone(&self.inner);
        let name = name.to_owned();
        blocking(move || inner.remove(&name)).await
    }

    /// Removes what no pull has gone on with for too long. Blocks.
    pub fn expire(&self) {
        self.inner.expire_partials();
    }

    /// What the store's directory takes on disk, as `du` counts it. Looks at each file once: for thousands of
    /// layers call it from a blocking thread.
    pub fn usage(&self) -> Usage {
        let mut usage = Usage::default();
        let mut add = |metadata: &fs::Metadata| {
            usage.bytes += metadata.blocks() * 512;
            usage.inodes += 1;
        };
        let root = self
            .inner
            .layers_dir
            .parent()
            .and_then(|dir| fs::metadata(dir).ok());
        root.iter().for_each(&mut add);
        let inner = &self.inner;
        for dir in [&inner.layers_dir, &inner.tmp_dir, &inner.partial_dir] {
            fs::metadata(dir).iter().for_each(&mut add);
            // A file that is removed meanwhile takes no space.
            let entries = fs::read_dir(dir).into_iter().flatten().flatten();
            entries
                .filter_map(|entry| entry.metadata().ok())
                .for_each(|metadata| add(&metadata));
        }
        usage
    }
}

impl Inner {
    fn state(&self) -> MutexGuard<'_, State> {
        // A panic elsewhere cannot leave State half changed: each change is a handful of map operations.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn layer_path(&self, diff_id: &Digest) -> PathBuf {
        self.layers_dir.join(format!("{}.erofs", diff_id.hex()))
    }

    /// A new file for a layer in the making. It is gone when dropped, unless [`Inner::add_layer`] takes it.
    pub(crate) fn temp_file(&self) -> io::Result<NamedTempFile> {
        tempfile::Builder::new()
            .prefix("layer-")
            .tempfile_in(&self.tmp_dir)
    }

    /// A hold on the layer if it is there.
    pub(crate) fn lease(self: &Arc<Self>, diff_id: &Digest) -> Option<LayerLease> {
        self.state().layers.get_mut(diff_id)?.holders += 1;
        Some(LayerLease {
            inner: Arc::clone(self),
            diff_id: diff_id.clone(),
        })
    }

    /// Gives a finished layer, already on disk and synced, its name. If it is there by now, that one stays.
    pub(crate) fn add_layer(
        self: &Arc<Self>,
        diff_id: &Digest,
        layer: NewLayer,
    ) -> Result<LayerLease, StoreError> {
        let mut state = self.state();
        if let Some(present) = state.layers.get_mut(diff_id) {
            present.holders += 1;
        } else {
            let path = self.layer_path(diff_id);
            layer
                .file
                .persist(&path)
                .map_err(|error| StoreError::file("rename to", &path)(error.error))?;
            state.layers.insert(
                diff_id.clone(),
                LayerUse {
                    holders: 1,
                    length: layer.length,
                    disk_bytes: layer.disk_bytes,
                },
            );
        }
        Ok(LayerLease {
            inner: Arc::clone(self),
            diff_id: diff_id.clone(),
        })
    }

    /// Makes an image visible, in the database first. Blocks.
    pub(crate) fn add_image(&self, new: NewImage) -> Result<Arc<Image>, StoreError> {
        let _change = self.change.lock().unwrap_or_else(PoisonError::into_inner);
        // The layers' names must be on disk before the record that relies on them.
        File::open(&self.layers_dir)
            .and_then(|dir| dir.sync_all())
            .map_err(StoreError::file("sync", &self.layers_dir))?;

        let (retagged, image) = self.plan_image(&new);
        self.write_records(&image, &new.config_json, &retagged)?;

        let mut state = self.state();
        for other in retagged {
            state.images.insert(other.id.clone(), other);
        }
        let known = state
            .images
            .insert(image.id.clone(), Arc::clone(&image))
            .is_some();
        if !known {
            for lease in &new.layers {
                if let Some(layer) = state.layers.get_mut(&lease.diff_id) {
                    layer.holders += 1;
                }
            }
        }
        drop(state);
        Ok(image)
    }

    /// The image as it will be, and the images that lose their tag to it.
    fn plan_image(&self, new: &NewImage) -> (Vec<Arc<Image>>, Arc<Image>) {
        let state = self.state();
        let id = new.id.to_string();
        let (mut repo_tags, mut repo_digests) = match state.images.get(&id) {
            Some(image) => (image.repo_tags.clone(), image.repo_digests.clone()),
            None => (Vec::new(), Vec::new()),
        };
        let mut retagged = Vec::new();
        if let Target::Tag(_) = new.reference.target() {
            let tag = new.reference.to_string();
            for other in state
                .images
                .values()
                .filter(|other| other.id != id && other.repo_tags.contains(&tag))
            {
                let mut other = Image::clone(other);
                other.repo_tags.retain(|known| *known != tag);
                retagged.push(Arc::new(other));
            }
            push_unique(&mut repo_tags, tag);
        }
        push_unique(&mut repo_digests, new.reference.with_digest(&new.resolved));

        let mut size = new.config_json.len() as u64;
        let mut layers = Vec::with_capacity(new.layers.len());
        for lease in &new.layers {
            // A lease keeps its layer in the map.
            let Some(known) = state.layers.get(&lease.diff_id) else {
                continue;
            };
            let path = self.layer_path(&lease.diff_id);
            let layer = Layer {
                diff_id: lease.diff_id.to_string(),
                path,
                length: known.length,
            };
            if !layers.contains(&layer) {
                size += known.disk_bytes;
            }
            layers.push(layer);
        }
        let config = new.config.clone();
        let pulled_at = SystemTime::now();
        (
            retagged,
            Arc::new(Image {
                id,
                repo_tags,
                repo_digests,
                size,
                config,
                layers,
                pulled_at,
            }),
        )
    }

    fn remove(&self, name: &str) -> Result<bool, StoreError> {
        let _change = self.change.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(image) = self.state().resolve(name) else {
            return Ok(false);
        };
        self.delete_records(std::slice::from_ref(&image.id))?;

        let mut trash = Vec::new();
        let mut state = self.state();
        state.images.remove(&image.id);
        for layer in &image.layers {
            if let Ok(diff_id) = layer.diff_id.parse() {
                trash.extend(self.release(&mut state, &diff_id));
            }
        }
        drop(state);
        for path in &trash {
            remove_file(path);
        }
        Ok(true)
    }

    /// Takes one holder off a layer. After the last one the file gets a name in `tmp/`, under the same lock, so
    /// that a new file of that layer can take its place at once; the caller unlinks the path it gets.
    fn release(&self, state: &mut State, diff_id: &Digest) -> Option<PathBuf> {
        let layer = state.layers.get_mut(diff_id)?;
        layer.holders -= 1;
        if layer.holders > 0 {
            return None;
        }
        state.layers.remove(diff_id);
        let path = self.layer_path(diff_id);
        let trash = self.tmp_dir.join(format!(
            "trash-{}",
            self.trash_counter.fetch_add(1, Ordering::Relaxed)
        ));
        match fs::rename(&path, &trash) {
            Ok(()) => Some(trash),
            Err(error) => {
                warn!(path = %path.display(), %error, "cannot remove layer");
                None
            }
        }
    }
}

impl State {
    fn resolve(&self, name: &str) -> Option<Arc<Image>> {
        let hex = name.strip_prefix("sha256:").unwrap_or(name);
        if is_sha256_hex(hex) {
            return self.images.get(&format!("sha256:{hex}")).cloned();
        }
        let by_reference = name.parse::<Reference>().ok().and_then(|reference| {
            let wanted = reference.to_string();
            let names = |image: &Image| match reference.target() {
                Target::Tag(_) => image.repo_tags.contains(&wanted),
                Target::Digest(_) => image.repo_digests.contains(&wanted),
            };
            self.images.values().find(|image| names(image)).cloned()
        });
        by_reference.or_else(|| self.resolve_prefix(hex))
    }

    fn resolve_prefix(&self, hex: &str) -> Option<Arc<Image>> {
        if hex.is_empty() || hex.len() > 64 {
            return None;
        }
        let prefix = format!("sha256:{hex}");
        let mut matches = self
            .images
            .range(prefix.clone()..)
            .take_while(|(id, _)| id.starts_with(&prefix));
        match (matches.next(), matches.next()) {
            (Some((_, image)), None) => Some(Arc::clone(image)),
            _ => None,
        }
    }
}

fn push_unique(list: &mut Vec<String>, item: String) {
    if !list.contains(&item) {
        list.push(item);
    }
}

fn remove_file(path: &Path) {
    if let Err(error) = fs::remove_file(path) {
        warn!(path = %path.display(), %error, "cannot remove file");
    }
}

/// Unlinks off the async threads: a large file's blocks take their time.
fn unlink_later(path: Option<PathBuf>) {
    let Some(path) = path else { return };
    match tokio::runtime::Handle::try_current() {
        Ok(runtime) => drop(runtime.spawn_blocking(move || remove_file(&path))),
        Err(_) => remove_file(&path),
    }
}

/// Runs `work` on a blocking thread, to its end even if the caller goes away.
pub(crate) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            // The runtime shuts down: nothing will poll this again.
            Err(_) => std::future::pending().await,
        },
    }
}
