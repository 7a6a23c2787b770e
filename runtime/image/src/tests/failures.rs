//! Registries that fail, lie or hang: the right error with their own words, and nothing left behind.

use std::io::ErrorKind;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::fake_registry::End;
use super::*;

/// Pulls from a registry that does not let the pull succeed.
async fn fails(
    handler: impl Fn(&Request) -> Reply + Send + Sync + 'static,
) -> (PullError, FakeRegistry) {
    let registry = FakeRegistry::start(handler).await;
    let node = Node::new();
    let error = node
        .pull(&format!("{}/app:v1", registry.address))
        .await
        .unwrap_err();
    node.becomes_empty().await;
    assert!(node.store.list().is_empty());
    (error, registry)
}

/// Pulls of an image from a registry that changes some answers.
async fn fails_with(
    fixture: Fixture,
    change: impl Fn(&Request) -> Option<Reply> + Send + Sync + 'static,
) -> (PullError, FakeRegistry) {
    fails(move |request| change(request).unwrap_or_else(|| fixture.answer(request))).await
}

pub(super) fn is_layer(fixture: &Fixture, request: &Request) -> bool {
    fixture
        .layers
        .iter()
        .any(|layer| request.path.contains(layer.as_str()))
}

#[tokio::test(flavor = "multi_thread")]
async fn names_that_are_none() {
    let node = Node::new();
    for name in ["", "UPPER/case:", "a b", "app@sha256:12"] {
        assert!(
            matches!(node.pull(name).await, Err(PullError::InvalidReference(_))),
            "{name}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_that_does_not_exist() {
    let (error, registry) =
        fails(|_| Reply::error(404, "MANIFEST_UNKNOWN", "manifest unknown")).await;
    assert!(matches!(error, PullError::NotFound(_)));
    assert!(
        error
            .to_string()
            .contains("MANIFEST_UNKNOWN: manifest unknown"),
        "{error}"
    );
    assert_eq!(registry.requests().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_that_is_not_there() {
    let registry = FakeRegistry::start(|_| Reply::ok("", b"")).await;
    let address = registry.address.clone();
    drop(registry);
    tokio::task::yield_now().await;
    let error = Node::new()
        .pull(&format!("{address}/app"))
        .await
        .unwrap_err();
    assert!(
        matches!(&error, PullError::Unavailable(words) if words.contains("refused")),
        "{error}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_that_fails_itself() {
    let (error, registry) = fails(|_| Reply::error(503, "UNAVAILABLE", "try later")).await;
    assert!(
        matches!(&error, PullError::Unavailable(words) if words.contains("503") && words.contains("try later")),
        "{error}"
    );
    assert_eq!(registry.requests().len(), limits().attempts as usize);
}

#[tokio::test(flavor = "multi_thread")]
async fn failures_that_pass() {
    for (status, header) in [(500, ("X", "y")), (429, ("Retry-After", "0"))] {
        let fixture = Fixture::new(&[b"x"]);
        let honest = fixture.clone();
        let count = AtomicUsize::new(0);
        let registry = FakeRegistry::start(move |request| {
            // Every request fails twice.
            if count.fetch_add(1, Ordering::Relaxed) % 3 < 2 {
                return Reply::error(status, "", "").header(header.0, header.1);
            }
            honest.answer(request)
        })
        .await;
        let image = Node::new()
            .pull(&format!("{}/app", registry.address))
            .await
            .unwrap();
        assert_eq!(image.id, fixture.id());
        assert_eq!(registry.requests().len(), 9);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_that_hangs() {
    let (error, registry) = fails(|_| Reply::ok("", b"").end(End::Silent)).await;
    assert!(
        matches!(&error, PullError::Unavailable(words) if words.contains("no answer for 0.5 s")),
        "{error}"
    );
    assert_eq!(registry.requests().len(), 1);

    let fixture = Fixture::new(&[b"x"]);
    let manifest = fixture.manifest.clone();
    let (error, _) = fails(move |_| Reply::ok("", &manifest).end(End::Stall(20))).await;
    assert!(
        matches!(&error, PullError::Unavailable(words) if words.contains("no data for 0.5 s")),
        "{error}"
    );

    let of_layer = fixture.clone();
    let (error, _) = fails_with(fixture.clone(), move |request| {
        is_layer(&of_layer, request).then(|| of_layer.answer(request).end(End::Stall(20)))
    })
    .await;
    assert!(
        matches!(&error, PullError::Unavailable(words) if words.contains("no data for 0.5 s")),
        "{error}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_bytes() {
    let fixture = Fixture::new(&[b"x"]);
    for wrong in [&b"something else"[..], b""] {
        for is_wanted in [
            // The configuration, a layer, a manifest by digest.
            |fixture: &Fixture, request: &Request| request.path.contains(&fixture.id()),
            is_layer,
        ] {
            let of_this = fixture.clone();
            let (error, _) = fails_with(fixture.clone(), move |request| {
                is_wanted(&of_this, request).then(|| Reply::ok("", wrong))
            })
            .await;
            assert!(matches!(error, PullError::Corrupt(_)), "{error:?}");
        }
    }
    // As long as the layer is.
    let of_layer = fixture.clone();
    let (error, _) = fails_with(fixture.clone(), move |request| {
        is_layer(&of_layer, request).then(|| {
            let mut reply = of_layer.answer(request);
            *reply.body.last_mut().unwrap() ^= 1;
            reply
        })
    })
    .await;
    assert!(matches!(error, PullError::Corrupt(_)), "{error:?}");
    // Longer than it.
    let of_layer = fixture.clone();
    let (error, _) = fails_with(fixture, move |request| {
        is_layer(&of_layer, request).then(|| {
            let mut reply = of_layer.answer(request);
            reply.body.extend_from_slice(&[0; 1000]);
            reply
        })
    })
    .await;
    assert!(matches!(error, PullError::Corrupt(_)), "{error:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_bytes_of_a_mirror() {
    let fixture = Fixture::new(&[b"x", b"y"]);
    // As many as there should be, and fewer: then the server gives the rest of a layer that begins wrong.
    for short in [false, true] {
        let server = fixture.registry().await;
        let of_mirror = fixture.clone();
        let mirror = FakeRegistry::start(move |request| {
            let mut reply = of_mirror.answer(request);
            if is_layer(&of_mirror, request) {
                reply
                    .body
                    .truncate(if short { 10 } else { reply.body.len() });
                reply.body[9] ^= 1;
            }
            reply
        })
        .await;
        let node = Node::new();
        let hosts = format!(
            "server = \"http://{}\"\n[host.\"http://{}\"]\n",
            server.address, mirror.address
        );
        node.hosts_toml("r.example", &hosts);
        assert_eq!(node.pull("r.example/app").await.unwrap().id, fixture.id());
        assert_eq!(server.requests().len(), if short { 4 } else { 2 });
        assert_eq!(node.files().len(), 2);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_download_that_breaks_goes_on() {
    let noise = noise(300_000);
    for knows_ranges in [true, false] {
        let fixture = Fixture::new(&[&noise]);
        let honest = fixture.clone();
        let count = AtomicUsize::new(0);
        let registry = FakeRegistry::start(move |request| {
            if !is_layer(&honest, request) {
                return honest.answer(request);
            }
            let whole = Reply::ok("", &honest.blobs[&honest.layers[0]]);
            let reply = if knows_ranges {
                whole.ranged(request)
            } else {
                whole
            };
            let cut = 50_000 * (1 + count.fetch_add(1, Ordering::Relaxed));
            if cut < 150_000 {
                reply.end(End::Cut(cut))
            } else {
                reply
            }
        })
        .await;
        let image = Node::new()
            .pull(&format!("{}/app", registry.address))
            .await
            .unwrap();
        assert_eq!(image.id, fixture.id());
        let layer = &fixture.layers[0];
        let ranges: Vec<_> = registry
            .requests()
            .iter()
            .filter(|request| request.path.contains(layer.as_str()))
            .map(|request| request.headers.contains_key("range"))
            .collect();
        assert_eq!(ranges, [false, true, true]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_download_that_always_breaks() {
    let fixture = Fixture::new(&[&[7; 1000]]);
    let of_layer = fixture.clone();
    let (error, registry) = fails_with(fixture.clone(), move |request| {
        is_layer(&of_layer, request).then(|| of_layer.answer(request).end(End::Cut(0)))
    })
    .await;
    assert!(matches!(error, PullError::Unavailable(_)), "{error:?}");
    assert_eq!(
        registry.count(&fixture.layers[0]),
        limits().attempts as usize
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn documents_that_are_no_image() {
    let tar = TarBuilder::default().end();
    let config = |architecture: &str, diff_ids: &[String]| {
        let config = json!({"architecture": architecture, "os": "linux", "rootfs": {"type": "layers", "diff_ids": diff_ids}});
        Fixture::with_config(std::slice::from_ref(&tar), config.to_string().into_bytes())
    };
    let right = sha256(&tar).to_string();
    let cases = [
        (config("sparc", std::slice::from_ref(&right)), "NotFound"),
        (config(ARCHITECTURE, &[]), "Corrupt"),
        (config(ARCHITECTURE, &["sha256:1".to_owned()]), "Corrupt"),
        (
            config(ARCHITECTURE, &[sha256(b"other").to_string()]),
            "Corrupt",
        ),
        (
            Fixture::with_config(std::slice::from_ref(&tar), b"{}".to_vec()),
            "Corrupt",
        ),
        (
            Fixture::with_config(std::slice::from_ref(&tar), vec![0xff; 10]),
            "Corrupt",
        ),
        (Fixture::from_tars(vec![tar.clone(); 200]), "TooLarge"),
        (
            Fixture::from_tars(vec![TarBuilder::default().file("../x", b"").end()]),
            "Corrupt",
        ),
        (
            Fixture {
                manifest: b"{\"schemaVersion\":1}".to_vec(),
                ..Fixture::new(&[])
            },
            "Unsupported",
        ),
        (
            Fixture {
                manifest: b"<html>".to_vec(),
                ..Fixture::new(&[])
            },
            "Corrupt",
        ),
        (
            Fixture {
                manifest: vec![b' '; 5 << 20],
                ..Fixture::new(&[])
            },
            "TooLarge",
        ),
    ];
    for (fixture, expected) in cases {
        let (error, _) = fails_with(fixture, |_| None).await;
        assert!(
            format!("{error:?}").starts_with(expected),
            "{error:?}, {expected} expected"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn redirects_without_end_or_down_to_http() {
    let (error, registry) =
        fails(|request| Reply::error(307, "", "").header("Location", &request.path)).await;
    assert!(
        matches!(&error, PullError::Corrupt(words) if words.contains("redirects")),
        "{error}"
    );
    assert!(registry.requests().len() < 10);
    let (error, _) =
        fails(|_| Reply::error(302, "", "").header("Location", "file:///etc/passwd")).await;
    assert!(
        matches!(&error, PullError::Corrupt(words) if words.contains("usable location")),
        "{error}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hosts_toml_with_a_mistake() {
    let node = Node::new();
    node.hosts_toml("r.example", "server = 1");
    let error = node.pull("r.example/app").await.unwrap_err();
    assert!(
        matches!(&error, PullError::Config(words) if words.contains("hosts.toml")),
        "{error}"
    );
    node.hosts_toml(
        "r.example",
        "server = \"https://r.example\"\nca = \"missing.crt\"",
    );
    let error = node.pull("r.example/app").await.unwrap_err();
    assert!(
        matches!(&error, PullError::Config(words) if words.contains("missing.crt")),
        "{error}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_pull_leaves_nothing() {
    let fixture = Fixture::new(&[b"whole", &noise(100_000)]);
    let honest = fixture.clone();
    // The second layer never ends.
    let registry = FakeRegistry::start(move |request| {
        if request.path.contains(&honest.layers[1]) {
            honest.answer(request).end(End::Stall(10))
        } else {
            honest.answer(request)
        }
    })
    .await;
    let node = Node::with_limits(Limits {
        stall_timeout: Duration::from_mins(10),
        ..limits()
    });
    let reference = format!("{}/app", registry.address);
    let second_begun = tokio::sync::Notify::new();
    let progress = |progress: Progress| {
        if progress.layer == fixture.layers[1] && progress.done > 0 {
            second_begun.notify_one();
        }
    };
    tokio::select! {
        result = node.store.pull(&reference, None, &progress) => panic!("{result:?}"),
        () = second_begun.notified() => {}
    }
    node.becomes_empty().await;
    assert!(node.store.list().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pull_goes_on_when_another_of_the_same_is_cancelled() {
    let fixture = Fixture::new(&[&vec![7; 100_000]]);
    let honest = fixture.clone();
    let (release, released) = std::sync::mpsc::channel::<()>();
    let released = Mutex::new(released);
    let registry = FakeRegistry::start(move |request| {
        if is_layer(&honest, request) {
            released.lock().unwrap().recv().unwrap();
        }
        honest.answer(request)
    })
    .await;
    let node = Node::with_limits(Limits {
        stall_timeout: Duration::from_mins(10),
        ..limits()
    });
    let reference = format!("{}/app", registry.address);
    let begin = || {
        let (store, reference) = (node.store.clone(), reference.clone());
        let (told, begun) = tokio::sync::oneshot::channel();
        let told = Mutex::new(Some(told));
        let pull = tokio::spawn(async move {
            store
                .pull(&reference, None, &|_| {
                    if let Some(told) = told.lock().unwrap().take() {
                        told.send(()).unwrap();
                    }
                })
                .await
        });
        (pull, begun)
    };
    let (first, first_begun) = begin();
    first_begun.await.unwrap();
    let (second, second_begun) = begin();
    second_begun.await.unwrap();
    first.abort();
    assert!(first.await.unwrap_err().is_cancelled());
    release.send(()).unwrap();
    assert_eq!(second.await.unwrap().unwrap().id, fixture.id());
    assert_eq!(registry.count(&fixture.layers[0]), 1);
}

#[test]
fn a_full_disk_is_told_as_such() {
    for kind in [ErrorKind::StorageFull, ErrorKind::QuotaExceeded] {
        let error = crate::layer::LayerError::Write(kind.into());
        let digest = format!("sha256:{}", "0".repeat(64)).parse().unwrap();
        let error = PullError::layer(&digest, error);
        assert!(matches!(error, PullError::NoSpace(_)), "{error}");
    }
}
