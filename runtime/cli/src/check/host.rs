//! The kernel and the rights.

use std::fs;
use std::io;
use std::os::fd::FromRawFd;
use std::path::Path;

use indicatif::HumanBytes;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, statfs};
use nix::sys::statvfs::statvfs;
use podvisor_network::{netns, tap, tc};
use podvisor_node::backend::Choice;
use podvisor_node::config::Config;
use podvisor_proto::monitor::Backend;

use super::Finding;
use crate::Context;

/// Bits of the capability sets, from linux/capability.h.
const CAP_NET_ADMIN: u32 = 12;
const CAP_SYS_ADMIN: u32 = 21;
const CAP_SYS_RESOURCE: u32 = 24;

/// Space below which a node cannot do much: an image and some containers' writes.
const FREE_DISK_WANTED: u64 = 2 << 30;

/// Everything about the host.
pub async fn check(context: &Context) -> Vec<Finding> {
    let capabilities = fs::read_to_string("/proc/self/status")
        .ok()
        .and_then(|status| effective_capabilities(&status))
        .unwrap_or(0);
    vec![
        root(capabilities),
        oom_score(capabilities),
        kvm(&context.config, &Choice::make(&context.config).await),
        kernel(),
        cgroups(),
        network().await,
        disk(&context.config.data_dir),
    ]
}

fn root(capabilities: u64) -> Finding {
    const NAME: &str = "root";
    const WHY: &str = "namespaces, devices and cgroups of pods";
    let uid = nix::unistd::geteuid();
    if !uid.is_root() {
        return Finding::missing(
            NAME,
            WHY,
            format!("uid {uid}"),
            "run this, and podvisord, as root",
        );
    }
    let lacking: Vec<&str> = [
        (CAP_SYS_ADMIN, "CAP_SYS_ADMIN"),
        (CAP_NET_ADMIN, "CAP_NET_ADMIN"),
    ]
    .into_iter()
    .filter(|(bit, _)| capabilities & (1 << bit) == 0)
    .map(|(_, name)| name)
    .collect();
    if lacking.is_empty() {
        Finding::ok(NAME, WHY, "uid 0")
    } else {
        Finding::missing(
            NAME,
            WHY,
            format!("uid 0, without {}", lacking.join(" and ")),
            "run podvisord on the host itself, or in a privileged container",
        )
    }
}

fn oom_score(capabilities: u64) -> Finding {
    const NAME: &str = "CAP_SYS_RESOURCE";
    const WHY: &str =
        "keeping the kernel's OOM killer away from the pods' monitors (negative oom_score_adj)";
    if capabilities & (1 << CAP_SYS_RESOURCE) == 0 {
        Finding::note(
            NAME,
            WHY,
            "absent",
            "pods run; to protect their monitors, give podvisord the capability",
        )
    } else {
        Finding::ok(NAME, WHY, "held")
    }
}

/// The effective set in /proc/PID/status.
fn effective_capabilities(status: &str) -> Option<u64> {
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))?;
    u64::from_str_radix(line.trim(), 16).ok()
}

/// KVM as podvisord would find it: by a guest.
fn kvm(config: &Config, choice: &Choice) -> Finding {
    const NAME: &str = "KVM";
    const WHY: &str = "virtual machines at the speed of the hardware, in podvisor's own VMM";
    match (&choice.kvm_problem, choice.problem()) {
        (None, _) if choice.backend == Backend::Kvm => {
            Finding::ok(NAME, WHY, "/dev/kvm: the probe guest ran")
        }
        (None, _) => Finding::ok(NAME, WHY, "not used: the configuration says so"),
        (Some(why), Some(_)) => Finding::missing(
            NAME,
            WHY,
            why,
            format!("as above; or vmm = \"auto\" instead of {:?}", config.vmm),
        ),
        (Some(why), None) => Finding::note(
            NAME,
            WHY,
            why,
            "pods run nevertheless, slowly, in QEMU's software emulation",
        ),
    }
}

fn kernel() -> Finding {
    const NAME: &str = "kernel";
    const WHY: &str = "guest memory that the monitor and QEMU share (memfd), exits of processes as events (pidfd)";
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let release = format!("Linux {}", release.trim());
    let failed = [
        (
            "memfd_create",
            memfd_create(c"podvisor-check", MFdFlags::MFD_CLOEXEC)
                .map_err(io::Error::from)
                .err(),
        ),
        ("pidfd_open", pidfd_of_self().err()),
    ];
    let failed: Vec<String> = failed
        .into_iter()
        .filter_map(|(call, error)| error.map(|error| format!("{call}: {error}")))
        .collect();
    if failed.is_empty() {
        Finding::ok(NAME, WHY, release)
    } else {
        Finding::missing(
            NAME,
            WHY,
            format!("{release}: {}", failed.join("; ")),
            "Linux 5.4 or newer, and a seccomp profile that allows these calls",
        )
    }
}

fn pidfd_of_self() -> io::Result<fs::File> {
    // SAFETY: pidfd_open(2) takes two integers and touches no memory of ours.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, libc::getpid(), 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call succeeded, so this is a new descriptor that nobody else owns.
    Ok(unsafe { fs::File::from_raw_fd(fd as i32) })
}

