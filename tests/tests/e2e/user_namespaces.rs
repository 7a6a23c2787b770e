//! User namespaces: who is root in the pod is nobody else's root.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::unistd::chown;
use podvisor_tests::crictl::{Pod, shell, with_such_pod};
use podvisor_tests::daemon::Daemon;
use podvisor_tests::oci::{EntryType, Image, Layer};
use podvisor_tests::registry::{Registry, busybox};
use podvisor_tests::{eventually, http, logs};
use serde_json::{Value, json};

/// First and number of the ids on the node.
const HOST: u32 = 100_000;
const LENGTH: u32 = 65_536;

/// Waits to be stopped.
const WAITS: &str = "trap 'exit 0' TERM; while :; do sleep 0.1; done";

fn mapping() -> Value {
    json!([{"host_id": HOST, "container_id": 0, "length": LENGTH}])
}

/// Namespace options with user namespaces.
fn users(mode: i32, ids: &Value) -> Value {
    json!({"userns_options": {"mode": mode, "uids": ids, "gids": ids}})
}

/// A daemon and a pod with a user namespace.
struct Rig {
    dir: PathBuf,
    pod: Pod,
    id: String,
    daemon: Daemon,
}

impl Rig {
    fn new(name: &str, privileged: bool) -> Self {
        let options = users(0, &mapping());
        let context = json!({"namespace_options": options, "privileged": privileged});
        let (daemon, pod, id) = with_such_pod(name, &json!({ "security_context": context }));
        let dir = daemon.instance.dir().join("volumes");
        fs::create_dir(&dir).expect("a fresh directory");
        Self {
            dir,
            pod,
            id,
            daemon,
        }
    }

    /// A container's configuration. As kubelets send it, it repeats the pod's user namespace.
    fn config(name: &str, script: &str, mut context: Value) -> Value {
        let mut config = shell(name, &busybox(), script);
        context["namespace_options"]["userns_options"] =
            users(0, &mapping())["userns_options"].take();
        config["linux"]["security_context"] = context;
        config
    }

    fn start(&self, config: &Value) -> String {
        self.daemon.create_started(&self.id, &self.pod, config)
    }

    /// A container that waits.
    fn waiting(&self, name: &str, context: Value) -> String {
        self.start(&Self::config(name, WAITS, context))
    }

    fn sh(&self, container: &str, script: &str) -> String {
        self.daemon.exec(container, &["sh", "-c", script])
    }
}

fn owner(path: &Path) -> (u32, u32) {
    let metadata = fs::symlink_metadata(path).expect("there");
    (metadata.uid(), metadata.gid())
}

#[test]
fn a_container_is_root_of_its_pod_alone() {
    let rig = Rig::new("users", false);
    let c = rig.waiting("c", json!({}));
    let line = format!("0 {HOST} {LENGTH}");
    let maps = rig.sh(
        &c,
        "cat /proc/self/uid_map /proc/1/gid_map | tr -s ' ' | sed 's/^ //'",
    );
    assert_eq!(maps, format!("{line}\n{line}"));

    // The image's files, the pod's, and devices belong to whom the image says.
    let root = "/ /bin/busybox /etc /etc/hosts /etc/hostname /etc/resolv.conf /dev /dev/null /dev/pts /dev/shm /dev/fd /proc/self/fd/";
    let script = format!("stat -c '%u:%g %n' {root} | grep -v '^0:0 ' || echo all");
    assert_eq!(rig.sh(&c, &script), "all");
    assert_eq!(rig.sh(&c, "stat -c '%u:%g' /home/user"), "1000:1000");
    let script = "echo x >/home/user/file && chown 1000:50000 /home/user/file && stat -c '%u:%g' /home/user /home/user/file
        echo x >>/etc/hosts && echo x >/dev/null && echo x >/dev/shm/x && echo written";
    assert_eq!(rig.sh(&c, script), "1000:1000\n1000:50000\nwritten");
    // Nobody else's ids.
    let script = format!(
        "chown {LENGTH} /tmp 2>&1; mknod /tmp/disk b 254 0 2>&1; echo 1 2>&1 >/proc/sys/kernel/panic"
    );
    let refused = rig
        .daemon
        .exec(&c, &["sh", "-c", &format!("{script}; true")]);
    for word in ["Invalid argument", "not permitted", "ermission denied"] {
        assert!(refused.contains(word), "{refused}");
    }

    // Both containers of the pod are in one user namespace, and what enters later, too.
    let confined = json!({"run_as_user": {"value": 1000}, "no_new_privs": true, "readonly_rootfs": true, "seccomp": {"profile_type": 0},
        "masked_paths": ["/proc/timer_list", "/proc/scsi"], "readonly_paths": ["/proc/sys", "/proc/bus"]});
    let other = rig.waiting("other", confined);
    let namespaces = |container: &str| {
        let script = "for n in user net ipc uts; do readlink /proc/self/ns/$n; done";
        rig.sh(container, script)
    };
    assert_eq!(namespaces(&c), namespaces(&other));
    let script = "id -u; cat /dev/shm/x /proc/timer_list; echo new >/dev/stderr; grep -h Seccomp: /proc/self/status
        touch /new 2>&1; echo x 2>&1 >/proc/sys/kernel/domainname; true";
    let said = rig.sh(&other, script);
    let lines: Vec<&str> = said.lines().collect();
    assert_eq!(lines[..3], ["1000", "x", "Seccomp:\t2"], "{said}");
    assert_eq!(said.matches("Read-only file system").count(), 2, "{said}");

    let status = rig.daemon.inspect_pod(&rig.id);
    let options = &status["linux"]["namespaces"]["options"]["usernsOptions"];
    assert_eq!(options["uids"][0]["hostId"], HOST, "{status}");
    rig.daemon.remove_pods();
    rig.daemon.assert_nothing_left();
}

