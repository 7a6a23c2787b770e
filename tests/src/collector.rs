//! An OpenTelemetry collector that keeps what it gets (OTLP/gRPC).

use std::fmt::Write;
use std::net::TcpListener;
use std::sync::{Arc, Mutex, PoisonError};

use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{
    TraceService, TraceServiceServer,
};
use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTraceServiceRequest, ExportTraceServiceResponse,
};
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::trace::v1::Span;
use tokio::runtime::Runtime;
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;
use tonic::{Request, Response, Status};

/// A running one; it ends when dropped.
#[derive(Debug)]
pub struct Collector {
    spans: Spans,
    /// Its URL.
    pub endpoint: String,
    _runtime: Runtime,
}

type Spans = Arc<Mutex<Vec<Span>>>;

impl Collector {
    /// Starts one, on loopback.
    pub fn start() -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .expect("threads can be started");
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("it is bound");
        listener.set_nonblocking(true).expect("a socket");
        let spans = Spans::default();
        let service = TraceServiceServer::new(Keep(spans.clone()));
        runtime.spawn(async move {
            let listener = tokio::net::TcpListener::from_std(listener).expect("non-blocking");
            let server = Server::builder().add_service(service);
            server
                .serve_with_incoming(TcpIncoming::from(listener))
                .await
        });
        Self {
            spans,
            endpoint: format!("http://{address}"),
            _runtime: runtime,
        }
    }

    /// The spans of a trace that came so far.
    pub fn trace(&self, trace_id: &str) -> Vec<Span> {
        let spans = self.spans.lock().unwrap_or_else(PoisonError::into_inner);
        let of_trace = spans.iter().filter(|span| hex(&span.trace_id) == trace_id);
        of_trace.cloned().collect()
    }
}

struct Keep(Spans);

#[tonic::async_trait]
impl TraceService for Keep {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        let scopes = request.into_inner().resource_spans.into_iter();
        let scopes = scopes.flat_map(|resource| resource.scope_spans);
        let spans = scopes.flat_map(|scope| scope.spans);
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        kept.extend(spans);
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

/// As trace contexts write ids.
pub fn hex(id: &[u8]) -> String {
    id.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// A span's attribute as text.
pub fn attribute(span: &Span, key: &str) -> Option<String> {
    let found = span.attributes.iter().find(|pair| pair.key == key)?;
    match found.value.as_ref()?.value.as_ref()? {
        Value::StringValue(text) => Some(text.clone()),
        Value::IntValue(number) => Some(number.to_string()),
        Value::BoolValue(yes) => Some(yes.to_string()),
        _ => None,
    }
}
