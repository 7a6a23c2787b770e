//! Pods through crictl: run, list, inspect, stop, remove; what a pod gives its containers.

use podvisor_tests::crictl::shell;
use podvisor_tests::daemon::Daemon;
use podvisor_tests::logs;
use podvisor_tests::registry::busybox;
use serde_json::{Value, json};

/// `crictl pods` with some filter.
fn pods(daemon: &Daemon, filter: &[&str]) -> Vec<Value> {
    let list = daemon
        .crictl(&[&["pods", "-o", "json"], filter].concat())
        .json();
    list["items"].as_array().cloned().unwrap_or_default()
}

fn ids(items: &[Value]) -> Vec<&str> {
    let mut ids: Vec<&str> = items
        .iter()
        .filter_map(|item| item["id"].as_str())
        .collect();
    ids.sort_unstable();
    ids
}

#[test]
fn the_runtime_tells_who_it_is() {
    let daemon = Daemon::start();
    let version = daemon.crictl(&["version"]).ok();
    assert!(version.contains("RuntimeName:  podvisor"), "{version}");
    assert!(version.contains("RuntimeApiVersion:  v1"), "{version}");

    let info = daemon.crictl(&["info"]).json();
    let conditions = info["status"]["conditions"].as_array().expect("a list");
    for wanted in ["RuntimeReady", "NetworkReady"] {
        let condition = conditions.iter().find(|c| c["type"] == wanted);
        assert_eq!(
            condition.map(|c| &c["status"]),
            Some(&json!(true)),
            "{info}"
        );
    }
    // The default handler has a name, and is the one without.
    let handlers = info["runtimeHandlers"].as_array().expect("a list");
    for wanted in ["podvisor", ""] {
        let named = |handler: &Value| handler["name"].as_str().unwrap_or("") == wanted;
        assert!(handlers.iter().any(named), "{info}");
    }

    let config = daemon.crictl(&["runtime-config"]).ok();
    assert!(config.to_lowercase().contains("cgroupfs"), "{config}");
}

#[test]
fn a_pod_without_containers() {
    let daemon = Daemon::start();
    let id = daemon.try_run_pod(&daemon.pod("empty")).id();

    let status = daemon.inspect_pod(&id);
    assert_eq!(status["state"], "SANDBOX_READY");
    assert_eq!(ids(&pods(&daemon, &[])), [&id]);
    assert_eq!(ids(&pods(&daemon, &["--state", "ready"])), [&id]);
    assert_eq!(daemon.leaks(), "");
    assert!(!daemon.pod_resources().is_empty(), "a VM has processes");

    daemon.crictl(&["stopp", &id]).ok();
    let status = daemon.inspect_pod(&id);
    assert_eq!(status["state"], "SANDBOX_NOTREADY");
    assert_eq!(status["metadata"]["name"], "empty");
    assert_eq!(pods(&daemon, &["--state", "ready"]), Vec::<Value>::new());
    assert_eq!(ids(&pods(&daemon, &["--state", "notready"])), [&id]);
    // Again is no error.
    daemon.crictl(&["stopp", &id]).ok();

    daemon.crictl(&["rmp", &id]).ok();
    assert_eq!(pods(&daemon, &[]), Vec::<Value>::new());
    daemon.assert_nothing_left();
}

#[test]
fn attributes_are_preserved() {
    let daemon = Daemon::start();
    let labels = json!({"app": "web", "tier": "a/b=c", "empty": ""});
    let annotations = json!({"example.com/note": "line one\nline two ✓ \"quoted\""});
    let pod = daemon
        .pod("attributes")
        .with("labels", labels.clone())
        .with("annotations", annotations.clone())
        .with(
            "metadata",
            json!({"name": "attributes", "uid": "some-uid", "namespace": "some-ns", "attempt": 3}),
        );
    let id = daemon.run_pod(&pod);

    for item in [&daemon.inspect_pod(&id), &pods(&daemon, &[])[0]] {
        assert_eq!(item["id"], id);
        assert_eq!(item["metadata"], pod.config["metadata"]);
        assert_eq!(item["labels"], labels);
        assert_eq!(item["annotations"], annotations);
        assert_eq!(item["runtimeHandler"], pod.handler);
        assert!(
            item["createdAt"].as_str().is_some_and(|time| time > "0"),
            "{item}"
        );
    }
    let options = daemon.inspect_pod(&id)["linux"]["namespaces"]["options"].take();
    assert_eq!(options["network"], "POD", "{options}");

    // Filters, alone and together.
    assert_eq!(ids(&pods(&daemon, &["--label", "app=web"])), [&id]);
    assert_eq!(
        ids(&pods(&daemon, &["--label", "app=web", "--label", "empty="])),
        [&id]
    );
    assert_eq!(ids(&pods(&daemon, &["--id", &id])), [&id]);
    for none in [
        vec!["--label", "app=db"],
        vec!["--label", "app=web", "--label", "tier=d"],
        vec!["--label", "app=web", "--state", "notready"],
        vec!["--namespace", "other"],
    ] {
        assert_eq!(pods(&daemon, &none), Vec::<Value>::new(), "{none:?}");
    }
    let unknown = "0".repeat(64);
    assert_eq!(pods(&daemon, &["--id", &unknown]), Vec::<Value>::new());
    // crictl finds a pod by the beginning of its id.
    assert_eq!(daemon.inspect_pod(&id[..12])["id"], id);

    let container = json!({
        "metadata": {"name": "c", "attempt": 7},
        "image": {"image": busybox()},
        "command": ["true"],
        "labels": labels,
        "annotations": annotations,
        "log_path": "c.log",
    });
    daemon.pull(&busybox());
    let container_id = daemon.create(&id, &pod, &container);
    let list = daemon.crictl(&["ps", "-a", "-o", "json"]).json();
    let listed = &list["containers"][0];
    assert_eq!(listed["podSandboxId"], id);
    assert_eq!(listed["state"], "CONTAINER_CREATED");
    for item in [&daemon.inspect(&container_id), listed] {
        assert_eq!(item["id"], container_id);
        assert_eq!(item["metadata"], container["metadata"]);
        assert_eq!(item["labels"], labels);
        assert_eq!(item["annotations"], annotations);
        let image = podvisor_tests::oci::busybox().id();
        assert_eq!(item["imageId"], image);
        assert!(
            item["imageRef"]
                .as_str()
                .is_some_and(|name| !name.is_empty()),
            "{item}"
        );
    }
}

