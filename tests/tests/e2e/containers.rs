//! Containers through crictl: create, start, list, inspect, exec, logs, stop, remove.

use std::io::{BufRead, BufReader};
use std::time::Duration;

use podvisor_tests::crictl::{container, shell, with_pod};
use podvisor_tests::daemon::Daemon;
use podvisor_tests::machine::slowness;
use podvisor_tests::oci::{Image, Layer};
use podvisor_tests::registry::{Registry, busybox};
use podvisor_tests::{eventually, logs};
use serde_json::{Value, json};
use tonic::Code;

/// A shell that does what the test tells it, and ends when it is told to.
const WAITS: &str = "trap 'exit 0' TERM; while :; do sleep 0.1; done";

#[test]
fn the_life_of_a_container() {
    let (daemon, pod, id) = with_pod("life");
    let config = shell("c", &busybox(), "echo out; echo err >&2; exit 3");
    let container = daemon.try_create(&id, &pod, &config).id();
    let status = daemon.inspect(&container);
    assert_eq!(status["state"], "CONTAINER_CREATED");
    assert_eq!(status["logPath"], json!(pod.log("c")));

    daemon.crictl(&["start", &container]).ok();
    assert!(pod.log("c").exists(), "the log is there when start returns");
    daemon.cri().wait_exit(&container);
    let status = daemon.inspect(&container);
    assert_eq!(status["state"], "CONTAINER_EXITED");
    assert_eq!(status["exitCode"], 3);
    assert_eq!(status["reason"], "Error");
    let exact = daemon.cri().status(&container);
    let times = [exact.created_at, exact.started_at, exact.finished_at];
    assert!(times.is_sorted() && times[0] > 0, "{times:?}");
    assert_eq!(logs::stdout(&pod.log("c")), ["out"]);
    assert_eq!(logs::stream(&pod.log("c"), "stderr"), ["err"]);
    let ran = daemon.crictl(&["logs", &container]);
    assert_eq!(
        (ran.stdout.as_str(), ran.stderr.as_str()),
        ("out\n", "err\n")
    );

    // Of all states, in the pod, by name.
    for filter in [
        vec!["-a"],
        vec!["-a", "--pod", &id],
        vec!["-a", "--name", "c"],
        vec!["--state", "exited"],
    ] {
        let list = daemon
            .crictl(&[&["ps", "-q", "--no-trunc"], &filter[..]].concat())
            .ok();
        assert_eq!(list.trim(), container, "{filter:?}");
    }
    assert_eq!(
        daemon.crictl(&["ps", "-q"]).ok().trim(),
        "",
        "only those that run"
    );

    daemon.crictl(&["rm", "--keep-logs", &container]).ok();
    assert_eq!(daemon.crictl(&["ps", "-aq"]).ok().trim(), "");
    let gone = daemon.cri().try_status(&container).expect_err("removed");
    assert_eq!(gone.code(), Code::NotFound);
    assert!(pod.log("c").exists(), "logs are the kubelet's");
    assert_eq!(daemon.leaks(), "");
}

