//! Bad input: images that do not exist, registries that hang, refuse, fail or lie, layers that attack.
//! An error with the right code and the registry's own words, and nothing left behind.

use std::fs;
use std::net::TcpListener;
use std::path::Path;
use std::time::{Duration, Instant};

use podvisor_proto::cri;
use podvisor_tests::cri::image_spec;
use podvisor_tests::daemon::{Daemon, Options};
use podvisor_tests::eventually;
use podvisor_tests::fake_registry::{Answer, FakeRegistry};
use podvisor_tests::machine::slowness;
use podvisor_tests::oci::{self, Compression, EntryType, Format, Image, Layer};
use podvisor_tests::registry::{Registry, busybox};
use serde_json::json;
use tonic::Code;

/// A daemon that gives up a silent registry after a second.
fn impatient() -> Daemon {
    Daemon::start_with(&Options {
        config: vec![("image", "stall_timeout_s = 1".into())],
        ..Options::default()
    })
}

/// Bytes of all files below a directory.
fn bytes(dir: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(dir) else {
        return 0;
    };
    let sizes = entries.flatten().map(|entry| match entry.metadata() {
        Ok(meta) if meta.is_dir() => bytes(&entry.path()),
        Ok(meta) => meta.len(),
        Err(_) => 0,
    });
    sizes.sum()
}

/// Pulls something that cannot be pulled: the code, and no byte of it on the disk. The message.
fn pull_fails(daemon: &Daemon, name: &str, code: Code) -> String {
    let dir = daemon.instance.data_dir().join("images");
    let before = bytes(&dir);
    let error = daemon
        .cri()
        .pull(name)
        .expect_err("a pull that cannot work");
    assert_eq!(error.code(), code, "{error}");
    assert_eq!(bytes(&dir), before, "left in {}", dir.display());
    assert_eq!(daemon.leaks(), "");
    let images = daemon
        .cri()
        .call_image(async |mut c| c.list_images(cri::ListImagesRequest::default()).await);
    assert_eq!(images.expect("ListImages").images, vec![]);
    error.message().into()
}

#[test]
fn an_image_that_does_not_exist() {
    let daemon = Daemon::start();
    let registry = Registry::shared();
    for name in ["nothing-here:latest", "busybox:no-such-tag"] {
        let name = registry.name(name);
        let message = pull_fails(&daemon, &name, Code::NotFound);
        assert!(
            message.contains("MANIFEST_UNKNOWN"),
            "the registry's words: {message}"
        );
    }
    let digest = format!("{}@sha256:{}", registry.name("busybox"), "0".repeat(64));
    pull_fails(&daemon, &digest, Code::NotFound);
    // Through crictl, too.
    let ran = daemon.crictl(&["pull", &registry.name("nothing-here:latest")]);
    ran.failed("NotFound");
}

#[test]
fn names_that_are_none() {
    let daemon = Daemon::start();
    for name in [
        "",
        "upper/CASE",
        "a b",
        "x@sha256:12",
        "x:",
        "../../etc/passwd",
        "x@",
        "http://x/y",
    ] {
        let message = pull_fails(&daemon, name, Code::InvalidArgument);
        assert!(!message.is_empty());
    }
    let none = cri::PullImageRequest::default();
    let error = daemon
        .cri()
        .call_image(async |mut c| c.pull_image(none).await);
    assert_eq!(error.expect_err("no image").code(), Code::InvalidArgument);
}

#[test]
fn a_registry_that_refuses_connections() {
    let daemon = impatient();
    let free = TcpListener::bind("127.0.0.1:0").expect("loopback has free ports");
    let host = free.local_addr().expect("it is bound").to_string();
    drop(free);
    let message = pull_fails(&daemon, &format!("{host}/x:1"), Code::Unavailable);
    assert!(message.contains("refused"), "{message}");
}

#[test]
fn a_registry_that_hangs() {
    let daemon = impatient();
    let silent = FakeRegistry::start(&oci::busybox(), |_, _| Answer::Hang);
    let begun = Instant::now();
    pull_fails(&daemon, &silent.name("x:1"), Code::Unavailable);
    // Not a measurement: the client's own deadline is a minute.
    assert!(
        begun.elapsed() < Duration::from_secs(45) * slowness(),
        "no deadline of its own"
    );

    let stalls = FakeRegistry::start(&oci::busybox(), |request, _| {
        if request.path.contains("/blobs/") {
            Answer::Stall(100)
        } else {
            Answer::Honest
        }
    });
    pull_fails(&daemon, &stalls.name("x:1"), Code::Unavailable);
}

