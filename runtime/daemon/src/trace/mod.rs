//! Where the time of an RPC goes, as OpenTelemetry spans.
//!
//! - [`export`]: ended spans to a collector
//! - [`ids`]: the ids in an RPC's log lines become attributes of its span
//! - [`pull`]: the layers of a pull
//!
//! Spans are made below an RPC's own (`services::traced`) and nowhere else: where the current context has none, because
//! tracing is off or the call not sampled, these functions do nothing. Logs have `tracing`'s spans, which are others:
//! of those there is one per RPC, and it has no time.

pub mod export;
pub mod ids;
pub mod pull;

use std::fmt::Display;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use opentelemetry::global::{self, BoxedTracer};
use opentelemetry::trace::{
    FutureExt, Span, SpanBuilder, SpanKind, Status, TraceContextExt, Tracer,
};
use opentelemetry::{Context, KeyValue};
use podvisor_proto::monitor::{AgentCall, TimelineEntry};

/// Makes spans, once [`export::Exporter::start`] was called.
pub fn tracer() -> BoxedTracer {
    global::tracer("podvisord")
}

/// Whether spans made here would be kept.
pub fn is_active() -> bool {
    Context::map_current(|context| context.span().span_context().is_sampled())
}

/// `work` as a span of its own.
///
/// # Errors
/// Those of `work`, which are the span's as well.
pub fn span<T, E: Display>(
    name: &'static str,
    work: impl Future<Output = Result<T, E>>,
) -> impl Future<Output = Result<T, E>> {
    in_span(move |tracer| tracer.span_builder(name), work)
}

/// The call `rpc` of a pod's monitor as a span.
///
/// # Errors
/// Those of `work`, which are the span's as well.
pub fn monitor_call<T, E: Display>(
    rpc: &'static str,
    work: impl Future<Output = Result<T, E>>,
) -> impl Future<Output = Result<T, E>> {
    const SERVICE: &str = "podvisor.monitor.v1.Monitor";
    let builder = move |tracer: &BoxedTracer| {
        let attributes = rpc_attributes(SERVICE.to_owned(), rpc.to_owned());
        tracer
            .span_builder(format!("{SERVICE}/{rpc}"))
            .with_kind(SpanKind::Client)
            .with_attributes(attributes)
    };
    in_span(builder, work)
}

/// The calls of the agent that a call of a pod's monitor took, below the latter's span.
pub fn agent_calls(calls: &[AgentCall]) {
    const SERVICE: &str = "podvisor.agent.v1.Agent";
    if calls.is_empty() || !is_active() {
        return;
    }
    let tracer = tracer();
    for call in calls {
        let mut span = tracer
            .span_builder(format!("{SERVICE}/{}", call.rpc))
            .with_kind(SpanKind::Client)
            .with_start_time(at(call.start_ns))
            .with_attributes(rpc_attributes(SERVICE.to_owned(), call.rpc.clone()))
            .start(&tracer);
        span.end_with_timestamp(at(call.end_ns.max(call.start_ns)));
    }
}

/// Nanoseconds since the epoch.
fn at(ns: u64) -> SystemTime {
    UNIX_EPOCH + Duration::from_nanos(ns)
}

/// Which RPC (OpenTelemetry semantic conventions, "RPC").
pub fn rpc_attributes(service: String, method: String) -> [KeyValue; 3] {
    [
        KeyValue::new("rpc.system", "grpc"),
        KeyValue::new("rpc.service", service),
        KeyValue::new("rpc.method", method),
    ]
}

fn in_span<T, E: Display>(
    builder: impl FnOnce(&BoxedTracer) -> SpanBuilder,
    work: impl Future<Output = Result<T, E>>,
) -> impl Future<Output = Result<T, E>> {
    // Boxed: each of the futures around it would hold it once more.
    let work = Box::pin(work);
    async move {
        let context = if is_active() {
            let tracer = tracer();
            Context::current_with_span(tracer.build(builder(&tracer)))
        } else {
            Context::new()
        };
        let result = work.with_context(context.clone()).await;
        if let Err(error) = &result {
            context.span().set_status(Status::error(error.to_string()));
        }
        context.span().end();
        result
    }
}

/// The span `name` from the first phase of `timeline` to the last, and in it one for each of them. Phases are in
/// nanoseconds after `zero_ns`, which is nanoseconds since the epoch.
pub fn phases(name: &'static str, zero_ns: u64, timeline: &[TimelineEntry]) {
    let begin = timeline.iter().map(|entry| entry.start_ns).min();
    let end = timeline.iter().map(|entry| entry.end_ns).max();
    let (Some(begin), Some(end), true) = (begin, end, is_active()) else {
        return;
    };
    let at = |ns: u64| at(zero_ns.saturating_add(ns));
    let tracer = tracer();
    let start = |name: String, ns: u64| tracer.span_builder(name).with_start_time(at(ns));
    let whole = Context::current_with_span(tracer.build(start(name.to_owned(), begin)));
    for entry in timeline {
        let phase = start(entry.phase.clone(), entry.start_ns);
        let phase = whole.with_span(tracer.build_with_context(phase, &whole));
        phase
            .span()
            .end_with_timestamp(at(entry.end_ns.max(entry.start_ns)));
    }
    whole.span().end_with_timestamp(at(end));
}
