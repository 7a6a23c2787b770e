//! CreateContainer, UpdateContainer, RemoveContainer, ReopenLog.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;

use podvisor_proto::monitor::{
    self, ContainerState, CreateContainerRequest, UpdateContainerRequest,
};
use prost::Message;
use tracing::info;

use super::container::Container;
use super::{Pod, PodError};
use crate::log::LogSink;
use crate::state::now_ns;

impl Pod {
    /// Assembles a container.
    pub async fn create(&self, request: CreateContainerRequest) -> Result<(), PodError> {
        check_id(&request.id)?;
        let runner = self.ready_runner()?;
        let container = self.enter(&request)?;
        let _operation = container.operation.lock().await;
        if self.state.container_state(&container.id).is_some() {
            return Ok(()); // A retry.
        }
        // A try that failed meanwhile has taken the entry away.
        if !Arc::ptr_eq(&container, &self.container(&request.id)?) {
            return Err(PodError::State("tried twice at a time".to_owned()));
        }
        match runner.create(&request).await {
            Ok(user) => {
                info!(container = request.id, "created");
                self.state.update(|snapshot| {
                    snapshot.containers.push(monitor::Container {
                        id: request.id,
                        created_ns: now_ns(),
                        user,
                        ..monitor::Container::default()
                    });
                });
                Ok(())
            }
            Err(error) => {
                self.containers().remove(&request.id);
                Err(error)
            }
        }
    }

    /// Sets a container's limits.
    pub async fn update(&self, request: UpdateContainerRequest) -> Result<(), PodError> {
        let container = self.container(&request.id)?;
        let _operation = container.operation.lock().await;
        let runner = self.ready_runner()?;
        runner.update(&request.id, request.resources).await
    }

    /// Kills what is left of a container and forgets it.
    pub async fn remove(&self, id: &str) -> Result<(), PodError> {
        let Ok(container) = self.container(id) else {
            return Ok(());
        };
        if self.state.container_state(id) == Some(ContainerState::Running) {
            self.kill(id).await?;
        }
        let _operation = container.operation.lock().await;
        if self.container(id).is_err() {
            return Ok(()); // Another caller was faster.
        }
        self.runner.remove(id, &container.diff_ids).await?;
        self.containers().remove(id);
        self.state
            .update(|snapshot| snapshot.containers.retain(|entry| entry.id != id));
        info!(container = id, "removed");
        Ok(())
    }

    /// Goes on in another log file. When this returns nothing is written to the old one any more.
    pub async fn reopen_log(&self, id: &str, fd_token: &[u8]) -> Result<(), PodError> {
        let file = self.fds.take(fd_token);
        let container = self.container(id)?;
        let file = file.ok_or_else(|| PodError::State("no log file came".to_owned()))?;
        let log = Arc::clone(&container.log);
        // Waits for a write that is under way.
        tokio::task::spawn_blocking(move || log.reopen(file))
            .await
            .map_err(|error| PodError::Internal(error.to_string()))
    }

    /// The entry of the container to create: a new one, or that of the same request before.
    fn enter(&self, request: &CreateContainerRequest) -> Result<Arc<Container>, PodError> {
        let log_file = self.fds.take(&request.log_fd_token);
        let fingerprint = fingerprint(request);
        let mut containers = self.containers();
        if let Some(existing) = containers.get(&request.id) {
            if existing.fingerprint != fingerprint {
                return Err(PodError::Exists(request.id.clone()));
            }
            return Ok(Arc::clone(existing));
        }
        if log_file.is_none() && !request.log_fd_token.is_empty() {
            return Err(PodError::State("no log file came".to_owned()));
        }
        let log = LogSink::new(&request.id, log_file);
        let container = Arc::new(Container::new(request, log, fingerprint));
        containers.insert(request.id.clone(), Arc::clone(&container));
        Ok(container)
    }
}

/// Those of the container's image, then those of its image volumes.
pub fn all_layers(request: &CreateContainerRequest) -> impl Iterator<Item = &monitor::Layer> {
    let volumes = request.image_volumes.iter();
    request
        .layers
        .iter()
        .chain(volumes.flat_map(|volume| &volume.layers))
}

/// Ids are 64 lower-case hexadecimal digits.
fn check_id(id: &str) -> Result<(), PodError> {
    let hexadecimal = |byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
    if id.len() == 64 && id.bytes().all(hexadecimal) {
        return Ok(());
    }
    Err(PodError::Invalid(
        "a container id is 64 hexadecimal digits".to_owned(),
    ))
}

/// Everything in the request but the tokens, which differ from try to try.
fn fingerprint(request: &CreateContainerRequest) -> u64 {
    let mut request = request.clone();
    request.log_fd_token.clear();
    request.volumes_fd_token.clear();
    let volumes = &mut request.image_volumes;
    let of_volumes = volumes.iter_mut().flat_map(|volume| &mut volume.layers);
    for layer in request.layers.iter_mut().chain(of_volumes) {
        layer.fd_token.clear();
    }
    for device in &mut request.block_devices {
        device.fd_token.clear();
    }
    let mut hasher = DefaultHasher::new();
    request.encode_to_vec().hash(&mut hasher);
    hasher.finish()
}
