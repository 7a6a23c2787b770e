//! The end of a sandbox: what ran is killed, what the host kept for it is freed.

use std::sync::Arc;
use std::time::Duration;

use podvisor_network::netns;
use podvisor_node::cgroup::PodCgroup;
use podvisor_node::inventory;
use podvisor_proto::monitor;
use tokio::time::timeout;
use tracing::warn;

use crate::daemon::{Daemon, now_ns, within};
use crate::error::{Error, Result, if_there};
use crate::pod::Pod;
use crate::store::{Phase, SandboxRecord};
use crate::{heap, host};

/// How long a monitor may take to end its VM after all containers are dead.
const SHUTDOWN: Duration = Duration::from_secs(20);

/// How long killed processes may take to be gone from their cgroup.
const KILLED_PROCESSES: Duration = Duration::from_secs(10);

impl Daemon {
    /// Kills what runs, frees everything but the record. Fine when the sandbox is stopped or gone.
    ///
    /// # Errors
    /// Something could not be released: a later call goes on.
    pub async fn stop_pod_sandbox(&self, id: &str) -> Result<()> {
        let Some(pod) = if_there(self.pods.find(id))? else {
            return Ok(());
        };
        let _one_at_a_time = pod.lifecycle.lock().await;
        self.stop(&pod).await
    }

    async fn stop(&self, pod: &Arc<Pod>) -> Result<()> {
        if pod.record().phase == Phase::Stopped as i32 {
            return Ok(());
        }
        self.pods.begin_stop(pod);
        if let Some(monitor) = pod.monitor() {
            let request = monitor::ShutdownRequest { grace_ms: 0 };
            let mut client = monitor.client();
            let answer = tokio::select! {
                answer = within(SHUTDOWN, "Shutdown", client.shutdown(request)) => answer,
                () = monitor.died() => Err(Error::MonitorUnreachable("it died".into())),
            };
            match answer {
                Ok(answer) => self.pods.apply(pod, answer.snapshot),
                Err(error) => {
                    warn!(sandbox = pod.id, %error, "no orderly shutdown, killing the monitor");
                }
            }
            if timeout(Duration::from_secs(2), monitor.died())
                .await
                .is_err()
            {
                monitor.kill();
                // Who waits for a file system of the node's that hangs (fsfreeze) ends when that goes on: `release`
                // fails until then.
                let _ = timeout(KILLED_PROCESSES, monitor.died()).await;
            }
            let last = crate::monitor::read_state_file(&self.sandbox_dir(&pod.id));
            let why = "the sandbox was stopped";
            let record = self.pods.monitor_gone(pod, last, why, now_ns());
            // Goes on without: on a full disk there is room for a record only after the release.
            if let Err(error) = self.store.put_sandbox(record).await {
                warn!(sandbox = pod.id, %error, "cannot record the end of the VM yet");
            }
        }
        self.release(&pod.record()).await?;
        self.store.put_sandbox(pod.stopped()).await?;
        if Self::is_on_host(&pod.record()) {
            self.drop_unused_layers(None).await?;
        }
        Ok(())
    }

    /// Stops if need be, then forgets the sandbox and its containers. Fine when it is gone.
    ///
    /// # Errors
    /// As [`Self::stop_pod_sandbox`].
    pub async fn remove_pod_sandbox(&self, id: &str) -> Result<()> {
        let Some(pod) = if_there(self.pods.find(id))? else {
            return Ok(());
        };
        let _one_at_a_time = pod.lifecycle.lock().await;
        self.stop(&pod).await?;
        let containers = self
            .pods
            .containers_of(&pod.id)
            .iter()
            .map(|container| container.record.id.clone())
            .collect();
        self.store
            .remove_sandbox(pod.id.clone(), containers)
            .await?;
        self.pods.remove(&pod);
        heap::give_back();
        Ok(())
    }

    /// Kills all processes of a sandbox.
    pub async fn kill_processes(&self, record: &SandboxRecord) {
        let parent = self.cgroup_parent(&record.config.clone().unwrap_or_default());
        let leaf = inventory::cgroup_leaf(&self.config.run_dir, &record.id);
        let killed = tokio::task::spawn_blocking(move || PodCgroup::at(&parent, &leaf)?.kill_all());
        if let Ok(Err(error)) = killed.await {
            warn!(sandbox = record.id, %error, "processes are left");
        }
    }

    /// Frees all that the host holds for a sandbox, whatever of it there is. Each step is tried even
    /// when one before it failed; the first failure is reported.
    ///
    /// # Errors
    /// The first of them.
    pub async fn release(&self, record: &SandboxRecord) -> Result<()> {
        let id = record.id.clone();
        let config = record.config.clone().unwrap_or_default();
        let parent = self.cgroup_parent(&config);
        let leaf = inventory::cgroup_leaf(&self.config.run_dir, &id);
        // The processes first: they hold the tap, the disk and the cgroup.
        let processes = tokio::task::spawn_blocking(move || -> Result<()> {
            let cgroup = PodCgroup::at(&parent, &leaf)?;
            cgroup.kill_all()?;
            Ok(cgroup.remove(KILLED_PROCESSES)?)
        })
        .await
        .map_err(|_| Error::Cancelled)?;
        let network = self.cni.del(&id).await;
        let netns_path = self.netns_path(&id);
        let scratch = self.scratch_path(&id);
        let writable = self.writable_dir(&id);
        let dir = self.sandbox_dir(&id);
        let netns = netns::delete(&netns_path).await;
        let files = tokio::task::spawn_blocking(move || -> Result<()> {
            let scratch = gone(std::fs::remove_file(&scratch)).map_err(Error::io("scratch disk"));
            let dir = host::remove_mounted(&dir);
            scratch
                .and(dir)
                .and_then(|()| host::remove_mounted(&writable))
        })
        .await
        .map_err(|_| Error::Cancelled)?;
        processes?;
        network?;
        netns?;
        files
    }
}

fn gone(result: std::io::Result<()>) -> std::io::Result<()> {
    match result {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}
