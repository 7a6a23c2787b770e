//! Every RPC is a span ([`crate::trace`]), below the caller's if it says which (W3C Trace Context in the metadata).

use http::{HeaderMap, Request};
use opentelemetry::propagation::{Extractor, TextMapPropagator};
use opentelemetry::trace::{FutureExt, SpanKind, Status as SpanStatus, TraceContextExt, Tracer};
use opentelemetry::{Context, KeyValue};
use opentelemetry_sdk::propagation::TraceContextPropagator;
use tonic::{Code, Status};

use super::around::{Answer, Wrap};
use crate::trace;

/// Makes a span of each call; none if tracing is off.
#[derive(Debug, Clone, Copy)]
pub struct Traced {
    /// Whether it is on.
    pub enabled: bool,
}

impl Wrap for Traced {
    fn wrap<B, E: 'static>(
        &self,
        request: &Request<B>,
    ) -> impl FnOnce(Answer<E>) -> Answer<E> + use<B, E> {
        let context = self.enabled.then(|| begin(request));
        move |answer| {
            let Some(context) = context else {
                return answer;
            };
            let called = async move {
                let answer = answer.await?;
                let status = Status::from_header_map(answer.headers());
                Context::map_current(|context| end(context, status.as_ref()));
                Ok(answer)
            };
            Box::pin(called.with_context(context))
        }
    }
}

fn begin<B>(request: &Request<B>) -> Context {
    let propagator = TraceContextPropagator::new();
    let parent = propagator.extract_with_context(&Context::new(), &Headers(request.headers()));
    let name = request.uri().path().trim_start_matches('/');
    let (service, method) = name.split_once('/').unwrap_or(("", name));
    let tracer = trace::tracer();
    let builder = tracer
        .span_builder(name.to_owned())
        .with_kind(SpanKind::Server)
        .with_attributes(trace::rpc_attributes(service.to_owned(), method.to_owned()));
    let span = tracer.build_with_context(builder, &parent);
    parent.with_span(span)
}

/// `status`: an error's. Which of them are the server's fault: semantic conventions, "gRPC".
fn end(context: &Context, status: Option<&Status>) {
    let span = context.span();
    let code = status.map_or(Code::Ok, Status::code);
    span.set_attribute(KeyValue::new("rpc.grpc.status_code", code as i64));
    if let Some(status) = status
        && matches!(
            code,
            Code::Unknown
                | Code::DeadlineExceeded
                | Code::Unimplemented
                | Code::Internal
                | Code::Unavailable
                | Code::DataLoss
        )
    {
        span.set_status(SpanStatus::error(status.message().to_owned()));
    }
    span.end();
}

struct Headers<'a>(&'a HeaderMap);

impl Extractor for Headers<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key)?.to_str().ok()
    }

    fn keys(&self) -> Vec<&str> {
        self.0.keys().map(http::HeaderName::as_str).collect()
    }
}
