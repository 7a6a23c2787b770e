//! A pull: from a reference to an image whose layers are all on this node.

use std::fmt;
use std::io;
use std::sync::Arc;

use futures_util::future::try_join_all;
use oci_spec::image::ImageConfiguration;
use tokio::sync::Semaphore;
use tracing::{debug, info};

use crate::hosts::HostsError;
use crate::jobs;
use crate::layer::LayerError;
use crate::reference::{Digest, Reference, ReferenceError, Target};
use crate::registry::manifest::{self, ARCHITECTURE, Manifest, ManifestError, Resolved};
use crate::registry::{Document, FailureKind, Registry, RegistryError};
use crate::store::{Image, Inner, NewImage, StoreError, blocking};

/// Indexes in indexes are allowed, and rare.
const MAX_INDEX_DEPTH: usize = 4;

/// What proves to a registry who asks. Given with each pull, never stored, and shown only to hosts that ask for it: the
/// registry, and the mirrors that this node's configuration has for it.
#[derive(Clone, PartialEq, Eq)]
pub enum Credentials {
    /// User name and password, sent as basic authentication or to fetch a token.
    Password {
        /// User name.
        username: String,
        /// Password.
        password: String,
    },
    /// A bearer token for the registry itself (CRI `registry_token`).
    RegistryToken(String),
    /// An OAuth2 refresh token for the registry's token service (CRI `identity_token`).
    IdentityToken(String),
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Password { .. } => "Password(…)",
            Self::RegistryToken(_) => "RegistryToken(…)",
            Self::IdentityToken(_) => "IdentityToken(…)",
        })
    }
}

/// How far one layer of a pull is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Progress {
    /// Digest of the compressed layer, as in the manifest.
    pub layer: String,
    /// Compressed bytes received.
    pub done: u64,
    /// Compressed bytes in all. `done == total` at once for a layer that is already on this node.
    pub total: u64,
}

/// Why a pull failed. Each variant is one gRPC code; messages carry the registry's own words.
#[derive(Debug, Clone, thiserror::Error)]
pub enum PullError {
    /// INVALID_ARGUMENT: the name is not an image reference.
    #[error(transparent)]
    InvalidReference(#[from] ReferenceError),
    /// NOT_FOUND: no host has the image, or it has none for this platform.
    #[error("{0}")]
    NotFound(String),
    /// UNAUTHENTICATED: a host wants other credentials.
    #[error("{0}")]
    Unauthorized(String),
    /// PERMISSION_DENIED: these credentials are known and not enough.
    #[error("{0}")]
    Forbidden(String),
    /// UNAVAILABLE: unreachable, too slow, or answers with errors of its own.
    #[error("{0}")]
    Unavailable(String),
    /// DATA_LOSS: digests that do not match, a broken manifest or layer.
    #[error("{0}")]
    Corrupt(String),
    /// UNIMPLEMENTED: a format that podvisor does not read.
    #[error("{0}")]
    Unsupported(String),
    /// RESOURCE_EXHAUSTED: over one of [`Limits`](crate::Limits).
    #[error("{0}")]
    TooLarge(String),
    /// RESOURCE_EXHAUSTED: the node's disk is full.
    #[error("no space left for the image: {0}")]
    NoSpace(String),
    /// FAILED_PRECONDITION: this node's registry configuration cannot be used.
    #[error("{0}")]
    Config(String),
    /// INTERNAL: this node's disk or database.
    #[error("{0}")]
    Storage(String),
}

impl From<RegistryError> for PullError {
    fn from(error: RegistryError) -> Self {
        let words = error.to_string();
        match error.kind() {
            FailureKind::NotFound => Self::NotFound(words),
            FailureKind::Unauthorized => Self::Unauthorized(words),
            FailureKind::Forbidden => Self::Forbidden(words),
            FailureKind::Unavailable => Self::Unavailable(words),
            FailureKind::Corrupt => Self::Corrupt(words),
            FailureKind::TooLarge => Self::TooLarge(words),
            FailureKind::Config => Self::Config(words),
        }
    }
}

impl From<ManifestError> for PullError {
    fn from(error: ManifestError) -> Self {
        let words = error.to_string();
        match error {
            ManifestError::Malformed(_) => Self::Corrupt(words),
            ManifestError::NoPlatform { .. } => Self::NotFound(words),
            ManifestError::NotAnImage(_) | ManifestError::LayerType(_) => Self::Unsupported(words),
        }
    }
}

impl PullError {
    /// What is wrong with the layer whose blob is `digest`.
    pub(crate) fn layer(digest: &Digest, error: LayerError) -> Self {
        use crate::erofs::TreeError;
        use crate::tar::TarError;
        let words = format!("layer {}: {error}", digest.as_str());
        match error {
            LayerError::Write(error) => Self::storage(&error, words),
            LayerError::TooLarge(_)
            | LayerError::TooLong { .. }
            | LayerError::Tar(TarError::TooLarge { .. })
            | LayerError::Tree(TreeError::TooManyEntries(_) | TreeError::TooMuchMetadata(_)) => {
                Self::TooLarge(words)
            }
            _ => Self::Corrupt(words),
        }
    }
}

impl From<StoreError> for PullError {
    fn from(error: StoreError) -> Self {
        let words = error.to_string();
        match &error {
            StoreError::File { source, .. } => Self::storage(source, words),
            StoreError::Database(database) => match &**database {
                redb::Error::Io(source) => Self::storage(source, words),
                _ => Self::Storage(words),
            },
        }
    }
}

impl From<HostsError> for PullError {
    fn from(error: HostsError) -> Self {
        Self::Config(error.to_string())
    }
}

impl PullError {
    fn storage(error: &io::Error, words: String) -> Self {
        match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::NoSpace(words),
            io::ErrorKind::FileTooLarge => Self::TooLarge(words),
            _ => Self::Storage(words),
        }
    }
}

