//! Limits of containers in the guest, and of pods on the host.

use podvisor_proto::cri;
use podvisor_tests::crictl::{shell, with_pod};
use podvisor_tests::daemon::{Daemon, Options};
use podvisor_tests::logs;
use podvisor_tests::registry::busybox;
use serde_json::{Value, json};
use tonic::{Code, Status};

/// A container that sleeps, with limits.
fn limited(name: &str, resources: Value) -> Value {
    let mut config = shell(name, &busybox(), "sleep 1000");
    config["linux"] = json!({ "resources": resources });
    config
}

/// Files of a container's control group, as it sees them.
fn group(daemon: &Daemon, container: &str, files: &[&str]) -> Vec<String> {
    let files = files.iter().map(|file| format!("/sys/fs/cgroup/{file}"));
    let command: Vec<String> = ["cat".to_owned()].into_iter().chain(files).collect();
    let command: Vec<&str> = command.iter().map(String::as_str).collect();
    let text = daemon.exec(container, &command);
    text.lines().map(str::to_owned).collect()
}

const FILES: [&str; 5] = [
    "cpu.weight",
    "cpu.max",
    "memory.max",
    "memory.swap.max",
    "pids.max",
];

fn update(
    daemon: &Daemon,
    container: &str,
    linux: cri::LinuxContainerResources,
) -> Result<(), Status> {
    let request = cri::UpdateContainerResourcesRequest {
        container_id: container.into(),
        linux: Some(linux),
        ..Default::default()
    };
    let cri = daemon.cri();
    cri.call(async |mut c| c.update_container_resources(request).await)
        .map(drop)
}

#[test]
fn limits_are_those_of_the_guest() {
    let (daemon, pod, id) = with_pod("limits");
    // As kubelets send them: sizes of pages that the guest may not have, with nothing.
    let page = |size: &str| json!({"page_size": size, "limit": 0});
    let limits = json!({
        "cpu_shares": 512, "cpu_quota": 20_000, "cpu_period": 100_000,
        "memory_limit_in_bytes": 64 << 20, "memory_swap_limit_in_bytes": 64 << 20,
        "hugepage_limits": [page("2MB"), page("1GB"), page("64KB")],
        "unified": {"memory.high": "60000000", "memory.oom.group": "1", "pids.max": "33"},
    });
    let container = daemon.create_started(&id, &pod, &limited("c", limits));
    let memory_max = (64 << 20).to_string();
    assert_eq!(
        group(&daemon, &container, &FILES),
        ["59", "20000 100000", &memory_max, "0", "33"]
    );
    let more = ["memory.oom.group", "hugetlb.2MB.max"];
    assert_eq!(group(&daemon, &container, &more), ["1", "0"]);
    let shown = &daemon.inspect(&container)["resources"]["linux"];
    assert_eq!(shown["memoryLimitInBytes"], memory_max);
    assert_eq!(shown["cpuShares"], "512");

    let free = daemon.create_started(&id, &pod, &limited("free", json!({})));
    assert_eq!(
        group(&daemon, &free, &FILES),
        ["100", "max 100000", "max", "max", "max"]
    );

    for (resources, field) in [
        (json!({"cpu_shares": -1}), "cpu_shares"),
        (json!({"cpu_quota": 10}), "cpu_quota"),
        (json!({"cpu_period": 2_000_000}), "cpu_period"),
        (
            json!({"memory_limit_in_bytes": 4096}),
            "memory_limit_in_bytes",
        ),
        (
            json!({"memory_limit_in_bytes": 64 << 20, "memory_swap_limit_in_bytes": 1 << 20}),
            "memory_swap_limit_in_bytes",
        ),
        (json!({"oom_score_adj": 2000}), "oom_score_adj"),
        (json!({"cpuset_cpus": "60000"}), "cpuset_cpus"),
        (json!({"cpuset_cpus": "zero"}), "cpuset_cpus"),
        (json!({"unified": {"cgroup.freeze": "1"}}), "cgroup.freeze"),
        (
            json!({"unified": {"memory.no_such": "1"}}),
            "memory.no_such",
        ),
    ] {
        let config = limited("refused", resources);
        let message = daemon
            .try_create(&id, &pod, &config)
            .failed("InvalidArgument");
        assert!(message.contains(field), "{message}");
    }
    assert_eq!(daemon.cri().containers().len(), 2);
}

