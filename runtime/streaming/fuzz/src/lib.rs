//! What the targets share: somebody who reads all that a client sends, and drops it.

use std::sync::Arc;
use std::time::Duration;

use podvisor_streaming::wire::{Idle, Incoming, OutboxReader};

/// Runs `work` to its end.
pub fn run(work: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build();
    runtime.expect("no threads are needed").block_on(work);
}

/// A session's clock that never strikes.
pub fn idle() -> Arc<Idle> {
    Arc::new(Idle::new(Duration::from_secs(3600)))
}

/// Takes all frames to the client.
pub async fn take(mut frames: OutboxReader) {
    while frames.discard().await {}
}

/// Reads a stream to its end.
pub async fn read(mut incoming: Incoming) {
    while incoming.recv().await.is_some() {}
}
