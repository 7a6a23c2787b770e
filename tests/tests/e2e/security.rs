//! Security contexts: who a container is, what it may do, and what it sees of others.

use std::fs;
use std::time::Duration;

use podvisor_tests::crictl::{Pod, container, shell, with_such_pod};
use podvisor_tests::daemon::Daemon;
use podvisor_tests::logs;
use podvisor_tests::registry::busybox;
use serde_json::{Value, json};

/// A daemon with the busybox image and a pod, privileged or not.
fn with_pod(name: &str, privileged: bool) -> (Daemon, Pod, String) {
    let linux = json!({"security_context": {"privileged": privileged}});
    with_such_pod(name, &linux)
}

/// A container's configuration with a security context.
fn secured(name: &str, script: &str, context: Value) -> Value {
    let mut config = shell(name, &busybox(), script);
    config["linux"] = json!({ "security_context": context });
    config
}

/// Runs a script in a container of its own: its output, lines of both streams.
fn run(daemon: &Daemon, pod: &Pod, id: &str, config: &Value) -> Vec<String> {
    let name = config["metadata"]["name"].as_str().expect("a name");
    let container = daemon.create_started(id, pod, config);
    daemon.cri().wait_exit(&container);
    let lines = logs::read(&pod.log(name));
    lines.into_iter().map(|line| line.content).collect()
}

const FILTERED: &str =
    "grep -h Seccomp: /proc/self/status; unshare -u true 2>&1; mkdir /made 2>&1; echo end";

