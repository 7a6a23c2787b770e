//! What podvisord does about the past: at start it finds its pods again, undoes what was half done,
//! and from then on, now and then, removes host resources that belong to nobody.

use std::sync::Arc;
use std::time::Duration;

use podvisor_node::inventory::{self, Kind};
use tracing::{info, warn};

use crate::daemon::{Daemon, now_ns};
use crate::error::Result;
use crate::ids;
use crate::monitor::{Monitor, read_state_file};
use crate::pod::{Container, Pod};
use crate::store::{ContainerRecord, Phase, SandboxRecord};

/// Between two searches for orphans.
const SWEEP: Duration = Duration::from_mins(5);

impl Daemon {
    /// Takes up the pods of an earlier podvisord: monitors are asked in parallel, sandboxes that were
    /// being created are undone, orphans removed. Ends when every list is true.
    ///
    /// # Errors
    /// The database cannot be read.
    pub async fn reconcile(self: &Arc<Self>) -> Result<()> {
        let (sandboxes, containers) = self.store.load()?;
        let mut tasks = tokio::task::JoinSet::new();
        for record in sandboxes {
            let daemon = Arc::clone(self);
            tasks.spawn(async move { daemon.take_up(record).await });
        }
        while let Some(result) = tasks.join_next().await {
            match result {
                Ok(Ok(())) => {}
                Ok(Err(error)) => warn!(%error, "a sandbox could not be taken up"),
                Err(error) => warn!(%error, "taking up a sandbox failed"),
            }
        }
        for record in containers {
            self.take_up_container(record).await?;
        }
        for pod in self.pods.all() {
            self.sweep_volumes(&pod).await;
        }
        self.sweep().await;
        if let Err(error) = self.drop_unused_layers(None).await {
            warn!(%error, "layers are left mounted");
        }
        Ok(())
    }

    async fn take_up(self: &Arc<Self>, record: SandboxRecord) -> Result<()> {
        let id = record.id.clone();
        if record.phase == Phase::Creating as i32 {
            info!(sandbox = id, "undoing a sandbox that was being created");
            self.release(&record).await?;
            self.store.remove_sandbox(id, Vec::new()).await?;
            return Ok(());
        }
        let metadata = record
            .config
            .as_ref()
            .and_then(|config| config.metadata.clone())
            .unwrap_or_default();
        let name = self
            .sandbox_names
            .reserve("sandbox", ids::sandbox_name(&metadata), &id)?;
        let dir = self.sandbox_dir(&id);
        let monitor = match &record.last {
            Some(_) => None,
            None => Monitor::adopt(&dir, record.monitor_pid, record.monitor_start)?,
        };
        let snapshot = match (&monitor, &record.last) {
            (Some(monitor), _) => monitor.first_state().await.unwrap_or_else(|| {
                warn!(
                    sandbox = id,
                    "monitor lives but does not answer: state unknown"
                );
                read_state_file(&dir).unwrap_or_default()
            }),
            (None, Some(last)) => last.clone(),
            (None, None) => read_state_file(&dir).unwrap_or_default(),
        };
        let died_meanwhile = monitor.is_none() && record.last.is_none();
        let pod = Arc::new(Pod::new(record, name, snapshot, monitor.map(Arc::new)));
        if died_meanwhile {
            warn!(sandbox = id, "the monitor died while podvisord was away");
            if Self::is_on_host(&pod.record()) {
                self.kill_processes(&pod.record()).await;
            }
            let why = "the pod's monitor died";
            let record = self.pods.monitor_gone(&pod, None, why, now_ns());
            self.store.put_sandbox(record).await?;
        }
        self.pods.insert(&pod);
        self.watch(&pod);
        Ok(())
    }

    async fn take_up_container(&self, record: ContainerRecord) -> Result<()> {
        let Ok(pod) = self.pods.find(&record.sandbox_id) else {
            return Ok(self.store.remove_container(record.id).await?);
        };
        let metadata = record
            .config
            .as_ref()
            .and_then(|config| config.metadata.clone())
            .unwrap_or_default();
        let name = self.container_names.reserve(
            "container",
            ids::container_name(&pod.id, &metadata),
            &record.id,
        )?;
        self.pods
            .insert_container(Arc::new(Container::new(record, pod, name)));
        Ok(())
    }

    /// Searches for orphans, and for what failed pulls have left, for ever.
    pub async fn sweep_forever(self: Arc<Self>) {
        let mut timer = tokio::time::interval(SWEEP);
        timer.tick().await;
        loop {
            timer.tick().await;
            self.sweep().await;
            let images = self.images.clone();
            let _ = tokio::task::spawn_blocking(move || images.expire()).await;
        }
    }

    /// Removes host resources that carry this instance's name and belong to no sandbox.
    async fn sweep(&self) {
        // Names are taken before the first resource is made: what has no owner now, had none then.
        let places = self.places();
        let found = match tokio::task::spawn_blocking(move || inventory::scan(&places)).await {
            Ok(Ok(found)) => found,
            Ok(Err(error)) => return warn!(%error, "cannot look for orphans"),
            Err(error) => return warn!(%error, "cannot look for orphans"),
        };
        let owners = self.sandbox_names.owners();
        for resource in found {
            // Nameless temporary files may be those of a pull that goes on: the store looks after them.
            if resource.sandbox_id.is_empty() || owners.contains(&resource.sandbox_id) {
                continue;
            }
            warn!(%resource, "removing an orphan");
            if resource.kind == Kind::NetworkAttachment {
                if let Err(error) = self.cni.del(&resource.sandbox_id).await {
                    warn!(%error, "cannot remove an orphan's network");
                }
                continue;
            }
            let removed = tokio::task::spawn_blocking(move || inventory::remove(&resource)).await;
            if let Ok(Err(error)) = removed {
                warn!(%error, "cannot remove an orphan");
            }
        }
    }
}
