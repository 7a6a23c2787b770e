//! Images as containers see them: every form of image, the files of its layers.

use podvisor_tests::crictl::{Pod, shell};
use podvisor_tests::daemon::Daemon;
use podvisor_tests::logs;
use podvisor_tests::oci::{self, Compression, EntryType, Format, Image, Layer};
use podvisor_tests::registry::Registry;

use super::pulls::images;

/// Runs a shell script in a container of an image and returns the lines it wrote.
fn run_in(daemon: &Daemon, (id, pod): (&str, &Pod), image: &str, script: &str) -> Vec<String> {
    let name = image.rsplit('/').next().unwrap_or_default();
    let name = name.replace(':', "-");
    let container = daemon.create_started(id, pod, &shell(&name, image, script));
    let status = daemon.cri().wait_exit(&container);
    let log = pod.log(&name);
    assert_eq!(status.exit_code, 0, "{:?}", logs::read(&log));
    logs::stdout(&log)
}

#[test]
fn every_form_of_image() {
    let daemon = Daemon::start();
    let registry = Registry::shared();
    let config = oci::busybox_config();
    let marked = |word: &str| Layer::new().file("marker", word).tar();
    let made = |format, word: &str, compression| {
        let layer = marked(word);
        let layers = [(oci::busybox_tar(), compression), (&layer, compression)];
        Image::new(format, &layers, &config)
    };
    let foreign = made(Format::Oci, "foreign", Compression::Gzip);
    let list = |format| {
        let own = made(format, &format!("{format:?}"), Compression::Gzip);
        Image::index(
            format,
            &[("linux/s390x", foreign.clone()), ("linux/amd64", own)],
        )
    };
    let pod = daemon.pod("forms");
    let id = daemon.run_pod(&pod);
    for (name, image, marker) in [
        (
            "plain:1",
            made(Format::Oci, "plain", Compression::None),
            "plain",
        ),
        (
            "zstd:1",
            made(Format::Oci, "zstd", Compression::Zstd),
            "zstd",
        ),
        (
            "docker:1",
            made(Format::Docker, "docker", Compression::Gzip),
            "docker",
        ),
        ("index:1", list(Format::Oci), "Oci"),
        ("list:1", list(Format::Docker), "Docker"),
    ] {
        registry.push(name, &image);
        let name = registry.name(name);
        daemon.crictl(&["pull", &name]).ok();
        let said = run_in(&daemon, (&id, &pod), &name, "cat /marker");
        assert_eq!(said, [marker], "{name}");
        // What a digest names is the index, for every client alike.
        let digest = daemon.crictl(&["inspecti", &name]).json();
        let digests = digest["status"]["repoDigests"].as_array().cloned();
        let by_digest = digests.expect("a list")[0]
            .as_str()
            .expect("text")
            .to_owned();
        assert!(by_digest.ends_with(&image.digest()), "{by_digest}");
    }
    let kept = images(&daemon);
    assert_eq!(kept.len(), 5, "{kept:?}");
}

#[test]
fn file_systems_arrive_unchanged() {
    let daemon = Daemon::start();
    let long = format!("long/{}/{}", "d".repeat(120), "f".repeat(200));
    let lower = Layer::new()
        .dir("dir")
        .file("dir/kept", "kept")
        .file("dir/removed", "removed")
        .dir("opaque")
        .file("opaque/below", "below")
        .file("replaced", "a file")
        .file("linked", "one inode")
        .link("linked-too", "linked")
        .symlink("absolute", "/dir/kept")
        .symlink("dangling", "../../../nowhere")
        .xattr("user.colour", b"blue")
        .file("coloured", "x")
        .entry("setuid", EntryType::Regular, 0o4755, "", b"#!")
        .entry("null", EntryType::Fifo, 0o600, "", b"")
        .file(&long, "deep")
        .file("empty", "")
        .file("blocks", vec![b'b'; 3 * 4096 + 1]);
    let upper = Layer::new()
        .file("dir/.wh.removed", "")
        .file("opaque/.wh..wh..opq", "")
        .file("opaque/above", "above")
        .dir("replaced")
        .file("replaced/inside", "a directory now");
    Registry::shared().push("tree:1", &Image::busybox_and(vec![lower, upper]));
    let name = Registry::shared().name("tree:1");
    daemon.crictl(&["pull", &name]).ok();

    let script = format!(
        "ls dir opaque; cat replaced/inside dir/kept absolute opaque/above; echo
         stat -c '%h %a %s' linked setuid empty blocks; stat -c '%F' null; readlink dangling
         [ linked -ef linked-too ] && echo same; md5sum < blocks; cat {long}; echo
         echo new > dir/kept; cat dir/kept; rm -r opaque; ls -d opaque 2>&1; mkdir opaque; ls opaque"
    );
    let wanted = [
        "dir:",
        "kept",
        "",
        "opaque:",
        "above",
        "a directory nowkeptkeptabove",
        "2 644 9",
        "1 4755 2",
        "1 644 0",
        "1 644 12289",
        "fifo",
        "../../../nowhere",
        "same",
        "b74ca97ee69b3ae5479f3fdebce8d580  -",
        "deep",
        "new",
        "ls: opaque: No such file or directory",
    ];
    let pod = daemon.pod("reads");
    let id = daemon.run_pod(&pod);
    assert_eq!(run_in(&daemon, (&id, &pod), &name, &script), wanted);
}
