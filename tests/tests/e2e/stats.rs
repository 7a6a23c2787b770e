//! What pods and containers use, as crictl shows it.

use podvisor_tests::crictl::{Pod, shell};
use podvisor_tests::daemon::Daemon;
use podvisor_tests::eventually;
use podvisor_tests::registry::busybox;
use serde_json::{Value, json};

/// Of crictl's JSON, in which numbers of 64 bits are strings, and absent ones 0.
fn number(value: &Value) -> u64 {
    match value {
        Value::String(text) => text.parse().expect("a number"),
        other => other.as_u64().unwrap_or(0),
    }
}

fn used(stats: &Value, part: &str, field: &str) -> u64 {
    number(&stats[part][field]["value"])
}

/// The entry of `id` in a list of crictl's.
fn of(list: &Value, id: &str) -> Option<Value> {
    let stats = list["stats"].as_array()?.iter();
    let mut found = stats.filter(|stats| stats["attributes"]["id"] == id);
    found.next().cloned()
}

/// What `crictl stats` knows of a container, once that satisfies `condition`.
fn stats(daemon: &Daemon, id: &str, condition: impl Fn(&Value) -> bool) -> Value {
    eventually("statistics", || {
        // crictl refuses when there is no second sample within its second, as on a machine that is busy.
        let ran = daemon.crictl(&["stats", "-a", "-o", "json", "--id", id]);
        let list: Value = serde_json::from_str(&ran.stdout).ok()?;
        of(&list, id).filter(&condition)
    })
}

const MIB: u64 = 1 << 20;

/// A container that has 8 MiB in its writable layer, and uses the CPU.
fn busy(name: &str) -> Value {
    let script = "mkdir /many; for i in 0 1 2 3 4 5 6 7 8 9; do echo > /many/$i; done; \
                  dd if=/dev/zero of=/big bs=1M count=8 2> /dev/null; sync; sleep 1000 & \
                  while :; do :; done";
    let mut config = shell(name, &busybox(), script);
    config["linux"] = json!({"resources": {
        "memory_limit_in_bytes": 64 * MIB, "memory_swap_limit_in_bytes": 64 * MIB,
        "cpu_period": 100_000, "cpu_quota": 20_000, "cpu_shares": 1024,
    }});
    config["labels"] = json!({"part": name});
    config
}

fn used_by(handler: &'static str) {
    let mut daemon = Daemon::start();
    daemon.pull(&busybox());
    let pod: Pod = daemon.pod("measured").by_handler(handler);
    let pod_id = daemon.run_pod(&pod);
    let id = daemon.create_started(&pod_id, &pod, &busy("busy"));
    let other = daemon.create_started(&pod_id, &pod, &shell("other", &busybox(), "exit 3"));

    let measured = stats(&daemon, &id, |stats| {
        let rate = used(stats, "cpu", "usageNanoCores");
        rate > 0 && used(stats, "writableLayer", "usedBytes") >= 8 * MIB
    });
    let layer = used(&measured, "writableLayer", "usedBytes");
    assert!(layer < 9 * MIB, "{measured}");
    // The directory itself, ten files in one, one large; on the node, places for mounts too.
    assert!(used(&measured, "writableLayer", "inodesUsed") >= 13);
    let mountpoint = daemon.crictl(&["imagefsinfo", "-o", "json"]).json();
    let mountpoint = mountpoint["status"]["imageFilesystems"][0]["fsId"]["mountpoint"].clone();
    assert_eq!(measured["writableLayer"]["fsId"]["mountpoint"], mountpoint);
    let working_set = used(&measured, "memory", "workingSetBytes");
    let available = used(&measured, "memory", "availableBytes");
    assert!(working_set > 0, "{measured}");
    assert_eq!(working_set + available, 64 * MIB);
    assert!(used(&measured, "memory", "usageBytes") >= working_set);
    assert_eq!(measured["attributes"]["metadata"]["name"], "busy");

    // The counter goes on.
    let cpu = |stats: &Value| used(stats, "cpu", "usageCoreNanoSeconds");
    stats(&daemon, &id, |stats| cpu(stats) > cpu(&measured));
    let ended = stats(&daemon, &other, |stats| stats["cpu"].is_null());
    assert!(ended["memory"].is_null() && !ended["writableLayer"].is_null());
    let by_label = eventually("two samples", || {
        let ran = daemon.crictl(&["stats", "-a", "-o", "json", "--label", "part=busy"]);
        serde_json::from_str::<Value>(&ran.stdout).ok()
    });
    assert_eq!(by_label["stats"].as_array().map(Vec::len), Some(1));
    let table = eventually("two samples", || {
        let ran = daemon.crictl(&["stats", "--pod", &pod_id]);
        (ran.code == 0).then_some(ran.stdout)
    });
    assert!(
        table.contains(&id[..13]) && !table.contains(&other[..13]),
        "{table}"
    );

    let of_pod = eventually("statistics of the pod", || {
        let ran = daemon.crictl(&["statsp", "-o", "json", "--id", &pod_id]);
        let list: Value = serde_json::from_str(&ran.stdout).ok()?;
        let linux = of(&list, &pod_id)?["linux"].take();
        (number(&linux["process"]["processCount"]["value"]) >= 2).then_some(linux)
    });
    assert_eq!(of_pod["network"]["defaultInterface"]["name"], "eth0");
    assert_eq!(of_pod["containers"].as_array().map(Vec::len), Some(2));
    // All that the pod costs the node: more than its container alone.
    assert!(used(&of_pod, "memory", "usageBytes") > 0, "{of_pod}");
    assert!(
        used(&of_pod, "cpu", "usageCoreNanoSeconds") > cpu(&measured),
        "{of_pod}"
    );

    metrics(&daemon, &pod_id, &id);

    daemon.kill();
    daemon.restart();
    stats(&daemon, &id, |stats| cpu(stats) > cpu(&measured));

    daemon.crictl(&["stopp", &pod_id]).ok();
    daemon.crictl(&["statsp", "--id", &pod_id]).ok();
    let cri = daemon.cri();
    let request = podvisor_proto::cri::PodSandboxStatsRequest {
        pod_sandbox_id: pod_id.clone(),
    };
    let refused = cri.call(async |mut c| c.pod_sandbox_stats(request).await);
    let refused = refused.expect_err("it is not ready");
    assert_eq!(refused.code(), tonic::Code::FailedPrecondition);
    daemon.crictl(&["rmp", &pod_id]).ok();
    daemon.assert_nothing_left();
}

