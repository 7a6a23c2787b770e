//! A registry, over HTTP: the pull half of <https://github.com/opencontainers/distribution-spec/blob/main/spec.md>.
//!
//! The crate oci-client was tried first: its URLs have no room for hosts.toml's paths (`override_path`), its requests
//! have no deadline between two pieces of a body, its downloads check a digest only when they start at byte 0, and the
//! registry's own words get lost in its errors. What is left without it is this module, over the same reqwest.

mod auth;
mod clients;
mod error;
mod host;
pub(crate) mod manifest;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use reqwest::StatusCode;
use reqwest::header::{ACCEPT, CONTENT_RANGE, CONTENT_TYPE, HeaderMap, HeaderValue, RANGE};
use sha2::{Digest as _, Sha256};

pub(crate) use clients::Clients;
pub(crate) use error::{FailureKind, RegistryError};

use crate::hosts::Host;
use crate::layer::blob::BlobSender;
use crate::limits::Limits;
use crate::pull::Credentials;
use crate::reference::{Digest, Reference, Target};
use error::Failure;
use host::{HostClient, Retry};
use manifest::Descriptor;

/// A download that got this much further before it broke may be tried as often as a new one.
const PROGRESS: u64 = 1 << 20;

/// The hosts of one registry, for one repository and one pull.
pub(crate) struct Registry {
    hosts: Vec<HostClient>,
    repository: String,
    limits: Limits,
}

/// A manifest, index or configuration with the digest that it has.
pub(crate) struct Document {
    pub(crate) bytes: Bytes,
    pub(crate) digest: Digest,
    /// From the response's header, without parameters. Empty if it had none.
    pub(crate) media_type: String,
}

impl Registry {
    /// `hosts` in the order in which they are to be asked, with the client for each; `clients` for those that they
    /// refer to.
    pub(crate) fn new(
        hosts: Vec<(Host, reqwest::Client)>,
        clients: Arc<Clients>,
        reference: &Reference,
        credentials: Option<Credentials>,
        limits: &Limits,
    ) -> Self {
        let hosts = hosts
            .into_iter()
            .map(|(host, client)| {
                HostClient::new(
                    host,
                    client,
                    Arc::clone(&clients),
                    credentials.clone(),
                    limits,
                )
            })
            .collect();
        Self {
            hosts,
            repository: reference.repository().to_owned(),
            limits: limits.clone(),
        }
    }

    /// What a reference points at: a manifest or an index.
    pub(crate) async fn manifest(&self, target: &Target) -> Result<Document, RegistryError> {
        let mut headers = HeaderMap::new();
        headers.insert(ACCEPT, HeaderValue::from_static(manifest::ACCEPT));
        let (name, digest) = match target {
            Target::Tag(tag) => (tag.as_str(), None),
            Target::Digest(digest) => (digest.as_str(), Some(digest)),
        };
        let path = format!("manifests/{name}");
        let may = |host: &Host| {
            if digest.is_some() {
                host.pull
            } else {
                host.resolve
            }
        };
        self.document(&path, &headers, digest, may).await
    }

    /// A small blob: an image's configuration.
    pub(crate) async fn blob(&self, blob: &Descriptor) -> Result<Document, RegistryError> {
        let path = format!("blobs/{}", blob.digest);
        self.document(&path, &HeaderMap::new(), Some(&blob.digest), |host| {
            host.pull
        })
        .await
    }

    async fn document(
        &self,
        path: &str,
        headers: &HeaderMap,
        digest: Option<&Digest>,
        may: impl Fn(&Host) -> bool,
    ) -> Result<Document, RegistryError> {
        let mut failures = Vec::new();
        for host in self.hosts.iter().filter(|host| may(host.host())) {
            match self.document_from(host, path, headers, digest).await {
                Ok(document) => return Ok(document),
                Err(failure) => failures.push(failure),
            }
        }
        Err(RegistryError::new(&self.repository, failures))
    }

    async fn document_from(
        &self,
        host: &HostClient,
        path: &str,
        headers: &HeaderMap,
        digest: Option<&Digest>,
    ) -> Result<Document, Failure> {
        let response = host.get(&self.repository, path, headers).await?;
        let media_type = response
            .headers()
            .get(CONTENT_TYPE)
            .and_then(|value| value.to_str().ok())
            .unwrap_or_default();
        let media_type = media_type
            .split(';')
            .next()
            .unwrap_or_default()
            .trim()
            .to_owned();
        let bytes = host.body(response, self.limits.max_manifest_bytes).await?;
        let actual = Digest::from(<[u8; 32]>::from(Sha256::digest(&bytes)));
        if let Some(expected) = digest.filter(|expected| **expected != actual) {
            return Err(host.failure(
                FailureKind::Corrupt,
                format!("{path}: digest {actual}, {expected} wanted"),
            ));
        }
        Ok(Document {
            bytes,
            digest: actual,
            media_type,
        })
    }