#[test]
fn limits_change_while_processes_run() {
    let (mut daemon, pod, id) = with_pod("update");
    let limits = json!({"cpu_shares": 512, "memory_limit_in_bytes": 64 << 20});
    let container = daemon.create_started(&id, &pod, &limited("c", limits.clone()));
    let pid = daemon.inspect(&container)["startedAt"].clone();
    let more = cri::LinuxContainerResources {
        cpu_shares: 2048,
        cpu_quota: 50_000,
        cpu_period: 100_000,
        memory_limit_in_bytes: 128 << 20,
        ..Default::default()
    };
    update(&daemon, &container, more).expect("up");
    let read = |daemon: &Daemon, file: &str| group(daemon, &container, &[file]).remove(0);
    assert_eq!(read(&daemon, "memory.max"), (128 << 20).to_string());
    assert_eq!(read(&daemon, "cpu.max"), "50000 100000");
    assert_eq!(read(&daemon, "cpu.weight"), "174");
    let shown = daemon.inspect(&container)["resources"]["linux"].take();
    assert_eq!(shown["cpuShares"], "2048");
    assert_eq!(shown["memoryLimitInBytes"], (128 << 20).to_string());

    let less = cri::LinuxContainerResources {
        cpu_quota: -1,
        memory_limit_in_bytes: 32 << 20,
        ..Default::default()
    };
    update(&daemon, &container, less.clone()).expect("down");
    update(&daemon, &container, less).expect("again is no error");
    assert_eq!(read(&daemon, "memory.max"), (32 << 20).to_string());
    assert_eq!(read(&daemon, "cpu.max"), "max 100000");
    assert_eq!(read(&daemon, "cpu.weight"), "174", "not named, not changed");

    // All or nothing.
    let used = cri::LinuxContainerResources {
        cpu_shares: 4096,
        unified: [("memory.high".to_owned(), "no number".to_owned())].into(),
        ..Default::default()
    };
    let error = update(&daemon, &container, used).expect_err("no number");
    assert_eq!(error.code(), Code::FailedPrecondition, "{error}");
    assert_eq!(read(&daemon, "cpu.weight"), "174");
    let bad = cri::LinuxContainerResources {
        cpu_quota: 1,
        ..Default::default()
    };
    let error = update(&daemon, &container, bad).expect_err("too little");
    assert_eq!(error.code(), Code::InvalidArgument, "{error}");

    // It is the same process, and a daemon that comes back knows.
    assert_eq!(daemon.inspect(&container)["startedAt"], pid);
    daemon.kill();
    daemon.restart();
    let shown = daemon.inspect(&container)["resources"]["linux"].take();
    assert_eq!(shown["memoryLimitInBytes"], (32 << 20).to_string());

    // Before the start is early enough.
    let waiting = daemon.create(&id, &pod, &limited("waiting", limits));
    let more = cri::LinuxContainerResources {
        memory_limit_in_bytes: 96 << 20,
        ..Default::default()
    };
    update(&daemon, &waiting, more.clone()).expect("created");
    daemon
        .cri()
        .start_container(&waiting)
        .expect("StartContainer");
    assert_eq!(
        group(&daemon, &waiting, &["memory.max", "cpu.weight"]),
        [(96 << 20).to_string(), "59".into()]
    );
    daemon.cri().stop_container(&waiting);
    let error = update(&daemon, &waiting, more).expect_err("it has ended");
    assert_eq!(error.code(), Code::FailedPrecondition, "{error}");
}

#[test]
fn memory_in_use_is_not_taken_away() {
    let (daemon, pod, id) = with_pod("in-use");
    let script = "x=$(head -c 20000000 /dev/zero | tr '\\0' x); echo ready; sleep 1000; echo $x";
    let mut config = shell("c", &busybox(), script);
    config["linux"] = json!({"resources": {"memory_limit_in_bytes": 200 << 20}});
    let container = daemon.create_started(&id, &pod, &config);
    logs::wait_for(&pod.log("c"), "ready");
    let less = cri::LinuxContainerResources {
        memory_limit_in_bytes: 4 << 20,
        ..Default::default()
    };
    let error = update(&daemon, &container, less).expect_err("it uses more");
    assert_eq!(error.code(), Code::FailedPrecondition, "{error}");
    assert_eq!(daemon.inspect(&container)["state"], "CONTAINER_RUNNING");
    assert_eq!(
        group(&daemon, &container, &["memory.max"]),
        [(200 << 20).to_string()]
    );
}

