//! Images and block devices.

use std::fs;
use std::path::Path;
use std::process::Command;

use podvisor_tests::crictl::shell;
use podvisor_tests::oci::{Image, Layer};
use podvisor_tests::registry::{Registry, busybox};
use serde_json::{Value, json};

use super::{Rig, WAITS};

#[test]
fn image_volumes() {
    let rig = Rig::new("image");
    let registry = Registry::shared();
    let name = registry.name("volume-image:1");
    let lower = Layer::new()
        .dir("dir")
        .file("dir/file", "lower")
        .file("only", "here");
    let upper = Layer::new()
        .dir("dir")
        .file("dir/file", "upper")
        .symlink("out", "/../../run/podvisor");
    registry.push("volume-image:1", &Image::busybox_and(vec![lower, upper]));
    rig.daemon.crictl(&["pull", &name]).ok();
    let image = |path: &str, sub: &str| json!({"image": {"image": name}, "container_path": path, "readonly": true, "image_sub_path": sub});
    let c = rig.container(
        "c",
        &[
            image("/all", ""),
            image("/dir", "dir"),
            image("/one", "dir/file"),
        ],
    );
    assert_eq!(
        rig.sh(&c, "cat /all/dir/file /all/only /dir/file /one"),
        "upperhereupperupper"
    );
    let said = rig.sh(
        &c,
        "echo x 2>&1 >/all/new || true; /all/bin/busybox echo runs",
    );
    assert!(
        said.contains("Read-only file system") && said.contains("runs"),
        "{said}"
    );
    let mounts = &rig.daemon.inspect(&c)["mounts"];
    let id = rig
        .daemon
        .crictl(&["images", "-q", "--no-trunc", &name])
        .ok();
    assert_eq!(mounts[0]["image"]["imageRef"], json!(id.trim()), "{mounts}");

    for (mount, problem) in [
        (image("/x", "missing"), "ImageVolumeMountFailed"),
        (image("/x", "out/hosts"), "ImageVolumeMountFailed"),
        (image("/x", "../dir"), "config.mounts[0].image_sub_path: "),
        (
            json!({"image": {"image": "no/such:image"}, "container_path": "/x", "readonly": true}),
            "ImageVolumeMountFailed",
        ),
        (
            json!({"image": {"image": name}, "container_path": "/x"}),
            "config.mounts[0].readonly: ",
        ),
    ] {
        let said = rig.refused(std::slice::from_ref(&mount));
        assert!(said.contains(problem), "{mount}: {said}");
    }
    rig.daemon.remove_pods();
    rig.daemon.assert_nothing_left();
}

/// A loop device, which is gone when it is dropped.
struct Loop(String);

impl Loop {
    fn new(file: &Path) -> Self {
        let device =
            podvisor_tests::output_of(Command::new("losetup").args(["--find", "--show"]).arg(file));
        Self(device.trim().to_owned())
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup")
            .arg("--detach")
            .arg(&self.0)
            .status();
    }
}

#[test]
fn raw_block_devices() {
    let rig = Rig::new("block");
    let file = rig.path("disk");
    let mut content = vec![0; 8 << 20];
    content[..5].copy_from_slice(b"node\n");
    fs::write(&file, &content).expect("writes");
    let device = Loop::new(&file);
    let create = |name: &str, devices: Value| {
        let mut config = shell(name, &busybox(), WAITS);
        config["devices"] = devices;
        rig.daemon.try_create(&rig.id, &rig.pod, &config)
    };
    let c = create(
        "c",
        json!([
            {"host_path": device.0, "container_path": "/dev/raw", "permissions": "rwm"},
            {"host_path": device.0, "container_path": "/dev/sub/readonly", "permissions": "r"},
        ]),
    )
    .ok();
    let c = c.trim();
    rig.daemon.cri().start_container(c).expect("StartContainer");
    let size = "dd if=/dev/raw bs=1M 2>/dev/null | wc -c";
    assert_eq!(
        rig.sh(c, &format!("head -n 1 /dev/raw; {size}")),
        "node\n8388608"
    );
    rig.sh(
        c,
        "printf pod | dd of=/dev/raw bs=1 seek=4096 conv=fsync,notrunc 2>/dev/null",
    );
    let written = fs::read(&file).expect("reads");
    assert_eq!(&written[4096..4099], b"pod");
    let said = rig.sh(
        c,
        "dd if=/dev/zero of=/dev/sub/readonly bs=4k count=1 conv=fsync 2>&1 || true",
    );
    assert!(
        said.contains("error") || said.contains("not permitted"),
        "{said}"
    );
    // Free for others when the container is gone.
    rig.daemon.cri().remove_container(c);
    nix::fcntl::open(
        Path::new(&device.0),
        nix::fcntl::OFlag::O_RDWR | nix::fcntl::OFlag::O_EXCL,
        nix::sys::stat::Mode::empty(),
    )
    .expect("nobody has it");

    for (wrong, field) in [
        (
            json!({"host_path": "/dev/missing", "container_path": "/dev/x"}),
            "host_path",
        ),
        (
            json!({"host_path": "/dev/ptmx", "container_path": "/dev/x"}),
            "host_path",
        ),
        (
            json!({"host_path": device.0, "container_path": "x"}),
            "container_path",
        ),
        (
            json!({"host_path": device.0, "container_path": "/x", "permissions": "rx"}),
            "permissions",
        ),
    ] {
        let ran = create("refused", json!([wrong]));
        let path = format!("config.devices[0].{field}: ");
        assert!(
            ran.code != 0 && ran.stderr.contains(&path),
            "{wrong}: {}",
            ran.stderr
        );
    }
}
