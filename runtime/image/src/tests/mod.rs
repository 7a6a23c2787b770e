//! Pulls from a registry that behaves as each test wants, and the store that they fill.

mod authentication;
mod failures;
mod fake_registry;
mod pulls;
mod resumed;
mod store;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use fake_registry::{FakeRegistry, Reply, Request};
use serde_json::json;
use tempfile::TempDir;

use crate::registry::manifest::ARCHITECTURE;
use crate::testing::{TarBuilder, gzip, sha256};
use crate::{Image, ImageStore, Limits, Progress, PullError, Registries};

const OCI: &str = "application/vnd.oci.image";

/// An image as a registry holds it.
#[derive(Clone)]
struct Fixture {
    /// By digest.
    blobs: BTreeMap<String, Vec<u8>>,
    manifest: Vec<u8>,
    config: Vec<u8>,
    /// Digests of the compressed layers.
    layers: Vec<String>,
}

impl Fixture {
    /// Each layer has one file with this content.
    fn new(layers: &[&[u8]]) -> Self {
        let tars = layers
            .iter()
            .map(|content| TarBuilder::default().file("file", content).end());
        Self::from_tars(tars.collect())
    }

    fn from_tars(tars: Vec<Vec<u8>>) -> Self {
        let diff_ids: Vec<_> = tars.iter().map(|tar| sha256(tar).to_string()).collect();
        let config = json!({
            "architecture": ARCHITECTURE, "os": "linux", "config": {"Cmd": ["/file"], "Volumes": null},
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
        });
        Self::with_config(&tars, config.to_string().into_bytes())
    }

    fn with_config(tars: &[Vec<u8>], config: Vec<u8>) -> Self {
        let blobs: Vec<_> = tars.iter().map(|tar| gzip(tar)).collect();
        let layers: Vec<_> = blobs.iter().map(|blob| sha256(blob).to_string()).collect();
        let descriptors: Vec<_> = blobs
            .iter()
            .map(|blob| json!({
                "mediaType": format!("{OCI}.layer.v1.tar+gzip"), "digest": sha256(blob).to_string(), "size": blob.len(),
            }))
            .collect();
        let manifest = json!({
            "schemaVersion": 2, "mediaType": format!("{OCI}.manifest.v1+json"),
            "config": {
                "mediaType": format!("{OCI}.config.v1+json"), "digest": sha256(&config).to_string(), "size": config.len(),
            },
            "layers": descriptors,
        });
        let mut by_digest: BTreeMap<_, _> = layers.iter().cloned().zip(blobs).collect();
        by_digest.insert(sha256(&config).to_string(), config.clone());
        Self {
            blobs: by_digest,
            manifest: manifest.to_string().into_bytes(),
            config,
            layers,
        }
    }

    fn id(&self) -> String {
        sha256(&self.config).to_string()
    }

    fn digest(&self) -> String {
        sha256(&self.manifest).to_string()
    }

    /// What an honest registry answers, whatever repository and tag are asked for.
    fn answer(&self, request: &Request) -> Reply {
        let (_, rest) = request.path.split_once("/v2/").unwrap();
        if let Some((_, digest)) = rest.split_once("/blobs/") {
            return match self.blobs.get(digest.split('?').next().unwrap()) {
                Some(blob) => Reply::ok("application/octet-stream", blob).ranged(request),
                None => Reply::error(404, "BLOB_UNKNOWN", "blob unknown to registry"),
            };
        }
        Reply::ok(&format!("{OCI}.manifest.v1+json"), &self.manifest)
    }

    /// A registry with this image alone.
    async fn registry(&self) -> FakeRegistry {
        let fixture = self.clone();
        FakeRegistry::start(move |request| fixture.answer(request)).await
    }
}

/// A store in a directory of its own.
struct Node {
    dir: TempDir,
    store: ImageStore,
}

/// Short enough that a test of what happens at a deadline does not take long.
fn limits() -> Limits {
    Limits {
        connect_timeout: Duration::from_secs(2),
        stall_timeout: Duration::from_millis(500),
        backoff: Duration::from_millis(5),
        min_resumed_bytes: 200_000,
        ..Limits::default()
    }
}

impl Node {
    fn new() -> Self {
        Self::with_limits(limits())
    }

    fn with_limits(limits: Limits) -> Self {
        // Only the first test's succeeds.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let dir = tempfile::tempdir().unwrap();
        let store = open(dir.path(), limits);
        Self { dir, store }
    }

    /// Closes the store and opens it again.
    fn reopen(self) -> Self {
        self.reopen_with(limits())
    }

    fn reopen_with(self, limits: Limits) -> Self {
        let Self { dir, store } = self;
        drop(store);
        let store = open(dir.path(), limits);
        Self { dir, store }
    }

    fn hosts_toml(&self, registry: &str, text: &str) {
        let dir = self.dir.path().join("certs.d").join(registry);
        std::fs::create_dir_all(&dir).unwrap();
        std::fs::write(dir.join("hosts.toml"), text).unwrap();
    }

    async fn pull(&self, reference: &str) -> Result<Arc<Image>, PullError> {
        self.store.pull(reference, None, &|_| {}).await
    }

    /// The files of the store.
    fn files(&self) -> Vec<String> {
        let mut files = Vec::new();
        for dir in ["layers", "partial", "tmp"] {
            for entry in std::fs::read_dir(self.dir.path().join("images").join(dir)).unwrap() {
                files.push(format!(
                    "{dir}/{}",
                    entry.unwrap().file_name().to_str().unwrap()
                ));
            }
        }
        files.sort();
        files
    }

    /// Waits until the store has no file: threads clean up after themselves a moment later.
    async fn becomes_empty(&self) {
        self.keeps_only("no file").await;
    }

    /// Waits until the store has no file whose path does not begin so.
    async fn keeps_only(&self, path: &str) {
        for _ in 0..500 {
            if self.files().iter().all(|file| file.starts_with(path)) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("left behind: {:?}", self.files());
    }
}

/// Bytes that do not compress.
fn noise(length: usize) -> Vec<u8> {
    let mut state = 1u64;
    let mut next = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (state >> 56) as u8
    };
    (0..length).map(|_| next()).collect()
}

fn open(dir: &Path, limits: Limits) -> ImageStore {
    // What a store has begun holds it a moment longer.
    let mut opened = redb::Database::create(dir.join("state.redb"));
    for _ in 0..500 {
        let Err(redb::DatabaseError::DatabaseAlreadyOpen) = opened else {
            break;
        };
        std::thread::sleep(Duration::from_millis(10));
        opened = redb::Database::create(dir.join("state.redb"));
    }
    let database = Arc::new(opened.unwrap());
    ImageStore::open(
        database,
        &dir.join("images"),
        Registries::new(dir.join("certs.d")),
        limits,
    )
    .unwrap()
}
