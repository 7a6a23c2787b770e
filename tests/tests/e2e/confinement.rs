//! AppArmor: a profile of the node confines the processes that a pod is made of there.

use std::fs;
use std::process::{Command, Stdio};

use podvisor_tests::crictl::{container, shell};
use podvisor_tests::daemon::Daemon;
use podvisor_tests::logs;
use podvisor_tests::registry::busybox;
use serde_json::{Value, json};

/// A profile in the node's kernel, which is without it again when this is dropped.
struct Profile {
    name: String,
}

impl Profile {
    /// `None` on a node without AppArmor.
    fn load(name: &str, rules: &str) -> Option<Self> {
        let enabled = fs::read_to_string("/sys/module/apparmor/parameters/enabled");
        if !enabled.is_ok_and(|text| text.starts_with('Y')) {
            println!("SKIPPED: the node's kernel has no AppArmor");
            return None;
        }
        let profile = Self { name: name.into() };
        profile.parse("--replace", rules);
        Some(profile)
    }

    fn parse(&self, action: &str, rules: &str) {
        use std::io::Write as _;
        let mut parser = Command::new("apparmor_parser")
            .args([action, "--skip-cache"])
            .stdin(Stdio::piped())
            .spawn()
            .expect("apparmor_parser: make deps");
        let flags = "flags=(attach_disconnected,mediate_deleted)";
        let text = format!("profile {} {flags} {{ {rules} }}\n", self.name);
        let mut input = parser.stdin.take().expect("piped");
        input.write_all(text.as_bytes()).expect("it reads");
        drop(input);
        assert!(parser.wait().expect("our own child").success());
    }

    /// As in a security context.
    fn localhost(&self) -> Value {
        json!({"apparmor": {"profile_type": 2, "localhost_ref": self.name}})
    }
}

impl Drop for Profile {
    fn drop(&mut self) {
        self.parse("--remove", "");
    }
}

const ALL: &str =
    "file, capability, network, mount, remount, umount, pivot_root, signal, ptrace, unix,";

#[test]
fn a_profile_confines_what_a_vm_is_made_of() {
    let Some(profile) = Profile::load("podvisor-e2e-vm", ALL) else {
        return;
    };
    let other = Profile::load("podvisor-e2e-other", ALL).expect("as above");
    let daemon = Daemon::start();
    daemon.pull(&busybox());
    let linux = json!({"security_context": profile.localhost()});
    let pod = daemon.pod("confined").with("linux", linux);
    let id = daemon.run_pod(&pod);
    let volume = daemon.instance.dir().join("volume");
    fs::create_dir(&volume).expect("ours");
    let mut main = shell("main", &busybox(), "echo works >/v/file; exec sleep 1000");
    main["mounts"] = json!([{"host_path": volume, "container_path": "/v"}]);
    main["linux"] = json!({"security_context": profile.localhost()});
    daemon.create_started(&id, &pod, &main);
    podvisor_tests::eventually("the volume is written to", || {
        fs::read_to_string(volume.join("file"))
            .ok()
            .filter(|text| text == "works\n")
    });

    let mut seen = Vec::new();
    for (pid, process) in daemon.instance.processes() {
        for program in ["podvisor-monitor", "podvisor-fs", "qemu-system"] {
            if process.contains(&format!("/{program}")) && process.contains(&id) {
                let current = fs::read_to_string(format!("/proc/{pid}/attr/apparmor/current"))
                    .expect("it lives");
                assert_eq!(current.trim_end(), "podvisor-e2e-vm (enforce)", "{process}");
                seen.push(program);
            }
        }
    }
    assert!(
        seen.contains(&"podvisor-monitor") && seen.contains(&"podvisor-fs"),
        "{seen:?}"
    );

    let mut foreign = container("foreign", &busybox(), &["true"]);
    foreign["linux"] = json!({"security_context": other.localhost()});
    let message = daemon
        .try_create(&id, &pod, &foreign)
        .failed("FailedPrecondition");
    assert!(message.contains("the sandbox's"), "{message}");
}

#[test]
fn a_profile_confines_a_container_on_the_host() {
    let rules = format!("{ALL} deny /denied w, /** ix,");
    let Some(profile) = Profile::load("podvisor-e2e-container", &rules) else {
        return;
    };
    let daemon = Daemon::start();
    daemon.pull(&busybox());
    let pod = daemon.pod("host").by_handler("runc");
    let id = daemon.run_pod(&pod);
    let script = "cat /proc/self/attr/apparmor/current; echo >/granted && echo ok; echo >/denied";
    let mut main = shell("main", &busybox(), script);
    main["linux"] = json!({"security_context": profile.localhost()});
    let main = daemon.create_started(&id, &pod, &main);
    daemon.cri().wait_exit(&main);
    assert_eq!(
        logs::stdout(&pod.log("main")),
        ["podvisor-e2e-container (enforce)", "ok"]
    );
    let refused = logs::stream(&pod.log("main"), "stderr").join("\n");
    assert!(refused.contains("Permission denied"), "{refused}");
}

#[test]
fn a_profile_that_is_not_there_starts_nothing() {
    let daemon = Daemon::start();
    for (security, word) in [
        (
            json!({"apparmor": {"profile_type": 2, "localhost_ref": "podvisor-e2e-none"}}),
            "apparmor",
        ),
        (
            json!({"selinux_options": {"level": "s0:c1"}}),
            "selinux_options",
        ),
    ] {
        if word == "selinux_options" && fs::exists("/sys/fs/selinux/enforce").expect("sysfs") {
            println!("SKIPPED: the node has SELinux");
            continue;
        }
        let pod = daemon
            .pod("unconfined")
            .with("linux", json!({ "security_context": security }));
        let message = daemon.try_run_pod(&pod).failed("FailedPrecondition");
        assert!(message.contains(word), "{message}");
    }
    daemon.assert_nothing_left();
}