#[test]
fn a_registry_that_fails() {
    let daemon = impatient();
    let broken = FakeRegistry::start(&oci::busybox(), |_, _| {
        Answer::Status(
            500,
            r#"{"errors":[{"code":"UNKNOWN","message":"the disk is on fire"}]}"#.into(),
        )
    });
    let message = pull_fails(&daemon, &broken.name("x:1"), Code::Unavailable);
    assert!(message.contains("the disk is on fire"), "{message}");
    assert!(message.contains("500"), "{message}");
    assert!(
        broken.count("/manifests/1") > 1,
        "not tried again: {:?}",
        broken.requests()
    );
}

#[test]
fn a_registry_that_fails_at_first() {
    let daemon = impatient();
    // Each request once: a 503, then half a blob, then all of it.
    let shaky = FakeRegistry::start(&oci::busybox(), |request, before| match before {
        0 => Answer::Status(503, "not now".into()),
        1 if request.path.contains("/blobs/") => Answer::Cut(1000),
        _ => Answer::Honest,
    });
    let id = daemon
        .cri()
        .pull(&shaky.name("x:1"))
        .expect("a retry helps");
    assert_eq!(id, oci::busybox().id());
}

#[test]
fn a_registry_that_says_no() {
    let daemon = impatient();
    let closed = FakeRegistry::start(&oci::busybox(), |_, _| {
        Answer::Status(
            403,
            r#"{"errors":[{"code":"DENIED","message":"requested access to the resource is denied"}]}"#.into(),
        )
    });
    let message = pull_fails(&daemon, &closed.name("x:1"), Code::PermissionDenied);
    assert!(
        message.contains("requested access to the resource is denied"),
        "{message}"
    );
    // Asking again cannot help.
    assert!(closed.count("/manifests/1") <= 2, "{:?}", closed.requests());
}

#[test]
fn a_registry_that_sends_wrong_bytes() {
    let daemon = impatient();
    let image = oci::busybox();
    let layer = image.layers()[0].clone();
    for part in [layer, image.id()] {
        let lying = FakeRegistry::start(&image, {
            let part = part.clone();
            move |request, _| {
                if request.path.ends_with(&part) {
                    Answer::Corrupt
                } else {
                    Answer::Honest
                }
            }
        });
        let message = pull_fails(&daemon, &lying.name("x:1"), Code::DataLoss);
        assert!(message.contains(&part), "{message}");
    }
    // A manifest that is not what its digest says.
    let lying = FakeRegistry::start(&image, |request, _| {
        if request.path.contains("/manifests/") {
            Answer::Corrupt
        } else {
            Answer::Honest
        }
    });
    let name = format!("{}@{}", lying.name("x"), image.digest());
    pull_fails(&daemon, &name, Code::DataLoss);
}

#[test]
fn manifests_that_are_none() {
    let daemon = impatient();
    for text in ["", "{}", "[]", "<html>", &"[".repeat(100_000)] {
        let mut image = oci::busybox();
        image.manifest = text.as_bytes().to_vec();
        let fake = FakeRegistry::start(&image, |_, _| Answer::Honest);
        pull_fails(&daemon, &fake.name("x:1"), Code::DataLoss);
    }
}

#[test]
fn an_image_for_other_machines() {
    let daemon = impatient();
    let list = Image::index(Format::Oci, &[("linux/s390x", oci::busybox())]);
    let fake = FakeRegistry::start(&list, |_, _| Answer::Honest);
    let message = pull_fails(&daemon, &fake.name("x:1"), Code::NotFound);
    assert!(message.contains("amd64"), "{message}");
}

