//! What PID 1 makes of the guest's kernel: devices, mounts, loopback, control groups.

use std::fs;
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::mount::{MsFlags, mount};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
use nix::sys::stat::Mode;
use nix::unistd::{chdir, chroot, dup2_stderr, dup2_stdin, dup2_stdout};

use crate::cgroup;
use crate::init::{InitError, step};
use crate::kmsg;
use crate::sandbox;

/// /dev, and standard streams, which PID 1 does not have when the guest has no console.
pub fn prepare_devices() -> Result<(), InitError> {
    mount_at("devtmpfs", "/dev", MsFlags::MS_NOSUID, "mode=0755")?;
    let null = open("/dev/null", OFlag::O_RDWR, Mode::empty()).map_err(step("/dev/null"))?;
    // Its own number is one of the three when they were closed.
    let number = null.as_raw_fd();
    dup2_stdin(&null)
        .and_then(|()| dup2_stdout(&null))
        .and_then(|()| dup2_stderr(&null))
        .map_err(step("/dev/null"))?;
    if number <= 2 {
        std::mem::forget(null);
    }
    Ok(())
}

/// Makes the root a mount that is not the initial one: `pivot_root`, which containers need, refuses to
/// work from that (pivot_root(2)).
pub fn move_root() -> Result<(), InitError> {
    let moved = || -> io::Result<()> {
        let new_root = "/root";
        fs::create_dir_all(new_root)?;
        let bind = MsFlags::MS_BIND | MsFlags::MS_REC;
        mount(Some("/"), new_root, None::<&str>, bind, None::<&str>)?;
        chdir(new_root)?;
        let to_root = MsFlags::MS_MOVE;
        mount(Some("."), "/", None::<&str>, to_root, None::<&str>)?;
        chroot(".")?;
        chdir("/")?;
        Ok(())
    };
    moved().map_err(step("moving the root file system"))
}

const GUARDED: MsFlags = MsFlags::MS_NOSUID
    .union(MsFlags::MS_NODEV)
    .union(MsFlags::MS_NOEXEC);

/// What the calls before the first container need.
pub fn mount_for_calls() -> Result<(), InitError> {
    mount_at("proc", "/proc", GUARDED, "")?;
    let temporary = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    mount_at("tmpfs", "/run", temporary, "mode=0755")?;
    fs::create_dir_all(Path::new(sandbox::DIRECTORY).join("containers"))
        .map_err(step("making directories"))
}

/// systemd's limit (systemd-system.conf(5)). Linux gives its first process 1024, a few for each exec.
const DESCRIPTORS: u64 = 512 * 1024;

/// Room for the streams of all that runs. What containers may have is their specs' business.
pub fn make_room_for_descriptors() {
    let raised = setrlimit(Resource::RLIMIT_NOFILE, DESCRIPTORS, DESCRIPTORS).or_else(|_| {
        let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
        setrlimit(Resource::RLIMIT_NOFILE, hard, hard)
    });
    if let Err(error) = raised {
        kmsg::error!("cannot have more descriptors: {error}");
    }
}

/// What containers need of the guest besides.
pub fn prepare_for_containers() -> Result<(), InitError> {
    let options = "nsdelegate,memory_recursiveprot";
    mount_at("cgroup2", cgroup::MOUNT_POINT, GUARDED, options)?;
    cgroup::set_up().map_err(step("making control groups"))?;
    set_loopback_up().map_err(step("taking the loopback interface up"))
}

/// Parameters of a kernel that has nothing else to do than this pod. Without them a pod works, too.
pub fn tune_kernel() {
    let reserve = reserve_kib(memory_kib());
    for (name, value) in [
        // Few free pages on the CPUs' own lists. By default these may hold an eighth of the memory
        // (admin-guide/sysctl/vm.rst), which counts as used and which the host never gets back by
        // free page reporting.
        ("vm/percpu_pagelist_high_fraction", "1000"),
        ("vm/min_free_kbytes", reserve.to_string().as_str()),
        // Our log lines all count; by default ten in five seconds do (admin-guide/sysctl/kernel.rst).
        ("kernel/printk_devkmsg", "on"),
    ] {
        let path = Path::new("/proc/sys").join(name);
        if let Err(error) = fs::write(path, format!("{value}\n")) {
            kmsg::error!("cannot set {name}: {error}");
        }
    }
}

/// What the kernel keeps free for itself, which counts as used. Its own rule is 4 √memory for a machine of
/// any kind, and with transparent huge pages, from 512 MiB on, 5 % of the memory. A pod has one disk, one
/// network interface, and asks for huge pages itself.
fn reserve_kib(memory_kib: u64) -> u64 {
    (memory_kib / 512).min(4 * memory_kib.isqrt())
}

fn memory_kib() -> u64 {
    // SAFETY: all zeroes is a valid value of this plain structure.
    let mut info: libc::sysinfo = unsafe { std::mem::zeroed() };
    // SAFETY: a structure that lives through the call, which fails only for a bad address.
    unsafe { libc::sysinfo(&raw mut info) };
    info.totalram * u64::from(info.mem_unit) / 1024
}

fn mount_at(kind: &str, target: &str, flags: MsFlags, options: &str) -> Result<(), InitError> {
    fs::create_dir_all(target)
        .and_then(|()| Ok(mount(Some(kind), target, Some(kind), flags, Some(options))?))
        .map_err(step(format!("mounting {target}")))
}

/// In the network namespace of the calling thread.
pub fn set_loopback_up() -> io::Result<()> {
    let socket = socket(
        AddressFamily::Inet,
        SockType::Datagram,
        SockFlag::SOCK_CLOEXEC,
        None,
    )?;
    // SAFETY: all zeroes is a valid value of this plain structure.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    request.ifr_name[0] = b'l' as libc::c_char;
    request.ifr_name[1] = b'o' as libc::c_char;
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    // SAFETY: a descriptor and a structure that lives through the call.
    Errno::result(unsafe {
        libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request)
    })?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reserve_grows_slower_than_memory() {
        assert_eq!(reserve_kib(512 << 10), 1024);
        assert_eq!(reserve_kib(2 << 20), 4096);
        assert_eq!(reserve_kib(64 << 20), 32768);
    }
}
