//! Pods of the host's own: handlers, and who goes where.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::signal::{Signal, kill};
use podvisor_tests::crictl::{Pod, container, shell};
use podvisor_tests::daemon::{Daemon, Options};
use podvisor_tests::registry::busybox;
use podvisor_tests::{eventually, http, logs};
use serde_json::{Value, json};

/// A daemon with the busybox image.
fn daemon() -> Daemon {
    daemon_with(&[])
}

/// With lines for its configuration.
fn daemon_with(config: &[(&'static str, &str)]) -> Daemon {
    let config = config.iter();
    let daemon = Daemon::start_with(&Options {
        config: config
            .map(|(section, line)| (*section, (*line).to_owned()))
            .collect(),
        ..Options::default()
    });
    daemon.pull(&busybox());
    daemon
}

/// A pod's `linux.security_context`.
fn security(context: Value) -> Value {
    json!({ "security_context": context })
}

/// Everything that the monitor of a pod does for one in a VM, it does here.
fn lives(daemon: &mut Daemon, handler: &'static str) {
    let pod = daemon
        .pod(handler)
        .by_handler(handler)
        .with("hostname", json!("inside"));
    let id = daemon.try_run_pod(&pod).id();
    let script = "hostname; id -u; echo err >&2; cat /etc/hostname; grep Seccomp: /proc/self/status; \
                  mount | grep -c ' / type overlay'; exec sleep 1000";
    let mut main = shell("main", &busybox(), script);
    main["linux"] =
        security(json!({"run_as_username": "www-data", "seccomp": {"profile_type": 0}}));
    let main = daemon.try_create(&id, &pod, &main).id();
    daemon.crictl(&["start", &main]).ok();
    logs::wait_for(&pod.log("main"), "1");
    assert_eq!(
        logs::stdout(&pod.log("main")),
        ["inside", "33", "inside", "Seccomp:\t2", "1"]
    );
    assert_eq!(logs::stream(&pod.log("main"), "stderr"), ["err"]);
    let release = nix::sys::utsname::uname().expect("a kernel");
    assert_eq!(
        daemon.exec(&main, &["uname", "-r"]),
        release.release().to_string_lossy()
    );
    assert_eq!(
        daemon
            .crictl(&["exec", "-s", &main, "sh", "-c", "exit 3"])
            .code,
        1
    );

    let fails = daemon.create(
        &id,
        &pod,
        &container("fails", &busybox(), &["/no/such/program"]),
    );
    let error = daemon
        .crictl(&["start", &fails])
        .failed("FailedPrecondition");
    assert!(error.contains("/no/such/program"), "{error}");
    let status = daemon.inspect(&fails);
    assert_eq!(
        (status["exitCode"].as_i64(), status["reason"].as_str()),
        (Some(128), Some("StartError"))
    );
    let ends = shell("ends", &busybox(), "echo listens; nc -l -p 99; exit 17");
    let ends = daemon.create_started(&id, &pod, &ends);
    logs::wait_for(&pod.log("ends"), "listens");
    let ip = daemon.cri().pod_status(&id).network.expect("a network").ip;

    // Without podvisord.
    daemon.kill();
    eventually("the container listens", || {
        std::net::TcpStream::connect((ip.as_str(), 99)).ok()
    });
    daemon.restart();
    let status = daemon.cri().wait_exit(&ends);
    assert_eq!((status.exit_code, status.reason.as_str()), (17, "Error"));
    assert_eq!(daemon.exec(&main, &["echo", "still"]), "still");
    assert_eq!(daemon.leaks(), "");

    // Nobody but root gets to an image's programs.
    let run_dir = daemon.instance.run_dir();
    for dir in ["layers".to_owned(), format!("sandboxes/{id}/bundles")] {
        let mode = fs::metadata(run_dir.join(dir))
            .expect("a folder")
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o700);
    }
    daemon.crictl(&["rm", "-f", &ends]).ok();
    daemon.crictl(&["stop", "--timeout", "0", &main]).ok();
    let status = daemon.cri().wait_exit(&main);
    assert_eq!(status.exit_code, 137);
    daemon.crictl(&["stopp", &id]).ok();
    daemon.crictl(&["rmp", &id]).ok();
}

#[test]
fn a_pod_of_runc_lives_as_one_in_a_vm() {
    lives(&mut daemon(), "runc");
}

#[test]
fn a_pod_of_crun_lives_as_one_in_a_vm() {
    let has = |file: &str| Path::new("/sys/fs/cgroup").join(file).exists();
    if has("memory") && has("unified/cgroup.controllers") {
        println!("crun does not run with cgroup v1 and v2 at once, as they are here");
        return;
    }
    let config = [
        ("handlers.runc", "runtime = \"runc\""),
        ("handlers.crun", "runtime = \"crun\""),
    ];
    lives(&mut daemon_with(&config), "crun");
}

#[test]
fn a_container_of_runsc_has_its_own_kernel() {
    // Debian's version takes every namespace of a newer kernel for the node's own, and then wants no network of its own.
    let dir = tempfile::tempdir().expect("a folder");
    let runtime = dir.path().join("runsc");
    fs::write(&runtime, "#!/bin/sh\nexec runsc --network=host \"$@\"\n").expect("writes");
    fs::set_permissions(&runtime, fs::Permissions::from_mode(0o755)).expect("a program");
    let line = format!("runtime = {:?}", runtime.display().to_string());
    let mut daemon = daemon_with(&[("handlers.gvisor", &line)]);
    let pod = daemon.pod("gvisor").by_handler("gvisor");
    let id = daemon.run_pod(&pod);
    let script = "dmesg | grep -o gVisor; echo err >&2; exec sleep 1000";
    let main = daemon.create_started(&id, &pod, &shell("main", &busybox(), script));
    logs::wait_for(&pod.log("main"), "gVisor");
    logs::wait_for(&pod.log("main"), "err");
    let release = nix::sys::utsname::uname().expect("a kernel");
    assert_ne!(
        daemon.exec(&main, &["uname", "-r"]),
        release.release().to_string_lossy()
    );
    let ip = daemon.cri().pod_status(&id).network.expect("a network").ip;
    let ends = shell("ends", &busybox(), "echo listens; nc -l -p 99; exit 17");
    let ends = daemon.create_started(&id, &pod, &ends);
    logs::wait_for(&pod.log("ends"), "listens");

    // Without podvisord.
    daemon.kill();
    eventually("the container listens", || {
        std::net::TcpStream::connect((ip.as_str(), 99)).ok()
    });
    daemon.restart();
    let status = daemon.cri().wait_exit(&ends);
    assert_eq!((status.exit_code, status.reason.as_str()), (17, "Error"));
    assert_eq!(daemon.exec(&main, &["echo", "still"]), "still");
    daemon.crictl(&["stop", "--timeout", "0", &main]).ok();
    assert_eq!(daemon.cri().wait_exit(&main).exit_code, 137);
    daemon.crictl(&["rmp", "-f", &id]).ok();
    assert_eq!(daemon.leaks(), "");
}

#[test]
fn both_kinds_of_pods_reach_each_other() {
    let daemon = daemon();
    let run = |name: &str, handler| {
        let pod = daemon.pod(name).by_handler(handler);
        let id = daemon.run_pod(&pod);
        let script =
            format!("mkdir /www; echo {name} > /www/index.html; exec httpd -f -p 80 -h /www");
        let container = daemon.create_started(&id, &pod, &shell(name, &busybox(), &script));
        let ip = daemon.cri().pod_status(&id).network.expect("a network").ip;
        (container, ip)
    };
    let (in_vm, vm_ip) = run("in-vm", "podvisor");
    let (on_host, host_ip) = run("on-host", "runc");
    for ip in [&vm_ip, &host_ip] {
        eventually("the server answers", || {
            http::request(&format!("{ip}:80"), "GET", "/index.html", &[], &[]).ok()
        });
    }
    let get = |container: &str, ip: &str| {
        daemon.exec(
            container,
            &["wget", "-q", "-O", "-", &format!("http://{ip}/index.html")],
        )
    };
    assert_eq!(get(&in_vm, &host_ip), "on-host");
    assert_eq!(get(&on_host, &vm_ip), "in-vm");
    let kernel = |container: &str| daemon.exec(container, &["uname", "-r"]);
    assert_ne!(kernel(&in_vm), kernel(&on_host));
}

#[test]
fn what_a_vm_cannot_give_is_routed_or_refused() {
    let daemon = daemon();
    let cases = [
        ("host-network", json!({"namespace_options": {"network": 2}})),
        ("host-pid", json!({"namespace_options": {"pid": 2}})),
        ("host-ipc", json!({"namespace_options": {"ipc": 2}})),
        ("privileged", json!({"privileged": true})),
    ];
    for (reason, context) in &cases {
        let pod = daemon.pod(reason).with("linux", security(context.clone()));
        // A pod that names the handler for VMs is in one, or does not run.
        let named = daemon.try_run_pod(&pod);
        if *reason == "privileged" {
            daemon.cri().remove_pod(&named.id());
        } else {
            named.failed("FailedPrecondition");
        }
        let id = daemon.run_pod(&pod.clone().by_handler(""));
        let annotations = &daemon.inspect_pod(&id)["annotations"];
        assert_eq!(
            annotations["podvisor.io/routed-to"], "runc",
            "{annotations}"
        );
        assert_eq!(annotations["podvisor.io/routed-because"], *reason);
        assert!(daemon.log().contains("routed: a VM cannot give"));
        daemon.cri().remove_pod(&id);
    }
    let unknown = daemon.pod("unknown").by_handler("gvisor");
    daemon.try_run_pod(&unknown).failed("InvalidArgument");
    let plain = daemon.run_pod(&daemon.pod("plain").by_handler(""));
    assert!(
        daemon.inspect_pod(&plain)["annotations"]
            .get("podvisor.io/routed-to")
            .is_none()
    );
}

#[test]
fn routing_is_the_operators_to_decide() {
    let refuses = daemon_with(&[("", "route_to_runc = []")]);
    let context = security(json!({"namespace_options": {"network": 2}}));
    let pod = refuses
        .pod("p")
        .by_handler("")
        .with("linux", context.clone());
    refuses.try_run_pod(&pod).failed("FailedPrecondition");
    drop(refuses);

    let limited = daemon_with(&[("", "route_namespaces = [\"kube-system\"]")]);
    let mut pod = limited.pod("p").by_handler("").with("linux", context);
    limited.try_run_pod(&pod).failed("FailedPrecondition");
    pod.config["metadata"]["namespace"] = json!("kube-system");
    limited.run_pod(&pod);
}

/// A routed pod with a container that sleeps. The pod, its id and the container's.
fn routed(daemon: &Daemon, name: &str, context: Value) -> (Pod, String, String) {
    let pod = daemon
        .pod(name)
        .by_handler("")
        .with("linux", security(context.clone()));
    let id = daemon.run_pod(&pod);
    let mut config = shell(name, &busybox(), "sleep 1000");
    config["linux"] = security(context);
    let container = daemon.create_started(&id, &pod, &config);
    (pod, id, container)
}

#[test]
fn host_namespaces_are_the_hosts() {
    let daemon = daemon();
    let own = |kind: &str| fs::read_link(format!("/proc/self/ns/{kind}")).expect("a namespace");
    let of = |container: &str, kind: &str| {
        daemon.exec(container, &["readlink", &format!("/proc/self/ns/{kind}")])
    };
    let all = json!({"namespace_options": {"network": 2, "pid": 2, "ipc": 2}});
    let (_, _, shares) = routed(&daemon, "shares", all);
    for kind in ["net", "ipc", "pid", "uts"] {
        assert_eq!(Path::new(&of(&shares, kind)), own(kind), "{kind}");
    }
    assert_ne!(Path::new(&of(&shares, "mnt")), own("mnt"));
    // What it leaves behind, the monitor reaps.
    let orphan = "(sleep 0.2 & echo $! > /tmp/pid) ; cat /tmp/pid";
    let orphan = daemon.exec(&shares, &["sh", "-c", orphan]);
    eventually("the orphan is reaped", || {
        (!Path::new("/proc").join(&orphan).exists()).then_some(())
    });

    let (pod, id, alone) = routed(&daemon, "alone", json!({"privileged": true}));
    for kind in ["net", "ipc", "pid", "uts"] {
        assert_ne!(Path::new(&of(&alone, kind)), own(kind), "{kind}");
    }
    // The containers of a pod share a pid namespace, whose first process is nobody's shell.
    let mut second = shell("second", &busybox(), "sleep 1001");
    second["linux"] = security(json!({"privileged": true}));
    let second = daemon.create_started(&id, &pod, &second);
    assert_eq!(of(&second, "pid"), of(&alone, "pid"));
    assert!(
        daemon
            .exec(&second, &["ps", "-o", "args"])
            .contains("sleep 1000")
    );
    let status = daemon.exec(&second, &["cat", "/proc/1/status"]);
    assert!(status.contains("CapEff:\t0000000000000000"), "{status}");
    assert_eq!(daemon.exec(&second, &["ls", "/proc/1/root/"]), "");
}

#[test]
fn volumes_are_mounts_of_the_node() {
    let daemon = daemon();
    let dir = daemon.instance.dir().join("volume");
    fs::create_dir_all(dir.join("sub")).expect("a fresh directory");
    fs::write(dir.join("file"), "the node's").expect("a fresh directory");
    let nothing: Option<&str> = None;
    mount(Some(&dir), &dir, nothing, MsFlags::MS_BIND, nothing).expect("mounts");
    mount(nothing, &dir, nothing, MsFlags::MS_SHARED, nothing).expect("shared");
    mount(
        Some("t"),
        &dir.join("sub"),
        Some("tmpfs"),
        MsFlags::empty(),
        nothing,
    )
    .expect("mounts");

    let privileged = json!({"privileged": true});
    let pod = daemon
        .pod("volumes")
        .by_handler("")
        .with("linux", security(privileged.clone()));
    let id = daemon.run_pod(&pod);
    let mut config = shell("c", &busybox(), "sleep 1000");
    let volume = |target: &str, more: Value| {
        let mut mount = json!({"container_path": target, "host_path": dir});
        mount
            .as_object_mut()
            .expect("an object")
            .extend(more.as_object().expect("one").clone());
        mount
    };
    config["mounts"] = json!([
        volume("/rw", json!({})),
        volume("/ro", json!({"readonly": true})),
        volume(
            "/rro",
            json!({"readonly": true, "recursive_read_only": true})
        ),
        volume("/slave", json!({"propagation": 1})),
        volume("/shared", json!({"propagation": 2})),
    ]);
    config["linux"] = security(privileged);
    let container = daemon.create_started(&id, &pod, &config);
    let writes = |path: &str| {
        daemon
            .crictl(&["exec", "-s", &container, "touch", path])
            .code
            == 0
    };
    assert_eq!(daemon.exec(&container, &["cat", "/ro/file"]), "the node's");
    assert_eq!(
        ["/rw/x", "/ro/x", "/ro/sub/x", "/rro/x", "/rro/sub/x"].map(writes),
        [true, false, true, false, false]
    );
    fs::create_dir(dir.join("later")).expect("writable");
    mount(
        Some("t"),
        &dir.join("later"),
        Some("tmpfs"),
        MsFlags::empty(),
        nothing,
    )
    .expect("mounts");
    fs::write(dir.join("later/seen"), "").expect("a tmpfs");
    let sees = |path: &str| daemon.crictl(&["exec", "-s", &container, "ls", path]).code == 0;
    assert_eq!(
        ["/rw/later/seen", "/slave/later/seen", "/shared/later/seen"].map(sees),
        [false, true, true]
    );
    daemon.exec(
        &container,
        &[
            "sh",
            "-c",
            "mkdir /shared/inner && mount -t tmpfs inner /shared/inner && touch /shared/inner/out",
        ],
    );
    assert!(dir.join("inner/out").exists(), "Bidirectional");
    daemon.cri().remove_pod(&id);
    assert!(dir.join("file").exists() && dir.join("later/seen").exists());
    umount2(&dir, MntFlags::MNT_DETACH).expect("mounted");
}

#[test]
fn limits_hold_and_change() {
    let daemon = daemon();
    let pod = daemon.pod("limits").by_handler("runc");
    let id = daemon.run_pod(&pod);
    let limit = |name: &str, script: &str| {
        let mut config = shell(name, &busybox(), script);
        config["linux"] =
            json!({"resources": {"memory_limit_in_bytes": 32 << 20, "cpu_shares": 512}});
        daemon.create_started(&id, &pod, &config)
    };
    let eats = limit("eats", "x=0123456789; while :; do x=$x$x; done");
    let status = daemon.cri().wait_exit(&eats);
    assert_eq!(
        (status.exit_code, status.reason.as_str()),
        (137, "OOMKilled")
    );
    let stays = limit("stays", "sleep 1000");
    daemon
        .crictl(&["update", "--memory", &(64 << 20).to_string(), &stays])
        .ok();
    let status = daemon.inspect(&stays);
    assert_eq!(
        status["resources"]["linux"]["memoryLimitInBytes"],
        (64 << 20).to_string()
    );
    let file = |name: &str| {
        daemon.crictl(&[
            "exec",
            "-s",
            &stays,
            "cat",
            &format!("/sys/fs/cgroup/{name}"),
        ])
    };
    let shown = [file("memory.max"), file("memory/memory.limit_in_bytes")];
    assert!(
        shown
            .iter()
            .any(|ran| ran.stdout.trim() == (64 << 20).to_string()),
        "{shown:?}"
    );
}

#[test]
fn a_monitors_death_is_its_pods_death() {
    let daemon = daemon();
    let (_, id, container) = routed(&daemon, "dies", json!({"namespace_options": {"pid": 2}}));
    let all = daemon.instance.processes();
    assert!(
        all.iter()
            .any(|(_, command)| command.contains("sleep 1000"))
    );
    let monitor = all
        .iter()
        .find(|(_, command)| command.contains("podvisor-monitor"));
    let monitor = monitor.expect("a monitor").0;
    kill(monitor, Signal::SIGKILL).expect("it runs");
    eventually("the pod is dead", || {
        (daemon.inspect_pod(&id)["state"] == "SANDBOX_NOTREADY").then_some(())
    });
    assert_eq!(daemon.inspect(&container)["exitCode"], 137);
    eventually("nothing runs", || {
        daemon
            .instance
            .processes()
            .iter()
            .all(|(_, command)| !command.contains("sleep 1000"))
            .then_some(())
    });
}

#[test]
fn a_terminal_is_one() {
    let daemon = daemon();
    let pod = daemon.pod("tty").by_handler("runc");
    let id = daemon.run_pod(&pod);
    let mut config = shell("tty", &busybox(), "tty; exit 4");
    config["tty"] = json!(true);
    let container = daemon.create_started(&id, &pod, &config);
    assert_eq!(daemon.cri().wait_exit(&container).exit_code, 4);
    let lines = logs::stdout(&pod.log("tty"));
    assert!(lines[0].starts_with("/dev/pts/"), "{lines:?}");
}