#[test]
fn layers_that_attack() {
    let daemon = Daemon::start_with(&Options {
        config: vec![("image", "max_layer_mib = 32".into())],
        ..Options::default()
    });
    let fine = Layer::new().file("fine", "fine");
    let outside = Layer::new().hostile(
        "../../../../tmp/podvisor-escaped",
        EntryType::Regular,
        "",
        b"x",
    );
    let linked = Layer::new().hostile("link", EntryType::Link, "../../../../etc/shadow", b"");
    let lies = {
        let mut tar = fine.tar();
        // More than there is.
        tar[124..135].copy_from_slice(b"00000777777");
        tar
    };
    let sum = {
        let mut tar = Layer::new().file("fine", "fine").tar();
        tar[0] = b'F';
        tar
    };
    let bomb = Layer::new().file("zeroes", vec![0; 64 << 20]).tar();
    let mut many = Layer::new();
    for i in 0..200 {
        many = many.hostile(&format!("d/../../{i}"), EntryType::Directory, "", b"");
    }
    for (what, tar) in [
        ("a name with ..", outside.tar()),
        ("a hard link out of the layer", linked.tar()),
        ("a header that lies about the size", lies),
        ("a wrong checksum", sum),
        ("more bytes than allowed", bomb),
        ("many names with ..", many.tar()),
        ("not a tar file", vec![b'x'; 4096]),
    ] {
        for compression in [Compression::Gzip, Compression::Zstd] {
            let image = Image::new(Format::Oci, &[(&tar, compression)], &json!({}));
            let fake = FakeRegistry::start(&image, |_, _| Answer::Honest);
            let name = fake.name("x:1");
            let error = daemon.cri().pull(&name).expect_err(what);
            assert!(
                matches!(error.code(), Code::DataLoss | Code::ResourceExhausted),
                "{what}: {error}"
            );
            pull_fails(&daemon, &name, error.code());
        }
    }
    assert!(!Path::new("/tmp/podvisor-escaped").exists());
    daemon
        .cri()
        .pull(&busybox())
        .expect("others are not affected");
}

#[test]
fn a_layer_that_is_not_what_its_config_says() {
    let daemon = impatient();
    let (tar, other) = (
        Layer::new().file("a", "a").tar(),
        Layer::new().file("a", "b").tar(),
    );
    let honest = Image::new(Format::Oci, &[(&tar, Compression::Gzip)], &json!({}));
    let other = Image::new(Format::Oci, &[(&other, Compression::Gzip)], &json!({}));
    // The configuration of one, the layer of the other: each digest of the transfer is right.
    let mut manifest: serde_json::Value =
        serde_json::from_slice(&honest.manifest).expect("made as JSON");
    let layers: serde_json::Value = serde_json::from_slice(&other.manifest).expect("made as JSON");
    manifest["layers"] = layers["layers"].clone();
    let mut mixed = honest;
    mixed.manifest = manifest.to_string().into_bytes();
    mixed.blobs.extend(other.blobs);
    let fake = FakeRegistry::start(&mixed, |_, _| Answer::Honest);
    pull_fails(&daemon, &fake.name("x:1"), Code::DataLoss);
}

#[test]
fn a_client_that_goes_away_during_a_pull() {
    let daemon = Daemon::start();
    let image = oci::busybox();
    let layer = image.layers()[0].clone();
    let slow = FakeRegistry::start(&image, move |request, _| {
        if request.path.ends_with(&layer) {
            Answer::Stall(500_000)
        } else {
            Answer::Honest
        }
    });
    let dir = daemon.instance.data_dir().join("images");
    let before = bytes(&dir);
    let cri = daemon.cri();
    let request = cri::PullImageRequest {
        image: Some(image_spec(&slow.name("x:1"))),
        ..Default::default()
    };
    cri.cancelled_image(
        move |mut c| async move { c.pull_image(request).await },
        || {
            eventually("the layer is on its way", || {
                (slow.count(&image.layers()[0]) > 0).then_some(())
            });
        },
    );
    // An empty file is no bytes, and still one too many.
    eventually("the pull is undone", || {
        (bytes(&dir) == before && daemon.leaks().is_empty()).then_some(())
    });
}

#[test]
fn a_full_disk() {
    let daemon = Daemon::start_with(&Options {
        data_bytes: Some(24 << 20),
        ..Options::default()
    });
    // Not compressible to nothing: the writer may leave holes for zeroes.
    let noise: Vec<u8> = (0..32_u32 << 20)
        .map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8)
        .collect();
    let layer = Layer::new().file("noise", &noise).tar();
    let image = Image::new(Format::Oci, &[(&layer, Compression::Zstd)], &json!({}));
    let fake = FakeRegistry::start(&image, |_, _| Answer::Honest);
    let message = pull_fails(&daemon, &fake.name("x:1"), Code::ResourceExhausted);
    assert!(message.to_lowercase().contains("space"), "{message}");
    daemon
        .cri()
        .pull(&busybox())
        .expect("what fits still works");
}
