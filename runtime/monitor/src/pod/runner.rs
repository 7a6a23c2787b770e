//! Who runs the containers of a pod.

use podvisor_oci::stdio::{Streams, Wanted};
use podvisor_proto::agent::{ResizeRequest, ResolvedUser, SampleResponse, SignalRequest};
use podvisor_proto::monitor::{ConfigureRequest, CreateContainerRequest};

use super::PodError;
use super::guest::Guest;
use super::host::Host;

/// An agent in a VM, or an OCI runtime. What both do is documented at [`Guest`].
pub enum Runner {
    /// In a VM.
    Guest(Guest),
    /// On the host.
    Host(Host),
}

impl Runner {
    pub async fn booted(&self) {
        match self {
            Self::Guest(guest) => guest.booted().await,
            Self::Host(_) => {}
        }
    }

    pub async fn configure(&self, request: ConfigureRequest) -> Result<(), PodError> {
        match self {
            Self::Guest(guest) => guest.configure(request).await,
            Self::Host(host) => Ok(host.configure(request.sandbox.unwrap_or_default())?),
        }
    }

    pub async fn create(
        &self,
        request: &CreateContainerRequest,
    ) -> Result<Option<ResolvedUser>, PodError> {
        match self {
            Self::Guest(guest) => guest.create(request).await,
            Self::Host(host) => Ok(Some(host.create(request)?)),
        }
    }

    pub async fn start(&self, id: &str, wanted: Wanted) -> Result<(u32, Streams), PodError> {
        match self {
            Self::Guest(guest) => guest.start(id, wanted).await,
            Self::Host(host) => Ok(host.start(id, wanted).await?),
        }
    }

    pub async fn exec(
        &self,
        container_id: &str,
        exec_id: &str,
        args: &[String],
        wanted: Wanted,
    ) -> Result<Streams, PodError> {
        match self {
            Self::Guest(guest) => guest.exec(container_id, exec_id, args, wanted).await,
            Self::Host(host) => Ok(host.exec(container_id, exec_id, args, wanted).await?),
        }
    }

    pub async fn signal(&self, request: SignalRequest) -> Result<(), PodError> {
        match self {
            Self::Guest(guest) => guest.signal(request).await,
            Self::Host(host) => Ok(host.signal(&request)?),
        }
    }

    pub async fn resize(&self, request: ResizeRequest) -> Result<(), PodError> {
        match self {
            Self::Guest(guest) => guest.resize(request).await,
            Self::Host(host) => Ok(host.resize(&request)?),
        }
    }

    pub async fn update(&self, id: &str, resources: Vec<u8>) -> Result<(), PodError> {
        match self {
            Self::Guest(guest) => guest.update(id, resources).await,
            Self::Host(host) => Ok(host.update(id, &resources).await?),
        }
    }

    pub async fn remove(&self, id: &str, diff_ids: &[String]) -> Result<(), PodError> {
        match self {
            Self::Guest(guest) => guest.remove(id, diff_ids).await,
            Self::Host(host) => Ok(host.remove(id).await?),
        }
    }

    pub async fn sample(&self) -> Result<SampleResponse, PodError> {
        match self {
            Self::Guest(guest) => guest.sample().await,
            Self::Host(host) => Ok(host.sample().await?),
        }
    }

    pub async fn end(&self, answers: bool) {
        match self {
            Self::Guest(guest) => guest.end(answers).await,
            Self::Host(host) => host.end(),
        }
    }
}
