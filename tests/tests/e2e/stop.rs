//! The end of containers, also of those that do not want it.

use std::thread;

use nix::sys::signal::{Signal, kill};
use podvisor_proto::cri;
use podvisor_tests::crictl::{shell, with_pod};
use podvisor_tests::machine::Backend;
use podvisor_tests::oci::Image;
use podvisor_tests::registry::{Registry, busybox};
use podvisor_tests::{eventually, logs};
use serde_json::json;
use tonic::Code;

const STUBBORN: &str = "trap '' TERM INT HUP; echo ready; while :; do sleep 1; done";

fn stop_request(container: &str, timeout: i64) -> cri::StopContainerRequest {
    cri::StopContainerRequest {
        container_id: container.into(),
        timeout,
    }
}

#[test]
fn the_signal_is_the_containers_or_the_images() {
    let (daemon, pod, id) = with_pod("signal");
    let mut config = Image::busybox_and(vec![]);
    config = config.with_config(&json!({"Env": ["PATH=/bin"], "StopSignal": "SIGUSR1"}));
    Registry::shared().push("signal:1", &config);
    let image = Registry::shared().name("signal:1");
    daemon.crictl(&["pull", &image]).ok();
    let script = "for s in TERM USR1 USR2; do trap \"echo $s; exit 0\" $s; done; echo ready; while :; do sleep 0.1; done";
    for (name, own, wanted) in [("image", None, "USR1"), ("own", Some(30), "USR2")] {
        let mut config = shell(name, &image, script);
        if let Some(signal) = own {
            config["stop_signal"] = json!(signal);
        }
        let container = daemon.create_started(&id, &pod, &config);
        logs::wait_for(&pod.log(name), "ready");
        daemon.crictl(&["stop", "-t", "60", &container]).ok();
        let status = daemon.inspect(&container);
        assert_eq!(logs::stdout(&pod.log(name)), ["ready", wanted], "{status}");
    }
}

#[test]
fn twenty_stubborn_containers() {
    let (daemon, pod, id) = with_pod("stubborn");
    let start = |n: usize| {
        let name = format!("c{n}");
        daemon.create_started(&id, &pod, &shell(&name, &busybox(), STUBBORN))
    };
    let containers: Vec<String> = (0..20).map(start).collect();
    for n in 0..20 {
        logs::wait_for(&pod.log(&format!("c{n}")), "ready");
    }
    // Half of them each with its grace, at the same time, as kubelets do; the other half with the pod.
    let (asked, others) = containers.split_at(10);
    thread::scope(|scope| {
        for container in asked {
            scope.spawn(|| {
                let request = stop_request(container, 3);
                let cri = daemon.cri();
                cri.call(async |mut c| c.stop_container(request).await)
                    .expect("StopContainer");
            });
        }
    });
    let ended: Vec<i64> = asked
        .iter()
        .map(|c| daemon.cri().status(c).finished_at)
        .collect();
    let (first, last) = (ended.iter().min(), ended.iter().max());
    let apart = last.expect("ten") - first.expect("ten");
    // One after the other, the last would end nine graces after the first.
    assert!(apart < 9 * 3_000_000_000, "{apart} ns");

    daemon.cri().stop_pod(&id).expect("StopPodSandbox");
    daemon.cri().stop_pod(&id).expect("again is no error");
    for container in others {
        let status = daemon.cri().status(container);
        assert_eq!(status.state(), cri::ContainerState::ContainerExited);
        assert_eq!(status.exit_code, 137);
    }
    assert_eq!(daemon.leaks(), "");
}

#[test]
fn a_stop_goes_on_when_its_caller_goes_away() {
    let (daemon, pod, id) = with_pod("gone");
    let script = "trap 'echo asked' TERM; echo ready; while :; do sleep 0.1; done";
    let container = daemon.create_started(&id, &pod, &shell("c", &busybox(), script));
    logs::wait_for(&pod.log("c"), "ready");
    let request = stop_request(&container, 2);
    daemon.cri().cancelled(
        move |mut c| async move { c.stop_container(request).await },
        || logs::wait_for(&pod.log("c"), "asked"),
    );
    assert_eq!(daemon.cri().wait_exit(&container).exit_code, 137);
}

#[test]
fn stopping_what_does_not_answer_has_an_end() {
    if Backend::here() == Backend::Kvm {
        eprintln!("skipped: vCPUs are threads of the monitor");
        return;
    }
    let (daemon, pod, id) = with_pod("stuck");
    let container = daemon.create_started(&id, &pod, &shell("c", &busybox(), "sleep 1000"));
    let processes = daemon.instance.processes();
    let vm = processes
        .iter()
        .find(|(_, command)| command.contains(Backend::Qemu.vm_process()));
    let vm = vm.expect("a VM").0;
    kill(vm, Signal::SIGSTOP).expect("it runs");
    let request = stop_request(&container, 1);
    let stopped = daemon
        .cri()
        .call(async |mut c| c.stop_container(request).await);
    assert_eq!(
        stopped.expect_err("nobody answers").code(),
        Code::DeadlineExceeded
    );
    assert_eq!(daemon.inspect(&container)["state"], "CONTAINER_RUNNING");
    // It is the guest that decides: when it goes on, it does what it was asked.
    kill(vm, Signal::SIGCONT).expect("it is stopped");
    let code = daemon.cri().wait_exit(&container).exit_code;
    assert!(
        [137, 143].contains(&code),
        "SIGKILL, or the SIGTERM before it: {code}"
    );
    eventually("the guest answers again", || {
        let next = daemon.try_create(&id, &pod, &shell("d", &busybox(), "true"));
        (next.code == 0).then_some(())
    });
}
