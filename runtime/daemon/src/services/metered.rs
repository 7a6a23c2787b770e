//! Every RPC is counted and timed ([`crate::metrics`]).

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Instant;

use http::{Request, Response};
use tonic::body::Body;
use tonic::{Code, Status};
use tower::{Layer, Service};

use crate::daemon::Daemon;

/// Tells the daemon's metrics of each call.
#[derive(Debug, Clone)]
pub struct MeteredLayer(pub Arc<Daemon>);

/// See [`MeteredLayer`].
#[derive(Debug, Clone)]
pub struct Metered<S> {
    inner: S,
    daemon: Arc<Daemon>,
}

impl<S> Layer<S> for MeteredLayer {
    type Service = Metered<S>;

    fn layer(&self, inner: S) -> Metered<S> {
        Metered {
            inner,
            daemon: Arc::clone(&self.0),
        }
    }
}

impl<S, B> Service<Request<B>> for Metered<S>
where
    S: Service<Request<B>, Response = Response<Body>>,
    S::Future: Send + 'static,
    S::Error: 'static,
{
    type Response = Response<Body>;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let begin = Instant::now();
        let method = method(request.uri().path()).to_owned();
        let daemon = Arc::clone(&self.daemon);
        let answer = self.inner.call(request);
        Box::pin(async move {
            let answer = answer.await?;
            // An error is all of an answer, and in its headers; a success ends with its trailers.
            let code = Status::from_header_map(answer.headers()).map_or(Code::Ok, |s| s.code());
            // A name that anybody can make up is none to keep.
            let method = if code == Code::Unimplemented {
                "other"
            } else {
                &method
            };
            daemon.metrics.rpc(method, code, begin.elapsed());
            Ok(answer)
        })
    }
}

/// "/runtime.v1.RuntimeService/Status": its last part.
fn method(path: &str) -> &str {
    path.rsplit_once('/').map_or(path, |(_, method)| method)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn methods_are_the_last_part_of_the_path() {
        assert_eq!(method("/runtime.v1.RuntimeService/Status"), "Status");
        assert_eq!(method("nonsense"), "nonsense");
    }
}
