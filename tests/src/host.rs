//! What an instance has on the host, seen without asking podvisor: an oracle for `check --leaks`.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nix::fcntl::{Flock, FlockArg};
use nix::mount::{MntFlags, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// The names that one test's daemon uses on the host. No two daemons of a machine share any of them:
/// a number is reserved by a lock for as long as this lives.
#[derive(Debug)]
pub struct Instance {
    number: u8,
    _lock: Flock<File>,
}

/// Second octets of 10.0.0.0/8 that tests use.
const NUMBERS: std::ops::RangeInclusive<u8> = 130..=229;

impl Instance {
    /// Takes a free number, and takes away what a test that was killed left under it.
    pub fn reserve() -> Self {
        for number in NUMBERS {
            let path = format!("/run/lock/podvisor-test-{number}");
            let file = OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o600)
                .open(&path)
                .unwrap_or_else(|error| panic!("{path}: {error} (the tests need root)"));
            if let Ok(lock) = Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                let instance = Self {
                    number,
                    _lock: lock,
                };
                if instance.dir().exists() || instance.run_dir().exists() {
                    instance.clear();
                }
                for dir in [instance.dir(), instance.run_dir()] {
                    fs::create_dir_all(&dir)
                        .unwrap_or_else(|error| panic!("{}: {error}", dir.display()));
                }
                return instance;
            }
        }
        panic!("{} instances at the same time", NUMBERS.count());
    }

    /// Second octet of the instance's pod network.
    pub fn number(&self) -> u8 {
        self.number
    }

    /// Everything of the instance but its sockets.
    pub fn dir(&self) -> PathBuf {
        std::env::temp_dir().join(self.bridge())
    }

    /// No longer than the default run directory: unix socket paths have 108 bytes.
    pub fn run_dir(&self) -> PathBuf {
        Path::new("/run").join(self.bridge())
    }

    /// Images and state.
    pub fn data_dir(&self) -> PathBuf {
        self.dir().join("data")
    }

    /// The bridge of the pod network, made by the CNI plugin.
    pub fn bridge(&self) -> String {
        format!("pvt{}", self.number)
    }

    /// Parent of the pods' cgroups.
    pub fn cgroup_parent(&self) -> String {
        format!("/podvisor-test-{}", self.number)
    }

    /// Processes that were started by the instance's daemon, by themselves or in one of its cgroups.
    /// Each as "PID COMMAND".
    pub fn processes(&self) -> Vec<(Pid, String)> {
        let marks = [
            format!("{}/", self.dir().display()),
            format!("{}/", self.run_dir().display()),
            format!("{}/", self.cgroup_parent()),
            format!("{}={}", Self::MARK, self.number),
        ];
        let own = Pid::this().as_raw();
        read_dir("/proc")
            .into_iter()
            .filter_map(|path| {
                let pid: i32 = path.file_name()?.to_str()?.parse().ok()?;
                let read = |file| {
                    let bytes = fs::read(path.join(file)).unwrap_or_default();
                    String::from_utf8_lossy(&bytes).into_owned()
                };
                let command = read("cmdline").replace('\0', " ");
                // The kernel's own have no command line; a zombie has none any more and holds nothing.
                if pid == own || command.is_empty() {
                    return None;
                }
                let is_marked = |text: &str| marks.iter().any(|mark| text.contains(mark));
                let ours = is_marked(&command)
                    || is_marked(&read("environ"))
                    || is_marked(&read("cgroup"));
                ours.then(|| (Pid::from_raw(pid), format!("{pid} {command}")))
            })
            .collect()
    }

    /// Environment variable by which the daemon's descendants are known.
    pub const MARK: &str = "PODVISOR_TEST_INSTANCE";

    /// Mount points below the instance's directories, deepest first.
    fn mounts(&self) -> Vec<PathBuf> {
        let roots = [self.dir(), self.run_dir()];
        let mounts = fs::read_to_string("/proc/self/mountinfo").expect("/proc is mounted");
        let mut points: Vec<PathBuf> = mounts
            .lines()
            .filter_map(|line| line.split(' ').nth(4))
            .map(PathBuf::from)
            .filter(|point| roots.iter().any(|root| point.starts_with(root)))
            .collect();
        points.reverse();
        points
    }

    /// The pods' cgroups, in every hierarchy.
    fn cgroups(&self) -> Vec<PathBuf> {
        let name = &self.cgroup_parent()[1..];
        let mut found = Vec::new();
        for root in [vec!["/sys/fs/cgroup".into()], read_dir("/sys/fs/cgroup")].concat() {
            let parent = root.join(name);
            let children = read_dir(&parent);
            found.extend(children.into_iter().filter(|child| child.is_dir()));
        }
        found
    }

    /// Everything of this instance but the process `daemon`, one line each. Empty when no pod is left.
    pub fn pod_resources(&self, daemon: Option<Pid>) -> Vec<String> {
        let mut found = Vec::new();
        let mut note = |kind: &str, what: String| found.push(format!("{kind}: {what}"));
        for (pid, process) in self.processes() {
            if Some(pid) != daemon {
                note("process", process);
            }
        }
        for mount in self.mounts() {
            // The data directory itself is one where a test made it so.
            if mount != self.data_dir() {
                note("mount", mount.display().to_string());
            }
        }
        for cgroup in self.cgroups() {
            note("cgroup", cgroup.display().to_string());
        }
        for port in read_dir(format!("/sys/class/net/{}/brif", self.bridge())) {
            note("interface", port.display().to_string());
        }
        let data = self.data_dir();
        for sandbox in read_dir(self.run_dir().join("sandboxes")) {
            note("sandbox", sandbox.display().to_string());
        }
        for (kind, dir) in [
            ("netns", self.run_dir().join("netns")),
            ("scratch", data.join("scratch")),
            ("CNI result", data.join("cni")),
        ] {
            for file in files(&dir) {
                note(kind, file.display().to_string());
            }
        }
        for file in read_dir(self.dir().join("ipam").join(self.bridge())) {
            let name = file.file_name().unwrap_or_default().to_string_lossy();
            if !name.starts_with("last_reserved_ip") && name != "lock" {
                note("address", name.into_owned());
            }
        }
        for (program, rule) in self.firewall() {
            note("firewall", format!("{program} {rule}"));
        }
        found
    }

    /// Rules of the CNI plugins that name the instance's network, and the program that shows them.
    fn firewall(&self) -> Vec<(&'static str, String)> {
        let marks = [
            format!("10.{}.0.", self.number),
            format!("fd00:{}::", self.number),
            format!("\"{}\\\"", self.bridge()),
        ];
        let mut rules = Vec::new();
        for program in ["iptables", "ip6tables"] {
            let save = Command::new(format!("{program}-save"))
                .args(["-t", "nat"])
                .output();
            let text = save.map_or_else(|_| Vec::new(), |output| output.stdout);
            for line in String::from_utf8_lossy(&text).lines() {
                if marks.iter().any(|mark| line.contains(mark)) {
                    rules.push((program, line.to_owned()));
                }
            }
        }
        rules
    }

    /// Deletes [`Instance::firewall`] and the chains that its rules lead to.
    pub fn clear_firewall(&self) {
        let iptables = |program: &str, arguments: &str| {
            // Rules are shown quoted for a shell.
            let line = format!("{program} -w -t nat {arguments}");
            let _ = Command::new("sh")
                .args(["-c", &line])
                .stderr(Stdio::null())
                .status();
        };
        let rules = self.firewall();
        for (program, rule) in &rules {
            iptables(program, &rule.replacen("-A ", "-D ", 1));
        }
        for (program, rule) in &rules {
            let chain = rule
                .rsplit("-j ")
                .next()
                .and_then(|rest| rest.split(' ').next());
            // Those of one container, not those of the plugin.
            if let Some(chain) = chain.filter(|chain| chain.starts_with("CNI-") && chain.len() > 24)
            {
                iptables(program, &format!("-F {chain}"));
                iptables(program, &format!("-X {chain}"));
            }
        }
    }

    /// Ends and removes everything of the instance.
    pub fn clear(&self) {
        crate::eventually("the instance's processes end", || {
            let processes = self.processes();
            for (pid, _) in &processes {
                let _ = kill(*pid, Signal::SIGKILL);
            }
            // What was killed may have been starting another.
            processes.is_empty().then_some(())
        });
        for mount in self.mounts() {
            let _ = umount2(&mount, MntFlags::MNT_DETACH);
        }
        self.clear_firewall();
        for cgroup in self.cgroups() {
            remove_cgroup(&cgroup);
            if let Some(parent) = cgroup.parent() {
                let _ = fs::remove_dir(parent);
            }
        }
        for dir in [self.dir(), self.run_dir()] {
            match fs::remove_dir_all(&dir) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    panic!("{}: {error}", dir.display())
                }
                _ => {}
            }
        }
        if Path::new("/sys/class/net").join(self.bridge()).exists() {
            let _ = Command::new("ip")
                .args(["link", "delete", &self.bridge()])
                .status();
        }
    }
}

/// Removes a cgroup and those below it; the kernel does not do that itself.
fn remove_cgroup(cgroup: &Path) {
    for child in read_dir(cgroup) {
        if child.is_dir() {
            remove_cgroup(&child);
        }
    }
    let _ = fs::remove_dir(cgroup);
}

/// Everything below a directory that is not a directory.
fn files(dir: &Path) -> Vec<PathBuf> {
    let (dirs, mut files): (Vec<_>, Vec<_>) = read_dir(dir)
        .into_iter()
        .partition(|path| path.is_dir() && !path.is_symlink());
    files.extend(dirs.iter().flat_map(|dir| self::files(dir)));
    files
}

/// Paths in a directory; none if it is not there.
fn read_dir(dir: impl AsRef<Path>) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(dir) else {
        return Vec::new();
    };
    entries.flatten().map(|entry| entry.path()).collect()
}
