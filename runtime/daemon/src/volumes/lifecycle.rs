//! When a pod's podvisor-fs is started and a container's volumes come and go.

use std::sync::Arc;

use podvisor_node::cgroup::PodCgroup;
use podvisor_node::inventory;
use tracing::{info, warn};

use super::{FsServer, Source, Volume, server};
use crate::confinement;
use crate::daemon::{Daemon, blocking};
use crate::error::{Error, Result};
use crate::monitor::Monitor;
use crate::pod::Pod;

/// Opens the host's side of volumes, with everything that may fail for what the caller asked.
///
/// # Errors
/// FAILED_PRECONDITION; nothing is mounted.
pub async fn open(volumes: Vec<Volume>) -> Result<Vec<(Volume, Source)>> {
    if volumes.is_empty() {
        return Ok(Vec::new());
    }
    let open = move || {
        let volumes = volumes.into_iter();
        volumes
            .map(|volume| Source::open(&volume).map(|source| (volume, source)))
            .collect()
    };
    blocking(open).await
}

impl Daemon {
    /// Mounts a container's volumes where its pod sees them. Returns the token of a socket that the monitor is to be told
    /// of with CreateContainer, or nothing.
    ///
    /// # Errors
    /// [`Self::remove_volumes`] takes away what there is then.
    pub async fn add_volumes(
        &self,
        pod: &Pod,
        monitor: &Monitor,
        container_id: &str,
        volumes: Vec<(Volume, Source)>,
    ) -> Result<Vec<u8>> {
        if volumes.is_empty() {
            return Ok(Vec::new());
        }
        let mut place = pod.volumes.lock().await;
        let server = match self.fs_server(pod, &mut place) {
            Some(server) => server,
            None => self.start_fs(pod, &mut place).await?,
        };
        let token = match server.unconfirmed_socket() {
            Some(socket) => monitor.send_fd(socket).await?,
            None => Vec::new(),
        };
        let container_id = container_id.to_owned();
        blocking(move || server.add(&container_id, &volumes)).await?;
        Ok(token)
    }

    /// The monitor has the socket: CreateContainer has succeeded with it.
    pub async fn confirm_volumes(&self, pod: &Pod) {
        if let Some(server) = &*pod.volumes.lock().await {
            server.confirm_socket();
        }
    }

    /// Takes a container's volumes away. Fine when there are none.
    ///
    /// # Errors
    /// A later call goes on.
    pub async fn remove_volumes(&self, pod: &Pod, container_id: &str) -> Result<()> {
        let mut place = pod.volumes.lock().await;
        let server = self.fs_server(pod, &mut place);
        let dir = self.sandbox_dir(&pod.id);
        let container_id = container_id.to_owned();
        blocking(move || server::remove(server.as_deref(), &dir, &container_id)).await
    }

    /// Takes volumes away that belong to no container: podvisord died while they were made.
    pub async fn sweep_volumes(&self, pod: &Pod) {
        let known = self.pods.containers_of(&pod.id);
        for id in server::containers(&self.sandbox_dir(&pod.id)) {
            if known.iter().any(|container| container.record.id == id) {
                continue;
            }
            warn!(
                sandbox = pod.id,
                container = id,
                "removing orphaned volumes"
            );
            if let Err(error) = self.remove_volumes(pod, &id).await {
                warn!(%error, "cannot remove orphaned volumes");
            }
        }
    }

    /// The pod's podvisor-fs, if it runs.
    fn fs_server(&self, pod: &Pod, place: &mut Option<Arc<FsServer>>) -> Option<Arc<FsServer>> {
        let record = pod.record();
        if place.is_none() && record.fs_pid != 0 {
            let dir = self.sandbox_dir(&pod.id);
            *place = FsServer::adopt(&dir, record.fs_pid, record.fs_start).map(Arc::new);
        }
        place.take_if(|server| !server.is_alive());
        place.clone()
    }

    async fn start_fs(
        &self,
        pod: &Pod,
        place: &mut Option<Arc<FsServer>>,
    ) -> Result<Arc<FsServer>> {
        let record = pod.record();
        let config = record.config.unwrap_or_default();
        let parent = self.cgroup_parent(&config);
        let leaf = inventory::cgroup_leaf(&self.config.run_dir, &pod.id);
        let cgroup = PodCgroup::at(&parent, &leaf)?;
        let binary = self.config.fs_path().map_err(Error::io("podvisor-fs"))?;
        let server = FsServer::start(
            &binary,
            &self.sandbox_dir(&pod.id),
            &cgroup,
            &confinement::of_vm(&config)?,
        )
        .await?;
        let server = Arc::new(server);
        info!(sandbox = pod.id, pid = server.pid(), "podvisor-fs runs");
        // Recorded before anybody is told of it.
        let record = pod.set_fs(server.pid(), server.start_time());
        self.store.put_sandbox(record).await?;
        *place = Some(Arc::clone(&server));
        Ok(server)
    }
}
