//! How each kind of resource is removed.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::mount::{MntFlags, umount2};
use nix::sys::signal::Signal;
use podvisor_network::netns::{self, NetnsError};

use super::{Kind, Resource};
use crate::cgroup::{self, CgroupError};
use crate::mountinfo;
use crate::pidfd::{PidFd, start_time};

/// A killed process ends at once, unless it hangs in the kernel; its memory may be large.
const END_TIMEOUT: Duration = Duration::from_secs(5);

/// A resource could not be removed.
#[derive(Debug, thiserror::Error)]
pub enum RemoveError {
    /// A file, a folder or a mount.
    #[error("{}: {step}: {source}", path.display())]
    Io {
        /// The resource.
        path: PathBuf,
        /// What was tried.
        step: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// A process does not end.
    #[error("process {pid} has been killed and does not end")]
    Process {
        /// Its number.
        pid: u32,
    },
    /// A folder in which something is mounted: what is mounted is not ours to delete.
    #[error("{} has {} mounted in it", path.display(), mount.display())]
    Mounted {
        /// The folder.
        path: PathBuf,
        /// A mount point below it.
        mount: PathBuf,
    },
    /// A cgroup.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// A namespace.
    #[error(transparent)]
    Netns(#[from] NetnsError),
    /// Only the plugins can undo what they did.
    #[error("the network attachment of sandbox {sandbox_id} is removed by CNI DEL")]
    NetworkAttachment {
        /// The sandbox.
        sandbox_id: String,
    },
}

pub fn remove(resource: &Resource) -> Result<(), RemoveError> {
    let path = &resource.path;
    match resource.kind {
        Kind::Process { pid, start_time } => end(pid, start_time),
        Kind::Cgroup => Ok(cgroup::remove_group(path, END_TIMEOUT)?),
        Kind::Mount => unmount(path),
        Kind::NetworkAttachment => Err(RemoveError::NetworkAttachment {
            sandbox_id: resource.sandbox_id.clone(),
        }),
        Kind::Netns => Ok(netns::delete_blocking(path)?),
        Kind::Folder => remove_folder(path),
        Kind::Scratch | Kind::TemporaryFile => remove_file(path),
    }
}

/// Kills a process and waits for its end. Nothing happens when the number is another's by now.
fn end(pid: u32, started: u64) -> Result<(), RemoveError> {
    let ended = || -> io::Result<bool> {
        let process = PidFd::open(pid)?;
        // Asked after the opening: from here on the descriptor and the number mean the same.
        if start_time(pid)? != started {
            return Ok(true);
        }
        process.signal(Signal::SIGKILL)?;
        process.wait(Instant::now() + END_TIMEOUT)
    };
    match ended() {
        Ok(true) => Ok(()),
        // Ended before or between.
        Err(e) if e.raw_os_error() == Some(libc::ESRCH) || e.kind() == io::ErrorKind::NotFound => {
            Ok(())
        }
        _ => Err(RemoveError::Process { pid }),
    }
}

fn unmount(path: &Path) -> Result<(), RemoveError> {
    match umount2(path, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
        // Not mounted any more, or the path is gone.
        Ok(()) | Err(Errno::EINVAL | Errno::ENOENT) => Ok(()),
        Err(e) => Err(failed(path, "unmount")(e.into())),
    }
}

/// Removes a folder and what is in it; fine when it is gone. Blocking.
///
/// # Errors
/// Something is mounted in it: never across a mount, a volume's files are the node's, or another pod's.
pub fn remove_folder(path: &Path) -> Result<(), RemoveError> {
    let mounts = mountinfo::read().map_err(failed(path, "read the mount table"))?;
    if let Some(mount) = mounts
        .into_iter()
        .find(|mount| mount.point.starts_with(path))
    {
        return Err(RemoveError::Mounted {
            path: path.to_owned(),
            mount: mount.point,
        });
    }
    match fs::remove_dir_all(path) {
        Err(e) if e.kind() == io::ErrorKind::NotADirectory => remove_file(path),
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(failed(path, "remove")(e)),
        _ => Ok(()),
    }
}

fn remove_file(path: &Path) -> Result<(), RemoveError> {
    match fs::remove_file(path) {
        Err(e) if e.kind() == io::ErrorKind::IsADirectory => remove_folder(path),
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(failed(path, "unlink")(e)),
        _ => Ok(()),
    }
}

fn failed(path: &Path, step: &'static str) -> impl FnOnce(io::Error) -> RemoveError {
    let path = path.to_owned();
    move |source| RemoveError::Io { path, step, source }
}
