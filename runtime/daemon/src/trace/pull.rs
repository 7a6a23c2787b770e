//! The layers of a pull as spans, from what the image store tells of its progress.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::SystemTime;

use opentelemetry::KeyValue;
use opentelemetry::global::BoxedSpan;
use opentelemetry::trace::{Span, Status, Tracer};
use podvisor_image::Progress;

use super::{is_active, tracer};

/// One span per layer, from the first news of it to the last. A layer that is not complete when this is dropped has failed.
#[derive(Debug, Default)]
pub struct Layers {
    /// By digest.
    running: Mutex<HashMap<String, Running>>,
}

#[derive(Debug)]
struct Running {
    span: BoxedSpan,
    complete: Option<SystemTime>,
}

impl Layers {
    /// What [`podvisor_image::ImageStore::pull`] tells.
    pub fn tell(&self, progress: &Progress) {
        if !is_active() {
            return;
        }
        let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        let layer = running
            .entry(progress.layer.clone())
            .or_insert_with(|| Running::new(progress));
        if progress.done == progress.total {
            // Said of the download, and again when the layer is unpacked.
            layer.complete = Some(SystemTime::now());
        }
    }
}

impl Running {
    fn new(progress: &Progress) -> Self {
        let tracer = tracer();
        let builder = tracer.span_builder("layer").with_attributes([
            KeyValue::new("podvisor.layer.digest", progress.layer.clone()),
            KeyValue::new("podvisor.layer.size", progress.total as i64),
            // All of it at the first news: nothing to be done.
            KeyValue::new("podvisor.layer.present", progress.done == progress.total),
        ]);
        Self {
            span: tracer.build(builder),
            complete: None,
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(time) = self.complete {
            self.span.end_with_timestamp(time);
        } else {
            self.span.set_status(Status::error("not complete"));
            self.span.end();
        }
    }
}