/// Metrics of a pod with a [`busy`] container.
fn metrics(daemon: &Daemon, pod_id: &str, id: &str) {
    let described = daemon.crictl(&["metricdescs"]).json();
    let described = described["descriptors"].as_array().expect("a list");
    let keys = |name: &str| {
        let descriptor = described.iter().find(|d| d["name"] == name);
        descriptor.map_or(0, |d| d["labelKeys"].as_array().map_or(0, Vec::len))
    };
    let listed = daemon.crictl(&["metricsp", "-o", "json"]).json();
    let pods = listed["podMetrics"].as_array().expect("a list").iter();
    let mut pods = pods.filter(|metrics| metrics["podSandboxId"] == pod_id);
    let pod = pods.next().expect("metrics of the pod");
    let containers = pod["containerMetrics"].as_array().expect("a list");
    assert_eq!(containers.len(), 1, "of what runs");
    assert_eq!(containers[0]["containerId"], id);
    let of_pod = pod["metrics"].as_array().expect("a list");
    let of_container = containers[0]["metrics"].as_array().expect("a list");
    for metric in of_pod.iter().chain(of_container) {
        let labels = metric["labelValues"].as_array().expect("labels");
        let name = metric["name"].as_str().expect("a name");
        assert_eq!(labels.len(), keys(name), "{metric}");
        assert!(labels.iter().any(|label| label == "measured"), "{metric}");
    }
    let value = |metrics: &[Value], name: &str| {
        let metric = metrics.iter().find(|metric| metric["name"] == name);
        number(&metric.unwrap_or_else(|| panic!("no {name}"))["value"]["value"])
    };
    assert_eq!(value(of_container, "container_spec_cpu_quota"), 20_000);
    assert_eq!(
        value(of_container, "container_spec_memory_limit_bytes"),
        64 * MIB
    );
    assert!(value(of_container, "container_processes") >= 2);
    assert!(value(of_container, "container_fs_usage_bytes") >= 8 * MIB);
    assert!(value(of_container, "container_ulimits_soft") > 0);
    let overhead = value(of_pod, "podvisor_pod_overhead_memory_bytes");
    let whole = value(of_pod, "podvisor_pod_memory_usage_bytes");
    assert!(overhead > 0 && overhead <= whole, "{overhead} of {whole}");
}

#[test]
fn what_a_vms_containers_use() {
    used_by("podvisor");
}

#[test]
fn what_the_hosts_own_containers_use() {
    used_by("runc");
}
