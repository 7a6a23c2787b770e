//! HTTP clients, with their pools of open connections: one for each way of checking a host.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use reqwest::{Certificate, Identity, Url};

use crate::hosts::{Host, Tls, is_loopback};

/// Idle connections are kept for a node's next pull, but not for ever.
const IDLE: Duration = Duration::from_mins(1);

/// Clients by how they check hosts. Made when first needed, then kept.
#[derive(Debug, Default)]
pub(crate) struct Clients {
    cache: Mutex<HashMap<Key, reqwest::Client>>,
}

#[derive(Debug, PartialEq, Eq, Hash)]
struct Key {
    /// A proxy of the environment is not for this machine.
    loopback: bool,
    tls: Option<TlsFiles>,
    connect_timeout: Duration,
}

/// [`Tls`] with the files' content, which may change.
#[derive(Debug, PartialEq, Eq, Hash)]
struct TlsFiles {
    skip_verify: bool,
    ca: Vec<Vec<u8>>,
    client: Option<Vec<u8>>,
}

/// Why there is no client for a host.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ClientError {
    #[error("{path}: {source}", path = path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("TLS configuration: {}", super::error::chain(.0))]
    Build(#[from] reqwest::Error),
}

impl Clients {
    /// The client for `host`. Reads certificates: blocks.
    pub(crate) fn get(
        &self,
        host: &Host,
        connect_timeout: Duration,
    ) -> Result<reqwest::Client, ClientError> {
        let (scheme, rest) = host.base.split_once("://").unwrap_or_default();
        let authority = rest.split('/').next().unwrap_or_default();
        let tls = if scheme == "https" {
            Some(TlsFiles::read(&host.tls)?)
        } else {
            None
        };
        self.cached(Key {
            loopback: is_loopback(authority),
            tls,
            connect_timeout,
        })
    }

    /// The client for a host that a registry redirects to or that gives out its tokens. Reads the system's
    /// certificates when first needed: blocks.
    pub(crate) fn for_url(
        &self,
        url: &Url,
        connect_timeout: Duration,
    ) -> Result<reqwest::Client, ClientError> {
        let system = TlsFiles {
            skip_verify: false,
            ca: Vec::new(),
            client: None,
        };
        let loopback = url.host_str().is_some_and(is_loopback);
        self.cached(Key {
            loopback,
            tls: (url.scheme() == "https").then_some(system),
            connect_timeout,
        })
    }

    fn cached(&self, key: Key) -> Result<reqwest::Client, ClientError> {
        let mut cache = self.cache.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(client) = cache.get(&key) {
            return Ok(client.clone());
        }
        let client = build(&key)?;
        cache.insert(key, client.clone());
        Ok(client)
    }
}

fn build(key: &Key) -> Result<reqwest::Client, ClientError> {
    let mut builder = reqwest::Client::builder()
        .user_agent(concat!("podvisor/", env!("CARGO_PKG_VERSION")))
        .connect_timeout(key.connect_timeout)
        .pool_idle_timeout(IDLE)
        // Followed by hand, so that credentials and headers stay where they belong.
        .redirect(reqwest::redirect::Policy::none());
    if key.loopback {
        builder = builder.no_proxy();
    }
    builder = match &key.tls {
        // No need to load the system's certificates, which may not be there.
        None => builder.tls_certs_only([]),
        Some(tls) => {
            let mut certificates = Vec::new();
            for pem in &tls.ca {
                certificates.extend(Certificate::from_pem_bundle(pem)?);
            }
            let builder = builder.tls_certs_merge(certificates);
            let builder = match &tls.client {
                Some(pem) => builder.identity(Identity::from_pem(pem)?),
                None => builder,
            };
            builder.tls_danger_accept_invalid_certs(tls.skip_verify)
        }
    };
    Ok(builder.build()?)
}

impl TlsFiles {
    fn read(tls: &Tls) -> Result<Self, ClientError> {
        let client = match &tls.client {
            None => None,
            Some((certificate, key)) => {
                let mut pem = read(certificate)?;
                if let Some(key) = key {
                    pem.push(b'\n');
                    pem.extend(read(key)?);
                }
                Some(pem)
            }
        };
        let ca = tls
            .ca
            .iter()
            .map(|path| read(path))
            .collect::<Result<_, _>>()?;
        Ok(Self {
            skip_verify: tls.skip_verify,
            ca,
            client,
        })
    }
}

fn read(path: &Path) -> Result<Vec<u8>, ClientError> {
    fs::read(path).map_err(|source| ClientError::Read {
        path: path.to_owned(),
        source,
    })
}
