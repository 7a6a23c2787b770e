//! Layers in the making: each is downloaded and converted once at a time, whoever wants it.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use tokio::sync::watch;
use tokio::task::AbortHandle;
use tracing::{Instrument, debug, info, warn};

use crate::layer::{self, LayerError, blob};
use crate::pull::{Progress, PullError};
use crate::reference::Digest;
use crate::registry::Registry;
use crate::registry::manifest::Descriptor;
use crate::store::{Inner, LayerLease, Partial, StoreError, blocking};

/// The running jobs by diff id.
#[derive(Default)]
pub(crate) struct Jobs(Mutex<HashMap<Digest, Weak<Job>>>);

/// A layer in the making. It goes on while somebody holds it; the last one to let go stops it.
struct Job {
    task: AbortHandle,
    state: watch::Receiver<State>,
}

#[derive(Default)]
struct State {
    /// Bytes of the blob so far.
    received: u64,
    result: Option<Result<Arc<LayerLease>, PullError>>,
}

impl Drop for Job {
    fn drop(&mut self) {
        // Drops the sender of the blob's pieces, which ends the unpacking thread. After the job's end: nothing.
        self.task.abort();
    }
}

/// The layer `diff_id`: the one that is there, or made from `blob` here or in another pull.
pub(crate) async fn layer(
    store: &Arc<Inner>,
    registry: &Arc<Registry>,
    blob: &Descriptor,
    diff_id: &Digest,
    progress: &(dyn Fn(Progress) + Send + Sync),
) -> Result<Arc<LayerLease>, PullError> {
    let tell = |done: u64| {
        progress(Progress {
            layer: blob.digest.to_string(),
            done: done.min(blob.size),
            total: blob.size,
        });
    };
    loop {
        let (job, is_ours) = match find_or_start(store, registry, blob, diff_id) {
            Found::There(lease) => {
                tell(blob.size);
                return Ok(Arc::new(lease));
            }
            Found::Job(job, is_ours) => (job, is_ours),
        };
        match wait(&job, &tell).await {
            // Another pull's credentials or registry need not be as good as ours.
            Err(error) if !is_ours => {
                debug!(%diff_id, %error, "another pull failed to get the layer");
            }
            Err(error) => return Err(error),
            Ok(lease) => {
                // The last piece and the end may have come as one change.
                tell(blob.size);
                return Ok(lease);
            }
        }
    }
}

async fn wait(job: &Job, tell: &impl Fn(u64)) -> Result<Arc<LayerLease>, PullError> {
    let mut state = job.state.clone();
    loop {
        {
            let state = state.borrow_and_update();
            match &state.result {
                Some(result) => return result.clone(),
                None => tell(state.received),
            }
        }
        if state.changed().await.is_err() {
            // The task never ends without a result, but for a panic in it.
            return Err(PullError::Storage(
                "unpacking a layer failed, see the log".to_owned(),
            ));
        }
    }
}

enum Found {
    There(LayerLease),
    /// And whether it was started for this caller.
    Job(Arc<Job>, bool),
}

fn find_or_start(
    store: &Arc<Inner>,
    registry: &Arc<Registry>,
    blob: &Descriptor,
    diff_id: &Digest,
) -> Found {
    // A job that ended, or that nobody wants any more. Dropped only when the lock is free again.
    let _ended: Option<Arc<Job>>;
    let mut jobs = store.jobs.lock();
    jobs.retain(|_, job| job.strong_count() > 0);
    let running = jobs.get(diff_id).and_then(Weak::upgrade);
    if let Some(job) = running {
        if job.state.borrow().result.is_none() {
            return Found::Job(job, false);
        }
        _ended = Some(job);
    }
    // Under the lock of the jobs: whoever finished before had added its layer.
    if let Some(lease) = store.lease(diff_id) {
        return Found::There(lease);
    }
    let (sender, state) = watch::channel(State::default());
    let making = run(
        Arc::clone(store),
        Arc::clone(registry),
        blob.clone(),
        diff_id.clone(),
        sender,
    );
    let task = tokio::spawn(making.in_current_span());
    let job = Arc::new(Job {
        task: task.abort_handle(),
        state,
    });
    jobs.insert(diff_id.clone(), Arc::downgrade(&job));
    Found::Job(job, true)
}

impl Jobs {
    fn lock(&self) -> MutexGuard<'_, HashMap<Digest, Weak<Job>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn run(
    store: Arc<Inner>,
    registry: Arc<Registry>,
    blob: Descriptor,
    diff_id: Digest,
    state: watch::Sender<State>,
) {
    let received = |bytes| state.send_modify(|state| state.received = bytes);
    let result = make(&store, &registry, &blob, &diff_id, &received).await;
    state.send_modify(|state| state.result = Some(result.map(Arc::new)));
}

/// Downloads and converts a layer. Bytes that are not the layer are tried again: all of them, where a part was there before,
/// and then from the next host, as a mirror may be broken where the registry is not.
async fn make(
    store: &Arc<Inner>,
    registry: &Registry,
    blob: &Descriptor,
    diff_id: &Digest,
    received: &(dyn Fn(u64) + Send + Sync),
) -> Result<LayerLease, PullError> {
    let mut first_host = 0;
    loop {
        let (inner, wanted) = (Arc::clone(store), blob.clone());
        // Gone when this is cancelled.
        let partial = blocking(move || inner.partial(&wanted)).await;
        let kept = partial.as_ref().and_then(|partial| partial.file().ok());
        let there = kept
            .as_ref()
            .and(partial.as_ref())
            .map_or(0, Partial::length);
        if there > 0 {
            info!(layer = %blob.digest, there, of = blob.size, "going on with a layer");
        }
        let (sender, reader) = blob::channel(blob.digest.clone(), blob.size, kept, there);
        let (inner, digest, wanted) = (Arc::clone(store), blob.digest.clone(), diff_id.clone());
        let unpacking = blocking(move || unpack(&inner, reader, &digest, &wanted));
        let download = async {
            let result = registry
                .download(blob, first_host, there, &sender, received)
                .await;
            match &result {
                Ok(_) => sender.finish().await,
                // The thread reads no further.
                Err(_) => drop(sender),
            }
            result
        };
        let (host, unpacked) = tokio::join!(download, unpacking);
        let host = match host {
            Ok(host) => host,
            Err(error) => {
                partial.into_iter().for_each(Partial::keep);
                return Err(error.into());
            }
        };
        match unpacked {
            Ok(lease) => return Ok(lease),
            Err(error @ PullError::Corrupt(_)) if there > 0 => {
                warn!(%error, layer = %blob.digest, "beginning anew");
                blocking(move || partial.map(|partial| partial.clear())).await;
            }
            Err(error @ PullError::Corrupt(_)) if registry.has_host_after(host) => {
                warn!(%error, layer = %blob.digest, "asking the next host");
                first_host = host + 1;
            }
            Err(error) => return Err(error),
        }
    }
}

/// Blocks.
fn unpack(
    store: &Arc<Inner>,
    reader: blob::BlobReader,
    digest: &Digest,
    diff_id: &Digest,
) -> Result<LayerLease, PullError> {
    let layer = store
        .temp_file()
        .map_err(LayerError::Write)
        .and_then(|file| layer::convert(reader, diff_id, file, &store.limits))
        .map_err(|error| PullError::layer(digest, error))?;
    store
        .add_layer(diff_id, layer)
        .map_err(|error: StoreError| error.into())
}