#[test]
fn seccomp() {
    let (daemon, pod, id) = with_pod("seccomp", true);
    let profiles = daemon.instance.dir().join("profiles");
    fs::create_dir(&profiles).expect("ours");
    let profile = |name: &str, content: &str| -> String {
        let path = profiles.join(name);
        fs::write(&path, content).expect("ours");
        path.to_str().expect("ASCII").into()
    };
    let localhost = |path: &str| json!({"profile_type": 2, "localhost_ref": path});
    let ran = |name: &str, context: Value| {
        run(&daemon, &pod, &id, &secured(name, FILTERED, context)).join("|")
    };

    // "unshare" is refused for want of a capability, too; with it, the filter alone decides.
    let admin = json!({"add_capabilities": ["SYS_ADMIN"]});
    assert_eq!(
        ran("none", json!({"capabilities": admin})),
        "Seccomp:\t0|end"
    );
    let unconfined = json!({"seccomp": {"profile_type": 1}, "capabilities": admin});
    assert_eq!(ran("unconfined", unconfined), "Seccomp:\t0|end");
    let default = json!({"seccomp": {"profile_type": 0}});
    let out = ran("default", default.clone());
    assert!(out.starts_with("Seccomp:\t2|unshare: "), "{out}");
    // The default follows capabilities.
    let default_admin = json!({"seccomp": {"profile_type": 0}, "capabilities": admin});
    assert_eq!(ran("default-admin", default_admin), "Seccomp:\t2|end");
    assert_eq!(
        ran(
            "old-field",
            json!({"seccomp_profile_path": "runtime/default"})
        ),
        out
    );

    let blocks = profile(
        "blocks.json",
        r#"{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 28}]}"#,
    );
    let blocked = "mkdir: can't create directory '/made': No space left on device";
    let out = ran(
        "localhost",
        json!({"seccomp": localhost(&blocks), "capabilities": admin}),
    );
    assert_eq!(out, format!("Seccomp:\t2|{blocked}|end"));
    let old = json!({"seccomp_profile_path": format!("localhost/{blocks}"), "capabilities": admin});
    assert_eq!(ran("localhost-old", old), out);
    // no_new_privs is the other way to load a filter.
    let unprivileged = json!({"seccomp": localhost(&blocks), "no_new_privs": true, "run_as_user": {"value": 1000}});
    let out = ran("unprivileged", unprivileged);
    assert!(out.contains(blocked), "{out}");
    // What enters later is filtered, too.
    let config = secured("exec", "sleep 1000", json!({"seccomp": localhost(&blocks)}));
    let container = daemon.create_started(&id, &pod, &config);
    let exec = daemon.exec(&container, &["sh", "-c", "mkdir /made 2>&1 || true"]);
    assert_eq!(exec, blocked);

    let broken = profile("broken.json", "{\"defaultAction\": \"SCMP_ACT_ALLOW\",");
    let strange = profile("strange.json", r#"{"defaultAction": "SCMP_ACT_PERHAPS"}"#);
    let notify = profile("notify.json", r#"{"defaultAction": "SCMP_ACT_NOTIFY"}"#);
    let missing = profiles.join("missing.json");
    let missing = missing.to_str().expect("ASCII");
    let before = daemon.cri().containers().len();
    for (path, word) in [
        (broken.as_str(), "broken.json"),
        (&strange, "SCMP_ACT_PERHAPS"),
        (&notify, "SCMP_ACT_NOTIFY"),
        (missing, "missing.json"),
        ("", "absolute"),
        ("relative.json", "relative.json"),
    ] {
        let config = secured("refused", "true", json!({"seccomp": localhost(path)}));
        let message = daemon
            .try_create(&id, &pod, &config)
            .failed("InvalidArgument");
        assert!(
            message.contains("seccomp") && message.contains(word),
            "{message}"
        );
    }
    assert_eq!(daemon.cri().containers().len(), before);

    // Privileged means unfiltered, whatever is named.
    let privileged = json!({"privileged": true, "seccomp": localhost(missing)});
    assert_eq!(ran("privileged", privileged), "Seccomp:\t0|end");
}

#[test]
fn privileged_is_privileged_in_the_vm() {
    let (daemon, pod, id) = with_pod("privileged", true);
    let script = "grep CapEff /proc/self/status; [ -b /dev/vda ] && head -c 1 /dev/vda | wc -c
        mount -t tmpfs none /mnt && echo mounted; echo 1 > /proc/sys/kernel/panic && echo written
        brctl addbr br7 && echo bridged; [ -e /dev/fuse ] && echo fuse; ls /dev/pts /dev/shm; [ -w /sys/kernel/profiling ] || touch /sys/x 2>&1 | grep -v Read-only";
    let mut config = secured(
        "yes",
        &format!("mkdir -p /mnt; {script}"),
        json!({"privileged": true, "masked_paths": ["/proc/kcore"], "readonly_paths": ["/proc/sys"], "no_new_privs": true}),
    );
    let out = run(&daemon, &pod, &id, &config).join("|");
    for wanted in [
        "CapEff:\t000001ffffffffff",
        "|1|",
        "mounted",
        "written",
        "bridged",
        "fuse",
    ] {
        assert!(out.contains(wanted), "no {wanted}: {out}");
    }
    config["linux"]["security_context"] = json!({"readonly_paths": ["/proc/sys"]});
    config["metadata"]["name"] = json!("no");
    config["log_path"] = json!("no.log");
    let out = run(&daemon, &pod, &id, &config).join("|");
    for never in ["|1|", "mounted", "written", "bridged", "fuse"] {
        assert!(!out.contains(never), "{never}: {out}");
    }
    // Nor can it make its own way to what other containers have on the pod's disk.
    let script = "mknod /disk b $(cat /sys/block/vda/dev | tr : ' ') && head -c 1 /disk 2>&1; mknod /null c 1 3 && echo x > /null && echo usable";
    let out = run(&daemon, &pod, &id, &secured("nodes", script, json!({})));
    assert_eq!(out.len(), 2, "{out:?}");
    assert!(out[0].contains("Operation not permitted"), "{out:?}");
    assert_eq!(out[1], "usable");
}

#[test]
fn devices() {
    let (daemon, pod, id) = with_pod("devices", false);
    let with = |host: &str, path: &str, permissions: &str| {
        let mut config = shell(
            "c",
            &busybox(),
            "ls -l /dev/nil | cut -c1; head -c 1 /dev/nil | wc -c; : > /dev/nil",
        );
        config["devices"] =
            json!([{"host_path": host, "container_path": path, "permissions": permissions}]);
        config
    };
    let out = run(&daemon, &pod, &id, &with("/dev/zero", "/dev/nil", "rw"));
    assert_eq!(out, ["c", "1"]);
    let refused = |config: &Value, code: &str, word: &str| {
        let mut config = config.clone();
        config["metadata"]["name"] = json!("refused");
        let message = daemon.try_create(&id, &pod, &config).failed(code);
        assert!(
            message.contains("devices") && message.contains(word),
            "{message}"
        );
    };
    refused(
        &with("/dev/no-such", "/dev/nil", "r"),
        "FailedPrecondition",
        "no-such",
    );
    refused(&with("/dev/zero", "nil", "r"), "InvalidArgument", "nil");
    refused(
        &with("/dev/zero", "/dev/nil", "rx"),
        "InvalidArgument",
        "rx",
    );
    refused(
        &with("/etc/passwd", "/dev/nil", "r"),
        "Unimplemented",
        "/etc/passwd",
    );
    assert_eq!(daemon.cri().containers().len(), 1);
}

#[test]
fn users_and_groups() {
    let (daemon, pod, id) = with_pod("users", false);
    // In the image, user is 1000:1000 and in group extra, 50000.
    let ids = |name: &str, context: Value| -> (String, Value) {
        let config = secured(name, "echo $(id -u):$(id -g) $(id -G)", context);
        let container = daemon.create_started(&id, &pod, &config);
        daemon.cri().wait_exit(&container);
        let status = daemon.inspect(&container)["user"]["linux"].take();
        daemon.cri().remove_container(&container);
        (logs::stdout(&pod.log(name)).join(""), status)
    };
    let (out, status) = ids(
        "merge",
        json!({"run_as_user": {"value": 1000}, "supplemental_groups": [1234]}),
    );
    // The kernel sorts them.
    assert_eq!(out, "1000:1000 1000 1234 50000");
    assert_eq!(status["uid"], "1000");
    assert_eq!(
        status["supplementalGroups"],
        json!(["1000", "50000", "1234"])
    );
    let strict = json!({"run_as_user": {"value": 1000}, "supplemental_groups": [1234], "supplemental_groups_policy": 1});
    let (out, status) = ids("strict", strict);
    assert_eq!(out, "1000:1000 1000 1234");
    assert_eq!(status["supplementalGroups"], json!(["1000", "1234"]));
    let (out, _) = ids(
        "group",
        json!({"run_as_username": "user", "run_as_group": {"value": 7}}),
    );
    assert_eq!(out, "1000:7 7 50000");
    // Nobody of the image.
    let (out, _) = ids(
        "stranger",
        json!({"run_as_user": {"value": 4711}, "run_as_group": {"value": 8}}),
    );
    assert_eq!(out, "4711:8 8");

    let refused = |context: Value| {
        let config = secured("refused", "true", context);
        daemon
            .try_create(&id, &pod, &config)
            .failed("InvalidArgument")
    };
    for (context, field) in [
        (json!({"run_as_group": {"value": 5}}), "run_as_group"),
        (json!({"run_as_user": {"value": -1}}), "run_as_user"),
        (
            json!({"run_as_user": {"value": 1}, "run_as_username": "user"}),
            "run_as_username",
        ),
        (
            json!({"run_as_username": "nobody-of-this-name"}),
            "nobody-of-this-name",
        ),
        (json!({"supplemental_groups": [-5]}), "supplemental_groups"),
        (json!({"masked_paths": ["proc"]}), "masked_paths"),
    ] {
        let message = refused(context);
        assert!(message.contains(field), "{message}");
    }
    assert_eq!(daemon.cri().containers(), vec![]);
}

#[test]
fn capabilities() {
    let (daemon, pod, id) = with_pod("capabilities", false);
    let sets = "grep -hE 'Cap(Inh|Prm|Eff|Bnd|Amb)' /proc/self/status | cut -f2 | sed 's/^0*//; s/^$/0/' | tr '\\n' ' '; echo";
    let ran = |name: &str, context: Value| {
        run(&daemon, &pod, &id, &secured(name, sets, context))
            .join("")
            .trim()
            .to_owned()
    };
    assert_eq!(ran("default", json!({})), "0 a80425fb a80425fb a80425fb 0");
    // A user other than root loses what is not ambient when it executes a program.
    let user = json!({"run_as_user": {"value": 1000}});
    assert_eq!(ran("user", user), "0 0 0 a80425fb 0");
    let ambient = json!({"run_as_user": {"value": 1000},
        "capabilities": {"drop_capabilities": ["ALL"], "add_ambient_capabilities": ["NET_BIND_SERVICE"]}});
    assert_eq!(ran("ambient", ambient), "400 400 400 400 400");
    let all = json!({"capabilities": {"add_capabilities": ["ALL"]}});
    assert_eq!(ran("all", all), "0 1ffffffffff 1ffffffffff 1ffffffffff 0");
    let none = json!({"capabilities": {"drop_capabilities": ["ALL"]}});
    assert_eq!(ran("nothing", none), "0 0 0 0 0");
    for change in [
        "add_capabilities",
        "drop_capabilities",
        "add_ambient_capabilities",
    ] {
        let config = secured(
            "refused",
            "true",
            json!({"capabilities": {change: ["CAP_NO_SUCH"]}}),
        );
        let message = daemon
            .try_create(&id, &pod, &config)
            .failed("InvalidArgument");
        assert!(message.contains("CAP_NO_SUCH"), "{message}");
    }
}

#[test]
fn limits_of_processes() {
    let (daemon, pod, id) = with_pod("rlimits", false);
    let mut config = shell(
        "c",
        &busybox(),
        "ulimit -n; ulimit -Hn; ulimit -u; cat /proc/self/oom_score_adj",
    );
    config["linux"] = json!({"resources": {"oom_score_adj": -998}});
    let out = run(&daemon, &pod, &id, &config);
    assert_eq!(out, ["1048576", "1048576", "unlimited", "-998"]);
}

#[test]
fn pid_namespaces() {
    let (daemon, pod, id) = with_pod("pids", false);
    let pids =
        |mode: i32, target: &str| json!({"namespace_options": {"pid": mode, "target_id": target}});
    let start = |name: &str, context: Value, mark: &str| {
        let script = format!("sleep {mark}; exit 3");
        daemon.create_started(&id, &pod, &secured(name, &script, context))
    };
    let sees = |container: &str| -> String {
        let script = "for p in /proc/[0-9]*; do tr '\\0' ' ' < $p/cmdline; echo; done 2>/dev/null | grep -o '^sleep 10[0-9]' | sort -u";
        daemon
            .exec(container, &["sh", "-c", script])
            .lines()
            .collect::<Vec<_>>()
            .join(" ")
    };
    let shared = start("shared", pids(0, ""), "101");
    let also = start("also", pids(0, ""), "102");
    let own = start("own", pids(1, ""), "103");
    assert_eq!(sees(&shared), "sleep 101 sleep 102");
    assert_eq!(sees(&also), "sleep 101 sleep 102");
    assert_eq!(sees(&own), "sleep 103");
    assert!(
        daemon
            .exec(&own, &["cat", "/proc/1/cmdline"])
            .starts_with("sh")
    );

    // As `kubectl debug --target` does it.
    let debug = start("debug", pids(3, &own), "104");
    assert_eq!(sees(&debug), "sleep 103 sleep 104");
    assert_eq!(sees(&own), "sleep 103 sleep 104");
    // The end of the first process of a pid namespace is that of all others.
    daemon.cri().stop_container(&own);
    assert_eq!(daemon.cri().wait_exit(&debug).exit_code, 137);

    for (context, code) in [
        (pids(2, ""), "FailedPrecondition"),
        (pids(3, ""), "InvalidArgument"),
        (pids(3, &own), "FailedPrecondition"),
        (pids(3, "0123456789"), "NotFound"),
        (
            json!({"namespace_options": {"ipc": 2}}),
            "FailedPrecondition",
        ),
        (
            json!({"namespace_options": {"network": 2}}),
            "FailedPrecondition",
        ),
        (json!({"namespace_options": {"ipc": 1}}), "InvalidArgument"),
    ] {
        let config = secured("refused", "true", context);
        daemon.try_create(&id, &pod, &config).failed(code);
    }
    assert_eq!(daemon.leaks(), "");
}

#[test]
fn ipc_is_the_pods() {
    let (daemon, pod, id) = with_pod("ipc", false);
    let first = daemon.create_started(&id, &pod, &shell("first", &busybox(), "sleep 1000"));
    let second = daemon.create_started(&id, &pod, &shell("second", &busybox(), "sleep 1000"));
    let namespace = |container: &str| daemon.exec(container, &["readlink", "/proc/self/ns/ipc"]);
    assert_eq!(namespace(&first), namespace(&second));
    daemon.exec(&first, &["sh", "-c", "echo said > /dev/shm/x"]);
    assert_eq!(daemon.exec(&second, &["cat", "/dev/shm/x"]), "said");
}

#[test]
fn what_only_the_host_could_give() {
    let daemon = Daemon::start();
    let refused = |linux: Value, code: &str, word: &str| {
        let pod = daemon.pod("refused").with("linux", linux);
        let message = daemon.try_run_pod(&pod).failed(code);
        assert!(message.contains(word), "{message}");
    };
    let options = |options: Value| json!({"security_context": {"namespace_options": options}});
    for kind in ["network", "pid", "ipc"] {
        refused(options(json!({kind: 2})), "FailedPrecondition", kind);
    }
    let users = |mode: i32, ids: Value| {
        options(json!({"userns_options": {"mode": mode, "uids": ids, "gids": ids}}))
    };
    let map = |container: u32, length: u32| json!({"host_id": 100_000, "container_id": container, "length": length});
    refused(
        users(0, json!([map(0, 10), map(10, 10)])),
        "InvalidArgument",
        "userns_options",
    );
    refused(
        users(0, json!([map(1, 10)])),
        "InvalidArgument",
        "userns_options",
    );
    refused(
        users(1, json!([map(0, 10)])),
        "InvalidArgument",
        "userns_options",
    );
    refused(users(3, json!([])), "InvalidArgument", "userns_options");
    for (name, value) in [
        ("kernel.panic", "1"),
        ("vm.swappiness", "10"),
        ("../x", "1"),
    ] {
        refused(
            json!({"sysctls": {name: value}}),
            "InvalidArgument",
            "sysctls",
        );
    }
    // One that the kernel does not have is seen when the VM is up; nothing of it stays.
    refused(
        json!({"sysctls": {"net.no.such": "1"}}),
        "InvalidArgument",
        "net.no.such",
    );
    assert_eq!(daemon.cri().pods(), vec![]);
    daemon.assert_nothing_left();
}

#[test]
fn sysctls() {
    let daemon = Daemon::start();
    daemon.pull(&busybox());
    let linux = json!({"sysctls": {"kernel.shm_rmid_forced": "1", "fs.mqueue.msg_max": "100", "net.core.somaxconn": "77", "kernel.domainname": "example"}});
    let pod = daemon.pod("sysctls").with("linux", linux);
    let id = daemon.run_pod(&pod);
    let script = "cd /proc/sys; cat kernel/shm_rmid_forced fs/mqueue/msg_max net/core/somaxconn kernel/domainname";
    let out = run(&daemon, &pod, &id, &shell("c", &busybox(), script));
    assert_eq!(out, ["1", "100", "77", "example"]);
}

#[test]
fn modules_of_the_hosts_kernel() {
    let (daemon, pod, id) = with_pod("modules", false);
    for context in [
        json!({"apparmor": {"profile_type": 0}}),
        json!({"apparmor": {"profile_type": 1}, "apparmor_profile": "localhost/ignored"}),
        json!({"apparmor_profile": "runtime/default"}),
        json!({"selinux_options": {}}),
    ] {
        let config = secured("taken", "true", context);
        let container = daemon.create(&id, &pod, &config);
        daemon.cri().remove_container(&container);
    }
    for (context, code, word) in [
        (
            json!({"apparmor": {"profile_type": 2, "localhost_ref": "own"}}),
            "FailedPrecondition",
            "apparmor",
        ),
        (
            json!({"apparmor": {"profile_type": 2}}),
            "InvalidArgument",
            "apparmor",
        ),
        (
            json!({"apparmor_profile": "localhost/own"}),
            "FailedPrecondition",
            "apparmor",
        ),
        (
            json!({"selinux_options": {"level": "s0:c1,c2"}}),
            "FailedPrecondition",
            "selinux_options",
        ),
        (
            json!({"selinux_options": {"level": "gibberish"}}),
            "InvalidArgument",
            "selinux_options",
        ),
    ] {
        let config = secured("refused", "true", context);
        let message = daemon.try_create(&id, &pod, &config).failed(code);
        assert!(message.contains(word), "{message}");
    }
}

#[test]
fn ten_thousand_variables() {
    let (daemon, pod, id) = with_pod("variables", false);
    let mut config = container("c", &busybox(), &["sh", "-c", "env | grep -c '^VARIABLE_'"]);
    let variables = (0..10_000)
        .map(|n| json!({"key": format!("VARIABLE_{n}"), "value": "some value of a usual length"}));
    config["envs"] = variables.collect();
    let out = run(&daemon, &pod, &id, &config);
    assert_eq!(out, ["10000"]);
    // Also for what enters later.
    config["metadata"]["name"] = json!("d");
    config["log_path"] = json!("d.log");
    config["command"] = json!(["sleep", "1000"]);
    let container = daemon.create_started(&id, &pod, &config);
    let ran = daemon.cri().exec(
        &container,
        &["sh", "-c", "env | grep -c '^VARIABLE_'"],
        Duration::ZERO,
    );
    assert_eq!(ran.expect("it runs").stdout, b"10000\n");
}
