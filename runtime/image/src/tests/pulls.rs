//! Pulls that succeed.

use super::*;

#[tokio::test(flavor = "multi_thread")]
async fn an_image_by_tag_and_by_digest() {
    let fixture = Fixture::new(&[b"one", b"two"]);
    let registry = fixture.registry().await;
    let node = Node::new();
    let by_tag = format!("{}/team/app:v1", registry.address);
    let by_digest = format!("{}/team/app@{}", registry.address, fixture.digest());

    let image = node.pull(&by_digest).await.unwrap();
    assert_eq!(image.id, fixture.id());
    assert!(image.repo_tags.is_empty());
    assert_eq!(image.repo_digests, std::slice::from_ref(&by_digest));

    let image = node.pull(&by_tag).await.unwrap();
    assert_eq!(image.repo_tags, std::slice::from_ref(&by_tag));
    assert_eq!(image.repo_digests, std::slice::from_ref(&by_digest));
    assert_eq!(
        image.config.config().as_ref().unwrap().cmd().as_deref(),
        Some(&["/file".to_owned()][..])
    );
    assert_eq!(image.layers.len(), 2);
    assert!(image.size > image.layers[0].length);
    for layer in &image.layers {
        assert_eq!(std::fs::metadata(&layer.path).unwrap().len(), layer.length);
        assert_eq!(registry.count(&layer.diff_id), 0);
    }
    // The second pull found the layers.
    for digest in &fixture.layers {
        assert_eq!(registry.count(digest), 1);
    }
    let hex = &image.id["sha256:".len()..];
    for name in [
        &by_tag,
        &by_digest,
        &image.id,
        hex,
        &hex[..12],
        &image.id[..20],
    ] {
        assert_eq!(node.store.resolve(name), Some(Arc::clone(&image)), "{name}");
    }
    assert_eq!(node.store.resolve("busybox"), None);
    assert_eq!(node.store.list(), [image]);
}

