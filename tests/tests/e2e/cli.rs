//! The command line: `podvisor run`, `ps`, `console`, `check`.

use std::fs;
use std::io::{BufRead, BufReader};
use std::process::{Command, Output, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use podvisor_tests::daemon::Daemon;
use podvisor_tests::machine::Backend;
use podvisor_tests::registry::busybox;
use podvisor_tests::{eventually, finished};
use serde_json::Value;

fn podvisor(daemon: &Daemon, args: &[&str]) -> Output {
    finished(daemon.cli().args(args))
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn run_is_the_command() {
    let daemon = Daemon::start();
    let script = "echo to-stdout; echo to-stderr >&2; printf 'no end'; exit 42";
    let ran = podvisor(&daemon, &["run", &busybox(), "sh", "-c", script]);
    let said = text(&ran.stderr);
    assert_eq!(ran.status.code(), Some(42), "{said}");
    assert_eq!(text(&ran.stdout), "to-stdout\nno end");
    assert!(said.contains("to-stderr"), "{said}");
    // The boot timeline.
    assert!(said.contains("PHASE"), "{said}");
    assert_eq!(daemon.cri().pods(), vec![]);
    daemon.assert_nothing_left();

    let quiet = podvisor(
        &daemon,
        &["run", "--quiet", &busybox(), "cat", "/etc/hostname"],
    );
    assert_eq!(text(&quiet.stderr), "");
    assert!(quiet.status.success());
    let nothing = podvisor(&daemon, &["run", "-q", &busybox(), "no-such-command"]);
    assert_eq!(nothing.status.code(), Some(128));
    assert!(text(&nothing.stderr).contains("no-such-command"));
    let no_image = podvisor(
        &daemon,
        &["run", "-q", &format!("{}-not", busybox()), "true"],
    );
    assert_eq!(no_image.status.code(), Some(125));
    assert_eq!(daemon.cri().pods(), vec![]);
    daemon.assert_nothing_left();
}

#[test]
fn a_signal_ends_run_and_its_pod() {
    let daemon = Daemon::start();
    let script = "trap 'echo bye; exit 3' TERM; echo ready; while :; do sleep 0.1; done";
    let mut run = daemon
        .cli()
        .args(["run", "-q", &busybox(), "sh", "-c", script])
        .stdout(Stdio::piped())
        .spawn()
        .expect("it can be executed");
    let mut lines = BufReader::new(run.stdout.take().expect("piped")).lines();
    assert_eq!(lines.next().expect("a line").expect("a pipe"), "ready");
    kill(Pid::from_raw(run.id() as i32), Signal::SIGTERM).expect("our own child");
    assert_eq!(lines.next().expect("a line").expect("a pipe"), "bye");
    assert_eq!(run.wait().expect("our own child").code(), Some(3));
    assert_eq!(daemon.cri().pods(), vec![]);
    daemon.assert_nothing_left();
}

#[test]
fn ps_and_console() {
    let daemon = Daemon::start();
    let id = daemon.run_pod(&daemon.pod("shown"));
    let shown = text(&podvisor(&daemon, &["ps"]).stdout);
    assert!(
        shown.contains("shown") && shown.contains(&id[..12]),
        "{shown}"
    );
    for name in [&id[..12], "shown"] {
        let console = podvisor(&daemon, &["console", name]);
        assert!(console.status.success(), "{}", text(&console.stderr));
    }
    let none = podvisor(&daemon, &["console", "no-such-pod"]);
    assert!(!none.status.success());
    assert!(text(&none.stderr).contains("no-such-pod"));
}

#[test]
fn inspect_shows_the_vm() {
    let daemon = Daemon::start();
    let id = daemon.run_pod(&daemon.pod("seen"));
    let inspected = podvisor(&daemon, &["inspect", &id]);
    let inspected: Value = serde_json::from_slice(&inspected.stdout).expect("JSON");
    let vm = &inspected["vm"];
    assert_eq!(vm["backend"], Backend::here().name(), "{vm}");
    assert_eq!(vm["vcpus"], 1);
    let resident = vm["memory_resident_bytes"].as_u64().expect("a number");
    let given = vm["memory_bytes"].as_u64().expect("a number");
    assert!(resident > 1 << 20 && resident <= given, "{vm}");
    let disk = &vm["devices"][0];
    assert_eq!(disk["name"], "disk");
    // The kernel has looked for partitions, and the scratch area is mounted.
    assert!(disk["queues"][0]["chains"].as_u64() > Some(0), "{vm}");
    if Backend::here() == Backend::Kvm {
        assert!(vm["exits"]["mmio-write"].as_u64() > Some(0), "{vm}");
    }
    let phases = inspected["monitor"]["timeline"].as_array().expect("a list");
    assert!(phases.iter().any(|phase| phase["phase"] == "vm start"));
}

/// `vmm = "auto"` follows the probe guest, and says so in all the places where an operator looks.
#[test]
fn auto_is_kvm_where_the_probe_guest_runs() {
    let mut daemon = Daemon::start();
    let config = fs::read_to_string(daemon.config()).expect("written");
    let here = format!("vmm = {:?}", Backend::here().name());
    fs::write(daemon.config(), config.replace(&here, "vmm = \"auto\"")).expect("ours");
    daemon.stop();
    daemon.restart();

    let probe = Command::new(Daemon::binary("podvisor-monitor"))
        .arg("probe-kvm")
        .output()
        .expect("it runs");
    let info = daemon.crictl(&["info"]).json();
    let status = &info["podvisor"];
    let check = text(&podvisor(&daemon, &["check"]).stdout);
    if probe.status.success() {
        assert_eq!(status["vmm"]["backend"], "kvm", "{info}");
        assert!(check.contains("the probe guest ran"), "{check}");
    } else {
        let why = text(&probe.stderr);
        let why = why.trim();
        assert_eq!(status["vmm"]["backend"], "qemu", "{info}");
        assert_eq!(status["kvm_problem"], why);
        let warned = status["warnings"].to_string();
        assert!(warned.contains("software emulation"), "{warned}");
        assert!(daemon.log().contains(why), "one warning at start");
        assert!(check.contains(why), "{check}");
    }
}

#[test]
fn check_names_what_is_missing() {
    let daemon = Daemon::start();
    let fine = podvisor(&daemon, &["check"]);
    assert!(fine.status.success(), "{}", text(&fine.stdout));
    let config = fs::read_to_string(daemon.config()).expect("written");
    let broken = config.replace("guest_dir", "guest_dir = \"/nowhere/guest\"\n#");
    fs::write(daemon.config(), broken).expect("ours");
    let broken = podvisor(&daemon, &["check"]);
    assert!(!broken.status.success());
    assert!(
        text(&broken.stdout).contains("/nowhere/guest"),
        "{}",
        text(&broken.stdout)
    );
}

#[test]
fn check_leaks_finds_what_nobody_owns() {
    let mut daemon = Daemon::start();
    daemon.run_pod(&daemon.pod("owner"));
    assert_eq!(daemon.leaks(), "", "what a pod owns is no leak");

    let orphan = "f".repeat(64);
    let run = daemon.instance.run_dir();
    let data = daemon.instance.data_dir();
    fs::create_dir(run.join("sandboxes").join(&orphan)).expect("ours");
    fs::write(run.join("netns").join(&orphan), "").expect("ours");
    fs::write(data.join("scratch").join(format!("{orphan}.img")), "").expect("ours");
    let leaks = daemon.leaks();
    for part in ["sandboxes", "netns", "scratch"] {
        let named = leaks
            .lines()
            .any(|line| line.contains(part) && line.contains(&orphan));
        assert!(named, "no {part}: {leaks}");
    }

    // A daemon takes away at its start what it finds and nobody owns.
    daemon.stop();
    daemon.restart();
    eventually("orphans are removed", || {
        daemon.leaks().is_empty().then_some(())
    });
    assert_eq!(daemon.cri().pods().len(), 1);
}
