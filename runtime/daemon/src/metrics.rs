//! What podvisord counts, in Prometheus' text format (OpenMetrics 1.0) at `http://[metrics] address/metrics`.
//!
//! Nothing is counted per pod: labels have few values, whatever the node runs. Pods and containers are counted when
//! somebody asks.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use http::{Method, Request, Response, StatusCode, header};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use podvisor_node::handlers::Reason;
use podvisor_proto::{cri, monitor};
use prometheus_client::encoding::{EncodeLabelSet, text};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::{Registry, Unit};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tracing::{debug, warn};

use crate::daemon::Daemon;
use crate::pod::Pods;

/// Who scrapes has one connection, and may try again.
const MAX_CONNECTIONS: usize = 8;

/// A request's head must be there by then.
const HEAD: Duration = Duration::from_secs(10);

/// How long a connection may live: requests, answers and the pauses between them.
const CONNECTION: Duration = Duration::from_mins(5);

/// Upper bounds in seconds, for what takes from a millisecond to the boot timeout's half minute.
const BUCKETS: [f64; 14] = [
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0,
];

/// Every metric's name begins with it.
const PREFIX: &str = "podvisor";

/// The phases of RunPodSandbox that are counted, podvisord's and the monitor's: a monitor that was taken over makes up
/// no more of them.
const PHASES: [&str; 9] = [
    "host resources",
    "monitor spawn",
    "CNI",
    "wait for the guest",
    "monitor start",
    "vm start",
    "guest kernel",
    "agent",
    "configure",
];

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RpcLabels {
    method: String,
    code: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RoutedLabels {
    reason: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PhaseLabels {
    phase: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PodLabels {
    handler: String,
    state: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ContainerLabels {
    state: &'static str,
}

/// All that is counted.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    rpcs: Family<RpcLabels, Histogram, fn() -> Histogram>,
    routed: Family<RoutedLabels, Counter>,
    phases: Family<PhaseLabels, Histogram, fn() -> Histogram>,
    /// Spans that no collector has got.
    pub spans_dropped: Counter,
}

impl Metrics {
    /// All zero. `backend`: what runs VMs.
    pub fn new(backend: &str) -> Self {
        let histogram: fn() -> Histogram = || Histogram::new(BUCKETS);
        let mut registry = Registry::with_prefix(PREFIX);
        let build = Info::new([
            ("version".to_owned(), env!("CARGO_PKG_VERSION").to_owned()),
            ("vmm".to_owned(), backend.to_owned()),
        ]);
        registry.register("build", "podvisord's version and what runs VMs", build);
        let rpcs = Family::new_with_constructor(histogram);
        registry.register_with_unit(
            "rpc_duration",
            "How long RPCs took, by their gRPC code; streams until they began",
            Unit::Seconds,
            rpcs.clone(),
        );
        let routed = Family::<RoutedLabels, Counter>::default();
        registry.register(
            "pods_routed",
            "Pods that named no handler and went to runc, by what they ask for that a VM cannot give",
            routed.clone(),
        );
        let phases = Family::new_with_constructor(histogram);
        registry.register_with_unit(
            "pod_start_phase_duration",
            "How long the phases of RunPodSandbox took, those of the VM's boot among them",
            Unit::Seconds,
            phases.clone(),
        );
        let spans_dropped = Counter::default();
        registry.register(
            "spans_dropped",
            "Spans that the collector did not take: it is away, or slower than they come",
            spans_dropped.clone(),
        );
        Self {
            registry,
            rpcs,
            routed,
            phases,
            spans_dropped,
        }
    }

    /// An RPC has ended, or its stream has begun.
    pub fn rpc(&self, method: &str, code: tonic::Code, took: Duration) {
        let labels = RpcLabels {
            method: method.to_owned(),
            code: code_name(code),
        };
        self.rpcs.get_or_create(&labels).observe(took.as_secs_f64());
    }

    /// A pod that named no handler went to runc.
    pub fn routed(&self, because: Reason) {
        let labels = RoutedLabels {
            reason: because.name(),
        };
        self.routed.get_or_create(&labels).inc();
    }

    /// A pod has started.
    pub fn started<'a>(&self, timeline: impl Iterator<Item = &'a monitor::TimelineEntry>) {
        for entry in timeline {
            let Some(phase) = PHASES.into_iter().find(|phase| *phase == entry.phase) else {
                continue;
            };
            let took = Duration::from_nanos(entry.end_ns.saturating_sub(entry.start_ns));
            self.phases
                .get_or_create(&PhaseLabels { phase })
                .observe(took.as_secs_f64());
        }
    }

    /// The whole of it as text.
    fn text(&self, pods: &Pods) -> Result<String, std::fmt::Error> {
        let mut text = String::new();
        text::encode_registry(&mut text, &self.registry)?;
        text::encode_registry(&mut text, &counted(pods))?;
        text::encode_eof(&mut text)?;
        Ok(text)
    }
}

/// How many pods and containers there are now.
fn counted(pods: &Pods) -> Registry {
    let by_state = Family::<PodLabels, Gauge>::default();
    for pod in pods.all() {
        let state = match pod.cri_state() {
            cri::PodSandboxState::SandboxReady => "ready",
            cri::PodSandboxState::SandboxNotready => "notready",
        };
        let handler = pod.record().handler;
        by_state.get_or_create(&PodLabels { handler, state }).inc();
    }
    let containers = Family::<ContainerLabels, Gauge>::default();
    for container in pods.all_containers() {
        let state = match container.state().state() {
            monitor::ContainerState::Created => "created",
            monitor::ContainerState::Running => "running",
            monitor::ContainerState::Exited => "exited",
        };
        containers.get_or_create(&ContainerLabels { state }).inc();
    }
    let mut registry = Registry::with_prefix(PREFIX);
    registry.register("pods", "Pods, by handler and state", by_state);
    registry.register("containers", "Containers, by state", containers);
    registry
}

/// As gRPC's documentation writes it.
fn code_name(code: tonic::Code) -> &'static str {
    use tonic::Code;
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "CANCELLED",
        Code::Unknown => "UNKNOWN",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::NotFound => "NOT_FOUND",
        Code::AlreadyExists => "ALREADY_EXISTS",
        Code::PermissionDenied => "PERMISSION_DENIED",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::FailedPrecondition => "FAILED_PRECONDITION",
        Code::Aborted => "ABORTED",
        Code::OutOfRange => "OUT_OF_RANGE",
        Code::Unimplemented => "UNIMPLEMENTED",
        Code::Internal => "INTERNAL",
        Code::Unavailable => "UNAVAILABLE",
        Code::DataLoss => "DATA_LOSS",
        Code::Unauthenticated => "UNAUTHENTICATED",
    }
}