#[test]
fn its_namespaces_are_its_own_to_configure() {
    let rig = Rig::new("own", false);
    let context = json!({"capabilities": {"add_capabilities": ["SYS_ADMIN", "NET_ADMIN"]},
        "namespace_options": {"pid": 0}});
    let script = format!(
        "mkdir /mnt /www; echo hello >/www/index.html
        mount -t tmpfs none /mnt && echo mounted; hostname renamed && echo named
        ip link add bridge7 type bridge && ip addr add 10.9.8.7/32 dev lo && echo configured
        echo 77 >/proc/sys/net/core/somaxconn && echo written; httpd -p 80 -h /www; {WAITS}"
    );
    let mut config = Rig::config("c", &script, context);
    config["linux"]["security_context"]["readonly_paths"] = json!([]);
    let c = rig.start(&config);
    // The network that CNI gave the pod.
    let status = rig.daemon.inspect_pod(&rig.id);
    let ip = status["network"]["ip"].as_str().expect("an address");
    let body = eventually("the web server answers", || {
        let answer = http::request(&format!("{ip}:80"), "GET", "/index.html", &[], &[]).ok()?;
        (answer.status == 200).then_some(answer.body)
    });
    assert_eq!(body, b"hello\n");
    let addresses = rig.sh(&c, "ip -o addr");
    let has = |address: &str| addresses.contains(address);
    assert!(has(ip) && has("10.9.8.7/32"), "{addresses}");
    let out = logs::stdout(&rig.pod.log("c"));
    assert_eq!(out, ["mounted", "named", "configured", "written"]);
    let said = rig.sh(
        &c,
        "hostname; cat /proc/sys/net/core/somaxconn; ls /sys/class/net",
    );
    assert_eq!(said, "renamed\n77\nbridge7\neth0\nlo");
}

/// Says who it is: its effective user, and its effective capabilities.
const WHO: &str = r#"#include <stdio.h>
#include <string.h>
#include <unistd.h>
int main(void) {
    char line[256];
    FILE *status = fopen("/proc/self/status", "r");
    while (status && fgets(line, sizeof line, status))
        if (!strncmp(line, "CapEff:", 7)) printf("%d %s", geteuid(), line + 8);
    return 0;
}"#;

#[test]
fn programs_change_who_runs_them() {
    let rig = Rig::new("suid", false);
    let source = rig.dir.join("who.c");
    let program = rig.dir.join("who");
    fs::write(&source, WHO).expect("ours");
    let built = Command::new("gcc")
        .args(["-static", "-Os", "-o"])
        .args([&program, &source])
        .status();
    assert!(built.expect("gcc").success());
    let program = fs::read(program).expect("built");
    // linux/capability.h, `struct vfs_cap_data`: version 2, effective, CAP_NET_BIND_SERVICE.
    let mut capability = vec![1, 0, 0, 2, 0, 4, 0, 0];
    capability.resize(20, 0);
    let layer = Layer::new()
        .entry("suid", EntryType::Regular, 0o4755, "", &program)
        .xattr("security.capability", &capability)
        .entry("capable", EntryType::Regular, 0o755, "", &program);
    let name = Registry::shared().name("who:1");
    Registry::shared().push("who:1", &Image::busybox_and(vec![layer]));
    rig.daemon.crictl(&["pull", &name]).ok();
    let mut config = Rig::config("c", WAITS, json!({"run_as_user": {"value": 1000}}));
    config["image"]["image"] = json!(name);
    let c = rig.start(&config);
    let said = rig.sh(&c, "/suid | cut -d' ' -f1; /capable");
    assert_eq!(said, "0\n1000 0000000000000400");
}