    /// Downloads a blob into `out`, without its first `there` bytes, from the first of the hosts from number `first` on that
    /// has it. A download that breaks goes on where it broke, on the same host and then on the next ones. `received` is told
    /// how many bytes there are so far. Returns the number of the host that gave the first bytes: the first to suspect if they are wrong.
    pub(crate) async fn download(
        &self,
        blob: &Descriptor,
        first: usize,
        there: u64,
        out: &BlobSender,
        received: &(dyn Fn(u64) + Send + Sync),
    ) -> Result<usize, RegistryError> {
        if there > 0 && there == blob.size {
            return Ok(first);
        }
        let mut failures = Vec::new();
        let mut offset = there;
        let mut giver = None;
        for (number, host) in self
            .hosts
            .iter()
            .enumerate()
            .skip(first)
            .filter(|(_, host)| host.host().pull)
        {
            let mut retry = Retry::new(&self.limits);
            loop {
                let start = offset;
                let result = self
                    .download_from(host, blob, &mut offset, out, received)
                    .await;
                if offset > start {
                    giver.get_or_insert(number);
                }
                match result {
                    Ok(()) => return Ok(giver.unwrap_or(number)),
                    Err(failure) => {
                        if offset - start >= PROGRESS {
                            retry = Retry::new(&self.limits);
                        }
                        if !(failure.retry && retry.wait(Duration::ZERO).await) {
                            failures.push(failure);
                            break;
                        }
                    }
                }
            }
        }
        Err(RegistryError::new(&self.repository, failures))
    }

    async fn download_from(
        &self,
        host: &HostClient,
        blob: &Descriptor,
        offset: &mut u64,
        out: &BlobSender,
        received: &(dyn Fn(u64) + Send + Sync),
    ) -> Result<(), Failure> {
        let path = format!("blobs/{}", blob.digest);
        let mut headers = HeaderMap::new();
        if *offset > 0 {
            let range = HeaderValue::try_from(format!("bytes={offset}-"));
            headers.extend(range.ok().map(|range| (RANGE, range)));
        }
        let mut response = host.get(&self.repository, &path, &headers).await?;
        // A host that does not know ranges begins anew.
        let mut skip = if response.status() == StatusCode::PARTIAL_CONTENT {
            0
        } else {
            *offset
        };
        if response.status() == StatusCode::PARTIAL_CONTENT
            && !range_starts_at(response.headers(), *offset)
        {
            return Err(host.failure(
                FailureKind::Corrupt,
                format!("{path}: not the range that was asked for"),
            ));
        }
        while let Some(mut piece) = host.piece(&mut response).await? {
            let skipped = skip.min(piece.len() as u64);
            drop(piece.split_to(skipped as usize));
            skip -= skipped;
            *offset += piece.len() as u64;
            if *offset > blob.size {
                return Err(host.failure(
                    FailureKind::Corrupt,
                    format!("{path}: more than {} bytes", blob.size),
                ));
            }
            if !out.send(piece).await {
                // The unpacking thread gave up and tells why.
                return Ok(());
            }
            received(*offset);
        }
        if *offset == blob.size {
            return Ok(());
        }
        let words = format!("{path}: ended after {offset} of {} bytes", blob.size);
        Err(Failure {
            retry: true,
            ..host.failure(FailureKind::Corrupt, words)
        })
    }

    /// Whether there is a host after number `host` that may be asked for blobs.
    pub(crate) fn has_host_after(&self, host: usize) -> bool {
        self.hosts
            .iter()
            .skip(host + 1)
            .any(|host| host.host().pull)
    }
}

fn range_starts_at(headers: &HeaderMap, offset: u64) -> bool {
    let range = headers
        .get(CONTENT_RANGE)
        .and_then(|value| value.to_str().ok())
        .unwrap_or_default();
    let start = range
        .strip_prefix("bytes ")
        .and_then(|range| range.split('-').next());
    start.is_some_and(|start| start.parse() == Ok(offset))
}
