//! Pulls that go on with what a failed one had received.

use std::sync::atomic::{AtomicBool, Ordering};

use super::failures::is_layer;
use super::fake_registry::End;
use super::*;

/// An image of one large layer, at a registry that breaks each download after 50,000 bytes until it is `whole`.
struct Breaking {
    fixture: Fixture,
    registry: FakeRegistry,
    whole: Arc<AtomicBool>,
}

impl Breaking {
    fn reference(&self) -> String {
        format!("{}/app", self.registry.address)
    }

    fn becomes_whole(&self) {
        self.whole.store(true, Ordering::Relaxed);
    }

    /// What downloads of the layer asked for; empty: all of it.
    fn ranges(&self) -> Vec<String> {
        let requests = self.registry.requests();
        let of_layer = requests
            .iter()
            .filter(|request| is_layer(&self.fixture, request));
        of_layer
            .map(|request| request.headers.get("range").cloned().unwrap_or_default())
            .collect()
    }
}

/// [`Breaking`], and a node whose pull failed there.
async fn failed_once() -> (Breaking, Node) {
    let fixture = Fixture::new(&[&noise(300_000)]);
    let whole = Arc::new(AtomicBool::new(false));
    let (honest, is_whole) = (fixture.clone(), Arc::clone(&whole));
    let registry = FakeRegistry::start(move |request| {
        let reply = honest.answer(request);
        if is_whole.load(Ordering::Relaxed) || !is_layer(&honest, request) {
            reply
        } else {
            reply.end(End::Cut(50_000))
        }
    })
    .await;
    let breaking = Breaking {
        fixture,
        registry,
        whole,
    };
    let node = Node::new();
    node.pull(&breaking.reference()).await.unwrap_err();
    (breaking, node)
}

fn from(byte: u32) -> String {
    format!("bytes={byte}-")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pull_goes_on_where_one_failed() {
    let (breaking, node) = failed_once().await;
    breaking.becomes_whole();
    // Also after podvisord was away.
    let node = node.reopen();
    let pulled = node.pull(&breaking.reference()).await.unwrap();
    assert_eq!(pulled.id, breaking.fixture.id());
    assert_eq!(
        breaking.ranges(),
        [String::new(), from(50_000), from(100_000), from(150_000)]
    );
    node.keeps_only("layers/").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_part_that_is_not_the_blobs_is_fetched_again() {
    let (breaking, node) = failed_once().await;
    breaking.becomes_whole();
    let [part] = &node.files()[..] else {
        panic!("{:?}", node.files())
    };
    let part = node.dir.path().join("images").join(part);
    let mut bytes = std::fs::read(&part).unwrap();
    assert_eq!(bytes.len(), 150_000);
    bytes[100_000] ^= 1;
    std::fs::write(&part, bytes).unwrap();
    let pulled = node.pull(&breaking.reference()).await.unwrap();
    assert_eq!(pulled.id, breaking.fixture.id());
    assert_eq!(breaking.ranges()[3..], [from(150_000), String::new()]);
}

#[tokio::test(flavor = "multi_thread")]
async fn parts_are_not_kept_for_ever() {
    let (_, node) = failed_once().await;
    node.store.expire();
    assert_eq!(node.files().len(), 1);
    let impatient = Limits {
        resumable_for: Duration::ZERO,
        ..limits()
    };
    let node = node.reopen_with(impatient);
    assert_eq!(node.files(), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_pull_leaves_no_part() {
    let fixture = Fixture::new(&[&noise(300_000)]);
    let honest = fixture.clone();
    let registry = FakeRegistry::start(move |request| {
        let reply = honest.answer(request);
        if is_layer(&honest, request) {
            reply.end(End::Stall(250_000))
        } else {
            reply
        }
    })
    .await;
    let node = Node::with_limits(Limits {
        stall_timeout: Duration::from_mins(10),
        ..limits()
    });
    let reference = format!("{}/app", registry.address);
    let store = node.store.clone();
    let (told, arrived) = tokio::sync::oneshot::channel();
    let told = Mutex::new(Some(told));
    let pull = tokio::spawn(async move {
        let progress = |progress: Progress| {
            if progress.done >= 200_000
                && let Some(told) = told.lock().unwrap().take()
            {
                told.send(()).unwrap();
            }
        };
        store.pull(&reference, None, &progress).await
    });
    arrived.await.unwrap();
    assert!(node.files().iter().any(|file| file.starts_with("partial/")));
    pull.abort();
    node.becomes_empty().await;
}
