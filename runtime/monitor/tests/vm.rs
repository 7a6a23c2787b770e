//! The monitor with real VMs: its binary, QEMU (TCG), the guest's kernel and agent.

mod common;

use std::fs;
use std::time::Duration;

use common::{PATIENCE, Pod};
use podvisor_proto::monitor::{
    ConsoleRequest, ContainerState, RemoveContainerRequest, ReopenLogRequest, SandboxState,
    ShutdownRequest, Snapshot, StopContainerRequest,
};
use prost::Message;
use tonic::Code;

#[tokio::test]
async fn a_pod_from_boot_to_shutdown() {
    let Some(mut pod) = Pod::ready().await else {
        return;
    };
    let ready = pod
        .state_when(|state| state.state() == SandboxState::Ready)
        .await;
    let phases: Vec<&str> = ready
        .timeline
        .iter()
        .map(|entry| entry.phase.as_str())
        .collect();
    assert_eq!(
        phases,
        [
            "monitor start",
            "vm start",
            "guest kernel",
            "agent",
            "configure"
        ]
    );
    for pair in ready.timeline.windows(2) {
        assert!(pair[0].start_ns <= pair[0].end_ns && pair[0].end_ns <= pair[1].start_ns);
    }

    // Logs, exit code.
    let script = "echo one; echo two >&2; echo -n three; exit 3";
    let id = pod.create('a', &["sh", "-c", script]).await;
    pod.start(&id).await;
    let exited = pod.exited(&id).await;
    assert_eq!((exited.exit_code, exited.reason.as_str()), (3, "Error"));
    let mut log = pod.log('a');
    log.sort();
    assert_eq!(log, ["stderr F two", "stdout F one", "stdout P three"]);

    // A second container after the first has ended; exec.
    let id = pod.create('b', &["sleep", "1000"]).await;
    let running = pod.start(&id).await;
    assert_eq!(running.state(), ContainerState::Running);
    let script = "echo out; echo err >&2; exit 7";
    let done = pod.exec(&id, &["sh", "-c", script], 0).await.unwrap();
    assert_eq!(
        (&done.stdout[..], &done.stderr[..]),
        (&b"out\n"[..], &b"err\n"[..])
    );
    assert_eq!(done.exit_code, 7);
    let large = pod
        .exec(&id, &["head", "-c", "3000000", "/dev/zero"], 0)
        .await
        .unwrap();
    assert_eq!(large.stdout.len(), 3_000_000);
    let script = "sleep 1234 & sleep 1234";
    let late = pod.exec(&id, &["sh", "-c", script], 500).await.unwrap_err();
    assert_eq!(late.code(), Code::DeadlineExceeded);
    let script = "cat /proc/[0-9]*/cmdline";
    let left = pod.exec(&id, &["sh", "-c", script], 0).await.unwrap();
    let left = String::from_utf8_lossy(&left.stdout).into_owned();
    assert!(left.contains("sleep") && !left.contains("1234"), "{left}");
    let missing = pod.exec(&id, &["no-such-program"], 0).await.unwrap_err();
    assert!(missing.message().contains("no-such-program"), "{missing}");

    // As the first process of its pid namespace `sleep` ignores SIGTERM.
    let stop = StopContainerRequest {
        id: id.clone(),
        signal: 15,
        grace_ms: 200,
    };
    pod.client.stop_container(stop).await.unwrap();
    assert_eq!(pod.exited(&id).await.exit_code, 137);
    pod.client
        .remove_container(RemoveContainerRequest { id })
        .await
        .unwrap();

    let last = pod
        .client
        .shutdown(ShutdownRequest { grace_ms: 0 })
        .await
        .unwrap();
    let last = last.into_inner().snapshot.unwrap();
    assert_eq!(
        (last.state(), last.reason.as_str()),
        (SandboxState::Stopped, "Shutdown")
    );
    assert_eq!(last.containers.len(), 1);
    assert!(pod.monitor.wait().unwrap().success());
    let saved = fs::read(pod.dir.path().join("state")).unwrap();
    assert_eq!(Snapshot::decode(saved.as_slice()).unwrap(), last);
}

#[tokio::test]
async fn what_cannot_be_started_says_why() {
    let Some(mut pod) = Pod::ready().await else {
        return;
    };
    let id = pod.create('a', &["no-such-program"]).await;
    let failed = pod.start(&id).await;
    assert_eq!(failed.state(), ContainerState::Exited);
    assert_eq!(
        (failed.exit_code, failed.reason.as_str()),
        (128, "StartError")
    );
    assert!(
        failed.message.contains("no-such-program"),
        "{}",
        failed.message
    );
}

