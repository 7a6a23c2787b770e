//! System call filters: one for each kind of thread of the process that has the VM.
//!
//! The lists are data: `seccomp/*.json`, which `build.rs` compiles. A call that is not in a thread's list ends the
//! process, with the call's number on standard error (the kernel's Documentation/userspace-api/seccomp_filter.rst).

use std::io;

use nix::sys::signal::{SigSet, Signal};

/// A kind of thread.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Thread {
    /// What talks to podvisord and to the agent, and writes logs; and what it starts later. In no filter before the VM
    /// runs: QEMU, which it starts, brings its own.
    Main,
    /// Runs a vCPU.
    Vcpu,
    /// Serves devices.
    Device,
}

impl Thread {
    fn program(self) -> &'static [u8] {
        match self {
            Thread::Main => include_bytes!(concat!(env!("OUT_DIR"), "/main.bpf")),
            Thread::Vcpu => include_bytes!(concat!(env!("OUT_DIR"), "/vcpu.bpf")),
            Thread::Device => include_bytes!(concat!(env!("OUT_DIR"), "/device.bpf")),
        }
    }
}

/// Puts the calling thread, and all that it starts from then on, under the filter of its kind, for good. One that serves
/// the guest gives up its capabilities as well: what it writes takes set-uid bits away, and keeps to quotas.
///
/// # Errors
/// The kernel has no seccomp.
pub fn confine(thread: Thread) -> io::Result<()> {
    if thread != Thread::Main {
        drop_capabilities()?;
        // A file that gets larger than it may is the guest's error, and not this process's end.
        let mut signal = SigSet::empty();
        signal.add(Signal::SIGXFSZ);
        signal.thread_block()?;
    }
    /// Bytes of a `struct sock_filter`.
    const INSTRUCTION_BYTES: usize = 8;
    // As the kernel wants it, aligned.
    let mut program: Vec<libc::sock_filter> = thread
        .program()
        .chunks_exact(INSTRUCTION_BYTES)
        .map(|bytes| libc::sock_filter {
            code: u16::from_ne_bytes([bytes[0], bytes[1]]),
            jt: bytes[2],
            jf: bytes[3],
            k: u32::from_ne_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]),
        })
        .collect();
    let program = libc::sock_fprog {
        len: program.len() as u16,
        filter: program.as_mut_ptr(),
    };
    // SAFETY: a flag of the thread's; no pointers.
    if unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: `program` is valid through the call, which copies it.
    let result = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            0,
            &raw const program,
        )
    };
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The calling thread's, all of them (capset(2)).
fn drop_capabilities() -> io::Result<()> {
    const VERSION_3: u32 = 0x2008_0522;
    // The version and the calling thread; effective, permitted and inheritable ones, in two halves.
    let header = [VERSION_3, 0];
    let none = [0_u32; 6];
    // SAFETY: a header and two halves, as version 3 has them; the kernel only reads them.
    match unsafe { libc::syscall(libc::SYS_capset, header.as_ptr(), none.as_ptr()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Exit code of a process that made a call that is not in its list: 128 + SIGSYS.
pub const EXIT_CODE: libc::c_int = 128 + libc::SIGSYS;

/// From now on a forbidden call is reported before it ends the process.
pub fn report_violations() {
    // SAFETY: the handler does only what signal handlers may.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_flags = libc::SA_SIGINFO;
        action.sa_sigaction = handle_violation
            as extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void)
            as libc::sighandler_t;
        libc::sigaction(libc::SIGSYS, &raw const action, std::ptr::null_mut());
    }
}

extern "C" fn handle_violation(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    /// Of `si_syscall` in the siginfo of SIGSYS on 64-bit Linux: after three numbers, padding, and an address.
    const SYSCALL_OFFSET: usize = 24;
    // SAFETY: the kernel passes a siginfo, and for SIGSYS of seccomp the number is there.
    let mut number = unsafe { info.byte_add(SYSCALL_OFFSET).cast::<i32>().read() };
    let mut line = *b"seccomp: forbidden system call ....\n";
    let digits = line.len() - 5..line.len() - 1;
    for digit in line[digits].iter_mut().rev() {
        *digit = b'0' + (number % 10) as u8;
        number /= 10;
    }
    // SAFETY: both are calls that signal handlers may make; the buffer lives through the first.
    unsafe {
        libc::write(libc::STDERR_FILENO, line.as_ptr().cast(), line.len());
        libc::_exit(EXIT_CODE);
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{FileExt as _, MetadataExt as _, PermissionsExt as _};

    use nix::sys::resource::{Resource, setrlimit};

    use super::*;

    /// In a process of its own: a filter cannot be taken back.
    fn in_child(work: fn()) -> i32 {
        // SAFETY: the child makes system calls and ends; it takes no lock that another thread may hold, but the
        // allocator's, which glibc keeps usable across fork.
        match unsafe { libc::fork() } {
            0 => {
                work();
                // SAFETY: ends the child without its parent's exit handlers.
                unsafe { libc::_exit(0) }
            }
            child => {
                let mut status = 0;
                // SAFETY: `status` lives through the call.
                assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
                assert!(libc::WIFEXITED(status), "{status:#x}");
                libc::WEXITSTATUS(status)
            }
        }
    }

    #[test]
    fn what_is_not_in_the_list_ends_the_process() {
        for thread in [Thread::Main, Thread::Vcpu, Thread::Device] {
            assert!(!thread.program().is_empty() && thread.program().len().is_multiple_of(8));
        }
        let violations: [fn(); 3] = [
            || {
                confine(Thread::Main).unwrap();
                let _ = nix::unistd::chroot("/");
            },
            || {
                confine(Thread::Device).unwrap();
                let _ = std::fs::File::open("/etc/passwd");
            },
            || {
                confine(Thread::Vcpu).unwrap();
                let _ = nix::unistd::pipe();
            },
        ];
        for violation in violations {
            let work = violation;
            report_violations();
            assert_eq!(in_child(work), EXIT_CODE);
        }
    }

    #[test]
    fn who_serves_the_guest_has_no_capabilities() {
        let work = || {
            let file = tempfile::tempfile().unwrap();
            let set_uid = std::fs::Permissions::from_mode(0o4755);
            file.set_permissions(set_uid).unwrap();
            confine(Thread::Device).unwrap();
            file.write_at(b"x", 0).unwrap();
            assert_eq!(file.metadata().unwrap().mode() & 0o7777, 0o755);
        };
        assert_eq!(in_child(work), 0);
    }

    #[test]
    fn a_file_that_gets_too_large_is_an_error() {
        let work = || {
            let file = tempfile::tempfile().unwrap();
            setrlimit(Resource::RLIMIT_FSIZE, 4096, 4096).unwrap();
            confine(Thread::Device).unwrap();
            assert_eq!(file.write_at(b"x", 4095).unwrap(), 1);
            let error = file.write_at(b"x", 4096).unwrap_err();
            assert_eq!(error.raw_os_error(), Some(libc::EFBIG));
        };
        assert_eq!(in_child(work), 0);
    }

    #[test]
    fn what_is_in_the_list_goes_on() {
        let work = || {
            confine(Thread::Vcpu).unwrap();
            drop(vec![0_u8; 1 << 20]);
        };
        assert_eq!(in_child(work), 0);
    }
}
