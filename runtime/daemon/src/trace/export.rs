//! Ended spans go to a collector in batches, by a task of their own.
//!
//! Who ends a span never waits: it goes into a queue, or, when that is full, nowhere and is counted. A collector that is
//! away costs its spans, one warning, and nothing else.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use opentelemetry::{KeyValue, global};
use opentelemetry_otlp::{ExporterBuildError, SpanExporter, WithExportConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::trace::{
    Sampler, SdkTracerProvider, Span, SpanData, SpanExporter as Export, SpanProcessor,
};
use podvisor_node::config;
use prometheus_client::metrics::counter::Counter;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tracing::{info, warn};

/// Spans that wait, about 1 KiB each.
const QUEUE: usize = 2048;

/// Spans sent as one message.
const BATCH: usize = 256;

/// How long a batch is waited for once it has a span.
const GATHER: Duration = Duration::from_secs(1);

/// How long a collector may take for a batch, being connected to included.
const SEND: Duration = Duration::from_secs(5);

/// What a running pod's start has of attributes is fewer; more would be a mistake.
const MAX_ATTRIBUTES: u32 = 32;

/// The task that exports, and the end of all spans.
#[derive(Debug)]
pub struct Exporter {
    provider: SdkTracerProvider,
    task: JoinHandle<()>,
}

impl Exporter {
    /// Begins to trace, if `config` says so. `dropped` counts what no collector gets.
    ///
    /// # Errors
    /// The endpoint cannot be used.
    pub fn start(
        config: &config::Tracing,
        dropped: Counter,
    ) -> Result<Option<Self>, ExporterBuildError> {
        if config.otlp_endpoint.is_empty() {
            return Ok(None);
        }
        let mut collector = SpanExporter::builder()
            .with_tonic()
            .with_endpoint(&config.otlp_endpoint)
            .with_timeout(SEND)
            .build()?;
        let resource = resource();
        collector.set_resource(&resource);
        let (exporter, provider) = Self::new(collector, config.sampling_ratio, resource, dropped);
        global::set_tracer_provider(provider);
        Ok(Some(exporter))
    }

    fn new(
        collector: impl Export + 'static,
        sampling_ratio: f64,
        resource: Resource,
        dropped: Counter,
    ) -> (Self, SdkTracerProvider) {
        let (sender, queue) = mpsc::channel(QUEUE);
        let processor = Queue {
            sender: Mutex::new(Some(sender)),
            dropped: dropped.clone(),
        };
        let ratio = Sampler::TraceIdRatioBased(sampling_ratio);
        let provider = SdkTracerProvider::builder()
            .with_span_processor(processor)
            .with_sampler(Sampler::ParentBased(Box::new(ratio)))
            .with_max_attributes_per_span(MAX_ATTRIBUTES)
            .with_resource(resource)
            .build();
        let exporter = Self {
            provider: provider.clone(),
            task: tokio::spawn(export(queue, collector, dropped)),
        };
        (exporter, provider)
    }

    /// Sends what waits, and gives up what is not sent within `limit`.
    pub async fn shut_down(self, limit: Duration) {
        // Closes the queue, whose end is the task's; nothing else of it can fail or wait.
        let _ = self.provider.shutdown();
        if timeout(limit, self.task).await.is_err() {
            warn!("tracing: the collector did not take the last spans in time");
        }
    }
}

/// Who sends: this podvisord on this host, and what `OTEL_RESOURCE_ATTRIBUTES` adds.
fn resource() -> Resource {
    let host = nix::unistd::gethostname().unwrap_or_default();
    Resource::builder()
        .with_service_name("podvisord")
        .with_attributes([
            KeyValue::new("service.version", env!("CARGO_PKG_VERSION")),
            KeyValue::new("host.name", host.to_string_lossy().into_owned()),
        ])
        .build()
}

/// Where ended spans wait.
#[derive(Debug)]
struct Queue {
    /// None: shut down.
    sender: Mutex<Option<mpsc::Sender<SpanData>>>,
    dropped: Counter,
}

impl Queue {
    fn sender(&self) -> MutexGuard<'_, Option<mpsc::Sender<SpanData>>> {
        self.sender.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl SpanProcessor for Queue {
    fn on_start(&self, _span: &mut Span, _context: &opentelemetry::Context) {}

    fn on_end(&self, span: SpanData) {
        let sender = self.sender();
        let place = sender.as_ref().and_then(|sender| sender.try_reserve().ok());
        if let Some(place) = place {
            place.send(span);
        } else {
            self.dropped.inc();
        }
    }

    fn force_flush(&self) -> OTelSdkResult {
        Ok(())
    }

    fn shutdown_with_timeout(&self, _limit: Duration) -> OTelSdkResult {
        self.sender().take();
        Ok(())
    }
}

/// Until the queue is closed and empty.
async fn export(mut queue: mpsc::Receiver<SpanData>, collector: impl Export, dropped: Counter) {
    let mut is_away = false;
    loop {
        let batch = next_batch(&mut queue).await;
        if batch.is_empty() {
            return;
        }
        let count = batch.len() as u64;
        let problem = match timeout(SEND, collector.export(batch)).await {
            Ok(Ok(())) => None,
            Ok(Err(error)) => Some(error.to_string()),
            Err(_) => Some(format!("no answer within {SEND:?}")),
        };
        match &problem {
            None if is_away => info!("tracing: the collector takes spans again"),
            Some(problem) if !is_away => {
                warn!(
                    problem,
                    "tracing: the collector takes no spans, they are dropped"
                );
            }
            _ => {}
        }
        is_away = problem.is_some();
        if is_away {
            dropped.inc_by(count);
        }
    }
}

/// Empty: the end.
async fn next_batch(queue: &mut mpsc::Receiver<SpanData>) -> Vec<SpanData> {
    let mut batch = Vec::new();
    if queue.recv_many(&mut batch, BATCH).await == 0 {
        return batch;
    }
    let fill = async {
        while batch.len() < BATCH {
            let more = BATCH - batch.len();
            if queue.recv_many(&mut batch, more).await == 0 {
                break;
            }
        }
    };
    // What has come by then is the batch.
    let _ = timeout(GATHER, fill).await;
    batch
}

#[cfg(test)]
mod tests {
    use opentelemetry::trace::{Tracer, TracerProvider};
    use opentelemetry_sdk::error::OTelSdkError;

    use super::*;

    /// Tells of each batch's size; answers when it is told what.
    #[derive(Debug)]
    struct Collector {
        came: mpsc::UnboundedSender<usize>,
        answers: tokio::sync::Mutex<mpsc::UnboundedReceiver<OTelSdkResult>>,
    }

    impl Export for Collector {
        async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
            let _ = self.came.send(batch.len());
            let answer = self.answers.lock().await.recv().await;
            answer.unwrap_or(Err(OTelSdkError::AlreadyShutdown))
        }
    }

    struct Rig {
        exporter: Exporter,
        provider: SdkTracerProvider,
        came: mpsc::UnboundedReceiver<usize>,
        answers: mpsc::UnboundedSender<OTelSdkResult>,
        dropped: Counter,
    }

    fn rig() -> Rig {
        let (came_in, came) = mpsc::unbounded_channel();
        let (answers, answers_out) = mpsc::unbounded_channel();
        let collector = Collector {
            came: came_in,
            answers: tokio::sync::Mutex::new(answers_out),
        };
        let dropped = Counter::default();
        let empty = Resource::builder_empty().build();
        let (exporter, provider) = Exporter::new(collector, 1.0, empty, dropped.clone());
        Rig {
            exporter,
            provider,
            came,
            answers,
            dropped,
        }
    }

    fn make_spans(provider: &SdkTracerProvider, count: usize) {
        let tracer = provider.tracer("test");
        for _ in 0..count {
            drop(tracer.start("x"));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn spans_go_in_batches() {
        let mut rig = rig();
        make_spans(&rig.provider, BATCH + 1);
        rig.answers.send(Ok(())).unwrap();
        assert_eq!(rig.came.recv().await, Some(BATCH));
        rig.answers.send(Ok(())).unwrap();
        assert_eq!(rig.came.recv().await, Some(1));
        rig.exporter.shut_down(SEND).await;
        assert_eq!(rig.dropped.get(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_collector_holds_up_nobody() {
        let mut rig = rig();
        make_spans(&rig.provider, BATCH);
        assert_eq!(rig.came.recv().await, Some(BATCH));
        make_spans(&rig.provider, QUEUE + 7);
        assert_eq!(rig.dropped.get(), 7);
        // The first batch is given up, the second comes.
        assert_eq!(rig.came.recv().await, Some(BATCH));
        assert_eq!(rig.dropped.get(), 7 + BATCH as u64);
    }

    #[tokio::test(start_paused = true)]
    async fn the_end_sends_what_waits_but_not_for_ever() {
        let mut rig = rig();
        make_spans(&rig.provider, 3);
        rig.answers.send(Ok(())).unwrap();
        rig.exporter.shut_down(SEND).await;
        assert_eq!(rig.came.recv().await, Some(3));
        assert_eq!(rig.dropped.get(), 0);

        let silent = self::rig();
        make_spans(&silent.provider, 3);
        silent.exporter.shut_down(SEND / 2).await;
    }

    #[tokio::test(start_paused = true)]
    async fn what_a_collector_refuses_is_counted() {
        let mut rig = rig();
        for answer in [Err(OTelSdkError::AlreadyShutdown), Ok(())] {
            make_spans(&rig.provider, 2);
            rig.answers.send(answer).unwrap();
            assert_eq!(rig.came.recv().await, Some(2));
        }
        rig.exporter.shut_down(SEND).await;
        assert_eq!(rig.dropped.get(), 2);
    }
}
