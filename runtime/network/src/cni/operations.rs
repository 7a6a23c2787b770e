//! ADD, CHECK and DEL of a whole network: the plugins one after the other.

use std::convert::Infallible;
use std::env;
use std::ffi::{OsStr, OsString};
use std::future::{Future, pending};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Map, Value};
use tokio::sync::{Mutex, OwnedMutexGuard, oneshot};
use tokio::task::spawn_blocking;

use super::cache::{Cache, Entry, Record};
use super::config::{Chosen, ConfDir, Network, Plugin, find_plugin};
use super::exec::{self, Call, Failure, Verb};
use super::locks::Locks;
use super::result::{self, Outcome};
use super::{CniConfig, CniError, request};
use crate::types::{Attachment, Cidr, PodInterface, PodNetwork};
use crate::{INTERFACE, link, netns};

#[derive(Debug)]
pub struct Operations {
    plugin_dirs: Vec<PathBuf>,
    /// `CNI_PATH`.
    plugin_path: OsString,
    plugin_timeout: Duration,
    conf: ConfDir,
    cache: Cache,
    locks: Locks,
    /// Whether an ADD has succeeded since the start: of a pod without port mappings, and of one with.
    has_added: [Mutex<bool>; 2],
}

impl Operations {
    pub fn new(config: CniConfig) -> Self {
        // A folder with a colon in its name cannot be said in CNI_PATH. Its plugins are still
        // found by us; only those that they delegate to are not.
        let plugin_path = env::join_paths(&config.plugin_dirs).unwrap_or_default();
        Self {
            plugin_path,
            plugin_dirs: config.plugin_dirs,
            plugin_timeout: config.plugin_timeout,
            conf: ConfDir::new(config.conf_dir),
            cache: Cache::new(config.cache_dir),
            locks: Locks::default(),
            has_added: Default::default(),
        }
    }

    pub async fn lock(&self, sandbox_id: &str) -> OwnedMutexGuard<()> {
        self.locks.lock(sandbox_id).await
    }

    pub async fn attachments(self: &Arc<Self>) -> Result<Vec<String>, CniError> {
        self.blocking(|this| this.cache.list()).await
    }

    /// The network in force, with all its plugins in place.
    pub async fn ready_network(self: &Arc<Self>) -> Result<Chosen, CniError> {
        self.blocking(|this| {
            let chosen = this.conf.current()?;
            for plugin in &chosen.network.plugins {
                this.program(&chosen.network, &plugin.kind)?;
                let ipam = plugin.config.get("ipam").and_then(|ipam| ipam.get("type"));
                if let Some(ipam) = ipam.and_then(Value::as_str).filter(|kind| !kind.is_empty()) {
                    this.program(&chosen.network, ipam)?;
                }
            }
            Ok(chosen)
        })
        .await
    }

    /// ADD by every plugin. `gone` ends when nobody wants the result any more. On an error all is
    /// undone.
    pub async fn add(
        self: &Arc<Self>,
        attachment: Attachment,
        mut gone: oneshot::Receiver<Infallible>,
    ) -> Result<PodNetwork, CniError> {
        let network = self.ready_network().await?.network;
        let record = request::record(&attachment, Network::clone(&network))?;
        let id = record.sandbox_id.clone();
        if !matches!(self.recall(&id).await?, Entry::Absent) {
            return Err(CniError::InvalidAttachment(format!(
                "sandbox {id} is attached already"
            )));
        }
        // What all pods share, plugins make for the first one, and portmap fails when another pod is the first at the
        // same time: until one ADD has succeeded they take turns.
        let kind = usize::from(!attachment.port_mappings.is_empty());
        let mut turn = Some(self.has_added[kind].lock().await).filter(|has_added| !**has_added);
        let attached = self.attach(record, &mut gone).await;
        if attached.is_err() {
            self.undo(&id).await;
        } else if let Some(has_added) = &mut turn {
            **has_added = true;
        }
        attached
    }

    async fn attach(
        self: &Arc<Self>,
        record: Record,
        gone: &mut oneshot::Receiver<Infallible>,
    ) -> Result<PodNetwork, CniError> {
        let mut record = self.remember(record).await?;
        let network = Arc::new(record.network.clone());
        let mut result = Map::new();
        let mut outcome = Outcome::default();
        for (i, plugin) in network.plugins.iter().enumerate() {
            let cancelled = async {
                // The sender is never used, only dropped.
                let _ = (&mut *gone).await;
            };
            let previous = (i > 0).then_some(&result);
            let stdout = self
                .run(Verb::Add, &record, plugin, previous, cancelled)
                .await?;
            let understood = result::parse(&stdout)
                .and_then(|result| Ok((result::outcome(&result, INTERFACE)?, result)));
            (outcome, result) = understood.map_err(|message| CniError::Broken {
                network: network.name.clone(),
                plugin: plugin.kind.clone(),
                command: Verb::Add.as_str(),
                message,
            })?;
        }
        record.result = Some(result);
        let record = self.remember(record).await?;
        pod_network(&record, outcome).await
    }

    pub async fn check(self: &Arc<Self>, id: &str) -> Result<(), CniError> {
        let not_attached = |why| CniError::InvalidAttachment(format!("sandbox {id} {why}"));
        let record = match self.recall(id).await? {
            Entry::Present(record) => record,
            Entry::Absent => return Err(not_attached("is not attached".to_owned())),
            Entry::Unreadable(e) => return Err(not_attached(format!("has a damaged record: {e}"))),
        };
        let Some(result) = &record.result else {
            return Err(not_attached("was never attached to its end".to_owned()));
        };
        if record.network.disable_check || !record.network.version.has_check() {
            return Ok(());
        }
        for plugin in &record.network.plugins {
            self.run(Verb::Check, &record, plugin, Some(result), pending())
                .await?;
        }
        Ok(())
    }

