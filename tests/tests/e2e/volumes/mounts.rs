//! How volumes are mounted, and what cannot be.

use std::fs;
use std::path::Path;
use std::process::Command;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use podvisor_tests::crictl::shell;
use podvisor_tests::eventually;
use podvisor_tests::registry::busybox;
use serde_json::json;

use super::{Rig, read_only, volume};

#[test]
fn read_only_volumes() {
    let mut rig = Rig::new("readonly");
    let data = rig.directory("data");
    fs::write(data.join("file"), "x").expect("writes");
    rig.tmpfs("data/below", "1m");
    let recursive = json!({"host_path": data, "container_path": "/rro", "readonly": true, "recursive_read_only": true});
    let c = rig.container(
        "c",
        &[read_only(&data, "/ro"), recursive, volume(&data, "/rw")],
    );
    let try_write = |path: &str| rig.sh(&c, &format!("echo y 2>&1 >{path} || true"));
    for path in ["/ro/file", "/ro/new", "/rro/file", "/rro/below/new"] {
        let said = try_write(path);
        assert!(said.contains("Read-only file system"), "{path}: {said}");
    }
    // Of itself alone: what is mounted below is what it is.
    assert_eq!(try_write("/ro/below/through-ro"), "");
    assert_eq!(try_write("/rw/through-rw"), "");
    assert_eq!(
        rig.sh(&c, "ls /rro/below /rro"),
        "/rro:\nbelow\nfile\nthrough-rw\n\n/rro/below:\nthrough-ro"
    );
    assert!(data.join("below/through-ro").exists() && data.join("through-rw").exists());
}

#[test]
fn later_mounts_of_the_node_are_seen_as_asked() {
    let mut rig = Rig::new("propagation");
    let base = rig.tmpfs("base", "1m");
    let nothing = None::<&str>;
    mount(nothing, &base, nothing, MsFlags::MS_SHARED, nothing).expect("shares");
    fs::create_dir(base.join("below")).expect("a directory");
    let follows = json!({"host_path": base, "container_path": "/slave", "propagation": 1});
    let c = rig.container("c", &[volume(&base, "/private"), follows]);
    let below = rig.tmpfs("base/below", "1m");
    fs::write(below.join("seen"), "").expect("writes");
    assert_eq!(rig.sh(&c, "ls /slave/below; ls /private/below"), "seen");
    umount2(&below, MntFlags::empty()).expect("nothing of the pod's holds it");
    assert_eq!(rig.sh(&c, "ls /slave/below"), "");
}

#[test]
fn what_cannot_be_mounted_is_refused_and_leaves_nothing() {
    let rig = Rig::new("refused");
    let data = rig.directory("data");
    let fine = volume(&data, "/fine");
    for (mount, field) in [
        (
            json!({"host_path": "data", "container_path": "/x"}),
            "host_path",
        ),
        (
            json!({"host_path": data, "container_path": "x"}),
            "container_path",
        ),
        (
            json!({"host_path": "", "container_path": "/x"}),
            "host_path",
        ),
        (volume(&rig.path("missing"), "/x"), "host_path"),
        (volume(&data.join("../data"), "/x"), "host_path"),
        (volume(&data, "/proc"), "container_path"),
        (volume(&data, "/proc/sys/net"), "container_path"),
        (volume(&data, "/"), "container_path"),
        (
            json!({"host_path": data, "container_path": "/x", "propagation": 2}),
            "propagation",
        ),
        (
            json!({"host_path": data, "container_path": "/x", "recursive_read_only": true}),
            "recursive_read_only",
        ),
        (
            json!({"host_path": data, "container_path": "/x", "readonly": true,
                "recursive_read_only": true, "propagation": 1}),
            "recursive_read_only",
        ),
    ] {
        let said = rig.refused(&[fine.clone(), mount.clone()]);
        let path = format!("config.mounts[1].{field}: ");
        assert!(said.contains(&path), "{mount}: {said}");
    }
    rig.daemon.remove_pods();
    rig.daemon.assert_nothing_left();
}

