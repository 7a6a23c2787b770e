//! The ids that an RPC's log lines carry (`#[instrument]` in [`crate::services`]) become attributes of its span.

use std::fmt;

use opentelemetry::trace::{SpanRef, TraceContextExt};
use opentelemetry::{Context, KeyValue};
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Metadata, Subscriber};
use tracing_subscriber::layer;

/// Copies the ids.
#[derive(Debug, Clone, Copy)]
pub struct Ids;

impl Ids {
    /// Whether [`Ids`] looks at a span: at those of RPCs only.
    pub fn wants(metadata: &Metadata<'_>) -> bool {
        metadata.is_span() && metadata.target().starts_with("podvisor_daemon::services")
    }
}

impl<S: Subscriber> layer::Layer<S> for Ids {
    fn on_new_span(&self, attributes: &Attributes<'_>, _: &Id, _: layer::Context<'_, S>) {
        Context::map_current(|context| attributes.record(&mut Copy(context.span())));
    }

    fn on_record(&self, _: &Id, values: &Record<'_>, _: layer::Context<'_, S>) {
        Context::map_current(|context| values.record(&mut Copy(context.span())));
    }
}

/// Copies fields to a span.
struct Copy<'a>(SpanRef<'a>);

impl Visit for Copy<'_> {
    fn record_str(&mut self, field: &Field, value: &str) {
        let set = |name, value: &str| self.0.set_attribute(KeyValue::new(name, value.to_owned()));
        match field.name() {
            // OpenTelemetry semantic conventions, "Container", "K8s"; they have none for a sandbox's id.
            "container" => set("container.id", value),
            "image" => set("container.image.name", value),
            "sandbox" => set("podvisor.sandbox.id", value),
            "pod" => {
                if let Some((namespace, name)) = value.split_once('/') {
                    set("k8s.namespace.name", namespace);
                    set("k8s.pod.name", name);
                }
            }
            _ => {}
        }
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.record_str(field, &format!("{value:?}"));
    }
}