    pub async fn del(self: &Arc<Self>, id: &str) -> Result<(), CniError> {
        let record = match self.recall(id).await? {
            Entry::Absent => return Ok(()),
            Entry::Present(record) => *record,
            Entry::Unreadable(reason) => {
                tracing::warn!(
                    sandbox = id,
                    reason,
                    "damaged record of a network attachment; \
                    detaching with the current network's configuration"
                );
                let network = self.ready_network().await?.network;
                let unknown = Attachment {
                    sandbox_id: id.to_owned(),
                    ..Attachment::default()
                };
                request::record(&unknown, Network::clone(&network))?
            }
        };
        self.detach(&record).await?;
        let id = id.to_owned();
        self.blocking(move |this| this.cache.remove(&id)).await
    }

    /// DEL by every plugin, the last first, whatever the others say.
    async fn detach(&self, record: &Record) -> Result<(), CniError> {
        let result = record
            .result
            .as_ref()
            .filter(|_| record.network.version.has_check());
        let mut first_error = None;
        for plugin in record.network.plugins.iter().rev() {
            if let Err(error) = self.run(Verb::Del, record, plugin, result, pending()).await {
                tracing::warn!(sandbox = record.sandbox_id, %error, "a network plugin failed");
                first_error.get_or_insert(error);
            }
        }
        first_error.map_or(Ok(()), Err)
    }

    /// DEL after an ADD that failed or that nobody wants. Its error is not the caller's: the first
    /// one is, and the record stays for another try.
    pub async fn undo(self: &Arc<Self>, id: &str) {
        if let Err(error) = self.del(id).await {
            tracing::warn!(sandbox = id, %error, "a failed network attachment is not undone");
        }
    }

    async fn run(
        &self,
        verb: Verb,
        record: &Record,
        plugin: &Plugin,
        previous: Option<&Map<String, Value>>,
        cancelled: impl Future<Output = ()>,
    ) -> Result<Vec<u8>, CniError> {
        let network = record.network.name.clone();
        let program = self.program(&record.network, &plugin.kind)?;
        // The spec: DEL without a namespace when that is gone.
        let gone = verb == Verb::Del && !netns::is_namespace(&record.netns);
        let call = Call {
            program: &program,
            verb,
            container_id: &record.sandbox_id,
            netns: if gone {
                OsStr::new("")
            } else {
                record.netns.as_os_str()
            },
            interface: &record.interface,
            args: &record.args,
            plugin_path: &self.plugin_path,
            timeout: self.plugin_timeout,
        };
        let config = request::stdin(record, plugin, previous);
        let started = Instant::now();
        let outcome = exec::run(&call, &config, cancelled).await;
        tracing::debug!(
            sandbox = record.sandbox_id,
            plugin = plugin.kind,
            command = verb.as_str(),
            ok = outcome.is_ok(),
            micros = started.elapsed().as_micros() as u64,
            "network plugin"
        );
        let (plugin, command) = (plugin.kind.clone(), verb.as_str());
        outcome.map_err(|failure| match failure {
            Failure::Refused { code, message } => CniError::Refused {
                network,
                plugin,
                command,
                code,
                message,
            },
            Failure::Broken(message) => CniError::Broken {
                network,
                plugin,
                command,
                message,
            },
            Failure::Timeout => CniError::Timeout {
                network,
                plugin,
                command,
                timeout: self.plugin_timeout,
            },
            Failure::Cancelled => CniError::Aborted,
        })
    }

    fn program(&self, network: &Network, kind: &str) -> Result<PathBuf, CniError> {
        find_plugin(&self.plugin_dirs, kind).ok_or_else(|| CniError::PluginMissing {
            network: network.name.clone(),
            plugin: kind.to_owned(),
            dirs: self.plugin_path.to_string_lossy().into_owned(),
        })
    }

    async fn recall(self: &Arc<Self>, id: &str) -> Result<Entry, CniError> {
        let id = id.to_owned();
        self.blocking(move |this| this.cache.read(&id)).await
    }

    async fn remember(self: &Arc<Self>, record: Record) -> Result<Record, CniError> {
        self.blocking(move |this| this.cache.write(&record).map(|()| record))
            .await
    }

    /// Work on files, off the async threads.
    async fn blocking<T: Send + 'static>(
        self: &Arc<Self>,
        work: impl FnOnce(&Self) -> Result<T, CniError> + Send + 'static,
    ) -> Result<T, CniError> {
        let this = Arc::clone(self);
        spawn_blocking(move || work(&this))
            .await
            .map_err(|_| CniError::Aborted)?
    }
}

/// What the pod got: addresses and their order by the plugins' word, the rest as it really is.
async fn pod_network(record: &Record, outcome: Outcome) -> Result<PodNetwork, CniError> {
    let network = record.network.name.clone();
    let link = link::observe(&record.netns, INTERFACE)
        .await
        .map_err(|source| CniError::Interface {
            network: network.clone(),
            source,
        })?;
    let ips = if outcome.ips.is_empty() {
        link.addresses.iter().map(Cidr::address).collect()
    } else {
        outcome.ips
    };
    Ok(PodNetwork {
        network,
        interface: PodInterface {
            name: INTERFACE.to_owned(),
            mac: link.mac,
            mtu: link.mtu,
            addresses: link.addresses,
        },
        routes: link.routes,
        dns: outcome.dns,
        ips,
    })
}
