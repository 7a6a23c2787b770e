//! `podvisor run` against a podvisord and a monitor that do as the test says: whatever happens, the
//! pod is removed and the exit code tells what happened.

#[allow(dead_code)] // Each test binary uses its part.
mod fake;

use std::process::{Command, Stdio};

use fake::{Fake, Start};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

#[test]
fn output_and_exit_code_are_the_containers() {
    let fake = Fake::serve(Start::Exits(3));
    let output = podvisor(&fake).arg("-q").arg("image").output().unwrap();
    assert_eq!(output.stdout, b"out\n");
    assert_eq!(output.stderr, b"err\n");
    assert_eq!(output.status.code(), Some(3));
    assert_eq!(
        fake.calls(),
        [
            "ImageStatus",
            "RunPodSandbox",
            "CreateContainer",
            "StartContainer",
            "StopPodSandbox",
            "RemovePodSandbox"
        ]
    );
}

#[test]
fn the_timeline_goes_to_standard_error() {
    let fake = Fake::serve(Start::Exits(0));
    let output = podvisor(&fake).arg("image").output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(
        stderr.contains("vm start") && stderr.contains("start container"),
        "{stderr}"
    );
    assert_eq!(output.stdout, b"out\n");
}

#[test]
fn an_absent_image_is_pulled_layer_by_layer() {
    let fake = Fake::serve(Start::Exits(0));
    let output = podvisor(&fake).arg("absent").output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(
        stderr.contains("pulling absent\n  0123456789ab 2 B\n"),
        "{stderr}"
    );
    assert_eq!(output.status.code(), Some(0));

    let output = podvisor(&fake)
        .args(["--pull=never", "absent"])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(125));
}

#[test]
fn sigterm_stops_the_container_and_then_removes_the_pod() {
    let fake = Fake::serve(Start::RunsUntilStopped);
    let mut child = podvisor(&fake)
        .args(["-q", "image"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    // Its output shows that the container runs.
    let mut line = [0; 4];
    std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut line).unwrap();
    kill(Pid::from_raw(child.id() as i32), Signal::SIGTERM).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(143));
    assert_eq!(
        fake.calls()[4..],
        ["StopContainer 10", "StopPodSandbox", "RemovePodSandbox"]
    );
}

#[test]
fn a_signal_during_the_boot_removes_what_came_of_it() {
    let fake = Fake::serve(Start::BootHangs);
    let mut child = podvisor(&fake).args(["-q", "image"]).spawn().unwrap();
    fake.wait_for("RunPodSandbox");
    kill(Pid::from_raw(child.id() as i32), Signal::SIGINT).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(130));
    assert_eq!(
        fake.calls()[2..],
        ["ListPodSandbox", "StopPodSandbox", "RemovePodSandbox"]
    );
}

#[test]
fn a_command_that_cannot_start_is_128_with_the_reason() {
    let fake = Fake::serve(Start::Fails);
    let output = podvisor(&fake)
        .args(["-q", "image", "nope"])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(128));
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(
        stderr.contains("StartError: no such file: nope"),
        "{stderr}"
    );
    assert_eq!(fake.calls().last().unwrap(), "RemovePodSandbox");
}

#[test]
fn a_monitor_that_dies_leaves_the_word_to_podvisord() {
    let fake = Fake::serve(Start::MonitorDies);
    let output = podvisor(&fake).args(["-q", "image"]).output().unwrap();
    assert_eq!(output.status.code(), Some(137), "{output:?}");
    assert_eq!(output.stdout, b"out\n");
    assert_eq!(fake.calls().last().unwrap(), "RemovePodSandbox");
}

#[test]
fn a_reader_that_goes_away_ends_the_pod() {
    let fake = Fake::serve(Start::RunsUntilStopped);
    let mut child = podvisor(&fake)
        .args(["-q", "image"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    assert_eq!(child.wait().unwrap().code(), Some(141));
    assert_eq!(fake.calls().last().unwrap(), "RemovePodSandbox");
}

fn podvisor(fake: &Fake) -> Command {
    let mut command = fake.podvisor();
    command.arg("run");
    command
}