#[test]
fn a_volume_without_a_map_has_the_nodes_ids() {
    let rig = Rig::new("plain", false);
    let plain = rig.dir.join("plain");
    fs::create_dir(&plain).expect("a fresh directory");
    fs::set_permissions(&plain, fs::Permissions::from_mode(0o777)).expect("chmod");
    fs::write(plain.join("known"), "x").expect("writes");
    chown(
        &plain.join("known"),
        Some(HOST.into()),
        Some((HOST + 7).into()),
    )
    .expect("chown");
    let mut config = Rig::config("c", WAITS, json!({}));
    config["mounts"] = json!([{"host_path": plain, "container_path": "/plain"}]);
    let c = rig.start(&config);
    let script =
        "stat -c '%u:%g' /plain /plain/known; echo x >/plain/new; stat -c '%u:%g' /plain/new";
    assert_eq!(rig.sh(&c, script), "65534:65534\n0:7\n0:0");
    assert_eq!(owner(&plain.join("new")), (HOST, HOST));
}

/// A volume with the pod's map.
fn mapped(host: &Path, container: &str) -> Value {
    json!({"host_path": host, "container_path": container, "uidMappings": mapping(), "gidMappings": mapping()})
}

/// Whether the node maps the ids of a directory for temporary files, which may be on a tmpfs.
fn node_maps_ids() -> bool {
    let release = nix::sys::utsname::uname().expect("uname");
    let release = release.release().to_str().expect("ASCII").to_owned();
    let mut numbers = release.split('.').map(|part| part.parse().unwrap_or(0));
    (numbers.next(), numbers.next()) >= (Some(6), Some(3))
}

#[test]
fn a_mapped_volume_has_the_same_ids_on_both_sides() {
    let rig = Rig::new("mapped", false);
    let data = rig.dir.join("data");
    fs::create_dir(&data).expect("a fresh directory");
    fs::write(data.join("roots"), "r").expect("writes");
    fs::set_permissions(data.join("roots"), fs::Permissions::from_mode(0o600)).expect("chmod");
    fs::write(data.join("users"), "u").expect("writes");
    chown(&data.join("users"), Some(1000.into()), Some(50_000.into())).expect("chown");
    let group = data.join("group");
    fs::create_dir(&group).expect("a fresh directory");
    chown(&group, None, Some(7.into())).expect("chown");
    fs::set_permissions(&group, fs::Permissions::from_mode(0o2770)).expect("chmod");

    let mut config = Rig::config("c", WAITS, json!({}));
    config["mounts"] = json!([mapped(&data, "/v")]);
    if !node_maps_ids() {
        let ran = rig.daemon.try_create(&rig.id, &rig.pod, &config);
        let message = ran.failed("FailedPrecondition");
        assert!(message.contains("cannot map ids"), "{message}");
        return;
    }
    let c = rig.start(&config);
    let script = "stat -c '%u:%g' /v /v/roots /v/users; cat /v/roots
        cd /v; echo x >new; echo x >given; chown 1000:7 given; mkdir dir; ln -s x link; stat -c '%u:%g' given";
    assert_eq!(rig.sh(&c, script), "0:0\n0:0\n1000:50000\nr1000:7");
    for (name, ids) in [
        ("new", (0, 0)),
        ("given", (1000, 7)),
        ("dir", (0, 0)),
        ("link", (0, 0)),
    ] {
        assert_eq!(owner(&data.join(name)), ids, "{name}");
    }

    // A user, and its groups (fsGroup).
    let context = json!({"run_as_user": {"value": 1000}, "run_as_group": {"value": 2000}, "supplemental_groups": [7]});
    let mut config = Rig::config("user", WAITS, context);
    config["mounts"] = json!([mapped(&data, "/v")]);
    let user = rig.start(&config);
    let script = "cat /v/roots 2>/dev/null; cat /v/given; echo x >/v/group/file";
    assert_eq!(rig.sh(&user, script), "x");
    assert_eq!(owner(&group.join("file")), (1000, 7));
    rig.daemon.remove_pods();
    rig.daemon.assert_nothing_left();
}

