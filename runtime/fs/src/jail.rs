//! What is left of this process when it begins to serve: a root that holds the pod's shares and nothing else, the file
//! capabilities it needs, no network, and the system calls of a file server.

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{SigHandler, Signal, signal};
use nix::unistd::{fchdir, pivot_root};
use thiserror::Error;

/// Files that may be open or known to the guest at a time: what the kernel allows by default (`fs.nr_open`).
const MAX_FILES: u64 = 1 << 20;

/// `CAP_FSETID` (linux/capability.h).
pub const FSETID: u32 = 4;
/// `CAP_CHOWN`, `CAP_DAC_OVERRIDE`, `CAP_FOWNER`, `CAP_FSETID`, `CAP_SETGID`, `CAP_SETUID`, `CAP_SETFCAP`. Not
/// `CAP_DAC_READ_SEARCH`, which opens files by handle, outside of any root; nor `CAP_MKNOD`.
const CAPABILITIES: [u32; 7] = [0, 1, 3, FSETID, 6, 7, 31];

/// `SECBIT_NOROOT`, `SECBIT_NO_SETUID_FIXUP` and their locks, and `SECBIT_KEEP_CAPS_LOCKED` (linux/securebits.h).
const SECURE_BITS: libc::c_ulong = 0b10_1111;

/// Why there is no jail.
#[derive(Debug, Error)]
#[error("{step}: {source}")]
pub struct JailError {
    step: &'static str,
    source: io::Error,
}

fn failed<E: Into<io::Error>>(step: &'static str) -> impl FnOnce(E) -> JailError {
    move |error| JailError {
        step,
        source: error.into(),
    }
}

/// Makes `shares` the root of this process, read-only, and gives up everything that it does not need. Returns a
/// directory of the process's own descriptors, by which they can be opened again.
///
/// # Errors
/// Nothing may be served then.
pub fn enter(shares: &Path) -> Result<OwnedFd, JailError> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).map_err(failed("getrlimit"))?;
    let files = MAX_FILES.min(nr_open().unwrap_or(hard));
    // Not everywhere may root raise it: then it is what it is.
    setrlimit(Resource::RLIMIT_NOFILE, files, files)
        .or_else(|_| setrlimit(Resource::RLIMIT_NOFILE, hard, hard))
        .map_err(failed("setrlimit"))?;
    // A file that gets larger than it may is the guest's error, and not this process's end.
    // SAFETY: no handler.
    unsafe { signal(Signal::SIGXFSZ, SigHandler::SigIgn) }.map_err(failed("signal"))?;
    unshare(
        CloneFlags::CLONE_NEWNS
            | CloneFlags::CLONE_NEWNET
            | CloneFlags::CLONE_NEWIPC
            | CloneFlags::CLONE_NEWUTS,
    )
    .map_err(failed("unshare"))?;
    let descriptors = own_descriptors().map_err(failed("/proc/self/fd"))?;
    change_root(shares)?;
    // New files have the modes that the guest says.
    nix::sys::stat::umask(nix::sys::stat::Mode::empty());
    nix::unistd::setgroups(&[]).map_err(failed("setgroups"))?;
    drop_privileges().map_err(failed("capabilities"))?;
    filter_system_calls().map_err(failed("system call filter"))?;
    Ok(descriptors)
}

fn nr_open() -> Option<u64> {
    fs::read_to_string("/proc/sys/fs/nr_open")
        .ok()?
        .trim()
        .parse()
        .ok()
}

/// /proc/self/fd of a /proc of its own, which is nowhere mounted and shows nobody else.
fn own_descriptors() -> io::Result<OwnedFd> {
    use nix::fcntl::{OFlag, openat};
    use nix::sys::stat::Mode;
    use std::os::fd::{AsRawFd as _, FromRawFd as _};

    const FSCONFIG_SET_STRING: libc::c_uint = 1;
    const FSCONFIG_CMD_CREATE: libc::c_uint = 6;
    let descriptor = |result: libc::c_long| -> io::Result<OwnedFd> {
        match i32::try_from(result) {
            // SAFETY: the kernel has just made it, nobody else has it.
            Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
            _ => Err(io::Error::last_os_error()),
        }
    };
    // SAFETY: a string and a flag.
    let proc = descriptor(unsafe {
        libc::syscall(libc::SYS_fsopen, c"proc".as_ptr(), libc::FSOPEN_CLOEXEC)
    })?;
    let options = [(c"hidepid", c"ptraceable"), (c"subset", c"pid")];
    for (key, value) in options {
        // SAFETY: a descriptor, strings and numbers.
        let result = unsafe {
            libc::syscall(
                libc::SYS_fsconfig,
                proc.as_raw_fd(),
                FSCONFIG_SET_STRING,
                key.as_ptr(),
                value.as_ptr(),
                0,
            )
        };
        nix::errno::Errno::result(result)?;
    }
    // SAFETY: a descriptor and numbers.
    let result = unsafe {
        libc::syscall(
            libc::SYS_fsconfig,
            proc.as_raw_fd(),
            FSCONFIG_CMD_CREATE,
            std::ptr::null::<libc::c_char>(),
            std::ptr::null::<libc::c_char>(),
            0,
        )
    };
    nix::errno::Errno::result(result)?;
    // SAFETY: a descriptor and numbers.
    let mounted = descriptor(unsafe {
        libc::syscall(
            libc::SYS_fsmount,
            proc.as_raw_fd(),
            libc::FSMOUNT_CLOEXEC,
            libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOEXEC,
        )
    })?;
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    Ok(openat(&mounted, "self/fd", flags, Mode::empty())?)
}