/// Answers scrapes for as long as podvisord runs.
pub async fn serve(listener: TcpListener, daemon: Arc<Daemon>) {
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    // Never closed: a place is always given in the end.
    while let Ok(place) = Arc::clone(&places).acquire_owned().await {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                // Out of descriptors: the connection waits, and so does this.
                warn!(%error, "metrics: cannot accept");
                tokio::time::sleep(Duration::from_secs(1)).await;
                continue;
            }
        };
        let daemon = Arc::clone(&daemon);
        tokio::spawn(async move {
            let _place = place;
            let service = service_fn(|request| {
                let answer = answer(&request, &daemon);
                async { Ok::<_, Infallible>(answer) }
            });
            let connection = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEAD)
                .serve_connection(TokioIo::new(stream), service);
            match tokio::time::timeout(CONNECTION, connection).await {
                Ok(Ok(())) | Err(_) => {}
                Ok(Err(error)) => debug!(%error, "metrics: a connection"),
            }
        });
    }
}

fn answer(request: &Request<Incoming>, daemon: &Daemon) -> Response<String> {
    let simple = |status: StatusCode, text: &str| {
        let mut response = Response::new(text.to_owned());
        *response.status_mut() = status;
        response
    };
    if request.uri().path() != "/metrics" {
        return simple(StatusCode::NOT_FOUND, "metrics are at /metrics\n");
    }
    if request.method() != Method::GET {
        return simple(StatusCode::METHOD_NOT_ALLOWED, "GET only\n");
    }
    match daemon.metrics.text(&daemon.pods) {
        Ok(text) => {
            let mut response = simple(StatusCode::OK, &text);
            let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
            response
                .headers_mut()
                .insert(header::CONTENT_TYPE, header::HeaderValue::from_static(kind));
            response
        }
        Err(error) => simple(StatusCode::INTERNAL_SERVER_ERROR, &error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_happened_is_in_the_text() {
        let metrics = Metrics::new("kvm");
        metrics.rpc("ListImages", tonic::Code::Ok, Duration::from_millis(3));
        metrics.rpc("Exec", tonic::Code::Unimplemented, Duration::ZERO);
        metrics.routed(Reason::HostNetwork);
        metrics.routed(Reason::HostNetwork);
        let phase = monitor::TimelineEntry {
            phase: "CNI".into(),
            start_ns: 1_000_000_000,
            end_ns: 3_000_000_000,
        };
        let made_up = monitor::TimelineEntry {
            phase: "made up".into(),
            ..phase.clone()
        };
        metrics.started([phase, made_up].iter());
        let text = metrics.text(&Pods::default()).unwrap();
        for line in [
            concat!(
                "podvisor_build_info{version=\"",
                env!("CARGO_PKG_VERSION"),
                "\",vmm=\"kvm\"} 1"
            ),
            "podvisor_rpc_duration_seconds_count{method=\"ListImages\",code=\"OK\"} 1",
            "podvisor_rpc_duration_seconds_bucket{le=\"0.005\",method=\"ListImages\",code=\"OK\"} 1",
            "podvisor_rpc_duration_seconds_count{method=\"Exec\",code=\"UNIMPLEMENTED\"} 1",
            "podvisor_pods_routed_total{reason=\"host-network\"} 2",
            "podvisor_pod_start_phase_duration_seconds_sum{phase=\"CNI\"} 2.0",
            "# EOF",
        ] {
            assert!(text.lines().any(|had| had == line), "{line}\n{text}");
        }
        assert!(!text.contains("made up"), "{text}");
    }
}