#[test]
fn out_of_memory_ends_one_container() {
    let (daemon, pod, id) = with_pod("oom");
    let other = daemon.create_started(&id, &pod, &limited("other", json!({})));
    let greedy = |name: &str, script: &str, resources: Value| {
        let mut config = shell(name, &busybox(), script);
        config["linux"] = json!({ "resources": resources });
        let container = daemon.create_started(&id, &pod, &config);
        daemon.cri().wait_exit(&container)
    };
    // As critest does it.
    let memory = json!({"memory_limit_in_bytes": 15 << 20, "memory_swap_limit_in_bytes": 15 << 20});
    let status = greedy(
        "dd",
        "exec dd if=/dev/zero of=/dev/null bs=20M",
        memory.clone(),
    );
    assert_eq!(
        (status.reason.as_str(), status.exit_code),
        ("OOMKilled", 137)
    );
    // The group as a whole, as kubelets ask for: the shell does not outlive its child.
    let mut whole = memory;
    whole["unified"] = json!({"memory.oom.group": "1"});
    let status = greedy(
        "group",
        "dd if=/dev/zero of=/dev/null bs=20M; sleep 1000",
        whole,
    );
    assert_eq!(
        (status.reason.as_str(), status.exit_code),
        ("OOMKilled", 137)
    );
    // Nobody limits this one but the VM's own memory.
    let status = greedy("all", "exec tail /dev/zero", json!({}));
    assert_eq!(
        (status.reason.as_str(), status.exit_code),
        ("OOMKilled", 137)
    );
    assert_eq!(daemon.inspect(&other)["state"], "CONTAINER_RUNNING");
    assert_eq!(daemon.exec(&other, &["echo", "alive"]), "alive");
    assert_eq!(daemon.inspect_pod(&id)["state"], "SANDBOX_READY");
}

/// Bytes of memory that the VM has: what `podvisor inspect` says, and the guest's kernel.
fn vm_memory(daemon: &Daemon, pod: &str, container: &str) -> (u64, u64) {
    let inspected = daemon.cli().args(["inspect", pod]).output();
    let inspected = inspected.expect("podvisor runs").stdout;
    let inspected: Value = serde_json::from_slice(&inspected).expect("JSON");
    let given = inspected["vm"]["memory_bytes"].as_u64().expect("a number");
    let total = daemon.exec(
        container,
        &["awk", "/MemTotal/ {print $2}", "/proc/meminfo"],
    );
    (given, total.parse::<u64>().expect("a number") << 10)
}

