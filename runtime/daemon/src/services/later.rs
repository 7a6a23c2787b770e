//! RPCs that a later release brings: they answer UNIMPLEMENTED and name themselves. This list is the
//! one place that says which.

use http::Request;
use tonic::Status;

use super::around::{Answer, Wrap};

/// Paths of the RPCs that are not implemented yet.
pub const LATER: [&str; 3] = [
    "/runtime.v1.RuntimeService/CheckpointContainer",
    "/runtime.v1.RuntimeService/CheckpointPod",
    "/runtime.v1.RuntimeService/RestorePod",
];

/// Answers the RPCs of [`LATER`] in the place of the services.
#[derive(Debug, Clone, Copy)]
pub struct Later;

impl Wrap for Later {
    fn wrap<B, E: 'static>(
        &self,
        request: &Request<B>,
    ) -> impl FnOnce(Answer<E>) -> Answer<E> + use<B, E> {
        let path = request.uri().path();
        let status = LATER.contains(&path).then(|| {
            let name = path.rsplit('/').next().unwrap_or_default();
            Status::unimplemented(format!("podvisor does not implement {name} yet"))
        });
        move |answer| match status {
            // What was to answer has not begun, and is dropped.
            Some(status) => Box::pin(async { Ok(status.into_http()) }),
            None => answer,
        }
    }
}
