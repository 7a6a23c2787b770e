//! Network namespaces that live without a process: a bind mount of the namespace's file in /proc
//! keeps one alive (see namespaces(7)).
//!
//! A thread that changed its namespace is never used for anything else again: each piece of work
//! in a namespace runs on a thread of its own that ends with it.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::thread;

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::statfs::{NSFS_MAGIC, statfs};
use tokio::sync::oneshot;

/// What can go wrong with a namespace.
#[derive(Debug, thiserror::Error)]
pub enum NetnsError {
    /// A step on the namespace's file.
    #[error("network namespace {path}: {step}: {source}")]
    Io {
        /// The namespace's file.
        path: PathBuf,
        /// What was tried.
        step: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// No thread to work on, or it died.
    #[error("a thread for work in a network namespace: {0}")]
    Thread(io::Error),
}

impl NetnsError {
    fn io(path: &Path, step: &'static str, source: impl Into<io::Error>) -> Self {
        Self::Io {
            path: path.to_owned(),
            step,
            source: source.into(),
        }
    }
}

/// Makes a namespace, held by a bind mount at `path`, with `lo` up.
///
/// The folder is made when needed, 0711 so that plugins of any user can pass. It needs no mount of
/// its own: the new mount propagates as its parent says (on hosts with systemd: everywhere), and
/// removing the file drops the copies in other mount namespaces (the kernel detaches what is
/// mounted on an unlinked file).
///
/// # Errors
/// `path` exists, or the kernel says no. Nothing is left then.
pub async fn create(path: &Path) -> Result<(), NetnsError> {
    let path = path.to_owned();
    on_thread(move || create_here(&path)).await?
}

/// Removes what [`create`] made, or any part of it; a path that does not exist is fine.
///
/// The namespace itself goes when its last user does: a process in it, an open tap.
///
/// # Errors
/// The kernel refuses to unmount or unlink.
pub async fn delete(path: &Path) -> Result<(), NetnsError> {
    let path = path.to_owned();
    on_thread(move || delete_blocking(&path)).await?
}

/// [`delete`] on this thread: it may take some ms.
pub fn delete_blocking(path: &Path) -> Result<(), NetnsError> {
    // More than one mount is left by a daemon that died between mount and its own undoing.
    loop {
        match umount2(path, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
            Ok(()) => {}
            Err(Errno::EINVAL | Errno::ENOENT) => break,
            Err(e) => return Err(NetnsError::io(path, "unmount", e)),
        }
    }
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(NetnsError::io(path, "unlink", e)),
        _ => Ok(()),
    }
}

/// Whether a namespace is mounted at `path`.
pub fn is_namespace(path: &Path) -> bool {
    statfs(path).is_ok_and(|fs| fs.filesystem_type() == NSFS_MAGIC)
}

/// Runs `work` in the namespace at `path`, on a thread of its own, and gives its result.
///
/// # Errors
/// The namespace cannot be entered, or the thread ended without a result.
pub async fn enter<T, F>(path: &Path, work: F) -> Result<T, NetnsError>
where
    T: Send + 'static,
    F: FnOnce() -> T + Send + 'static,
{
    let path = path.to_owned();
    on_thread(move || {
        let file = File::open(&path).map_err(|e| NetnsError::io(&path, "open", e))?;
        setns(&file, CloneFlags::CLONE_NEWNET).map_err(|e| NetnsError::io(&path, "enter", e))?;
        Ok(work())
    })
    .await?
}

fn create_here(path: &Path) -> Result<(), NetnsError> {
    if let Some(parent) = path.parent() {
        DirBuilder::new()
            .recursive(true)
            .mode(0o711)
            .create(parent)
            .map_err(|e| NetnsError::io(path, "make its folder", e))?;
    }
    // The mount point. Exclusive: an existing namespace is somebody's.
    OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o444)
        .open(path)
        .map_err(|e| NetnsError::io(path, "make the mount point", e))?;

    let made = unshare(CloneFlags::CLONE_NEWNET)
        .map_err(|e| NetnsError::io(path, "unshare", e))
        .and_then(|()| {
            crate::link::set_up("lo").map_err(|e| NetnsError::io(path, "lo up", e))?;
            mount(
                Some("/proc/thread-self/ns/net"),
                path,
                None::<&str>,
                MsFlags::MS_BIND,
                None::<&str>,
            )
            .map_err(|e| NetnsError::io(path, "bind mount", e))
        });
    if made.is_err() {
        // The first error is the one that explains.
        let _ = delete_blocking(path);
    }
    made
}

/// Runs `work` on a fresh thread: namespaces belong to threads, and one that changed its own must
/// not return to a pool.
async fn on_thread<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, NetnsError> {
    let (reply, answer) = oneshot::channel();
    thread::Builder::new()
        .name("netns".into())
        .spawn(move || reply.send(work()))
        .map_err(NetnsError::Thread)?;
    answer
        .await
        .map_err(|_| NetnsError::Thread(io::Error::other("it ended without a result")))
}