#[test]
fn a_vm_grows_with_its_containers() {
    const MIB: u64 = 1 << 20;
    let mut daemon = Daemon::start_with(&Options {
        config: vec![
            ("vm", "memory_mib = 192".into()),
            ("vm", "max_memory_mib = 640".into()),
        ],
        ..Options::default()
    });
    daemon.crictl(&["pull", &busybox()]).ok();
    let pod = daemon.pod("grows");
    let id = daemon.run_pod(&pod);
    let small = json!({"memory_limit_in_bytes": 64 * MIB});
    let first = daemon.create_started(&id, &pod, &limited("first", small));
    let (given, before) = vm_memory(&daemon, &id, &first);
    assert_eq!(given, 192 * MIB);

    // What both may use together, in blocks of 128 MiB beyond what the VM began with.
    let use_it = "mkdir /full; mount -t tmpfs -o size=100% full /full;
        dd if=/dev/zero of=/full/file bs=1M count=200 2>&1; echo used; sleep 1000";
    let mut large = shell("large", &busybox(), use_it);
    large["linux"] = json!({
        "resources": {"memory_limit_in_bytes": 240 * MIB},
        "security_context": {"capabilities": {"add_capabilities": ["SYS_ADMIN"]}},
    });
    let large = daemon.create_started(&id, &pod, &large);
    logs::wait_for(&pod.log("large"), "used");
    let (given, after) = vm_memory(&daemon, &id, &first);
    assert_eq!(given, 320 * MIB);
    assert_eq!(after - before, 128 * MIB);
    let used = daemon.exec(&large, &["cat", "/sys/fs/cgroup/memory.current"]);
    assert!(used.parse::<u64>().expect("a number") > 200 * MIB, "{used}");

    // A new limit counts as well, after a restart of podvisord, too; and what is too much is refused.
    daemon.kill();
    daemon.restart();
    let change = |container: &str, memory: u64| {
        let linux = cri::LinuxContainerResources {
            memory_limit_in_bytes: memory as i64,
            ..Default::default()
        };
        update(&daemon, container, linux)
    };
    change(&first, 200 * MIB).expect("more memory");
    assert_eq!(vm_memory(&daemon, &id, &first).0, 448 * MIB);
    let error = change(&first, 500 * MIB).expect_err("more than the maximum");
    assert_eq!(error.code(), Code::FailedPrecondition, "{error}");
    assert!(error.message().contains("max_memory_mib"), "{error}");
    let limit = group(&daemon, &first, &["memory.max"]);
    assert_eq!(limit, [(200 * MIB).to_string()]);
    let huge = json!({"memory_limit_in_bytes": 400 * MIB});
    let huge = daemon.create(&id, &pod, &limited("huge", huge));
    let error = daemon.cri().start_container(&huge).expect_err("too much");
    assert_eq!(error.code(), Code::FailedPrecondition, "{error}");
    // One that has ended needs nothing any more.
    daemon.cri().stop_container(&large);
    let started = daemon.cri().start_container(&huge);
    started.expect("there is room now");
    assert_eq!(vm_memory(&daemon, &id, &first).0, 704 * MIB);
}

#[test]
fn a_resized_pod_has_a_vm_of_that_size() {
    const MIB: i64 = 1 << 20;
    let daemon = Daemon::start();
    daemon.crictl(&["pull", &busybox()]).ok();
    let linux = json!({"resources": {"memory_limit_in_bytes": 256 * MIB}});
    let pod = daemon.pod("resized").with("linux", linux);
    let id = daemon.run_pod(&pod);
    let container = daemon.create_started(&id, &pod, &limited("c", json!({})));
    let (_, before) = vm_memory(&daemon, &id, &container);
    // As kubelets do: first the pod, then the container.
    let resize = |memory: i64| {
        let resources = cri::LinuxContainerResources {
            memory_limit_in_bytes: memory,
            ..Default::default()
        };
        let request = cri::UpdatePodSandboxResourcesRequest {
            pod_sandbox_id: id.clone(),
            overhead: None,
            resources: Some(resources.clone()),
        };
        let cri = daemon.cri();
        cri.call(async |mut c| c.update_pod_sandbox_resources(request).await)?;
        update(&daemon, &container, resources)
    };
    resize(500 * MIB).expect("more memory");
    let (given, after) = vm_memory(&daemon, &id, &container);
    assert_eq!(given, 512 * MIB as u64);
    assert_eq!(after - before, 256 * MIB as u64);
    resize(256 * MIB).expect("less memory");
    assert_eq!(vm_memory(&daemon, &id, &container), (given, after));
}

#[test]
fn huge_pages_are_set_aside() {
    let daemon = Daemon::start();
    daemon.pull(&busybox());
    let pages = |size: &str, limit: u32| json!({"page_size": size, "limit": limit});
    let linux =
        json!({"resources": {"hugepage_limits": [pages("2MB", 16 << 20), pages("1GB", 0)]}});
    let pod = daemon.pod("huge").with("linux", linux);
    let id = daemon.run_pod(&pod);
    let mut config = limited("c", json!({"hugepage_limits": [pages("2MB", 8 << 20)]}));
    config["command"] = json!([
        "sh",
        "-c",
        "grep HugePages_Total /proc/meminfo | tr -d ' '; cat /sys/fs/cgroup/hugetlb.2MB.max"
    ]);
    let container = daemon.create_started(&id, &pod, &config);
    daemon.cri().wait_exit(&container);
    assert_eq!(
        logs::stdout(&pod.log("c")),
        ["HugePages_Total:8", "8388608"]
    );
    let linux = json!({"resources": {"hugepage_limits": [pages("1GB", 1 << 30)]}});
    let message = daemon
        .try_run_pod(&daemon.pod("giant").with("linux", linux))
        .failed("InvalidArgument");
    assert!(message.contains("hugepage_limits"), "{message}");
}

