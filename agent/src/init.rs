//! What PID 1 does once. Only what the connection to the host needs comes before it: mounts are made
//! while the host answers.

use std::fs;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::mount::{MsFlags, mount};
use nix::sys::signal::{SigHandler, Signal, signal};
use nix::sys::stat::Mode;
use nix::unistd::{chdir, chroot, dup2_stderr, dup2_stdin, dup2_stdout};

use crate::cgroup;
use crate::container::Pod;
use crate::events::Events;
use crate::kmsg;
use crate::reaper::Reaper;
use crate::server::{self, CONTROL_PORT, STREAM_PORT};
use crate::service::{Service, boot_clock};
use crate::socket::{Address, Listener, Socket};
use crate::streams::Streams;
use crate::watch::Watch;

/// The pod's disk.
const DISK: &str = "/dev/vda";

/// Why PID 1 cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum InitError {
    /// A step of the set-up.
    #[error("{action}: {source}")]
    Step {
        /// What was tried.
        action: String,
        /// The kernel's reason.
        source: io::Error,
    },
    /// Not an argument.
    #[error("unknown argument {0:?}; usage: podvisor-agent [--listen unix:PATH] [--disk DEVICE]")]
    Argument(String),
}

fn step<E: Into<io::Error>>(action: impl Into<String>) -> impl FnOnce(E) -> InitError {
    move |error| InitError::Step {
        action: action.into(),
        source: error.into(),
    }
}

/// How to run outside of a VM, for development: in new pid, mount, network, ipc and uts namespaces, as
/// their first process. The API is at a unix socket, streams at the same path with `.streams`.
#[derive(Debug)]
struct Options {
    listen: Option<PathBuf>,
    disk: PathBuf,
}

impl Options {
    fn parse(arguments: &[String]) -> Result<Self, InitError> {
        let mut options = Self {
            listen: None,
            disk: PathBuf::from(DISK),
        };
        let mut arguments = arguments.iter();
        while let Some(argument) = arguments.next() {
            let unknown = || InitError::Argument(argument.clone());
            let value = arguments.next().ok_or_else(unknown)?;
            match argument.as_str() {
                "--listen" => {
                    let path = value.strip_prefix("unix:").ok_or_else(unknown)?;
                    options.listen = Some(PathBuf::from(path));
                }
                "--disk" => options.disk = PathBuf::from(value),
                _ => return Err(unknown()),
            }
        }
        Ok(options)
    }
}

/// PID 1's life. Returns only when it cannot go on; in the guest, the kernel panics then.
pub fn run(arguments: &[String]) -> libc::c_int {
    let init_started = boot_clock();
    kmsg::end_on_panic();
    let result = Options::parse(arguments).and_then(|options| {
        if options.listen.is_none() {
            prepare_devices()?;
        }
        kmsg::open();
        // SAFETY: "ignore" runs no code of ours.
        unsafe { signal(Signal::SIGPIPE, SigHandler::SigIgn) }.map_err(step("signals"))?;
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(step("the runtime"))?
            .block_on(serve(options, init_started))
    });
    match result {
        Ok(()) => 0,
        Err(error) => {
            kmsg::write(2, format_args!("{error}"));
            1
        }
    }
}

async fn serve(options: Options, init_started: u64) -> Result<(), InitError> {
    let reaper = Reaper::start().map_err(step("the reaper"))?;
    let streams = Streams::default();
    let events = Events::default();
    let watch = Watch::start(events.clone()).map_err(step("inotify"))?;
    let pod = Pod::new(options.disk, reaper, streams.clone(), events, watch);
    let service = Service::new(pod.clone(), init_started);
    let stream_address = match &options.listen {
        None => Address::Vsock(STREAM_PORT),
        Some(path) => Address::Unix(path.with_added_extension("streams")),
    };
    let stream_listener = Listener::bind(&stream_address).map_err(step("listening for streams"))?;
    tokio::spawn(streams.serve(stream_listener));

    if let Some(path) = options.listen {
        mount_all()?;
        let listener = Listener::bind(&Address::Unix(path)).map_err(step("listening"))?;
        let serving = server::listen(service, listener);
        return tokio::select! {
            served = serving => served.map_err(step("accepting")),
            error = prepare_for_containers(pod) => Err(error),
        };
    }
    // The host's answer takes a moment; the mounts fill it.
    let dialling = tokio::spawn({
        let service = service.clone();
        async move {
            let socket = Socket::connect_to_host(CONTROL_PORT).await?;
            service.mark_ready();
            Ok(socket)
        }
    });
    tokio::task::yield_now().await;
    move_root().map_err(step("moving the root file system"))?;
    mount_all()?;
    let first = async { dialling.await.map_err(io::Error::other)? };
    tokio::select! {
        () = server::dial(service, first) => Ok(()),
        error = prepare_for_containers(pod) => Err(error),
    }
}

