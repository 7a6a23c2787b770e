//! podvisor-fs: one process per pod that has volumes, started when the first container with some is created.
//!
//! It ends when the pod's monitor closes its socket. podvisord may die and come back meanwhile: the process is recorded
//! by pid and start time, as a monitor is.

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::mount::{MntFlags, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, setsockopt, socketpair, sockopt};
use podvisor_node::cgroup::PodCgroup;
use podvisor_node::pidfd::{PidFd, start_time};
use tokio::io::AsyncReadExt;
use tokio::time::timeout;

use super::{Source, Volume, mount};
use crate::confinement::Confinement;
use crate::error::{Error, Result};

/// How long the process may take until it is in its jail.
const START: Duration = Duration::from_secs(10);

/// Room in the socket for several of the longest messages, in bytes: as much as a guest's readahead asks for at once.
const SOCKET_BYTES: usize = 2 << 20;

/// A pod's podvisor-fs.
#[derive(Debug)]
pub struct FsServer {
    process: PidFd,
    pid: u32,
    start: u64,
    /// The folder that is its root: empty directories and files, on which it has its mounts.
    shares: PathBuf,
    /// The monitor's end of the socket, until the monitor certainly has it.
    socket: Mutex<Option<Arc<OwnedFd>>>,
}

impl FsServer {
    /// Starts `binary` for the sandbox whose folder is `dir`. It ends when the other end of its socket is closed.
    ///
    /// # Errors
    /// Nothing is left then.
    pub async fn start(
        binary: &Path,
        dir: &Path,
        cgroup: &PodCgroup,
        confinement: &Confinement,
    ) -> Result<Self> {
        let failed = |step: &str| Error::io(format!("{}: {step}", binary.display()));
        let shares = shares(dir);
        match fs::create_dir(&shares) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(failed("its folder")(error));
            }
            _ => {}
        }
        let log = fs::File::create(dir.join("fs.log")).map_err(failed("its log"))?;
        let (ours, theirs) = sockets().map_err(failed("its socket"))?;
        let mut command = tokio::process::Command::new(binary);
        command
            .arg(&shares)
            .env_clear()
            .current_dir("/")
            .stdin(theirs)
            .stdout(Stdio::piped())
            .stderr(log);
        // A group of its own: what a terminal sends to podvisord is not for it.
        command.process_group(0);
        confinement.confine(command.as_std_mut());
        // Dropped, it lives on, and is reaped when it ends. Here it ends when `ours` is closed.
        let mut child = command.spawn().map_err(failed("cannot be started"))?;
        drop(command);
        let pid = child.id().ok_or(Error::Cancelled)?;
        let process = PidFd::open(pid).map_err(failed("pidfd_open"))?;
        cgroup.add(pid)?;
        // One byte says that it is in its jail; the end of its output, that it has failed.
        let mut ready = Vec::new();
        let output = child.stdout.take().ok_or(Error::Cancelled)?;
        let read = timeout(START, output.take(1).read_to_end(&mut ready)).await;
        if !matches!(read, Ok(Ok(1))) {
            // It may hang where it does not look at its socket.
            let _ = child.start_kill();
            let text = fs::read_to_string(dir.join("fs.log")).unwrap_or_default();
            return Err(failed("does not serve")(io::Error::other(text)));
        }
        Ok(Self {
            process,
            pid,
            start: start_time(pid).map_err(failed("start time"))?,
            shares,
            socket: Mutex::new(Some(Arc::new(ours))),
        })
    }

    /// Finds the process of an earlier podvisord again. `None`: it has ended.
    pub fn adopt(dir: &Path, pid: u32, start: u64) -> Option<Self> {
        let process = PidFd::open(pid).ok()?;
        // The pid could be another process by now. The pidfd holds whatever it is: compare after.
        (start_time(pid).ok()? == start).then(|| Self {
            process,
            pid,
            start,
            shares: shares(dir),
            socket: Mutex::default(),
        })
    }

    /// The monitor's end of the socket, if the monitor may not have it yet.
    pub fn unconfirmed_socket(&self) -> Option<Arc<OwnedFd>> {
        self.socket().clone()
    }

    /// The monitor has it: from now on the process lives as long as the monitor does.
    pub fn confirm_socket(&self) {
        *self.socket() = None;
    }

    fn socket(&self) -> MutexGuard<'_, Option<Arc<OwnedFd>>> {
        self.socket.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Process id.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Start time of the process in clock ticks since boot.
    pub fn start_time(&self) -> u64 {
        self.start
    }

    /// Whether it runs.
    pub fn is_alive(&self) -> bool {
        matches!(self.process.wait(Instant::now()), Ok(false))
    }

    /// Mounts a container's volumes. Blocking.
    ///
    /// # Errors
    /// Some may be mounted then: [`remove`] takes them away.
    pub fn add(&self, container_id: &str, volumes: &[(Volume, Source)]) -> Result<()> {
        let folder = self.shares.join(container_id);
        let failed = || Error::io(format!("volumes of container {container_id}"));
        let places = || -> io::Result<()> {
            fs::create_dir(&folder)?;
            for (volume, source) in volumes {
                let place = folder.join(volume.index.to_string());
                if source.is_directory {
                    fs::create_dir(place)?;
                } else {
                    fs::File::create(place)?;
                }
            }
            Ok(())
        };
        places().map_err(failed())?;
        self.inside(|| {
            for (volume, source) in volumes {
                let place = Path::new("/")
                    .join(container_id)
                    .join(volume.index.to_string());
                mount::attach(source.tree.as_fd(), &place)?;
            }
            Ok(())
        })
        .map_err(failed())
    }

    /// Does `work` in the process's mount namespace, by a thread that ends then: it cannot come back.
    fn inside(&self, work: impl FnOnce() -> io::Result<()> + Send) -> io::Result<()> {
        std::thread::scope(|scope| {
            let thread = std::thread::Builder::new().spawn_scoped(scope, || {
                // Its root and working directory become those of the namespace, and of no other thread.
                unshare(CloneFlags::CLONE_FS)?;
                setns(self.process.as_fd(), CloneFlags::CLONE_NEWNS)?;
                work()
            })?;
            let ended = thread.join();
            ended.unwrap_or_else(|_| Err(io::Error::other("a thread of podvisord's died")))
        })
    }
}

