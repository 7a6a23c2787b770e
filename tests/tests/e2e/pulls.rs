//! Images through crictl: pull from every kind of registry, list, inspect, remove. No VM has a part in it.

use std::fs;
use std::path::{Path, PathBuf};

use podvisor_tests::certificates::{Authority, Certificate};
use podvisor_tests::daemon::Daemon;
use podvisor_tests::fake_registry::{Answer, FakeRegistry};
use podvisor_tests::oci::{self, Compression, Format, Image, Layer};
use podvisor_tests::registry::{Registry, busybox};
use serde_json::{Value, json};

/// `crictl images`.
pub fn images(daemon: &Daemon) -> Vec<Value> {
    let list = daemon.crictl(&["images", "-o", "json"]).json();
    list["images"].as_array().cloned().unwrap_or_default()
}

#[test]
fn pull_list_inspect_remove() {
    let daemon = Daemon::start();
    let name = busybox();
    let image = oci::busybox();

    let pulled = daemon.crictl(&["pull", &name]).ok();
    assert!(pulled.contains(&image.id()), "{pulled}");

    let all = images(&daemon);
    assert_eq!(all.len(), 1, "{all:?}");
    assert_eq!(all[0]["id"], image.id());
    assert_eq!(all[0]["repoTags"], json!([name]));
    let digest = format!("{}@{}", name.trim_end_matches(":latest"), image.digest());
    assert_eq!(all[0]["repoDigests"], json!([digest]));
    let size: u64 = all[0]["size"]
        .as_str()
        .expect("a string")
        .parse()
        .expect("a number");
    assert!(size > 0);

    // The same answer by tag, by name without tag, by digest, by id with and without algorithm.
    let id = image.id();
    let by_tag = daemon.crictl(&["inspecti", &name]).json();
    assert_eq!(by_tag["status"]["id"], id);
    let bare = id.strip_prefix("sha256:").expect("a digest");
    for other in [name.trim_end_matches(":latest"), &digest, &id, bare] {
        let answer = daemon.crictl(&["inspecti", other]).json();
        assert_eq!(answer["status"], by_tag["status"], "{other}");
    }

    // Again is no second image.
    daemon.crictl(&["pull", &name]).ok();
    assert_eq!(images(&daemon).len(), 1);

    daemon.crictl(&["rmi", &name]).ok();
    assert_eq!(images(&daemon), Vec::<Value>::new());
    assert_eq!(daemon.crictl(&["inspecti", &name]).code, 1);
}

#[test]
fn image_fs_info_is_what_du_says() {
    let daemon = Daemon::start();
    let usage = || {
        let info = daemon.crictl(&["imagefsinfo", "-o", "json"]).json();
        let images = &info["status"]["imageFilesystems"][0];
        let containers = &info["status"]["containerFilesystems"][0];
        assert!(containers["fsId"]["mountpoint"].is_string(), "{info}");
        let bytes = images["usedBytes"]["value"].as_str().unwrap_or("0");
        let mountpoint = images["fsId"]["mountpoint"].as_str();
        (
            bytes.parse::<u64>().expect("a number"),
            PathBuf::from(mountpoint.expect("a path")),
        )
    };
    let (empty, dir) = usage();
    assert!(dir.starts_with(daemon.instance.data_dir()), "{dir:?}");
    daemon.crictl(&["pull", &busybox()]).ok();
    let (full, _) = usage();
    let on_disk: u64 = files(&dir).iter().map(blocks).sum();
    // Directories are not counted by everyone.
    assert!(full.abs_diff(on_disk) <= 64 << 10, "{full} of {on_disk}");
    assert!(full > empty + (1 << 20), "{empty} -> {full}");
    daemon.crictl(&["rmi", &busybox()]).ok();
    assert_eq!(usage().0, empty);
}

fn blocks(file: impl AsRef<Path>) -> u64 {
    use std::os::unix::fs::MetadataExt;
    fs::symlink_metadata(file).expect("it is there").blocks() * 512
}

fn files(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).expect("a directory").flatten() {
        let path = entry.path();
        if path.is_dir() {
            found.extend(files(&path));
        } else {
            found.push(path);
        }
    }
    found
}

#[test]
fn credentials() {
    let daemon = Daemon::start();
    let registry = Registry::start("basic", Some(("someone", "pass:word")));
    registry.push("private:1", &oci::busybox());
    let name = registry.name("private:1");

    for wrong in [
        vec!["pull", &name],
        vec!["pull", "--creds", "someone:wrong", &name],
    ] {
        let ran = daemon.crictl(&wrong);
        assert_ne!(ran.code, 0);
        assert!(ran.stderr.to_lowercase().contains("auth"), "{}", ran.stderr);
    }
    assert_eq!(images(&daemon), Vec::<Value>::new());
    let ran = daemon.crictl(&["pull", "--creds", "someone:pass:word", &name]);
    assert!(ran.ok().contains(&oci::busybox().id()));
}