/// Pulls `reference` into `store`.
pub(crate) async fn pull(
    store: &Arc<Inner>,
    reference: Reference,
    credentials: Option<Credentials>,
    progress: &(dyn Fn(Progress) + Send + Sync),
) -> Result<Arc<Image>, PullError> {
    let registry = Arc::new(connect(store, &reference, credentials).await?);
    let (resolved, manifest) = resolve(&registry, reference.target()).await?;
    debug!(%reference, digest = %resolved, layers = manifest.layers.len(), "manifest");
    let document = registry.blob(&manifest.config).await?;
    let config = Config::parse(&document, &manifest, store.limits.max_layers)?;

    let running = Semaphore::new(store.limits.parallel_layers.max(1));
    let layers = manifest
        .layers
        .iter()
        .zip(&config.diff_ids)
        .map(|(blob, diff_id)| async {
            // Never closed; without a permit nothing would go wrong but the load.
            let _permit = running.acquire().await.ok();
            jobs::layer(store, &registry, blob, diff_id, progress).await
        });
    let layers = try_join_all(layers).await?;

    let new = NewImage {
        id: document.digest,
        config_json: config.json,
        config: config.parsed,
        layers,
        reference: reference.clone(),
        resolved,
    };
    let inner = Arc::clone(store);
    let image = blocking(move || inner.add_image(new)).await?;
    info!(%reference, image = image.id, bytes = image.size, "image pulled");
    Ok(image)
}

/// The hosts to ask, from this node's configuration as it is now.
async fn connect(
    store: &Arc<Inner>,
    reference: &Reference,
    credentials: Option<Credentials>,
) -> Result<Registry, PullError> {
    let (inner, reference) = (Arc::clone(store), reference.clone());
    blocking(move || {
        let limits = &inner.limits;
        let mut hosts = Vec::new();
        let clients = &inner.registries.clients;
        for host in inner.registries.hosts(reference.registry())? {
            let client = clients.get(&host, limits.connect_timeout);
            let client =
                client.map_err(|error| PullError::Config(format!("{}: {error}", host.base)))?;
            hosts.push((host, client));
        }
        Ok(Registry::new(
            hosts,
            Arc::clone(clients),
            &reference,
            credentials,
            limits,
        ))
    })
    .await
}

/// The digest that a reference stands for, and this platform's manifest behind it.
async fn resolve(registry: &Registry, target: &Target) -> Result<(Digest, Manifest), PullError> {
    let mut document = registry.manifest(target).await?;
    let resolved = document.digest.clone();
    for _ in 0..MAX_INDEX_DEPTH {
        match manifest::parse(&document.bytes, &document.media_type)? {
            Resolved::Manifest(manifest) => return Ok((resolved, manifest)),
            Resolved::Index(digest) => {
                document = registry.manifest(&Target::Digest(digest)).await?;
            }
        }
    }
    Err(PullError::Corrupt("indexes nested too deep".to_owned()))
}

/// An image's configuration, checked against its manifest.
struct Config {
    json: String,
    parsed: ImageConfiguration,
    /// Bottom first, one for each of the manifest's layers.
    diff_ids: Vec<Digest>,
}

impl Config {
    fn parse(
        document: &Document,
        manifest: &Manifest,
        max_layers: usize,
    ) -> Result<Self, PullError> {
        let corrupt = |reason: String| {
            PullError::Corrupt(format!("image configuration {}: {reason}", document.digest))
        };
        let json =
            std::str::from_utf8(&document.bytes).map_err(|error| corrupt(error.to_string()))?;
        let parsed: ImageConfiguration =
            serde_json::from_str(json).map_err(|error| corrupt(error.to_string()))?;
        let (os, architecture) = (parsed.os().to_string(), parsed.architecture().to_string());
        if (os.as_str(), architecture.as_str()) != ("linux", ARCHITECTURE) {
            let words =
                format!("image is for {os}/{architecture}, this node is linux/{ARCHITECTURE}");
            return Err(PullError::NotFound(words));
        }
        let diff_ids: Result<Vec<Digest>, _> = parsed
            .rootfs()
            .diff_ids()
            .iter()
            .map(|text| text.parse())
            .collect();
        let diff_ids = diff_ids.map_err(|error: ReferenceError| corrupt(error.to_string()))?;
        if diff_ids.len() != manifest.layers.len() {
            let (ids, layers) = (diff_ids.len(), manifest.layers.len());
            return Err(corrupt(format!("{ids} diff ids for {layers} layers")));
        }
        if diff_ids.len() > max_layers {
            return Err(PullError::TooLarge(format!(
                "{} layers, at most {max_layers} can be mounted",
                diff_ids.len()
            )));
        }
        Ok(Self {
            json: json.to_owned(),
            parsed,
            diff_ids,
        })
    }
}