#[tokio::test(flavor = "multi_thread")]
async fn progress_reaches_the_total() {
    let noise = noise(200_000);
    let fixture = Fixture::new(&[&noise, b"small"]);
    let registry = fixture.registry().await;
    let node = Node::new();
    let told: Mutex<Vec<Progress>> = Mutex::default();
    let reference = format!("{}/app", registry.address);
    for _ in 0..2 {
        told.lock().unwrap().clear();
        node.store
            .pull(&reference, None, &|progress| {
                told.lock().unwrap().push(progress);
            })
            .await
            .unwrap();
        let told = told.lock().unwrap();
        for layer in &fixture.layers {
            let of_layer: Vec<_> = told
                .iter()
                .filter(|progress| progress.layer == *layer)
                .collect();
            let total = fixture.blobs[layer].len() as u64;
            assert!(of_layer.iter().all(|progress| progress.total == total));
            assert!(of_layer.is_sorted_by_key(|progress| progress.done));
            assert_eq!(of_layer.last().unwrap().done, total);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_index_by_its_own_digest() {
    let fixture = Fixture::new(&[b"x"]);
    let index = json!({"schemaVersion": 2, "manifests": [
        {"mediaType": format!("{OCI}.manifest.v1+json"), "digest": sha256(b"other").to_string(), "size": 5,
         "platform": {"os": "linux", "architecture": "sparc"}},
        {"mediaType": format!("{OCI}.manifest.v1+json"), "digest": fixture.digest(), "size": fixture.manifest.len(),
         "platform": {"os": "linux", "architecture": ARCHITECTURE}},
    ]});
    let index = index.to_string().into_bytes();
    let index_digest = sha256(&index).to_string();
    let honest = fixture.clone();
    let registry = FakeRegistry::start(move |request| {
        if request.path.ends_with("/manifests/latest") {
            assert!(request.headers["accept"].contains("image.index.v1"));
            return Reply::ok(&format!("{OCI}.index.v1+json; charset=utf-8"), &index);
        }
        honest.answer(request)
    })
    .await;
    let node = Node::new();
    let image = node
        .pull(&format!("{}/app", registry.address))
        .await
        .unwrap();
    assert_eq!(image.id, fixture.id());
    assert_eq!(
        image.repo_digests,
        [format!("{}/app@{index_digest}", registry.address)]
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_layer_twice_and_no_layer() {
    let twice = Fixture::new(&[b"same", b"same"]);
    let none = Fixture::new(&[]);
    let (first, second) = (twice.registry().await, none.registry().await);
    let node = Node::new();
    let image = node
        .pull(&format!("{}/twice", first.address))
        .await
        .unwrap();
    assert_eq!(image.layers[0], image.layers[1]);
    assert_eq!(first.count(&twice.layers[0]), 1);
    let image = node
        .pull(&format!("{}/none", second.address))
        .await
        .unwrap();
    assert!(image.layers.is_empty() && image.size > 0);
    assert!(
        node.store
            .remove(&format!("{}/twice", first.address))
            .await
            .unwrap()
    );
    node.becomes_empty().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn concurrent_pulls_share_the_work() {
    let fixture = Fixture::new(&[b"one", b"two", b"three", b"four"]);
    let registry = fixture.registry().await;
    let node = Node::new();
    let pulls = (0..8).map(|i| {
        let (store, reference) = (node.store.clone(), format!("{}/app:{i}", registry.address));
        tokio::spawn(async move {
            store
                .pull(&reference, None, &|_| {})
                .await
                .unwrap()
                .id
                .clone()
        })
    });
    for id in futures_util::future::join_all(pulls).await {
        assert_eq!(id.unwrap(), fixture.id());
    }
    for digest in &fixture.layers {
        assert_eq!(registry.count(digest), 1, "{digest}");
    }
    let image = node.store.resolve(&fixture.id()).unwrap();
    assert_eq!(image.repo_tags.len(), 8);
    assert_eq!(node.files().len(), 4);
}

#[tokio::test(flavor = "multi_thread")]
async fn mirrors_in_order_then_the_server() {
    let fixture = Fixture::new(&[b"x"]);
    let empty =
        FakeRegistry::start(|_| Reply::error(404, "NAME_UNKNOWN", "no such repository")).await;
    let resolves = fixture.registry().await;
    let server = fixture.registry().await;
    let node = Node::new();
    let hosts = format!(
        "server = \"http://{}\"\n[host.\"http://{}\"]\n[host.\"http://{}\"]\ncapabilities = [\"resolve\"]\n\
         [host.\"http://{}\".header]\nx-token = \"secret\"\n",
        server.address, empty.address, resolves.address, resolves.address
    );
    node.hosts_toml("registry.example", &hosts);
    let image = node.pull("registry.example/app").await.unwrap();
    assert_eq!(image.repo_tags, ["registry.example/app:latest"]);
    assert!(
        empty
            .requests()
            .iter()
            .all(|request| request.path.ends_with("?ns=registry.example"))
    );
    assert_eq!(
        empty.requests()[0].path,
        "/v2/app/manifests/latest?ns=registry.example"
    );
    assert_eq!(
        (resolves.count("manifests"), resolves.count("blobs")),
        (1, 0)
    );
    assert_eq!(resolves.requests()[0].headers["x-token"], "secret");
    assert_eq!((server.count("manifests"), server.count("blobs")), (0, 2));
    assert!(!server.requests()[0].headers.contains_key("x-token"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_path_of_its_own() {
    let fixture = Fixture::new(&[b"x"]);
    let honest = fixture.clone();
    let registry =
        FakeRegistry::start(
            move |request| match request.path.strip_prefix("/api/cache/") {
                Some(rest) => honest.answer(&Request {
                    path: format!("/v2/{rest}"),
                    ..request.clone()
                }),
                None => Reply::error(404, "", ""),
            },
        )
        .await;
    let node = Node::new();
    let hosts = format!(
        "[host.\"http://{}/api/cache\"]\noverride_path = true\n",
        registry.address
    );
    node.hosts_toml("_default", &hosts);
    assert_eq!(
        node.pull("busybox").await.unwrap().repo_tags,
        ["docker.io/library/busybox:latest"]
    );
    assert_eq!(
        registry.requests()[0].path,
        "/api/cache/library/busybox/manifests/latest?ns=docker.io"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn blobs_behind_a_redirect() {
    let fixture = Fixture::new(&[b"x"]);
    let blobs = fixture.registry().await;
    let (honest, target) = (fixture.clone(), blobs.address.clone());
    let registry = FakeRegistry::start(move |request| {
        if !request.headers.contains_key("authorization") {
            return Reply::error(401, "", "").header("WWW-Authenticate", "Basic");
        }
        if request.path.contains("/blobs/") {
            Reply::error(307, "", "")
                .header("Location", &format!("http://{target}{}", request.path))
        } else {
            honest.answer(request)
        }
    })
    .await;
    let node = Node::new();
    node.hosts_toml(
        "_default",
        &format!(
            "server = \"http://{}\"\n[header]\nx-token = \"secret\"\n",
            registry.address
        ),
    );
    let password = crate::Credentials::Password {
        username: "u".into(),
        password: "p".into(),
    };
    node.store
        .pull("r.example/app", Some(password), &|_| {})
        .await
        .unwrap();
    assert_eq!(blobs.requests().len(), 2);
    for request in blobs.requests() {
        assert!(
            !request.headers.contains_key("authorization")
                && !request.headers.contains_key("x-token")
        );
    }
}
