//! `podvisor bench` against scripted servers: all of it runs, reports and cleans up.

#[allow(dead_code)] // Each test binary uses its part.
mod fake;

use std::process::Stdio;

use fake::{Fake, Start};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

#[test]
fn results_are_written_printed_and_compared() {
    let fake = Fake::serve(Start::RunsUntilStopped);
    let results = fake.dir().join("results.json");
    let bench = || {
        let mut command = fake.podvisor();
        command
            .args(["bench", "--pods=3", "--parallel=2", "--image=image"])
            .args(["--pull=other", "--pull-rounds=2", "--pull-against"])
            .arg(fake.dir().join("podvisor.sock"))
            .arg("--json")
            .arg(&results);
        command
    };
    let output = bench().output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let table = String::from_utf8(output.stdout).unwrap();
    for line in ["one by one", "2 at a time", "memory", "pull", "promised"] {
        assert!(
            table.lines().any(|text| text.starts_with(line)),
            "{line}: {table}"
        );
    }

    let report: serde_json::Value =
        serde_json::from_slice(&std::fs::read(&results).unwrap()).unwrap();
    let metric = |name: &str| {
        let metrics = report["metrics"].as_array().unwrap();
        metrics
            .iter()
            .find(|metric| metric["name"] == name)
            .unwrap()
            .clone()
    };
    assert_eq!(metric("one by one/RunPodSandbox")["count"], 3);
    assert_eq!(metric("one by one/ExecSync true")["count"], 15);
    assert_eq!(
        metric("one by one/VMM's start to agent ready")["p50"],
        500.0
    );
    assert_eq!(metric("2 at a time/RemovePodSandbox")["count"], 3);
    assert!(
        metric("memory/podvisor's own: PSS")["p50"]
            .as_f64()
            .unwrap()
            > 0.0
    );
    assert_eq!(metric("pull/podvisor")["count"], 2);
    assert_eq!(metric("pull/other runtime")["count"], 2);

    let count = |name: &str| fake.calls().iter().filter(|call| *call == name).count();
    // One more to warm up.
    assert_eq!((count("RunPodSandbox"), count("RemovePodSandbox")), (7, 7));

    let output = bench().arg("--compare").arg(&results).output().unwrap();
    let table = String::from_utf8(output.stdout).unwrap();
    assert!(table.contains("against the earlier run"), "{table}");
}

#[test]
fn an_interrupted_run_removes_its_pods() {
    let fake = Fake::serve(Start::BootHangs);
    let mut child = fake
        .podvisor()
        .args(["bench", "--image=image"])
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    fake.wait_for("RunPodSandbox");
    kill(Pid::from_raw(child.id() as i32), Signal::SIGINT).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(125));
    assert_eq!(
        fake.calls()[2..],
        ["ListPodSandbox", "StopPodSandbox", "RemovePodSandbox"]
    );
}
