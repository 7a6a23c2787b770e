//! Bad input from the host: guest images that do not boot, no pod network, a full disk.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};

use podvisor_tests::crictl::shell;
use podvisor_tests::daemon::{Daemon, Network, Options};
use podvisor_tests::guest::{Flaw, SILENT, flawed};
use podvisor_tests::machine::slowness;
use podvisor_tests::output_of;
use podvisor_tests::registry::busybox;
use serde_json::{Value, json};

/// A daemon whose VMs do not boot, and the error of a pod.
fn does_not_boot(flaw: Flaw, timeout_s: u64, code: &str) -> String {
    let dir = std::env::temp_dir().join(format!(
        "podvisor-test-guest-{}-{flaw:?}",
        std::process::id()
    ));
    let guest_dir = flawed(dir.clone(), flaw);
    let daemon = Daemon::start_with(&Options {
        guest_dir,
        config: vec![("vm", format!("boot_timeout_s = {timeout_s}"))],
        ..Options::default()
    });
    let pod = daemon.pod("does-not-boot");
    let message = daemon.try_run_pod(&pod).failed(code);
    assert_eq!(daemon.cri().pods(), vec![]);
    daemon.assert_nothing_left();
    // The name is free again: the same error, not AlreadyExists.
    daemon.try_run_pod(&pod).failed(code);
    drop(daemon);
    fs::remove_dir_all(dir).expect("ours");
    message
}

#[test]
fn a_kernel_that_is_none() {
    let message = does_not_boot(Flaw::Garbage, 60, "FailedPrecondition");
    assert!(message.to_lowercase().contains("kernel"), "{message}");
}

#[test]
fn a_kernel_that_panics() {
    let message = does_not_boot(Flaw::NoInit, 60, "FailedPrecondition");
    assert!(
        message.contains("Kernel panic"),
        "the console's end: {message}"
    );
}

#[test]
fn a_guest_that_never_calls() {
    let seconds = u64::from(7 * slowness());
    let message = does_not_boot(Flaw::SilentInit, seconds, "DeadlineExceeded");
    assert!(message.contains(SILENT), "the console's end: {message}");
    let waited = format!("{seconds}s");
    assert!(message.contains(&waited), "how long it waited: {message}");
}

/// The condition `NetworkReady` of `crictl info`.
fn network_ready(daemon: &Daemon) -> Value {
    let info = daemon.crictl(&["info"]).json();
    let conditions = info["status"]["conditions"].as_array().expect("a list");
    let network = conditions.iter().find(|c| c["type"] == "NetworkReady");
    network.expect("always told").clone()
}

#[test]
fn no_cni_configuration() {
    let daemon = Daemon::start_with(&Options {
        network: None,
        ..Options::default()
    });
    let dir = daemon.instance.dir().join("net.d").display().to_string();
    let condition = network_ready(&daemon);
    assert!(condition["status"] != true, "{condition}");
    assert!(
        condition["message"]
            .as_str()
            .is_some_and(|why| why.contains(&dir)),
        "{condition}"
    );
    assert!(
        condition["reason"]
            .as_str()
            .is_some_and(|why| !why.is_empty()),
        "{condition}"
    );
    let message = daemon
        .try_run_pod(&daemon.pod("pod"))
        .failed("FailedPrecondition");
    assert!(message.contains(&dir), "{message}");
    daemon.assert_nothing_left();

    // A network add-on writes it later; nobody restarts a runtime for that.
    daemon.write_cni(Network::Bridge);
    assert_eq!(network_ready(&daemon)["status"], json!(true));
    daemon.run_pod(&daemon.pod("pod"));
}

/// A plugin that says no to whoever wants to be added.
const REFUSES: &str = r#"#!/bin/sh
[ "$CNI_COMMAND" = ADD ] || exit 0
echo '{"cniVersion": "1.0.0", "code": 11, "msg": "no room for one more"}'
exit 1
"#;

#[test]
fn a_cni_plugin_that_fails() {
    let plugins = std::env::temp_dir().join(format!("podvisor-test-cni-{}", std::process::id()));
    fs::create_dir_all(&plugins).expect("ours");
    fs::write(plugins.join("refuses"), REFUSES).expect("ours");
    let executable = fs::Permissions::from_mode(0o755);
    fs::set_permissions(plugins.join("refuses"), executable).expect("ours");
    let plugin_dirs = format!(
        "plugin_dirs = [\"{}\", \"/usr/lib/cni\"]",
        plugins.display()
    );
    let daemon = Daemon::start_with(&Options {
        config: vec![("network", plugin_dirs)],
        network: Some(Network::Node),
        ..Options::default()
    });
    let file = fs::read_dir(daemon.instance.dir().join("net.d"))
        .expect("written")
        .next();
    let file = file.expect("one").expect("readable").path();
    let good = fs::read_to_string(&file).expect("readable");
    // The last plugin of the chain: those before it have done their work already.
    for (bad, word) in [
        (
            good.replace("\"bandwidth\",", "\"no-such-plugin\","),
            "no-such-plugin",
        ),
        (
            good.replace("\"bandwidth\",", "\"refuses\","),
            "no room for one more",
        ),
        ("not json".into(), "net.d"),
    ] {
        fs::write(&file, bad).expect("ours");
        let ran = daemon.try_run_pod(&daemon.pod("pod"));
        assert_ne!(ran.code, 0);
        assert!(ran.stderr.contains(word), "{}", ran.stderr);
        assert_eq!(daemon.cri().pods(), vec![]);
        daemon.assert_nothing_left();
    }
    fs::write(&file, good).expect("ours");
    daemon.run_pod(&daemon.pod("pod"));
    fs::remove_dir_all(plugins).expect("ours");
}

