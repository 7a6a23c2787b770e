//! Starts a monitor.

use std::io::{self, Write};
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use podvisor_proto::monitor::Launch;
use prost::Message;

/// The descriptors that `launch` names, without the network's when there is none.
pub fn inherited_fds(launch: &Launch) -> Vec<RawFd> {
    let mut fds = vec![
        launch.grpc_fd,
        launch.fd_socket_fd,
        launch.vsock_fd,
        launch.dir_fd,
        launch.scratch_fd,
    ];
    if let Some(vm) = &launch.vm {
        fds.extend([vm.kernel_fd, vm.initramfs_fd]);
        if vm.tap_fd >= 0 {
            fds.push(vm.tap_fd);
        }
    }
    fds
}

/// Starts the monitor at `binary` in a session of its own.
///
/// `launch` names descriptors by their numbers in this process; they are the same in the monitor,
/// and may be close-on-exec here. Standard error goes to `log`. The monitor moves into `cgroups`
/// before it executes: each is a cgroup's `cgroup.procs`, opened for writing.
///
/// The caller owns the child: it has to be waited for when it ends, but it does not end with the
/// caller.
///
/// # Errors
/// The binary cannot be executed, a descriptor is not open, a cgroup refuses, or the monitor ended
/// before it had read `launch`. No process is left.
pub fn spawn(
    binary: &Path,
    launch: &Launch,
    log: Stdio,
    cgroups: &[BorrowedFd<'_>],
) -> io::Result<Child> {
    let fds = inherited_fds(launch);
    let cgroups: Vec<RawFd> = cgroups.iter().map(AsRawFd::as_raw_fd).collect();
    let mut command = Command::new(binary);
    command
        .env_clear()
        .current_dir("/")
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(log);
    // SAFETY: the closure runs between fork and exec and makes only system calls: no allocation, no
    // locks. Its vectors were filled before.
    unsafe {
        command.pre_exec(move || {
            for &cgroup in &cgroups {
                // "0" is the writing process itself (cgroups(7)).
                check(libc::write(cgroup, b"0".as_ptr().cast(), 1) as libc::c_int)?;
            }
            for &fd in &fds {
                check(libc::fcntl(fd, libc::F_SETFD, 0))?;
            }
            check(libc::setsid())
        });
    }
    let mut child = command.spawn()?;
    let written = child
        .stdin
        .take()
        .ok_or_else(|| io::Error::from(io::ErrorKind::BrokenPipe))
        .and_then(|mut stdin| stdin.write_all(&launch.encode_to_vec()));
    if let Err(error) = written {
        child.kill()?;
        child.wait()?;
        return Err(error);
    }
    Ok(child)
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