fn change_root(shares: &Path) -> Result<(), JailError> {
    let nothing = None::<&str>;
    // Later mounts below the shares come by their own propagation; nothing of ours goes anywhere.
    mount(
        nothing,
        "/",
        nothing,
        MsFlags::MS_PRIVATE | MsFlags::MS_REC,
        nothing,
    )
    .map_err(failed("making mounts private"))?;
    mount(Some(shares), shares, nothing, MsFlags::MS_BIND, nothing)
        .map_err(failed("binding the shares"))?;
    let read_only = MsFlags::MS_BIND
        | MsFlags::MS_REMOUNT
        | MsFlags::MS_RDONLY
        | MsFlags::MS_NOSUID
        | MsFlags::MS_NODEV
        | MsFlags::MS_NOEXEC;
    mount(nothing, shares, nothing, read_only, nothing).map_err(failed("the shares' root"))?;
    let root = fs::File::open(shares).map_err(failed("opening the shares"))?;
    fchdir(root.as_fd()).map_err(failed("chdir"))?;
    // The old root goes on top of the new one, and from there away (pivot_root(2)).
    pivot_root(".", ".").map_err(failed("pivot_root"))?;
    umount2(".", MntFlags::MNT_DETACH).map_err(failed("leaving the old root"))?;
    nix::unistd::chdir("/").map_err(failed("chdir"))
}

fn drop_privileges() -> io::Result<()> {
    // SAFETY: numbers only.
    if unsafe { libc::prctl(libc::PR_SET_SECUREBITS, SECURE_BITS, 0, 0, 0) } != 0 {
        return Err(io::Error::last_os_error());
    }
    for capability in 0..63 {
        // SAFETY: numbers only. Those that the kernel does not know are refused.
        unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) };
    }
    // SAFETY: numbers only.
    if unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // Its memory is nobody's to look at, nor are its files in /proc.
    // SAFETY: numbers only.
    if unsafe { libc::prctl(libc::PR_SET_DUMPABLE, 0, 0, 0, 0) } != 0 {
        return Err(io::Error::last_os_error());
    }
    set_capabilities(capabilities(), capabilities())
}

/// A call that is not in `seccomp/serve.json` ends the process from now on.
fn filter_system_calls() -> io::Result<()> {
    /// Bytes of a `struct sock_filter`.
    const INSTRUCTION_BYTES: usize = 8;
    let program: seccompiler::BpfProgram = include_bytes!(concat!(env!("OUT_DIR"), "/serve.bpf"))
        .as_chunks::<INSTRUCTION_BYTES>()
        .0
        .iter()
        .map(|bytes| seccompiler::sock_filter {
            code: u16::from_ne_bytes([bytes[0], bytes[1]]),
            jt: bytes[2],
            jf: bytes[3],
            k: u32::from_ne_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]),
        })
        .collect();
    seccompiler::apply_filter(&program).map_err(io::Error::other)
}

/// What this process keeps, as a mask.
pub fn capabilities() -> u64 {
    CAPABILITIES.iter().fold(0, |mask, bit| mask | 1 << bit)
}

/// Sets the calling thread's capabilities (capset(2)).
pub fn set_capabilities(effective: u64, permitted: u64) -> io::Result<()> {
    const VERSION_3: u32 = 0x2008_0522;
    #[repr(C)]
    struct Header {
        version: u32,
        pid: libc::c_int,
    }
    #[repr(C)]
    struct Data {
        effective: u32,
        permitted: u32,
        inheritable: u32,
    }
    let header = Header {
        version: VERSION_3,
        pid: 0,
    };
    let half = |shift: u32| Data {
        effective: (effective >> shift) as u32,
        permitted: (permitted >> shift) as u32,
        inheritable: 0,
    };
    let data = [half(0), half(32)];
    // SAFETY: a header and two halves, as version 3 has them.
    match unsafe { libc::syscall(libc::SYS_capset, &raw const header, data.as_ptr()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