#[test]
fn client_certificates() {
    let authority = Authority::new();
    let registry = Registry::start("before-tls", None);
    registry.push("private:1", &oci::busybox());
    let registry = registry.behind_tls(&authority);
    let name = registry.name("private:1");
    let daemon = Daemon::start();
    let dir = daemon.certs_dir().join(&registry.host);
    fs::create_dir_all(&dir).expect("ours");
    let configure = |more: &str| {
        let url = format!("https://{}", registry.host);
        let ca = authority.certificate().display();
        let hosts = format!("server = {url:?}\n[host.{url:?}]\nca = \"{ca}\"\n{more}\n");
        fs::write(dir.join("hosts.toml"), hosts).expect("ours");
    };
    let show = |shown: &Certificate| {
        let (certificate, key) = (shown.certificate.display(), shown.key.display());
        format!("client = [[\"{certificate}\", \"{key}\"]]")
    };
    let pull = || daemon.cri().pull(&name);

    // The words are those of the registry's TLS: alerts (RFC 8446, 6.2).
    configure("");
    let error = pull().expect_err("without a certificate");
    let words = error.message().to_lowercase();
    assert!(
        words.contains("alert") && words.contains("certificate"),
        "{words}"
    );
    let stranger = Authority::new();
    configure(&show(&stranger.issue("stranger", "DNS:node.test")));
    let error = pull().expect_err("of another authority");
    assert!(error.message().contains("alert"), "{error}");

    configure(&show(&authority.issue("node", "DNS:node.test")));
    pull().expect("with its certificate");
}

#[test]
fn bearer_tokens() {
    let daemon = Daemon::start();
    let registry = FakeRegistry::with_tokens(&oci::busybox(), "someone", "secret");
    let name = registry.name("team/private:1");

    assert_ne!(daemon.crictl(&["pull", &name]).code, 0);
    assert_ne!(
        daemon
            .crictl(&["pull", "--creds", "someone:wrong", &name])
            .code,
        0
    );
    daemon
        .crictl(&["pull", "--creds", "someone:secret", &name])
        .ok();
    let log = daemon.log();
    assert!(!log.contains("secret"), "a password in the log");
}

#[test]
fn pulled_by_digest() {
    let daemon = Daemon::start();
    let image = oci::busybox();
    let name = busybox();
    let by_digest = format!("{}@{}", name.trim_end_matches(":latest"), image.digest());
    daemon.crictl(&["pull", &by_digest]).ok();
    let all = images(&daemon);
    assert_eq!(all[0]["repoDigests"], json!([by_digest]));
    assert_eq!(
        all[0]["repoTags"].as_array().map_or(0, Vec::len),
        0,
        "{all:?}"
    );
}

#[test]
fn removing_one_tag_removes_all() {
    let daemon = Daemon::start();
    let registry = Registry::shared();
    for tag in ["tags:1", "tags:2", "elsewhere/tags:3"] {
        registry.push(tag, &oci::busybox());
        daemon.crictl(&["pull", &registry.name(tag)]).ok();
    }
    let all = images(&daemon);
    assert_eq!(all.len(), 1);
    assert_eq!(
        all[0]["repoTags"].as_array().map(Vec::len),
        Some(3),
        "{all:?}"
    );
    daemon.crictl(&["rmi", &registry.name("tags:2")]).ok();
    assert_eq!(images(&daemon), Vec::<Value>::new());
}

#[test]
fn a_layer_is_fetched_once() {
    let daemon = Daemon::start();
    let common = Layer::new().file("common", vec![7; 1 << 20]);
    let common = common.tar();
    let image = |word: &str| {
        let own = Layer::new().file("own", word).tar();
        let layers = [
            (&common[..], Compression::Gzip),
            (&own[..], Compression::Gzip),
        ];
        Image::new(Format::Oci, &layers, &json!({}))
    };
    let (first, second) = (image("first"), image("second"));
    let registry = Registry::shared();
    registry.push("shares:1", &first);
    registry.push("shares:2", &second);
    daemon.crictl(&["pull", &registry.name("shares:1")]).ok();

    // A registry that has the second image without the layer that is there already.
    let fake = FakeRegistry::start(&second, {
        let layer = first.layers()[0].clone();
        move |request, _| {
            if request.path.ends_with(&layer) {
                Answer::Status(500, "the common layer was fetched again".into())
            } else {
                Answer::Honest
            }
        }
    });
    daemon.crictl(&["pull", &fake.name("shares:2")]).ok();

    // At the same time, from several clients: one transfer.
    let third = image("third");
    let fake = FakeRegistry::start(&third, |_, _| Answer::Honest);
    let name = fake.name("shares:3");
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| daemon.crictl(&["pull", &name]).ok());
        }
    });
    assert_eq!(fake.count(&third.layers()[1]), 1, "{:?}", fake.requests());
}

#[test]
fn mirrors_in_order() {
    let daemon = Daemon::start();
    let broken = FakeRegistry::start(&oci::busybox(), |_, _| {
        Answer::Status(503, "down for the day".into())
    });
    let registry = Registry::shared();
    registry.push("library/mirrored:1", &oci::busybox());
    let dir = daemon.certs_dir().join("registry.example");
    fs::create_dir_all(&dir).expect("ours");
    let hosts = format!(
        "server = \"http://127.0.0.1:1\"\n\
         [host.\"http://{}\"]\n  capabilities = [\"pull\", \"resolve\"]\n\
         [host.\"http://{}\"]\n  capabilities = [\"pull\", \"resolve\"]\n",
        broken.host, registry.host
    );
    fs::write(dir.join("hosts.toml"), hosts).expect("ours");

    let name = "registry.example/library/mirrored:1";
    daemon.crictl(&["pull", name]).ok();
    assert!(broken.count("manifests") > 0, "{:?}", broken.requests());
    let all = images(&daemon);
    assert_eq!(
        all[0]["repoTags"],
        json!([name]),
        "the name that was asked for"
    );
}