#[test]
fn volumes_outlive_the_daemon() {
    let mut rig = Rig::new("outlive");
    let data = rig.directory("data");
    let c = rig.container("c", &[volume(&data, "/v")]);
    let gone = rig.container("gone", &[volume(&data, "/v")]);
    rig.daemon.kill();
    // The pod works on without podvisord; whether it does is asked when podvisord is back.
    rig.daemon.restart();
    rig.sh(&c, "echo still >/v/there");
    assert_eq!(
        fs::read_to_string(data.join("there")).expect("there"),
        "still\n"
    );
    rig.daemon.cri().remove_container(&gone);
    let later = rig.container("later", &[volume(&data, "/w")]);
    assert_eq!(rig.sh(&later, "cat /w/there"), "still");
    rig.daemon.remove_pods();
    rig.daemon.assert_nothing_left();
}

#[test]
fn a_container_can_be_created_again_when_the_server_died() {
    let rig = Rig::new("died");
    let data = rig.directory("data");
    fs::write(data.join("x"), "x").expect("writes");
    let c = rig.container("c", &[volume(&data, "/v")]);
    let server = rig.daemon.pod_resources().into_iter().find_map(|line| {
        let process = line.strip_prefix("process: ")?;
        let (pid, command) = process.split_once(' ')?;
        command
            .contains("podvisor-fs")
            .then(|| pid.parse().expect("a number"))
    });
    kill(Pid::from_raw(server.expect("it runs")), Signal::SIGKILL).expect("kills");
    // Nothing hangs.
    eventually("the volume says that it is gone", || {
        let said = rig.sh(&c, "cat /v/x 2>&1 || true");
        (said != "x").then_some(())
    });
    let again = rig.container("again", &[volume(&data, "/v")]);
    assert_eq!(rig.sh(&again, "cat /v/x; echo y >/v/y"), "x");
    assert_eq!(fs::read_to_string(data.join("y")).expect("there"), "y\n");
}

/// A file system of the node that does not go on, for whoever writes to it.
struct Frozen<'a>(&'a Path);

impl<'a> Frozen<'a> {
    fn new(path: &'a Path) -> Self {
        let frozen = Command::new("fsfreeze").arg("-f").arg(path).status();
        assert!(frozen.expect("fsfreeze").success());
        Self(path)
    }
}

impl Drop for Frozen<'_> {
    fn drop(&mut self) {
        let _ = Command::new("fsfreeze").arg("-u").arg(self.0).status();
    }
}

/// Whether a thread of a process waits and cannot be killed.
fn hangs(pid: Pid) -> bool {
    let threads = fs::read_dir(format!("/proc/{pid}/task"));
    threads.into_iter().flatten().flatten().any(|thread| {
        let stat = fs::read_to_string(thread.path().join("stat")).unwrap_or_default();
        stat.rsplit(") ")
            .next()
            .is_some_and(|state| state.starts_with('D'))
    })
}

#[test]
fn a_volume_that_hangs_holds_up_no_call() {
    let mut rig = Rig::new("frozen");
    let data = rig.ext4("data", &[], "loop").expect("mounts");
    // The monitor writes, from the third time on.
    let script = "exec 3<>/v/file; i=0; while :; do echo $i >&3; echo wrote; sleep 0.1; done";
    let mut config = shell("writer", &busybox(), script);
    config["mounts"] = json!([volume(&data, "/v")]);
    rig.daemon.create_started(&rig.id, &rig.pod, &config);
    let log = rig.pod.log("writer");
    let lines = || fs::read_to_string(&log).unwrap_or_default().lines().count();
    eventually("it writes", || (lines() > 4).then_some(()));
    {
        let _frozen = Frozen::new(&data);
        eventually("the monitor hangs", || {
            let processes = rig.daemon.instance.processes();
            let mut monitors = processes
                .iter()
                .filter(|(_, command)| command.contains("podvisor-monitor"));
            monitors.any(|(pid, _)| hangs(*pid)).then_some(())
        });
        let stopped = rig.daemon.crictl(&["--timeout", "60s", "stopp", &rig.id]);
        assert_ne!(stopped.code, 0, "its processes cannot end");
        let said = stopped.stderr;
        assert!(!said.contains("DeadlineExceeded"), "{said}");
    }
    rig.daemon.cri().stop_pod(&rig.id).expect("StopPodSandbox");
    rig.daemon.remove_pods();
    rig.daemon.assert_nothing_left();
}