#[test]
fn images_are_volumes_with_the_pods_ids() {
    let rig = Rig::new("image", false);
    let mut config = Rig::config("c", WAITS, json!({}));
    let image = json!({"image": {"image": busybox()}, "container_path": "/image", "readonly": true,
        "uidMappings": mapping(), "gidMappings": mapping()});
    config["mounts"] = json!([image]);
    let c = rig.start(&config);
    assert_eq!(
        rig.sh(&c, "stat -c '%u:%g' /image/bin /image/home/user"),
        "0:0\n1000:1000"
    );
    config["metadata"]["name"] = json!("refused");
    config["mounts"][0]["uidMappings"][0]["host_id"] = json!(1);
    let ran = rig.daemon.try_create(&rig.id, &rig.pod, &config);
    let message = ran.failed("InvalidArgument");
    assert!(
        message.contains("config.mounts[0].uidMappings"),
        "{message}"
    );
}

#[test]
fn privileged_is_all_that_its_root_can_be() {
    let rig = Rig::new("privileged", true);
    let c = rig.waiting("c", json!({"privileged": true}));
    let script = "grep CapEff /proc/self/status; [ -b /dev/vda ] && echo disk
        mkdir /mnt; mount -t tmpfs none /mnt && echo mounted
        mkdir /sys/fs/cgroup/own && echo delegated
        stat -c '%u' /sys/fs/cgroup/memory.max; echo 1 2>&1 >/proc/sys/kernel/panic || true";
    let out = rig.sh(&c, script);
    for word in [
        "000001ffffffffff",
        "disk",
        "mounted",
        "delegated",
        "65534",
        "ermission denied",
    ] {
        assert!(out.contains(word), "no {word}: {out}");
    }
    let mut tty = Rig::config(
        "tty",
        "tty; ls -l /dev/console | cut -c1; stat -c %u $(tty)",
        json!({"run_as_user": {"value": 1000}}),
    );
    tty["tty"] = json!(true);
    let terminal = rig.start(&tty);
    rig.daemon.cri().wait_exit(&terminal);
    let said = logs::stdout(&rig.pod.log("tty"))
        .join("\n")
        .replace('\r', "");
    assert_eq!(said, "/dev/pts/0\nc\n1000");
}

#[test]
fn what_is_no_user_namespace_is_refused() {
    let rig = Rig::new("refused", false);
    let map = |host: u32, container: u32, length: u32| json!([{"host_id": host, "container_id": container, "length": length}]);
    let good = mapping();
    let mut different = users(0, &good);
    different["userns_options"]["gids"] = map(HOST + 1, 0, LENGTH);
    let two = json!([good[0], {"host_id": 1, "container_id": LENGTH, "length": 1}]);
    // NODE is 2, CONTAINER 1, TARGET 3.
    for options in [
        different,
        users(0, &two),
        users(0, &map(HOST, 1, LENGTH)),
        users(0, &map(HOST, 0, 0)),
        users(0, &map(u32::MAX, 0, 2)),
        users(1, &good),
        users(2, &good),
        users(3, &json!([])),
    ] {
        let linux = json!({"security_context": {"namespace_options": options}});
        let pod = rig.daemon.pod("bad").with("linux", linux);
        let message = rig.daemon.try_run_pod(&pod).failed("InvalidArgument");
        assert!(message.contains("userns_options"), "{message}");
    }

    let refused = |config: &Value, word: &str| {
        let ran = rig.daemon.try_create(&rig.id, &rig.pod, config);
        let message = ran.failed("InvalidArgument");
        assert!(message.contains(word), "{message}");
    };
    for options in [users(2, &json!([])), users(0, &map(HOST + 1, 0, LENGTH))] {
        let mut config = Rig::config("c", "true", json!({}));
        config["linux"]["security_context"]["namespace_options"] = options;
        refused(&config, "userns_options");
    }
    let stranger = json!({"run_as_user": {"value": LENGTH}});
    refused(&Rig::config("c", "true", stranger), "65536");
    let mut config = Rig::config("c", "true", json!({}));
    for (uids, gids, field) in [
        (&good, &json!([]), "gidMappings"),
        (&json!([]), &good, "uidMappings"),
        (&map(HOST, 0, 0), &good, "uidMappings"),
    ] {
        config["mounts"] = json!([{"host_path": rig.dir, "container_path": "/v", "uidMappings": uids, "gidMappings": gids}]);
        refused(&config, &format!("config.mounts[0].{field}"));
    }
    assert_eq!(rig.daemon.cri().containers(), vec![]);
    rig.daemon.remove_pods();
    rig.daemon.assert_nothing_left();
}
