//! RPCs that a later release brings: they answer UNIMPLEMENTED and name themselves. This list is the
//! one place that says which.

use std::task::{Context, Poll};

use http::{Request, Response};
use tonic::Status;
use tonic::body::Body;
use tower::{Layer, Service};

/// Paths of the RPCs that are not implemented yet.
pub const LATER: [&str; 5] = [
    "/runtime.v1.RuntimeService/UpdateRuntimeConfig",
    "/runtime.v1.RuntimeService/CheckpointContainer",
    "/runtime.v1.RuntimeService/CheckpointPod",
    "/runtime.v1.RuntimeService/RestorePod",
    "/runtime.v1.RuntimeService/UpdatePodSandboxResources",
];

/// Answers the RPCs of [`LATER`] before they reach the services.
#[derive(Debug, Clone, Copy, Default)]
pub struct LaterLayer;

/// See [`LaterLayer`].
#[derive(Debug, Clone)]
pub struct Later<S> {
    inner: S,
}

impl<S> Layer<S> for LaterLayer {
    type Service = Later<S>;

    fn layer(&self, inner: S) -> Later<S> {
        Later { inner }
    }
}

impl<S, B> Service<Request<B>> for Later<S>
where
    S: Service<Request<B>, Response = Response<Body>>,
{
    type Response = Response<Body>;
    type Error = S::Error;
    type Future = futures_util::future::Either<
        std::future::Ready<Result<Self::Response, Self::Error>>,
        S::Future,
    >;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let path = request.uri().path();
        if !LATER.contains(&path) {
            return futures_util::future::Either::Right(self.inner.call(request));
        }
        let name = path.rsplit('/').next().unwrap_or_default();
        let status = Status::unimplemented(format!("podvisor does not implement {name} yet"));
        futures_util::future::Either::Left(std::future::ready(Ok(status.into_http())))
    }
}
