//! What is done around every RPC, whichever it is: a tower layer for whoever wraps answers.

use std::pin::Pin;
use std::task::{Context, Poll};

use http::{Request, Response};
use tonic::body::Body;
use tower::{Layer, Service};

/// An RPC's answer, to come.
pub type Answer<E> = Pin<Box<dyn Future<Output = Result<Response<Body>, E>> + Send>>;

/// Something done around every RPC.
pub trait Wrap: Clone {
    /// Looks at a request. What it returns is given the answer, and gives the caller's.
    fn wrap<B, E: 'static>(
        &self,
        request: &Request<B>,
    ) -> impl FnOnce(Answer<E>) -> Answer<E> + use<Self, B, E>;
}

/// The layer of a [`Wrap`].
#[derive(Debug, Clone, Copy)]
pub struct Around<W>(pub W);

/// See [`Around`].
#[derive(Debug, Clone)]
pub struct Wrapped<W, S> {
    wrap: W,
    inner: S,
}

impl<W: Clone, S> Layer<S> for Around<W> {
    type Service = Wrapped<W, S>;

    fn layer(&self, inner: S) -> Wrapped<W, S> {
        Wrapped {
            wrap: self.0.clone(),
            inner,
        }
    }
}

impl<W, S, B> Service<Request<B>> for Wrapped<W, S>
where
    W: Wrap,
    S: Service<Request<B>, Response = Response<Body>>,
    S::Future: Send + 'static,
    S::Error: 'static,
{
    type Response = Response<Body>;
    type Error = S::Error;
    type Future = Answer<S::Error>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let wrapped = self.wrap.wrap(&request);
        wrapped(Box::pin(self.inner.call(request)))
    }
}
