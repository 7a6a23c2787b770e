//! A host of its own for each test: network and mount namespaces that end with the test, so that
//! nothing of it can leak, meet another test, or touch the machine's own network.

// Not every test file uses all of it.
#![allow(dead_code)]

use std::fs;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use podvisor_network::{Attachment, Cni, CniConfig, PodIdentity, netns};
use serde_json::{Value, json};
use tempfile::TempDir;

/// Where Debian and the plugins' own releases put them.
const PLUGIN_DIRS: [&str; 2] = ["/opt/cni/bin", "/usr/lib/cni"];

pub struct Host {
    pub dir: TempDir,
}

/// Runs `test` on a host of its own. As any user but root there is none, and nothing is tested.
pub fn on_a_host<F: Future<Output = ()>>(test: impl FnOnce(Host) -> F + Send + 'static) {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("skipped: needs root");
        return;
    }
    // All threads that the runtime starts are this thread's children and stay in its namespaces.
    let host = std::thread::spawn(move || {
        unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS).unwrap();
        let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
        mount(None::<&str>, "/", None::<&str>, private, None::<&str>).unwrap();
        sh("ip link set lo up");
        // A new bridge's own addresses are usable at once: the first connection does not wait
        // for duplicate address detection.
        fs::write("/proc/sys/net/ipv6/conf/default/accept_dad", "0").unwrap();
        let host = Host {
            dir: tempfile::tempdir().unwrap(),
        };
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(test(host));
    });
    if let Err(panic) = host.join() {
        std::panic::resume_unwind(panic);
    }
}

/// Runs a shell command in the calling thread's namespaces, and gives its stdout.
#[track_caller]
pub fn sh(command: &str) -> String {
    let output = Command::new("/bin/sh")
        .args(["-c", command])
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{command}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}

/// The same, in a pod's namespace.
pub async fn sh_in(netns: &Path, command: &str) -> String {
    let command = command.to_owned();
    netns::enter(netns, move || sh(&command)).await.unwrap()
}

impl Drop for Host {
    fn drop(&mut self) {
        // The folder cannot be removed while a namespace is mounted in it.
        for netns in fs::read_dir(self.path("netns"))
            .into_iter()
            .flatten()
            .flatten()
        {
            let _ = netns::delete_blocking(&netns.path());
        }
    }
}

impl Host {
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn netns(&self, id: &str) -> PathBuf {
        self.path("netns").join(id)
    }

    pub fn ipam_dir(&self) -> PathBuf {
        self.path("ipam").join("pods")
    }

    pub fn cni(&self) -> Cni {
        let fake = [self.path("plugins")];
        Cni::new(CniConfig {
            conf_dir: self.path("net.d"),
            plugin_dirs: fake
                .into_iter()
                .chain(PLUGIN_DIRS.map(Into::into))
                .collect(),
            cache_dir: self.path("cache"),
            plugin_timeout: Duration::from_mins(1),
        })
    }

    /// A bridge network with `more` plugins after it.
    pub fn write_network(&self, version: &str, more: &[Value]) {
        self.write_list(version, &[&[self.bridge(&["10.77.0.0/24"])], more].concat());
    }

    /// The bridge plugin with an address of each subnet.
    pub fn bridge(&self, subnets: &[&str]) -> Value {
        let ranges: Vec<_> = subnets.iter().map(|s| json!([{"subnet": s}])).collect();
        let routes = &[json!({"dst": "0.0.0.0/0"}), json!({"dst": "::/0"})][..subnets.len()];
        json!({
            "type": "bridge", "bridge": "pv0", "isGateway": true, "ipMasq": true, "mtu": 1400,
            "ipam": {
                "type": "host-local", "dataDir": self.path("ipam"), "ranges": ranges,
                "routes": routes,
            },
        })
    }

    pub fn write_list(&self, version: &str, plugins: &[Value]) {
        let list = json!({"cniVersion": version, "name": "pods", "plugins": plugins});
        fs::create_dir_all(self.path("net.d")).unwrap();
        fs::write(self.path("net.d/10-pods.conflist"), list.to_string()).unwrap();
    }

    /// A plugin of our own. It is written by another process: a file that this one has open for
    /// writing might be inherited by a fork of another test's thread, and could then not be run.
    pub fn write_plugin(&self, name: &str, body: &str) {
        let text = format!("#!/bin/sh\n{body}\n");
        let program = self.path("plugins").join(name);
        fs::create_dir_all(self.path("plugins")).unwrap();
        let written = Command::new("/bin/sh")
            .args([
                "-c",
                r#"printf %s "$1" > "$2" && chmod 755 "$2""#,
                "sh",
                &text,
            ])
            .arg(program)
            .status();
        assert!(written.unwrap().success());
    }

    /// A pod with a namespace, not attached yet.
    pub async fn pod(&self, id: &str) -> Attachment {
        let netns = self.netns(id);
        netns::create(&netns).await.unwrap();
        Attachment {
            sandbox_id: id.into(),
            netns,
            pod: PodIdentity {
                name: format!("pod-{id}"),
                namespace: "default".into(),
                uid: format!("uid-{id}"),
            },
            ..Attachment::default()
        }
    }

    /// Nothing on the host is any pod's.
    #[track_caller]
    pub fn assert_detached(&self) {
        let links = sh("ip -o link show type veth");
        assert_eq!(links, "", "veth devices");
        let rules = sh("iptables-save; ip6tables-save");
        let ours: Vec<_> = rules.lines().filter(|line| line.contains("id:")).collect();
        assert!(ours.is_empty(), "firewall rules: {ours:?}");
        let leases: Vec<_> = fs::read_dir(self.ipam_dir())
            .into_iter()
            .flatten()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .filter(|name| name.starts_with("10.77.") || name.starts_with("fd00:"))
            .collect();
        assert!(leases.is_empty(), "leases: {leases:?}");
        let records = fs::read_dir(self.path("cache"))
            .into_iter()
            .flatten()
            .count();
        assert_eq!(records, 0, "records");
    }
}