fn cgroups() -> Finding {
    const NAME: &str = "cgroups";
    const WHY: &str = "limits and accounts of pods";
    let is_v2 =
        |path: &str| statfs(path).is_ok_and(|fs| fs.filesystem_type() == CGROUP2_SUPER_MAGIC);
    if is_v2("/sys/fs/cgroup") {
        let controllers =
            fs::read_to_string("/sys/fs/cgroup/cgroup.controllers").unwrap_or_default();
        return Finding::ok(NAME, WHY, format!("v2: {}", controllers.trim()));
    }
    let v1: Vec<&str> = ["memory", "cpu", "pids"]
        .into_iter()
        .filter(|name| {
            Path::new("/sys/fs/cgroup")
                .join(name)
                .join("tasks")
                .exists()
        })
        .collect();
    if v1.is_empty() {
        Finding::missing(
            NAME,
            WHY,
            "none below /sys/fs/cgroup",
            "mount -t cgroup2 none /sys/fs/cgroup",
        )
    } else {
        Finding::ok(NAME, WHY, format!("v1: {}", v1.join(" ")))
    }
}

/// Makes what a pod's network is made of, in a namespace of its own, and removes it.
async fn network() -> Finding {
    const NAME: &str = "tun and tc";
    const WHY: &str = "the VM's network device, joined to the CNI plugins'";
    const REMEDY: &str = "load the modules tun, sch_ingress, cls_u32 and act_mirred (modprobe), and see that /dev/net/tun exists";
    let dir = match tempfile::Builder::new().prefix("podvisor-check-").tempdir() {
        Ok(dir) => dir,
        Err(error) => {
            return Finding::missing(
                NAME,
                WHY,
                format!("no temporary directory: {error}"),
                REMEDY,
            );
        }
    };
    let netns = dir.path().join("netns");
    let tried = try_network(&netns).await;
    let deleted = netns::delete(&netns)
        .await
        .map_err(|error| error.to_string());
    match tried.and(deleted) {
        Ok(()) => Finding::ok(NAME, WHY, "tried: namespace, tap devices, redirection"),
        Err(error) => Finding::missing(NAME, WHY, error, REMEDY),
    }
}

async fn try_network(netns: &Path) -> Result<(), String> {
    let text = |error: &dyn std::error::Error| error.to_string();
    netns::create(netns).await.map_err(|error| text(&error))?;
    let _first = tap::open(netns, "tap0")
        .await
        .map_err(|error| text(&error))?;
    // A second tap stands for the plugins' veth.
    let _second = tap::open(netns, "tap1")
        .await
        .map_err(|error| text(&error))?;
    tc::mirror(netns, "tap1", "tap0")
        .await
        .map_err(|error| text(&error))
}

fn disk(data_dir: &Path) -> Finding {
    const NAME: &str = "disk";
    const WHY: &str = "images and the writable disks of pods";
    // Before the first start there is no data directory: its file system is its ancestor's.
    let existing = data_dir
        .ancestors()
        .find(|path| path.exists())
        .unwrap_or(Path::new("/"));
    let free = match statvfs(existing) {
        Ok(fs) => fs.blocks_available() * fs.fragment_size(),
        Err(errno) => {
            return Finding::missing(
                NAME,
                WHY,
                format!("{}: {errno}", existing.display()),
                "set data_dir",
            );
        }
    };
    let found = format!("{} free for {}", HumanBytes(free), data_dir.display());
    if free < FREE_DISK_WANTED {
        Finding::note(
            NAME,
            WHY,
            found,
            "make room, or set data_dir to another file system",
        )
    } else {
        Finding::ok(NAME, WHY, found)
    }
}

#[cfg(test)]
mod tests {
    use podvisor_node::config::Vmm;

    use super::super::State;
    use super::*;

    #[test]
    fn capabilities_are_read_from_the_status_file() {
        let status = "Name:\tx\nCapPrm:\t0000000000000000\nCapEff:\t0000000001201000\nCapBnd:\t0\n";
        let set = effective_capabilities(status).unwrap();
        assert_eq!(
            set,
            1 << CAP_SYS_RESOURCE | 1 << CAP_SYS_ADMIN | 1 << CAP_NET_ADMIN
        );
        assert_eq!(effective_capabilities("Name:\tx\n"), None);
        assert_eq!(oom_score(set).state, State::Ok);
        assert_eq!(oom_score(0).state, State::Note);
    }

    #[test]
    fn kvm_fails_only_who_demands_it() {
        let mut config = Config::default();
        let mut choice = Choice {
            backend: Backend::Qemu,
            accel: "tcg",
            kvm_problem: Some("no /dev/kvm".into()),
        };
        assert_eq!(kvm(&config, &choice).state, State::Note);
        config.vmm = Vmm::Kvm;
        choice.backend = Backend::Kvm;
        assert_eq!(kvm(&config, &choice).state, State::Missing);
        choice.kvm_problem = None;
        assert_eq!(kvm(&config, &choice).state, State::Ok);
    }

    #[test]
    fn this_kernel_has_memfd_and_pidfd() {
        assert_eq!(kernel().state, State::Ok, "{:?}", kernel());
    }

    #[test]
    fn free_space_is_that_of_the_nearest_directory() {
        let finding = disk(Path::new("/proc/none/such"));
        assert_eq!(finding.state, State::Note, "{finding:?}");
        assert!(finding.found.contains("/proc/none/such"));
    }
}
