//! Volumes: what of the node's files a container sees, and what the node sees of what it does there.
//!
//! - `sharing`: files as they are on both sides
//! - `mounts`: how they are mounted, and what cannot be
//! - `disks`: images and block devices

mod disks;
mod mounts;
mod sharing;

use std::fs;
use std::os::fd::AsRawFd as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nix::libc;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use podvisor_tests::crictl::{Pod, shell};
use podvisor_tests::daemon::Daemon;
use podvisor_tests::registry::busybox;
use serde_json::{Value, json};

/// A daemon with a pod, and a folder of the node's.
struct Rig {
    // Unmounted before the folder goes.
    mounts: Vec<PathBuf>,
    dir: PathBuf,
    pod: Pod,
    id: String,
    daemon: Daemon,
}

/// Waits to be stopped.
const WAITS: &str = "trap 'exit 0' TERM; while :; do sleep 0.1; done";

impl Rig {
    fn new(name: &str) -> Self {
        let daemon = Daemon::start();
        daemon.pull(&busybox());
        let dir =
            std::env::temp_dir().join(format!("podvisor-volumes-{name}-{}", std::process::id()));
        fs::create_dir(&dir).expect("a fresh directory");
        let pod = daemon.pod(name);
        let id = daemon.run_pod(&pod);
        Self {
            mounts: Vec::new(),
            dir,
            pod,
            id,
            daemon,
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    fn directory(&self, name: &str) -> PathBuf {
        let path = self.path(name);
        fs::create_dir(&path).expect("a fresh directory");
        path
    }

    /// Mounts a tmpfs in the folder, on the node.
    fn tmpfs(&mut self, name: &str, size: &str) -> PathBuf {
        let path = self.path(name);
        fs::create_dir_all(&path).expect("a directory");
        let options = format!("size={size}");
        let flags = MsFlags::empty();
        mount(Some("test"), &path, Some("tmpfs"), flags, Some(&*options)).expect("mounts");
        self.mounts.push(path.clone());
        path
    }

    /// Mounts an ext4 in the folder, on the node. `None`: the node cannot with these options.
    fn ext4(&mut self, name: &str, make: &[&str], options: &str) -> Option<PathBuf> {
        let (image, path) = (self.path("image"), self.directory(name));
        fs::File::create(&image)
            .and_then(|file| file.set_len(16 << 20))
            .expect("a file");
        let mut mkfs = Command::new("mkfs.ext4");
        let made = mkfs.arg("-q").args(make).arg(&image).status();
        assert!(made.expect("mkfs.ext4").success());
        let mounted = Command::new("mount")
            .args(["-o", options])
            .args([&image, &path])
            .stderr(Stdio::null())
            .status();
        if !mounted.expect("mount").success() {
            return None;
        }
        self.mounts.push(path.clone());
        Some(path)
    }

    /// The same, of which a user may have so many KiB.
    fn ext4_with_quota(&mut self, name: &str, user: u32, kib: u64) -> Option<PathBuf> {
        let make = ["-O", "quota", "-E", "quotatype=usrquota"];
        let path = self.ext4(name, &make, "loop,usrquota")?;
        // `struct dqblk` (quotactl(2)).
        // SAFETY: all-zero is a valid one.
        let mut limits: libc::dqblk = unsafe { std::mem::zeroed() };
        limits.dqb_bhardlimit = kib;
        limits.dqb_valid = libc::QIF_BLIMITS;
        let directory = fs::File::open(&path).expect("opens");
        let set = libc::QCMD(libc::Q_SETQUOTA, libc::USRQUOTA);
        // SAFETY: a descriptor, numbers, and a structure that lasts as long.
        let result = unsafe {
            libc::syscall(
                libc::SYS_quotactl_fd,
                directory.as_raw_fd(),
                set,
                user,
                &raw const limits,
            )
        };
        assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
        Some(path)
    }

    /// A container with these mounts, which waits.
    fn container(&self, name: &str, mounts: &[Value]) -> String {
        self.container_with(name, mounts, json!({}))
    }

    fn container_with(&self, name: &str, mounts: &[Value], security: Value) -> String {
        let mut config = shell(name, &busybox(), WAITS);
        config["mounts"] = json!(mounts);
        config["linux"]["security_context"] = security;
        self.daemon.create_started(&self.id, &self.pod, &config)
    }

    /// What a script in a container prints.
    fn sh(&self, container: &str, script: &str) -> String {
        self.daemon.exec(container, &["sh", "-c", script])
    }

    /// What crictl says of a container that cannot be created.
    fn refused(&self, mounts: &[Value]) -> String {
        let mut config = shell("refused", &busybox(), "true");
        config["mounts"] = json!(mounts);
        let ran = self.daemon.try_create(&self.id, &self.pod, &config);
        assert_ne!(ran.code, 0, "{}", ran.stdout);
        ran.stderr
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        for path in self.mounts.iter().rev() {
            let _ = umount2(path, MntFlags::MNT_DETACH);
        }
        let _ = fs::remove_dir_all(&self.dir);
    }
}

fn volume(host: &Path, container: &str) -> Value {
    json!({"host_path": host, "container_path": container})
}

fn read_only(host: &Path, container: &str) -> Value {
    json!({"host_path": host, "container_path": container, "readonly": true})
}

/// The node's root, for programs that the image has not.
fn node() -> Value {
    json!({"host_path": "/", "container_path": "/node", "readonly": true, "recursive_read_only": true})
}
