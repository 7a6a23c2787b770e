//! podvisord is control only: what happens to pods when it is killed; what it tells when one of a
//! pod's own processes is.

use std::net::TcpStream;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use podvisor_proto::cri::{ContainerState, PodSandboxState};
use podvisor_tests::crictl::shell;
use podvisor_tests::daemon::Daemon;
use podvisor_tests::machine::Backend;
use podvisor_tests::registry::busybox;
use podvisor_tests::{eventually, logs};
use serde_json::json;
use tonic::Code;

/// Counts lines, for ever, until told. It stays then: with the container's end, the command that tells it would be killed.
const COUNTS: &str =
    "i=0; while [ ! -e /stop ]; do i=$((i+1)); echo $i; done; echo end; exec sleep 1000";

#[test]
fn a_killed_daemon_comes_back_to_its_pods() {
    let mut daemon = Daemon::start();
    daemon.pull(&busybox());
    let labels = json!({"kept": "yes"});
    let pod = daemon.pod("survives").with("labels", labels.clone());
    let id = daemon.run_pod(&pod);
    let empty = daemon.run_pod(&daemon.pod("empty"));
    let stopped = daemon.run_pod(&daemon.pod("stopped"));
    daemon.cri().stop_pod(&stopped).expect("StopPodSandbox");

    let counts = daemon.create_started(&id, &pod, &shell("counts", &busybox(), COUNTS));
    let created = daemon.create(&id, &pod, &shell("created", &busybox(), "echo late"));
    let exited = daemon.create_started(&id, &pod, &shell("exited", &busybox(), "exit 9"));
    daemon.cri().wait_exit(&exited);
    // Ends when somebody connects: while the daemon is away.
    let script = "echo listens; nc -l -p 99; echo done; exit 17";
    let ends = daemon.create_started(&id, &pod, &shell("ends", &busybox(), script));
    logs::wait_for(&pod.log("ends"), "listens");
    let ip = daemon.cri().pod_status(&id).network.expect("a network").ip;
    logs::wait_for(&pod.log("counts"), "1000");
    let all = [&counts, &created, &exited].map(|id| daemon.inspect(id));
    let pods = [&id, &empty, &stopped].map(|id| daemon.inspect_pod(id));
    let images = daemon.crictl(&["images", "-o", "json"]).json();

    daemon.kill();
    let before = logs::stdout(&pod.log("counts")).len();
    eventually("the container writes on without a daemon", || {
        (logs::stdout(&pod.log("counts")).len() > before + 2000).then_some(())
    });
    eventually("the container listens", || {
        TcpStream::connect((ip.as_str(), 99)).ok()
    });
    logs::wait_for(&pod.log("ends"), "done");
    daemon.restart();

    assert_eq!(
        [&counts, &created, &exited].map(|id| daemon.inspect(id)),
        all
    );
    assert_eq!(
        [&id, &empty, &stopped].map(|id| daemon.inspect_pod(id)),
        pods
    );
    assert_eq!(daemon.crictl(&["images", "-o", "json"]).json(), images);
    let status = daemon.cri().wait_exit(&ends);
    assert_eq!((status.exit_code, status.reason.as_str()), (17, "Error"));
    assert!(status.finished_at > status.started_at);
    assert_eq!(daemon.leaks(), "");

    // All of it still works.
    daemon
        .cri()
        .start_container(&created)
        .expect("StartContainer");
    daemon.cri().wait_exit(&created);
    assert_eq!(logs::stdout(&pod.log("created")), ["late"]);
    daemon.exec(&counts, &["touch", "/stop"]);
    logs::wait_for(&pod.log("counts"), "end");
    let mut lines = logs::stdout(&pod.log("counts"));
    assert_eq!(lines.pop().as_deref(), Some("end"));
    logs::assert_same(&lines, &logs::seq(lines.len()));
    // Names are still taken.
    daemon.try_run_pod(&pod).failed("AlreadyExists");
}

#[test]
fn stopping_the_daemon_stops_no_pod() {
    let mut daemon = Daemon::start();
    daemon.pull(&busybox());
    let pod = daemon.pod("goes-on");
    let id = daemon.run_pod(&pod);
    let container = daemon.create_started(&id, &pod, &shell("c", &busybox(), COUNTS));
    let boot = daemon.exec(&container, &["cat", "/proc/sys/kernel/random/boot_id"]);
    for _ in 0..3 {
        daemon.stop();
        daemon.restart();
        let again = daemon.exec(&container, &["cat", "/proc/sys/kernel/random/boot_id"]);
        assert_eq!(again, boot);
    }
}