/// The group of a pod below `parent`, in each hierarchy that has one.
fn host_groups(parent: &str, id: &str) -> Vec<std::path::PathBuf> {
    let mounts = std::fs::read_to_string("/proc/self/mounts").expect("a proc");
    let roots = mounts.lines().filter_map(|line| {
        let mut words = line.split(' ').skip(1);
        let (point, kind) = (words.next()?, words.next()?);
        kind.starts_with("cgroup").then(|| point.to_owned())
    });
    let groups = roots.filter_map(|root| {
        let parent = std::path::Path::new(&root).join(parent);
        let entries = std::fs::read_dir(parent).ok()?.flatten();
        let mut paths = entries.map(|entry| entry.path());
        paths.find(|path| path.to_string_lossy().contains(id))
    });
    groups.collect()
}

#[test]
fn a_pods_processes_are_in_its_parent() {
    let daemon = Daemon::start();
    daemon.pull(&busybox());
    // As both drivers of kubelets write it.
    let name = format!("{}-pod1", daemon.instance.cgroup_parent().trim_matches('/'));
    let slice = name.replace(['/', '_'], "-") + ".slice";
    let nested: Vec<String> = {
        let parts: Vec<&str> = slice.trim_end_matches(".slice").split('-').collect();
        (1..=parts.len())
            .map(|n| parts[..n].join("-") + ".slice")
            .collect()
    };
    let path = format!("{}/kubepods/podx", daemon.instance.cgroup_parent());
    for (parent, place) in [
        (path.clone(), path.trim_matches('/').to_owned()),
        (slice, nested.join("/")),
    ] {
        let pod = daemon
            .pod("parent")
            .with("linux", json!({"cgroup_parent": parent}));
        let id = daemon.run_pod(&pod);
        let groups = host_groups(&place, &id);
        assert!(!groups.is_empty(), "{parent}");
        let processes = daemon.instance.processes();
        for group in &groups {
            let inside = std::fs::read_to_string(group.join("cgroup.procs")).expect("a group");
            let of_pod = processes
                .iter()
                .filter(|(_, command)| command.contains(&id));
            for (pid, command) in of_pod {
                assert!(
                    inside.lines().any(|line| line == pid.as_raw().to_string()),
                    "{command} is not in {}",
                    group.display()
                );
            }
        }
        daemon.cri().remove_pod(&id);
        assert_eq!(host_groups(&place, &id), Vec::<std::path::PathBuf>::new());
        remove_parents(&place);
    }
}

/// Parents are the caller's, as kubelets know.
fn remove_parents(place: &str) {
    let mounts = std::fs::read_to_string("/proc/self/mounts").expect("a proc");
    for root in mounts.lines().filter(|line| line.contains(" cgroup")) {
        let root = root.split(' ').nth(1).expect("a mount point");
        let mut path = std::path::Path::new(root).join(place);
        while path != std::path::Path::new(root) && std::fs::remove_dir(&path).is_ok() {
            path.pop();
        }
    }
}

#[test]
fn cpus_are_the_hosts() {
    let (daemon, pod, id) = with_pod("cpuset");
    let parent = daemon.instance.cgroup_parent();
    let cpus = || -> Vec<String> {
        let groups = host_groups(parent.trim_matches('/'), &id).into_iter();
        // Of v2, what applies; of v1, what is set.
        let files = groups.filter_map(|group| {
            ["cpuset.cpus.effective", "cpuset.cpus"]
                .iter()
                .find_map(|name| std::fs::read_to_string(group.join(name)).ok())
        });
        files.map(|text| text.trim().to_owned()).collect()
    };
    if cpus().is_empty() {
        eprintln!("skipped: no cpuset controller here");
        return;
    }
    let all = cpus();
    let first = daemon.create_started(&id, &pod, &limited("first", json!({"cpuset_cpus": "0"})));
    assert_eq!(cpus(), ["0"]);
    // One that may run anywhere: the VM may, too.
    let second = daemon.create_started(&id, &pod, &limited("second", json!({})));
    assert_eq!(cpus(), all);
    let changed = cri::LinuxContainerResources {
        cpuset_cpus: "0".into(),
        ..Default::default()
    };
    update(&daemon, &second, changed).expect("a CPU");
    assert_eq!(cpus(), ["0"]);
    assert_eq!(
        daemon.inspect(&first)["resources"]["linux"]["cpusetCpus"],
        "0"
    );
}

