//! PortForward: a caller's stream, connected to a port of the pod's.

use podvisor_proto::monitor::PortForwardRequest;

use super::relay;
use super::streams::asynchronous;
use super::{Pod, PodError};

impl Pod {
    /// Connects a stream of the caller's to a port of a VM's pod, and moves bytes from then on.
    pub async fn port_forward(&self, request: PortForwardRequest) -> Result<(), PodError> {
        let caller = relay::take_stream(&self.fds, &request.fd_token)?;
        self.ready_runner()?;
        let no_vm = || PodError::State("the pod is one of the host's own".to_owned());
        let guest = self.guest().ok_or_else(no_vm)?;
        let port = guest.port_forward(request.port).await?;
        let port = port.into_std().and_then(|port| asynchronous(port.into()));
        let port = port.map_err(PodError::Stream)?;
        tokio::spawn(async move { relay::both_ways(&caller, &port).await });
        Ok(())
    }
}