/// What the first container needs and no call before it: begins when the sandbox is configured, so that it
/// does not take the CPU from the calls that a pod's start waits for. Returns only when it fails.
async fn prepare_for_containers(pod: Pod) -> InitError {
    pod.configured().await;
    let kernel = tokio::task::spawn_blocking(|| cap_free_lists().and_then(|()| cgroup::set_up()));
    let prepared = kernel
        .await
        .map_err(io::Error::from)
        .and_then(|result| result)
        .and_then(|()| pod.start_launcher());
    match prepared {
        Ok(()) => std::future::pending().await,
        Err(error) => step("preparing for containers")(error),
    }
}

/// Keeps few free pages on the CPUs' own lists. By default these may hold an eighth of the memory
/// (`vm.percpu_pagelist_high_fraction`, admin-guide/sysctl/vm.rst), which counts as used and which the
/// host never gets back by free page reporting.
fn cap_free_lists() -> io::Result<()> {
    const FRACTION: &str = "1000";
    fs::write("/proc/sys/vm/percpu_pagelist_high_fraction", FRACTION)
}

/// /dev, and standard streams, which PID 1 does not have when the guest has no console.
fn prepare_devices() -> Result<(), InitError> {
    mount_at(
        "devtmpfs",
        "devtmpfs",
        "/dev",
        MsFlags::MS_NOSUID,
        "mode=0755",
    )?;
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
fn move_root() -> io::Result<()> {
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
}

/// Mounts everything that a guest has, and what else the sandbox's configuration needs.
fn mount_all() -> Result<(), InitError> {
    let guarded = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount_at("proc", "proc", "/proc", guarded, "")?;
    mount_at("sysfs", "sysfs", "/sys", guarded, "")?;
    let cgroup_options = "nsdelegate,memory_recursiveprot";
    mount_at(
        "cgroup2",
        "cgroup2",
        cgroup::MOUNT_POINT,
        guarded,
        cgroup_options,
    )?;
    let temporary = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    mount_at("tmpfs", "tmpfs", "/run", temporary, "mode=0755")?;
    mount_at(
        "devpts",
        "devpts",
        "/dev/pts",
        MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC,
        "newinstance,ptmxmode=0666,mode=0620,gid=5",
    )?;
    for (link, target) in [
        ("/dev/fd", "/proc/self/fd"),
        ("/dev/stdin", "/proc/self/fd/0"),
        ("/dev/stdout", "/proc/self/fd/1"),
        ("/dev/stderr", "/proc/self/fd/2"),
    ] {
        match symlink(target, link) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(step(link)(error));
            }
            _ => {}
        }
    }
    fs::create_dir_all(Path::new(crate::sandbox::DIRECTORY).join("containers"))
        .map_err(step("/run/podvisor"))?;
    set_loopback_up().map_err(step("the loopback interface"))
}

fn mount_at(
    kind: &str,
    source: &str,
    target: &str,
    flags: MsFlags,
    options: &str,
) -> Result<(), InitError> {
    fs::create_dir_all(target)
        .and_then(|()| {
            Ok(mount(
                Some(source),
                target,
                Some(kind),
                flags,
                Some(options),
            )?)
        })
        .map_err(step(format!("mounting {target}")))
}

fn set_loopback_up() -> io::Result<()> {
    let socket = nix::sys::socket::socket(
        nix::sys::socket::AddressFamily::Inet,
        nix::sys::socket::SockType::Datagram,
        nix::sys::socket::SockFlag::SOCK_CLOEXEC,
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

    fn parse(arguments: &[&str]) -> Result<Options, InitError> {
        let arguments: Vec<String> = arguments.iter().map(|a| (*a).to_owned()).collect();
        Options::parse(&arguments)
    }

    #[test]
    fn arguments() {
        let none = parse(&[]).unwrap();
        assert!(none.listen.is_none());
        assert_eq!(none.disk, Path::new(DISK));
        let both = parse(&["--listen", "unix:/a", "--disk", "/dev/loop0"]).unwrap();
        assert_eq!(both.listen.as_deref(), Some(Path::new("/a")));
        assert_eq!(both.disk, Path::new("/dev/loop0"));
        for wrong in [&["--listen"][..], &["--listen", "/a"], &["-x", "y"], &["x"]] {
            assert!(parse(wrong).is_err(), "{wrong:?}");
        }
    }
}