#[test]
fn a_pod_that_dies_while_the_daemon_is_away() {
    let mut daemon = Daemon::start();
    daemon.pull(&busybox());
    let pod = daemon.pod("dies");
    let id = daemon.run_pod(&pod);
    let container = daemon.create_started(&id, &pod, &shell("c", &busybox(), "sleep 1000"));
    let lives = daemon.run_pod(&daemon.pod("lives"));
    let monitor = process_of(&daemon, "podvisor-monitor", &id);
    daemon.kill();
    kill(monitor, Signal::SIGKILL).expect("it runs");
    daemon.restart();
    assert_dead(&daemon, &id, &container);
    assert_eq!(daemon.inspect_pod(&lives)["state"], "SANDBOX_READY");
}

/// The process of a pod whose command contains `name`.
pub fn process_of(daemon: &Daemon, name: &str, id: &str) -> nix::unistd::Pid {
    let cgroup = format!("podvisor-{id}");
    let all = daemon.instance.processes();
    let found = all.iter().find(|(pid, command)| {
        let file = format!("/proc/{pid}/cgroup");
        let cgroups = std::fs::read_to_string(file).unwrap_or_default();
        command.contains(name) && (cgroups.contains(&cgroup) || command.contains(id))
    });
    found
        .unwrap_or_else(|| panic!("no {name} of {id}: {all:?}"))
        .0
}

/// A pod whose VM is gone, and its container, as kubelets are to see them.
fn assert_dead(daemon: &Daemon, pod: &str, container: &str) {
    let cri = daemon.cri();
    eventually("the pod is not ready", || {
        let state = cri.pod_status(pod).state();
        (state == PodSandboxState::SandboxNotready).then_some(())
    });
    let status = cri.status(container);
    assert_eq!(status.state(), ContainerState::ContainerExited);
    assert_eq!(status.exit_code, 137, "{status:?}");
    assert!(status.finished_at >= status.started_at, "{status:?}");
    let error = cri.exec(container, &["true"], Duration::from_secs(5));
    assert_eq!(
        error.expect_err("nothing to run it in").code(),
        Code::FailedPrecondition
    );
}

#[test]
fn killed_monitor() {
    dies("podvisor-monitor");
}

#[test]
fn killed_vmm() {
    match Backend::here() {
        Backend::Qemu => dies(Backend::Qemu.vm_process()),
        Backend::Kvm => {
            eprintln!("skipped: the VMM is in the monitor's process, which killed_monitor kills");
        }
    }
}

#[test]
fn a_guest_that_stops_answering() {
    if Backend::here() == Backend::Kvm {
        // The vCPUs cannot be stopped from outside without the monitor that has them.
        // runtime/vmm/tests/kvm.rs pauses and ends them there.
        eprintln!("skipped: vCPUs are threads of the monitor");
        return;
    }
    let daemon = Daemon::start();
    daemon.pull(&busybox());
    let pod = daemon.pod("stuck");
    let id = daemon.run_pod(&pod);
    let container = daemon.create_started(&id, &pod, &shell("c", &busybox(), "sleep 1000"));
    let vm = process_of(&daemon, Backend::Qemu.vm_process(), &id);
    kill(vm, Signal::SIGSTOP).expect("it runs");

    let command = ["true"];
    let exec = daemon
        .cri()
        .exec(&container, &command, Duration::from_secs(2));
    assert_eq!(exec.expect_err("no answer").code(), Code::DeadlineExceeded);
    // Lists do not ask the guest.
    assert_eq!(daemon.inspect_pod(&id)["state"], "SANDBOX_READY");
    daemon.cri().stop_pod(&id).expect("within its own deadline");
    daemon.cri().remove_pod(&id);
    assert_eq!(daemon.leaks(), "");
}

/// The death of one of a pod's processes is that pod's death, and no other's.
fn dies(process: &str) {
    let daemon = Daemon::start();
    daemon.pull(&busybox());
    let pod = daemon.pod("victim");
    let id = daemon.run_pod(&pod);
    let container = daemon.create_started(&id, &pod, &shell("c", &busybox(), "sleep 1000"));
    let other = daemon.run_pod(&daemon.pod("other"));

    kill(process_of(&daemon, process, &id), Signal::SIGKILL).expect("it runs");
    assert_dead(&daemon, &id, &container);
    assert_eq!(daemon.inspect_pod(&other)["state"], "SANDBOX_READY");
    // What a kubelet does next: a new attempt of the same pod, while the old one is still listed.
    let mut again = pod.clone();
    again.config["metadata"]["attempt"] = json!(2);
    let new = daemon.run_pod(&again);
    daemon.create_started(&new, &again, &shell("c2", &busybox(), "sleep 1000"));
    daemon.cri().remove_pod(&id);
    assert_eq!(daemon.inspect_pod(&new)["state"], "SANDBOX_READY");
    assert_eq!(daemon.leaks(), "");
}
