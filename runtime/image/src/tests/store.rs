//! Tags, removal, and what is there after a restart.

use super::*;

/// A registry whose tags are images, each with these layers.
async fn registry(tags: &'static [(&'static str, &'static [&'static [u8]])]) -> FakeRegistry {
    let fixtures: Vec<_> = tags
        .iter()
        .map(|(tag, layers)| (*tag, Fixture::new(layers)))
        .collect();
    FakeRegistry::start(move |request| {
        let by_tag = |(tag, fixture): &&(&str, Fixture)| {
            request.path.ends_with(&format!("/{tag}")) || request.path.ends_with(&fixture.digest())
        };
        if let Some((_, fixture)) = fixtures.iter().find(by_tag) {
            return fixture.answer(request);
        }
        let answers = fixtures.iter().map(|(_, fixture)| fixture.answer(request));
        answers
            .into_iter()
            .find(|reply| reply.status == 200)
            .unwrap_or(Reply::error(404, "", ""))
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn removing_by_any_name_removes_every_name() {
    let registry = registry(&[("one", &[b"shared", b"own"]), ("two", &[b"shared"])]).await;
    let node = Node::new();
    let name = |rest: &str| format!("{}/{rest}", registry.address);
    for by in 0..4 {
        let one = node.pull(&name("app:one")).await.unwrap();
        let one_elsewhere = node.pull(&name("other/app:one")).await.unwrap();
        assert_eq!(one_elsewhere.repo_tags.len(), 2);
        assert_eq!(one_elsewhere.repo_digests.len(), 2);
        node.pull(&name("app:two")).await.unwrap();
        assert_eq!(node.files().len(), 2);
        let removed = match by {
            0 => node.store.remove(&name("app:one")).await,
            1 => node.store.remove(&one.id).await,
            2 => node.store.remove(&one_elsewhere.repo_digests[1]).await,
            _ => node.store.remove(&one.id["sha256:".len()..][..16]).await,
        };
        assert!(removed.unwrap());
        assert_eq!(node.store.resolve(&name("other/app:one")), None);
        assert_eq!(node.store.list().len(), 1);
        // The other image still has the layer that both had.
        let two = node.store.resolve(&name("app:two")).unwrap();
        assert_eq!(
            node.files(),
            [format!(
                "layers/{}.erofs",
                &two.layers[0].diff_id["sha256:".len()..]
            )]
        );
        assert!(!node.store.remove(&name("app:one")).await.unwrap());
    }
    assert!(!node.store.remove("not a name").await.unwrap());
    assert!(!node.store.remove("").await.unwrap());
    assert!(node.store.remove(&name("app:two")).await.unwrap());
    node.becomes_empty().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn simultaneous_removals() {
    let registry = registry(&[("one", &[b"layer"])]).await;
    let node = Node::new();
    let image = node
        .pull(&format!("{}/app:one", registry.address))
        .await
        .unwrap();
    let removals = (0..10).map(|_| node.store.remove(&image.id));
    let removed = futures_util::future::join_all(removals).await;
    assert_eq!(
        removed
            .into_iter()
            .filter(|removed| *removed.as_ref().unwrap())
            .count(),
        1
    );
    node.becomes_empty().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tag_moves_to_the_image_pulled_last() {
    let (old, new) = (Fixture::new(&[b"old"]), Fixture::new(&[b"new"]));
    let current = Arc::new(Mutex::new(old.clone()));
    let served = Arc::clone(&current);
    let registry = FakeRegistry::start(move |request| served.lock().unwrap().answer(request)).await;
    let node = Node::new();
    let name = format!("{}/app:latest", registry.address);
    node.pull(&name).await.unwrap();
    *current.lock().unwrap() = new.clone();
    node.pull(&name).await.unwrap();
    {
        let node = node.reopen();
        let (old, new) = (
            node.store.resolve(&old.id()).unwrap(),
            node.store.resolve(&new.id()).unwrap(),
        );
        assert!(old.repo_tags.is_empty());
        assert_eq!(old.repo_digests.len(), 1);
        assert_eq!(new.repo_tags, std::slice::from_ref(&name));
        assert_eq!(node.store.resolve(&name), Some(new));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn everything_is_there_after_a_restart() {
    let registry = registry(&[("one", &[b"shared", b"own"]), ("two", &[b"shared"])]).await;
    let node = Node::new();
    for tag in ["one", "two"] {
        node.pull(&format!("{}/app:{tag}", registry.address))
            .await
            .unwrap();
    }
    let (before, usage) = (node.store.list(), node.store.usage());
    let node = node.reopen();
    let after = node.store.list();
    assert_eq!(after, before);
    assert_eq!(node.store.usage(), usage);
    for image in after {
        node.store.remove(&image.id).await.unwrap();
    }
    node.becomes_empty().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_killed_pull_left_is_removed() {
    let registry = registry(&[("one", &[b"layer"])]).await;
    let node = Node::new();
    node.pull(&format!("{}/app:one", registry.address))
        .await
        .unwrap();
    let files = node.files();
    let images = node.dir.path().join("images");
    std::fs::write(images.join("tmp/layer-abc"), "x").unwrap();
    std::fs::write(
        images.join(format!("layers/{}.erofs", sha256(b"unused").hex())),
        "x",
    )
    .unwrap();
    assert_eq!(node.reopen().files(), files);
}

#[tokio::test(flavor = "multi_thread")]
async fn images_with_missing_or_short_layers_are_dropped() {
    let registry = registry(&[("one", &[b"1"]), ("two", &[b"2", b"3"]), ("three", &[b"3"])]).await;
    let node = Node::new();
    for tag in ["one", "two", "three"] {
        node.pull(&format!("{}/app:{tag}", registry.address))
            .await
            .unwrap();
    }
    let image = |node: &Node, tag: &str| {
        node.store
            .resolve(&format!("{}/app:{tag}", registry.address))
    };
    std::fs::remove_file(&image(&node, "one").unwrap().layers[0].path).unwrap();
    let short = std::fs::OpenOptions::new()
        .write(true)
        .open(&image(&node, "two").unwrap().layers[0].path)
        .unwrap();
    short.set_len(4096).unwrap();
    let node = node.reopen();
    assert_eq!(node.store.list(), [image(&node, "three").unwrap()]);
    assert_eq!(node.files().len(), 1);
    // And they can be pulled again.
    for tag in ["one", "two"] {
        node.pull(&format!("{}/app:{tag}", registry.address))
            .await
            .unwrap();
    }
    assert_eq!(node.reopen().store.list().len(), 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn usage_is_what_du_says() {
    let registry = registry(&[("one", &[b"1", b"2"])]).await;
    let node = Node::new();
    let empty = node.store.usage();
    node.pull(&format!("{}/app:one", registry.address))
        .await
        .unwrap();
    let usage = node.store.usage();
    assert_eq!(usage.inodes, empty.inodes + 2);
    let du = std::process::Command::new("du")
        .args(["-s", "-B1"])
        .arg(node.dir.path().join("images"))
        .output()
        .unwrap();
    let said = String::from_utf8(du.stdout).unwrap();
    assert_eq!(
        said.split_whitespace().next().unwrap(),
        usage.bytes.to_string()
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn an_ambiguous_prefix_is_no_name() {
    let node = Node::new();
    let mut ids = Vec::new();
    // Of 17 ids, two begin with the same digit.
    for i in 0..17u8 {
        let fixture = Fixture::new(&[&[i]]);
        let registry = fixture.registry().await;
        ids.push(
            node.pull(&format!("{}/app", registry.address))
                .await
                .unwrap()
                .id
                .clone(),
        );
    }
    let first = |id: &String| id["sha256:".len()..][..1].to_owned();
    let shared = ids
        .iter()
        .find(|id| ids.iter().filter(|other| first(other) == first(id)).count() > 1)
        .unwrap();
    assert_eq!(node.store.resolve(&first(shared)), None);
    assert_eq!(
        node.store.resolve(&format!("sha256:{}", first(shared))),
        None
    );
    assert_eq!(node.store.resolve(shared).unwrap().id, *shared);
}