#[test]
fn exec() {
    let (daemon, pod, id) = with_pod("exec");
    let script = format!("(cd /proc/self/ns; readlink mnt ipc uts net cgroup); {WAITS}");
    let container = daemon.create_started(&id, &pod, &shell("c", &busybox(), &script));
    let cri = daemon.cri();
    let exec = |script: &str, seconds| {
        cri.exec(
            &container,
            &["sh", "-c", script],
            Duration::from_secs(seconds),
        )
    };

    assert_eq!(daemon.exec(&container, &["echo", "hello"]), "hello");
    let both = exec("echo out; echo err >&2; exit 42", 0).expect("a code is no error");
    assert_eq!(both.stdout, b"out\n");
    assert_eq!(both.stderr, b"err\n");
    assert_eq!(both.exit_code, 42);
    let ran = daemon.crictl(&[
        "exec",
        "-s",
        &container,
        "sh",
        "-c",
        "echo why >&2; exit 42",
    ]);
    assert_ne!(ran.code, 0);
    assert!(ran.stderr.contains("42"), "{}", ran.stderr);
    let killed = exec("kill -9 $$", 0).expect("a signal is no error");
    assert_eq!(killed.exit_code, 137);
    // No byte is lost, changed or out of its place.
    let much = exec("seq 1 200000; seq 1 100000 >&2", 0).expect("much output");
    let numbers = |to| (logs::seq(to).join("\n") + "\n").into_bytes();
    assert!(much.stdout == numbers(200_000) && much.stderr == numbers(100_000));
    let binary = exec("printf '\\000\\377\\n\\r'", 0).expect("any bytes");
    assert_eq!(binary.stdout, [0, 255, b'\n', b'\r']);
    // In the container's own namespaces.
    let namespaces = "cd /proc/self/ns; readlink mnt ipc uts net cgroup";
    let inside = exec(namespaces, 0).expect("readlink").stdout;
    assert_eq!(
        String::from_utf8_lossy(&inside).lines().collect::<Vec<_>>(),
        logs::stdout(&pod.log("c"))
    );
    // Nothing waits for what the command leaves running, or reads what nobody writes.
    let left = exec("sleep 300 >/dev/null 2>&1 & echo left", 30).expect("the shell has ended");
    assert_eq!(left.stdout, b"left\n");
    let input = exec("cat; echo end", 30).expect("standard input is empty");
    assert_eq!(input.stdout, b"end\n");

    // The deadline ends the command and its children.
    let late = exec("sleep 301 & sleep 302", 1).expect_err("too long");
    assert_eq!(late.code(), Code::DeadlineExceeded, "{late}");
    assert_eq!(
        daemon.exec(
            &container,
            &["sh", "-c", "ps | grep '[s]leep 30[12]' || echo none"]
        ),
        "none"
    );
    daemon
        .crictl(&["exec", "-s", "--timeout", "1", &container, "sleep", "303"])
        .failed("DeadlineExceeded");

    let missing = cri.exec(&container, &["no-such-command"], Duration::ZERO);
    match missing {
        // Both are seen of runtimes: an error, or the shell's code.
        Ok(response) => assert!([126, 127].contains(&response.exit_code), "{response:?}"),
        Err(error) => assert!(error.message().contains("no-such-command"), "{error}"),
    }
    let error = cri
        .exec(&container, &[], Duration::ZERO)
        .expect_err("no command");
    assert_eq!(error.code(), Code::InvalidArgument);
}

#[test]
fn output_of_exec_is_bounded() {
    let (daemon, pod, id) = with_pod("bounded");
    let container = daemon.create_started(&id, &pod, &shell("c", &busybox(), WAITS));
    // More than a message can carry, of either stream and of both.
    let much = "dd if=/dev/zero bs=1M count=20 2>/dev/null";
    for script in [much.to_owned(), format!("{much}; ({much}) >&2")] {
        let ran = daemon
            .cri()
            .exec(&container, &["sh", "-c", &script], Duration::ZERO);
        let ran = ran.expect("the rest is dropped, the command ends");
        assert_eq!(ran.exit_code, 0);
        let kept = ran.stdout.len() + ran.stderr.len();
        assert!((4 << 20..16 << 20).contains(&kept), "{kept}");
    }
}

#[test]
fn logs_are_what_the_container_wrote() {
    let (daemon, pod, id) = with_pod("logs");
    // Long lines come in parts; the last has no end; nothing of both streams is lost.
    let script = "echo first; head -c 100000 /dev/zero | tr '\\0' x; echo; seq 1 20000; seq 1 5000 >&2; printf unterminated";
    let container = daemon.create_started(&id, &pod, &shell("c", &busybox(), script));
    daemon.cri().wait_exit(&container);
    let mut wanted = vec!["first".to_owned(), "x".repeat(100_000)];
    wanted.extend(logs::seq(20_000));
    wanted.push("unterminated".into());
    logs::assert_same(&logs::stdout(&pod.log("c")), &wanted);
    logs::assert_same(&logs::stream(&pod.log("c"), "stderr"), &logs::seq(5000));
    let lines = logs::read(&pod.log("c"));
    assert!(
        lines.iter().any(|line| !line.full),
        "a long line is in parts"
    );
    assert!(
        lines.iter().all(|line| line.content.len() <= 16 << 10),
        "parts have a limit"
    );
    for stream in ["stdout", "stderr"] {
        let own = lines.iter().filter(|line| line.stream == stream);
        assert!(own.is_sorted_by_key(|line| &line.time), "{stream} in order");
    }
}

