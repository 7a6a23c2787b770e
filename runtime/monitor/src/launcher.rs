//! Starts a monitor.

use std::io;
use std::os::fd::RawFd;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use podvisor_proto::monitor::Launch;

/// The descriptors that `launch` names, without the network's when there is none.
pub fn inherited_fds(launch: &Launch) -> Vec<RawFd> {
    let mut fds = vec![launch.grpc_fd, launch.fd_socket_fd, launch.dir_fd];
    if let Some(vm) = &launch.vm {
        fds.extend([
            launch.vsock_fd,
            launch.scratch_fd,
            vm.kernel_fd,
            vm.initramfs_fd,
        ]);
        if vm.tap_fd >= 0 {
            fds.push(vm.tap_fd);
        }
    }
    fds
}

/// A command that starts the monitor at `binary`, in a session of its own, for the sandbox in the
/// folder `dir`, which is its only argument and tells its process from other pods'.
///
/// `launch` names descriptors by their numbers in this process; they are the same in the monitor, may
/// be close-on-exec here, and have to stay open until the process has been spawned. Standard error goes
/// to `log`. The monitor does nothing until it has read `launch` from standard input to its end: until
/// then it can be moved to a cgroup. It does not end with its parent.
pub fn command(binary: &Path, dir: &Path, launch: &Launch, log: Stdio) -> Command {
    let fds = inherited_fds(launch);
    let mut command = Command::new(binary);
    command
        .arg(dir)
        .env_clear()
        // Where an OCI runtime, and what that may run, is.
        .env(
            "PATH",
            "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        )
        .current_dir("/")
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(log);
    // SAFETY: the closure runs between fork and exec and makes only system calls: no allocation, no
    // locks. Its vector was filled before.
    unsafe {
        command.pre_exec(move || {
            for &fd in &fds {
                check(libc::fcntl(fd, libc::F_SETFD, 0))?;
            }
            check(libc::setsid())
        });
    }
    command
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