#[tokio::test]
async fn a_log_is_whole_across_a_rotation() {
    let Some(mut pod) = Pod::ready().await else {
        return;
    };
    const LINES: usize = 200_000;
    let id = pod.create('a', &["seq", &LINES.to_string()]).await;
    pod.start(&id).await;
    for rotation in 0..3 {
        let path = |name: String| pod.dir.path().join(name);
        fs::rename(path("a.log".to_owned()), path(format!("{rotation}.log"))).unwrap();
        let fd_token = pod.send_fd(pod.log_file('a')).await;
        let request = ReopenLogRequest {
            id: id.clone(),
            log_fd_token: fd_token,
        };
        pod.client.reopen_log(request).await.unwrap();
    }
    assert_eq!(pod.exited(&id).await.exit_code, 0);
    let all: Vec<String> = ['0', '1', '2', 'a']
        .into_iter()
        .flat_map(|name| pod.log(name))
        .collect();
    let expected = (1..=LINES).map(|number| format!("stdout F {number}"));
    assert!(
        all.into_iter().eq(expected),
        "a line is lost, doubled or out of order"
    );
}

#[tokio::test]
async fn a_killed_vm_is_reported_at_once() {
    let Some(mut pod) = Pod::ready().await else {
        return;
    };
    let id = pod.create('a', &["sleep", "1000"]).await;
    pod.start(&id).await;
    let vmm_pid = pod.state_when(|state| state.vmm_pid > 0).await.vmm_pid;
    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(vmm_pid as i32),
        nix::sys::signal::Signal::SIGKILL,
    )
    .unwrap();
    let stopped = pod
        .state_when(|state| state.state() == SandboxState::Stopped)
        .await;
    assert_eq!(stopped.reason, "VmmExited");
    let ended = common::container(&stopped, &id);
    assert_eq!(
        (ended.state(), ended.exit_code),
        (ContainerState::Exited, 137)
    );
    // The monitor is still there for who asks, until it is told to go.
    pod.client
        .shutdown(ShutdownRequest { grace_ms: 0 })
        .await
        .unwrap();
    assert!(pod.monitor.wait().unwrap().success());
}

#[tokio::test]
async fn a_guest_that_panics_says_so() {
    // Without an init.
    let Some(mut pod) = Pod::launch(PATIENCE, "rdinit=/nothing root=/dev/none") else {
        return;
    };
    let error = pod.configure().await.unwrap_err();
    assert_eq!(error.code(), Code::FailedPrecondition);
    assert!(error.message().contains("GuestPanic"), "{error}");
    assert!(error.message().contains("Kernel panic"), "{error}");
    let mut console = pod
        .client
        .console(ConsoleRequest { follow: true })
        .await
        .unwrap()
        .into_inner();
    let chunk = console
        .message()
        .await
        .unwrap()
        .expect("the kernel's words");
    assert!(String::from_utf8_lossy(&chunk.data).contains("Kernel panic"));
}

#[tokio::test]
async fn a_guest_that_does_not_come_up_in_time_is_given_up() {
    // Long enough for QEMU to start, and a kernel that stays where it is when it panics.
    let cmdline = "panic=0 rdinit=/nothing root=/dev/none";
    let Some(mut pod) = Pod::launch(Duration::from_secs(5), cmdline) else {
        return;
    };
    let error = pod.configure().await.unwrap_err();
    assert_eq!(error.code(), Code::DeadlineExceeded);
    assert!(error.message().contains("BootTimeout"), "{error}");
    assert!(error.message().contains("Kernel panic"), "{error}");
    let state = pod.state_when(|_| true).await;
    assert_eq!(state.state(), SandboxState::Stopped);
}

#[tokio::test]
async fn sigterm_is_an_orderly_shutdown() {
    let Some(mut pod) = Pod::ready().await else {
        return;
    };
    let pid = nix::unistd::Pid::from_raw(pod.monitor.id() as i32);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
    assert!(pod.monitor.wait().unwrap().success());
    let saved = fs::read(pod.dir.path().join("state")).unwrap();
    let saved = Snapshot::decode(saved.as_slice()).unwrap();
    assert_eq!(saved.state(), SandboxState::Stopped);
}
