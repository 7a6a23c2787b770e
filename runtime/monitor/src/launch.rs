//! What podvisord hands over at the start: the [`Launch`] message on standard input, and the file
//! descriptors that it names.

use std::collections::HashSet;
use std::io::{self, Read};
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixListener;
use std::time::Duration;

use podvisor_monitor::launcher::inherited_fds;
use podvisor_proto::monitor::{HostSpec, Launch, VmSpec};
use prost::Message;
use thiserror::Error;

/// Longest launch message read, bytes.
const MAX_MESSAGE: u64 = 64 * 1024;

/// Why the process cannot be a monitor.
#[derive(Debug, Error)]
pub enum LaunchError {
    /// Standard input.
    #[error("reading the launch message: {0}")]
    Read(#[source] io::Error),
    /// No protobuf of ours.
    #[error("the launch message: {0}")]
    Decode(#[from] prost::DecodeError),
    /// A field without which nothing works.
    #[error("the launch message: {0}")]
    Invalid(&'static str),
    /// A descriptor that was not inherited.
    #[error("file descriptor {fd} of the launch message: {source}")]
    Descriptor {
        /// Its number.
        fd: RawFd,
        /// From `fcntl`.
        source: io::Error,
    },
    /// The other descriptors cannot be closed to children.
    #[error("marking descriptors close-on-exec: {0}")]
    CloseOnExec(#[source] io::Error),
}

/// The launch message, checked, with its descriptors owned.
#[derive(Debug)]
pub struct Inherited {
    /// The sandbox.
    pub sandbox_id: String,
    /// Listens for gRPC.
    pub grpc: UnixListener,
    /// Listens for file descriptors.
    pub fd_socket: OwnedFd,
    /// The sandbox's folder.
    pub dir: OwnedFd,
    /// Who is to run the containers.
    pub runner: Runner,
    /// Zero of the timeline, nanoseconds since the epoch.
    pub requested_ns: u64,
    /// Filter for the log.
    pub log_filter: String,
}

/// Who is to run the pod's containers.
#[derive(Debug)]
pub enum Runner {
    /// An agent in a VM.
    Vm(Box<Vm>),
    /// An OCI runtime on the host.
    Host(HostSpec),
}

/// What a VM is made of.
#[derive(Debug)]
pub struct Vm {
    /// Listens for `CONNECT port`.
    pub vsock: UnixListener,
    /// The pod's writable disk.
    pub scratch: OwnedFd,
    /// Its size in bytes.
    pub scratch_bytes: u64,
    /// Guest kernel.
    pub kernel: OwnedFd,
    /// Guest initial root file system.
    pub initramfs: OwnedFd,
    /// Network device, when the pod has one.
    pub tap: Option<OwnedFd>,
    /// The VM's other properties.
    pub spec: VmSpec,
    /// Until the agent has to be ready.
    pub boot_timeout: Duration,
}

/// Reads the launch message from `input` to its end and takes over the descriptors.
///
/// # Errors
/// See [`LaunchError`].
pub fn receive(input: impl Read) -> Result<Inherited, LaunchError> {
    let mut bytes = Vec::new();
    input
        .take(MAX_MESSAGE)
        .read_to_end(&mut bytes)
        .map_err(LaunchError::Read)?;
    let launch = Launch::decode(bytes.as_slice())?;
    check(&launch)?;
    let fds = inherited_fds(&launch);
    check_descriptors(&fds)?;
    close_on_exec()?;

    // SAFETY: `check_descriptors` found each number open and named once, none of them a standard
    // stream, and nothing in this process owned a descriptor that it inherited.
    let own = |fd: RawFd| unsafe { OwnedFd::from_raw_fd(fd) };
    let runner = match (launch.vm, launch.host) {
        (Some(vm), _) => Runner::Vm(Box::new(Vm {
            vsock: own(launch.vsock_fd).into(),
            scratch: own(launch.scratch_fd),
            scratch_bytes: launch.scratch_bytes,
            kernel: own(vm.kernel_fd),
            initramfs: own(vm.initramfs_fd),
            tap: (vm.tap_fd >= 0).then(|| own(vm.tap_fd)),
            boot_timeout: Duration::from_millis(launch.boot_timeout_ms),
            spec: vm,
        })),
        (None, host) => Runner::Host(host.unwrap_or_default()),
    };
    Ok(Inherited {
        grpc: own(launch.grpc_fd).into(),
        fd_socket: own(launch.fd_socket_fd),
        dir: own(launch.dir_fd),
        sandbox_id: launch.sandbox_id,
        runner,
        requested_ns: launch.requested_ns,
        log_filter: launch.log_filter,
    })
}

fn check(launch: &Launch) -> Result<(), LaunchError> {
    let invalid = |what| Err(LaunchError::Invalid(what));
    if launch.sandbox_id.is_empty() {
        return invalid("no sandbox id");
    }
    match (&launch.vm, &launch.host) {
        (Some(vm), None) => {
            if launch.boot_timeout_ms == 0 {
                return invalid("no boot timeout");
            }
            if vm.vcpus == 0 || vm.memory_bytes == 0 {
                return invalid("a VM without CPUs or memory");
            }
        }
        (None, Some(host)) => {
            if host.runtime.is_empty() || host.dir.is_empty() {
                return invalid("no OCI runtime, or no folder");
            }
        }
        _ => return invalid("not one of a VM and a pod on the host"),
    }
    Ok(())
}

/// Each is open, named once, and not a standard stream.
fn check_descriptors(fds: &[RawFd]) -> Result<(), LaunchError> {
    let mut seen = HashSet::new();
    for &fd in fds {
        if fd <= libc::STDERR_FILENO || !seen.insert(fd) {
            return Err(LaunchError::Descriptor {
                fd,
                source: io::ErrorKind::InvalidInput.into(),
            });
        }
        // SAFETY: fcntl with F_GETFD touches no memory and accepts any number.
        if unsafe { libc::fcntl(fd, libc::F_GETFD) } < 0 {
            return Err(LaunchError::Descriptor {
                fd,
                source: io::Error::last_os_error(),
            });
        }
    }
    Ok(())
}

/// Marks everything but the standard streams close-on-exec: no child gets what is not passed to it
/// by name.
fn close_on_exec() -> Result<(), LaunchError> {
    // SAFETY: close_range with this flag changes descriptor flags only (close_range(2)).
    let result = unsafe {
        libc::syscall(
            libc::SYS_close_range,
            libc::STDERR_FILENO + 1,
            libc::c_uint::MAX,
            libc::CLOSE_RANGE_CLOEXEC,
        )
    };
    if result < 0 {
        return Err(LaunchError::CloseOnExec(io::Error::last_os_error()));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::fd::{AsRawFd, IntoRawFd};
    use std::os::unix::net::UnixStream;

    use super::*;

    fn launch(next: &mut dyn FnMut() -> RawFd) -> Launch {
        Launch {
            sandbox_id: "s".to_owned(),
            vm: Some(VmSpec {
                vcpus: 1,
                memory_bytes: 1 << 20,
                kernel_fd: next(),
                initramfs_fd: next(),
                tap_fd: -1,
                ..VmSpec::default()
            }),
            grpc_fd: next(),
            fd_socket_fd: next(),
            vsock_fd: next(),
            dir_fd: next(),
            scratch_fd: next(),
            boot_timeout_ms: 1,
            ..Launch::default()
        }
    }

    fn open_fd() -> RawFd {
        let (one, _) = UnixStream::pair().expect("socketpair");
        one.into_raw_fd()
    }

    #[test]
    fn descriptors_are_owned_and_close_on_exec() {
        let launch = launch(&mut open_fd);
        let inherited = receive(launch.encode_to_vec().as_slice()).expect("a good launch");
        assert_eq!(inherited.grpc.as_raw_fd(), launch.grpc_fd);
        assert!(matches!(inherited.runner, Runner::Vm(vm) if vm.tap.is_none()));
        // SAFETY: F_GETFD touches no memory.
        let flags = unsafe { libc::fcntl(launch.dir_fd, libc::F_GETFD) };
        assert_eq!(flags & libc::FD_CLOEXEC, libc::FD_CLOEXEC);
    }

    #[test]
    fn bad_descriptors_are_refused() {
        for bad in [-1, 0, 2, 1_000_000] {
            let mut launch = launch(&mut open_fd);
            launch.scratch_fd = bad;
            let error = receive(launch.encode_to_vec().as_slice()).expect_err("bad descriptor");
            assert!(matches!(error, LaunchError::Descriptor { fd, .. } if fd == bad));
        }
        let twice = open_fd();
        let launch = launch(&mut || twice);
        assert!(receive(launch.encode_to_vec().as_slice()).is_err());
    }

    #[test]
    fn incomplete_messages_are_refused() {
        assert!(matches!(receive(&b""[..]), Err(LaunchError::Invalid(_))));
        assert!(matches!(receive(&b"\xff"[..]), Err(LaunchError::Decode(_))));
    }
}