/// Takes a container's volumes away, if there are any. Without the process, its mounts are gone already. Blocking.
///
/// # Errors
/// A later call goes on.
pub fn remove(server: Option<&FsServer>, dir: &Path, container_id: &str) -> Result<()> {
    let folder = shares(dir).join(container_id);
    let removed = || -> io::Result<()> {
        if !folder.try_exists()? {
            return Ok(());
        }
        if let Some(server) = server {
            let inside = Path::new("/").join(container_id);
            server.inside(|| unmount_below(&inside))?;
        }
        remove_places(&folder)
    };
    removed().map_err(Error::io(format!("volumes of container {container_id}")))
}

/// Containers that have volumes in the sandbox whose folder is `dir`.
pub fn containers(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(shares(dir)).into_iter().flatten().flatten();
    entries
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect()
}

/// Unmounts all that is in a folder.
fn unmount_below(folder: &Path) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        match umount2(
            &entry?.path(),
            MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW,
        ) {
            // Not mounted: its container could not be created.
            Ok(()) | Err(Errno::EINVAL) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Removes a container's mount points. Only what is empty is removed: should a mount be there after all, its files stay.
fn remove_places(folder: &Path) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            fs::remove_dir(entry.path())?;
        } else {
            fs::remove_file(entry.path())?;
        }
    }
    fs::remove_dir(folder)
}

fn shares(dir: &Path) -> PathBuf {
    dir.join("shares")
}

/// The monitor's end, and podvisor-fs's.
fn sockets() -> io::Result<(OwnedFd, OwnedFd)> {
    let (ours, theirs) = socketpair(
        AddressFamily::Unix,
        SockType::SeqPacket,
        None,
        SockFlag::SOCK_CLOEXEC,
    )?;
    for socket in [&ours, &theirs] {
        setsockopt(socket, sockopt::SndBufForce, &SOCKET_BYTES)?;
    }
    Ok((ours, theirs))
}