#[test]
fn logs_can_be_followed() {
    let (daemon, pod, id) = with_pod("follow");
    let script = "echo one; while [ ! -e /go ]; do sleep 0.05; done; echo two; exit 0";
    let container = daemon.create_started(&id, &pod, &shell("c", &busybox(), script));
    let mut follower = daemon.crictl_spawn(&["logs", "-f", &container]);
    let mut lines = BufReader::new(follower.stdout.take().expect("piped")).lines();
    assert_eq!(lines.next().expect("a line").expect("a pipe"), "one");
    daemon.exec(&container, &["touch", "/go"]);
    assert_eq!(lines.next().expect("a line").expect("a pipe"), "two");
    assert!(lines.next().is_none(), "it ends with the container");
    assert!(follower.wait().expect("our own child").success());
}

#[test]
fn a_log_is_rotated() {
    let (daemon, pod, id) = with_pod("rotate");
    // With the container's end, the command that asks for it would be killed.
    let script = "i=0; while [ ! -e /stop ]; do i=$((i+1)); echo $i; sleep 0.01; done; echo end; exec sleep 1000";
    let container = daemon.create_started(&id, &pod, &shell("c", &busybox(), script));
    let (log, old) = (pod.log("c"), pod.log_dir.join("c.log.1"));
    logs::wait_for(&log, "20");
    std::fs::rename(&log, &old).expect("both are ours");
    let request = podvisor_proto::cri::ReopenContainerLogRequest {
        container_id: container.clone(),
    };
    let reopened = daemon
        .cri()
        .call(async |mut c| c.reopen_container_log(request).await);
    reopened.expect("ReopenContainerLog");
    assert!(log.exists(), "it is there at once");
    let before = logs::stdout(&old);
    daemon.exec(&container, &["touch", "/stop"]);
    logs::wait_for(&log, "end");
    assert_eq!(
        logs::stdout(&old),
        before,
        "nothing more goes to the old one"
    );
    let mut all = before;
    all.extend(logs::stdout(&log));
    assert_eq!(all.pop().as_deref(), Some("end"));
    logs::assert_same(&all, &logs::seq(all.len()));
}

#[test]
fn a_log_is_rotated_while_it_is_written_as_fast_as_can_be() {
    let (daemon, pod, id) = with_pod("torrent");
    let on_host = daemon.pod("torrent-host").by_handler("runc");
    let on_host_id = daemon.run_pod(&on_host);
    let script = "n=1; while [ ! -e /stop ]; do seq $n $((n + 999)); n=$((n + 1000)); done; \
                  echo end; exec sleep 1000";
    for (pod, id) in [(pod, id), (on_host, on_host_id)] {
        let container = daemon.create_started(&id, &pod, &shell("c", &busybox(), script));
        let log = pod.log("c");
        let cri = daemon.cri();
        let mut rotated = Vec::new();
        for number in 0..24 / slowness().min(3) {
            eventually("lines in the new file", || {
                let length = std::fs::metadata(&log).expect("it is there").len();
                (length > 0).then_some(())
            });
            let old = pod.log_dir.join(format!("c.log.{number}"));
            std::fs::rename(&log, &old).expect("both are ours");
            let request = podvisor_proto::cri::ReopenContainerLogRequest {
                container_id: container.clone(),
            };
            let reopened = cri.call(async |mut c| c.reopen_container_log(request).await);
            reopened.expect("ReopenContainerLog");
            rotated.push((std::fs::metadata(&old).expect("just made").len(), old));
        }
        daemon.exec(&container, &["touch", "/stop"]);
        logs::wait_for(&log, "end");
        let mut all = Vec::new();
        for (length, old) in &rotated {
            let now = std::fs::metadata(old).expect("nobody removes it").len();
            assert_eq!(now, *length, "written after ReopenContainerLog's answer");
            all.extend(logs::stdout(old));
        }
        all.extend(logs::stdout(&log));
        assert_eq!(all.pop().as_deref(), Some("end"));
        logs::assert_same(&all, &logs::seq(all.len()));
    }
}