#[test]
fn a_pods_own_limits() {
    const MIB: i64 = 1 << 20;
    let daemon = Daemon::start();
    let resources =
        json!({"memory_limit_in_bytes": 256 * MIB, "cpu_quota": 100_000, "cpu_period": 100_000});
    let asks = |name, handler| {
        let linux = json!({ "resources": resources });
        daemon.pod(name).by_handler(handler).with("linux", linux)
    };
    let in_vm = daemon.run_pod(&asks("vm", "podvisor"));
    let on_host = daemon.run_pod(&asks("host", "runc"));
    let cri = daemon.cri();
    let update = |id: &str, memory: i64, quota: i64| {
        let request = cri::UpdatePodSandboxResourcesRequest {
            pod_sandbox_id: id.into(),
            overhead: None,
            resources: Some(cri::LinuxContainerResources {
                memory_limit_in_bytes: memory,
                cpu_quota: quota,
                ..Default::default()
            }),
        };
        cri.call(async |mut c| c.update_pod_sandbox_resources(request).await)
            .map(drop)
    };
    let parent = daemon.instance.cgroup_parent();
    let is = |id: &str, names: [&str; 2]| -> String {
        let groups = host_groups(parent.trim_matches('/'), id);
        let mut files = groups.iter().flat_map(|group| names.map(|n| group.join(n)));
        let text = files.find_map(|file| std::fs::read_to_string(file).ok());
        text.expect("a controller").trim().into()
    };
    let quota = |id: &str| is(id, ["cpu.max", "cpu.cfs_quota_us"]);
    let memory = |id: &str| is(id, ["memory.max", "memory.limit_in_bytes"]);

    for id in [&in_vm, &on_host] {
        update(id, 0, 50_000).expect("less");
        assert_eq!(quota(id).split(' ').next(), Some("50000"));
        update(id, 0, 50_000).expect("again is no error");
        update(id, 0, 0).expect("nothing is no error");
        let error = update("no such pod", 0, 0).expect_err("there is none");
        assert_eq!(error.code(), Code::NotFound, "{error}");
    }
    update(&on_host, 128 * MIB, 0).expect("less memory");
    assert_eq!(memory(&on_host), (128 * MIB).to_string());
    update(&on_host, 512 * MIB, 0).expect("more memory");
    assert_eq!(memory(&on_host), (512 * MIB).to_string());
    let error = update(&on_host, 4096, 0).expect_err("less than is in use");
    assert_eq!(error.code(), Code::FailedPrecondition, "{error}");
    assert_eq!(memory(&on_host), (512 * MIB).to_string());

    // A VM keeps what it has.
    update(&in_vm, 128 * MIB, 0).expect("less memory");
    let error = update(&in_vm, 1 << 50, 0).expect_err("more than the node has");
    assert_eq!(error.code(), Code::FailedPrecondition, "{error}");
    assert!(error.message().contains("256 MiB"), "{error}");

    // The group of a parent that somebody made for the pod is somebody's.
    let place = format!("{}/theirs", parent.trim_matches('/'));
    let linux = json!({"resources": resources, "cgroup_parent": place});
    let theirs = daemon.run_pod(&daemon.pod("theirs").with("linux", linux));
    update(&theirs, 0, 50_000).expect("accepted");
    let unlimited = host_groups(&place, &theirs);
    for file in unlimited.iter().map(|group| group.join("cpu.cfs_quota_us")) {
        if let Ok(quota) = std::fs::read_to_string(file) {
            assert_eq!(quota.trim(), "-1");
        }
    }
    daemon.cri().stop_pod(&in_vm).expect("StopPodSandbox");
    let error = update(&in_vm, 0, 0).expect_err("it does not run");
    assert_eq!(error.code(), Code::FailedPrecondition, "{error}");
    cri.remove_pod(&theirs);
    remove_parents(&place);
}