#[test]
fn a_network_that_is_gone_before_its_pod() {
    let daemon = Daemon::start_with(&Options {
        network: Some(Network::Node),
        ..Options::default()
    });
    let id = daemon.run_pod(&daemon.pod("pod"));
    // What an administrator's hand or another program may do.
    fs::remove_dir_all(daemon.instance.dir().join("net.d")).expect("ours");
    for name in fs::read_dir(daemon.instance.run_dir().join("netns"))
        .expect("a folder")
        .flatten()
    {
        output_of(
            std::process::Command::new("umount")
                .arg("-l")
                .arg(name.path()),
        );
        fs::remove_file(name.path()).expect("ours");
    }
    daemon.cri().remove_pod(&id);
    // The bridge plugin takes its masquerading back only while it can look into the namespace.
    daemon.assert_nothing_left_but(&["firewall"]);
    daemon.instance.clear_firewall();
}

#[test]
fn a_full_disk() {
    let daemon = Daemon::start_with(&Options {
        data_bytes: Some(48 << 20),
        ..Options::default()
    });
    daemon.pull(&busybox());
    let pod = daemon.pod("writes");
    let id = daemon.run_pod(&pod);
    let container = daemon.create_started(&id, &pod, &shell("c", &busybox(), "sleep 1000"));

    // A guest that fills the disk gets an error, and the pod lives.
    let fill = "dd if=/dev/zero of=/big bs=1M count=100 conv=fsync 2>&1; echo $?";
    let said = daemon.exec(&container, &["sh", "-c", fill]);
    assert!(
        said.contains("error") || said.contains("No space"),
        "{said}"
    );
    assert_eq!(daemon.inspect_pod(&id)["state"], "SANDBOX_READY");
    assert_eq!(daemon.exec(&container, &["echo", "alive"]), "alive");

    // With no byte left a pod cannot be made, and says why.
    let filler = daemon.instance.data_dir().join("filler");
    let _ = fs::write(&filler, vec![1; 64 << 20]);
    assert!(
        fs::metadata(&filler).expect("begun").blocks() < (64 << 11),
        "it is full"
    );
    let ran = daemon.try_run_pod(&daemon.pod("no-room"));
    let message = ran.failed("ResourceExhausted");
    assert!(message.to_lowercase().contains("space"), "{message}");
    assert_eq!(daemon.cri().pods().len(), 1);
    assert_eq!(daemon.leaks(), "");

    // What is there can be removed on a full disk, and then there is room.
    daemon.cri().remove_pod(&id);
    fs::remove_file(&filler).expect("ours");
    let again = daemon.run_pod(&daemon.pod("room"));
    daemon.cri().remove_pod(&again);
}

#[test]
fn logs_that_cannot_be_written() {
    let daemon = Daemon::start();
    daemon.pull(&busybox());
    // A file where the directory is to be.
    let mut pod = daemon.pod("no-logs");
    pod.config["log_directory"] = json!("/proc/version/logs");
    let id = daemon.run_pod(&pod);
    let ran = daemon.try_create(&id, &pod, &shell("c", &busybox(), "true"));
    assert_ne!(ran.code, 0);
    assert!(ran.stderr.contains("/proc/version"), "{}", ran.stderr);
    assert_eq!(daemon.cri().containers(), vec![]);
    daemon.cri().remove_pod(&id);
    daemon.assert_nothing_left();

    // A disk that fills up under a log: the container goes on.
    let full = daemon.instance.dir().join("full");
    fs::create_dir(&full).expect("ours");
    output_of(
        std::process::Command::new("mount")
            .args(["-t", "tmpfs", "-o", "size=64k", "none"])
            .arg(&full),
    );
    pod.config["log_directory"] = json!(full);
    let id = daemon.run_pod(&pod);
    let script = "seq 1 100000; touch /wrote; sleep 1000";
    let container = daemon.create_started(&id, &pod, &shell("c", &busybox(), script));
    podvisor_tests::eventually("the container writes on", || {
        daemon
            .exec(&container, &["ls", "/"])
            .contains("wrote")
            .then_some(())
    });
    assert!(fs::metadata(full.join("c.log")).is_ok_and(|log| log.len() > 0));
    daemon.cri().remove_pod(&id);
    output_of(std::process::Command::new("umount").arg(&full));
}