#[test]
fn what_a_pod_gives_its_containers() {
    let daemon = Daemon::start();
    let pod = daemon
        .pod("settings")
        .with("hostname", json!("test-hostname"))
        .with(
            "dns_config",
            json!({"servers": ["10.10.10.10", "fd00::53"], "searches": ["google.com", "b.example"], "options": ["ndots:8"]}),
        )
        .with("linux", json!({"sysctls": {"kernel.shm_rmid_forced": "1", "net.ipv4.ip_unprivileged_port_start": "80"}}));
    let id = daemon.run_pod(&pod);
    daemon.pull(&busybox());
    let script = "hostname; cat /proc/sys/kernel/shm_rmid_forced /proc/sys/net/ipv4/ip_unprivileged_port_start
        cat /etc/resolv.conf; grep -q test-hostname /etc/hosts && echo named; grep -q localhost /etc/hosts && echo localhost
        [ -c /dev/null ] && [ -d /proc/1 ] && [ -d /sys/class ] && echo mounts
        echo x > /dev/shm/x && cat /dev/shm/x; id -u; pwd; echo $PATH";
    let container = daemon.create_started(&id, &pod, &shell("c", &busybox(), script));
    let status = daemon.cri().wait_exit(&container);
    let wanted = [
        "test-hostname",
        "1",
        "80",
        "search google.com b.example",
        "nameserver 10.10.10.10",
        "nameserver fd00::53",
        "options ndots:8",
        "named",
        "localhost",
        "mounts",
        "x",
        "0",
        "/",
        "/bin",
    ];
    let mut lines = logs::stdout(&pod.log("c"));
    // resolv.conf's lines may have any order.
    lines[3..7].sort();
    let mut wanted: Vec<String> = wanted.map(String::from).to_vec();
    wanted[3..7].sort();
    assert_eq!(lines, wanted, "{status:?}");
}

#[test]
fn memory_follows_the_pods_resources() {
    let daemon = Daemon::start();
    daemon.pull(&busybox());
    let total = |name: &str, linux: Value| -> u64 {
        let pod = daemon.pod(name).with("linux", linux);
        let id = daemon.run_pod(&pod);
        let script = "awk '/MemTotal/ {print $2}' /proc/meminfo";
        let container = daemon.create_started(&id, &pod, &shell("c", &busybox(), script));
        daemon.cri().wait_exit(&container);
        daemon.cri().remove_pod(&id);
        logs::stdout(&pod.log("c"))[0].parse().expect("a number")
    };
    let default = total("default", json!({}));
    let large = total(
        "large",
        json!({"resources": {"memory_limit_in_bytes": 1 << 30}, "overhead": {"memory_limit_in_bytes": 128 << 20}}),
    );
    assert!((400 << 10..512 << 10).contains(&default), "{default} kB");
    assert!((1000 << 10..1152 << 10).contains(&large), "{large} kB");
}

#[test]
fn removing_a_running_pod_removes_its_containers() {
    let daemon = Daemon::start();
    daemon.pull(&busybox());
    let pod = daemon.pod("running");
    let id = daemon.run_pod(&pod);
    daemon.create_started(&id, &pod, &shell("c", &busybox(), "sleep 1000"));
    daemon.cri().remove_pod(&id);
    assert_eq!(daemon.cri().containers(), vec![]);
    assert_eq!(daemon.cri().pods(), vec![]);
    daemon.assert_nothing_left();
}

#[test]
fn what_comes_later_says_its_name() {
    let daemon = Daemon::start();
    let cri = daemon.cri();
    let assert_later = |answer: Result<(), tonic::Status>, name: &str| {
        let error = answer.expect_err(name);
        assert_eq!(error.code(), tonic::Code::Unimplemented, "{error}");
        assert!(error.message().contains(name), "{error}");
    };
    macro_rules! later {
        ($method:ident, $request:ident) => {{
            let name = stringify!($request).trim_end_matches("Request");
            let request = podvisor_proto::cri::$request::default();
            let answer = cri.call(async |mut c| c.$method(request).await).map(drop);
            assert_later(answer, name);
        }};
    }
    later!(checkpoint_container, CheckpointContainerRequest);
    later!(checkpoint_pod, CheckpointPodRequest);
    later!(restore_pod, RestorePodRequest);
}
