//! New limits for a container.

use std::fs;
use std::io;
use std::os::fd::AsFd;

use podvisor_proto::agent::UpdateContainerRequest;

use super::{Container, ContainerError, Pod, SPEC, State, kernel};
use crate::cgroup::Cgroup;
use crate::oci::{Resources, Spec};
use crate::resources;

impl Pod {
    /// Sets limits; those that are not named stay. All of them are in force when this returns, or none is.
    /// A container that is not started yet will start with them.
    pub async fn update(&self, request: UpdateContainerRequest) -> Result<(), ContainerError> {
        let changes: Resources = serde_json::from_slice(&request.resources)
            .map_err(|error| ContainerError::Invalid(format!("the limits: {error}")))?;
        let container = self.find(&request.id)?;
        let _turn = container.turn.lock().await;
        let cgroup = match &*container.state() {
            State::Created => None,
            State::Started(started) => Some(started.cgroup.clone()),
            State::Removing => return Err(container.wrong_state("is being removed")),
        };
        let work = {
            let container = std::sync::Arc::clone(&container);
            move || match cgroup {
                Some(cgroup) => update_group(&changes, &cgroup),
                None => update_spec(changes, &container),
            }
        };
        tokio::task::spawn_blocking(work).await?
    }
}

/// Blocks.
fn update_group(changes: &Resources, cgroup: &Cgroup) -> Result<(), ContainerError> {
    let directory = cgroup.open().map_err(kernel("opening the control group"))?;
    Ok(resources::update(changes, directory.as_fd())?)
}

/// Blocks.
fn update_spec(changes: Resources, container: &Container) -> Result<(), ContainerError> {
    resources::check(&changes)?;
    let path = container.bundle.join(SPEC);
    let write = || -> io::Result<()> {
        let mut spec: Spec = serde_json::from_slice(&fs::read(&path)?)?;
        spec.linux.resources.change(changes);
        let new = container.bundle.join("config.new");
        fs::write(&new, serde_json::to_vec(&spec)?)?;
        fs::rename(new, path)
    };
    write().map_err(kernel("writing the bundle"))
}