#[test]
fn several_containers_in_a_pod() {
    let (daemon, pod, id) = with_pod("several");
    let server = shell(
        "server",
        &busybox(),
        "mkdir /www; echo served > /www/index.html; exec httpd -f -p 8080 -h /www",
    );
    let server = daemon.create_started(&id, &pod, &server);
    // One network: what one listens on, the other reaches at localhost.
    let script =
        "until wget -q -O - http://localhost:8080/index.html 2>/dev/null; do sleep 0.1; done";
    let client = daemon.create_started(&id, &pod, &shell("client", &busybox(), script));
    daemon.cri().wait_exit(&client);
    assert_eq!(logs::stdout(&pod.log("client")), ["served"]);
    // One machine, but each its own files and processes' names.
    let other = daemon.create_started(&id, &pod, &shell("other", &busybox(), WAITS));
    assert_eq!(
        daemon.exec(&other, &["sh", "-c", "ls -d /www 2>/dev/null || echo none"]),
        "none"
    );
    assert_eq!(daemon.exec(&server, &["cat", "/www/index.html"]), "served");
    let boot = ["cat", "/proc/sys/kernel/random/boot_id"];
    assert_eq!(daemon.exec(&server, &boot), daemon.exec(&other, &boot));
    let list = daemon.crictl(&["ps", "-q"]).ok();
    assert_eq!(list.lines().count(), 2, "{list}");
}

#[test]
fn a_container_is_restarted_in_the_same_vm() {
    let (daemon, pod, id) = with_pod("restarts");
    let mut boots = Vec::new();
    for attempt in 1..=5 {
        let mut config = shell(
            "c",
            &busybox(),
            "cat /proc/sys/kernel/random/boot_id; ls /left 2>/dev/null; touch /left",
        );
        config["metadata"]["attempt"] = json!(attempt);
        config["log_path"] = json!(format!("c-{attempt}.log"));
        let container = daemon.create_started(&id, &pod, &config);
        daemon.cri().wait_exit(&container);
        // As kubelets do: the one before the last is removed.
        daemon.crictl(&["rm", "--keep-logs", &container]).ok();
        let lines = logs::stdout(&pod.log(&format!("c-{attempt}")));
        assert_eq!(lines.len(), 1, "files of the one before: {lines:?}");
        boots.extend(lines);
        assert_eq!(daemon.inspect_pod(&id)["state"], "SANDBOX_READY");
    }
    boots.dedup();
    assert_eq!(boots.len(), 1, "one boot: {boots:?}");
}

#[test]
fn stop() {
    let (daemon, pod, id) = with_pod("stop");
    let stopped = |name: &str, script: &str, timeout: &str| -> Value {
        let log = pod.log(name);
        let container = daemon.create_started(&id, &pod, &shell(name, &busybox(), script));
        logs::wait_for(&log, "ready");
        daemon.crictl(&["stop", "-t", timeout, &container]).ok();
        let status = daemon.inspect(&container);
        assert_eq!(status["state"], "CONTAINER_EXITED");
        // Again is no error.
        daemon.crictl(&["stop", &container]).ok();
        status
    };
    let polite = "trap 'echo bye; exit 5' TERM; echo ready; while :; do sleep 0.1; done";
    let status = stopped("polite", polite, "30");
    assert_eq!(status["exitCode"], 5);
    assert_eq!(logs::stdout(&pod.log("polite")), ["ready", "bye"]);

    let stubborn = "trap '' TERM; echo ready; while :; do sleep 0.1; done";
    let status = stopped("stubborn", stubborn, "1");
    assert_eq!(status["exitCode"], 137);

    let status = stopped("at-once", polite, "0");
    assert_eq!(status["exitCode"], 137);
    assert_eq!(logs::stdout(&pod.log("at-once")), ["ready"]);
}

#[test]
fn the_image_says_what_to_run() {
    let (daemon, pod, id) = with_pod("entrypoint");
    let mut image = Image::busybox_and(vec![
        Layer::new()
            .entry(
                "entry",
                podvisor_tests::oci::EntryType::Regular,
                0o755,
                "",
                b"#!/bin/sh\necho $0 $* $WHO $(pwd) $(id -u):$(id -g) $(id -G)\n",
            )
            .dir("work"),
    ]);
    image = image.with_config(&json!({
        "Env": ["PATH=/bin", "WHO=image"], "Entrypoint": ["/entry"], "Cmd": ["a", "b"],
        "WorkingDir": "/work", "User": "user", "StopSignal": "SIGINT",
    }));
    Registry::shared().push("entry:1", &image);
    let name = Registry::shared().name("entry:1");
    daemon.crictl(&["pull", &name]).ok();
    let ran = |name: &str, config: &Value| -> String {
        let container = daemon.create_started(&id, &pod, config);
        daemon.cri().wait_exit(&container);
        logs::stdout(&pod.log(name)).join("|")
    };
    let with = |log: &str, changes: Value| {
        let mut config = container(log, &name, &[]);
        for (key, value) in changes.as_object().expect("an object") {
            config[key] = value.clone();
        }
        config
    };
    let extra = "1000:1000 1000 50000";
    assert_eq!(
        ran("image", &with("image", json!({}))),
        format!("/entry a b image /work {extra}")
    );
    assert_eq!(
        ran("args", &with("args", json!({"args": ["c"]}))),
        format!("/entry c image /work {extra}")
    );
    assert_eq!(
        ran(
            "command",
            &with("command", json!({"command": ["echo", "only"]}))
        ),
        "only"
    );
    let own = json!({
        "envs": [{"key": "WHO", "value": "pod"}], "working_dir": "/tmp/new",
        "linux": {"security_context": {"run_as_user": {"value": 33}, "run_as_group": {"value": 1000}}},
    });
    let out = ran("own", &with("own", own));
    assert!(
        out.starts_with("/entry a b pod /tmp/new 33:1000 1000"),
        "{out}"
    );
    let user = json!({"linux": {"security_context": {"run_as_username": "www-data"}}});
    let out = ran("user", &with("user", user));
    assert!(out.contains(" 33:33 33"), "{out}");
}

#[test]
fn limits_and_confinement() {
    let (daemon, pod, id) = with_pod("limits");
    let confined = json!({
        "metadata": {"name": "confined", "attempt": 0},
        "image": {"image": busybox()},
        "command": ["sh", "-c", "grep -E 'CapEff|NoNewPrivs|Seccomp:' /proc/self/status | tr -d '\\t'; touch /x 2>&1; ls /proc/kcore; cat /proc/self/cgroup; echo 1 > /proc/sys/kernel/panic"],
        "log_path": "confined.log",
        "linux": {
            "resources": {"memory_limit_in_bytes": 64 << 20, "cpu_period": 100_000, "cpu_quota": 50_000, "cpu_shares": 512},
            "security_context": {
                "readonly_rootfs": true, "no_new_privs": true,
                "capabilities": {"drop_capabilities": ["ALL"], "add_capabilities": ["NET_BIND_SERVICE"]},
                "masked_paths": ["/proc/kcore"], "readonly_paths": ["/proc/sys"],
            },
        },
    });
    let container = daemon.create_started(&id, &pod, &confined);
    daemon.cri().wait_exit(&container);
    let out = logs::stdout(&pod.log("confined")).join("\n");
    for wanted in [
        "CapEff:0000000000000400",
        "NoNewPrivs:1",
        "Read-only file system",
    ] {
        assert!(out.contains(wanted), "no {wanted}: {out}");
    }
    let err = logs::stream(&pod.log("confined"), "stderr").join("\n");
    assert!(err.contains("/proc/sys/kernel/panic"), "{err}");

    // More memory than allowed ends the container, not the pod.
    let mut greedy = shell("greedy", &busybox(), "dd if=/dev/zero of=/dev/null bs=200M");
    greedy["linux"] = json!({"resources": {"memory_limit_in_bytes": 32 << 20}});
    let greedy = daemon.create_started(&id, &pod, &greedy);
    daemon.cri().wait_exit(&greedy);
    let status = daemon.inspect(&greedy);
    assert_eq!(status["reason"], "OOMKilled", "{status}");
    assert_eq!(status["exitCode"], 137);
    assert_eq!(daemon.inspect_pod(&id)["state"], "SANDBOX_READY");
}

#[test]
fn crictl_run() {
    let daemon = Daemon::start();
    let pod = daemon.pod("run");
    let files = daemon.config_files(&pod, &shell("c", &busybox(), "echo ran"));
    let ran = daemon
        .crictl(&["run", "--with-pull", &files.0, &files.1])
        .ok();
    let container = ran.trim();
    assert_eq!(daemon.cri().wait_exit(container).exit_code, 0);
    assert_eq!(logs::stdout(&pod.log("c")), ["ran"]);
}
