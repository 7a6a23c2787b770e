//! The file system: the guest's requests as system calls on the files below a root.
//!
//! - `nodes`: the numbers by which the guest names files
//! - `open_files`: what it has open
//! - `host`: system calls that the nix crate has not
//! - `caller`: whose new files are
//! - `operations`: the requests
//! - here: what they have in common
//!
//! A name in a request is one component, never `.` or `..`, and never followed: paths are walked by the guest's kernel, one
//! lookup a step. What is opened is a regular file or a directory; devices, pipes and sockets are the guest's own.
//!
//! Node and pod agree because the guest keeps what it learns of names and attributes no longer than [`VALIDITY`], and then
//! asks again. File contents are kept while a file is open, dropped when it is opened again or its size has changed, and
//! written through at once.

mod caller;
mod host;
mod nodes;
mod open_files;
mod operations;

use std::ffi::{CStr, OsStr};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fuse_backend_rs::api::filesystem::Entry;
use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat, openat2};
use nix::sys::resource::{Resource, getrlimit};
use nix::sys::stat::Mode;
use nix::sys::statfs::{BTRFS_SUPER_MAGIC, EXT4_SUPER_MAGIC, FsType, TMPFS_MAGIC, XFS_SUPER_MAGIC};

use host::Status;
use nodes::{Identity, Node, Nodes, Place, Stamp};
use open_files::{OpenFile, OpenFiles};

/// How long the guest may take names and attributes for true without asking. Less than people and probes notice, and
/// enough for what belongs together: without, one `stat` of a path asks several times for each of its directories.
const VALIDITY: Duration = Duration::from_millis(20);

/// Age of a file's last change from which the next one has another time: more than a tick of any kernel.
const SETTLED: Duration = Duration::from_millis(100);

/// More files than a process finds in a second, as a power of two.
const NUMBERS_PER_SECOND_BITS: u32 = 24;

/// Files below a root.
pub struct Passthrough {
    nodes: RwLock<Nodes>,
    open: OpenFiles,
    /// The mount of the root, in which there are only places for volumes.
    root_mount: u64,
    /// Files that are held open because the guest knows them; others are found again by their paths.
    hold_at_most: usize,
    /// /proc/self/fd.
    descriptors: OwnedFd,
}

/// A file that the guest knows, found again.
struct Found {
    /// Opened with `O_PATH`.
    file: Arc<OwnedFd>,
    node: Node,
}

impl Passthrough {
    /// The files below `root`. `descriptors`: /proc/self/fd, which each thread that serves must have as its working
    /// directory ([`Self::enter_thread`]).
    pub fn new(root: &Path, descriptors: OwnedFd) -> io::Result<Self> {
        let file = nix::fcntl::open(root, PATH_ONLY | OFlag::O_DIRECTORY, Mode::empty())?;
        let status = host::status(&file)?;
        let root_mount = status.mount;
        let (files, _) = getrlimit(Resource::RLIMIT_NOFILE)?;
        let root = node(Place::Held(Arc::new(file)), &status);
        // A guest may know numbers of a process before this one: they must not be others' now.
        let first = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |since| since.as_secs() << NUMBERS_PER_SECOND_BITS);
        Ok(Self {
            nodes: RwLock::new(Nodes::new(root, first)),
            open: OpenFiles::new(first),
            root_mount,
            hold_at_most: (files / 2) as usize,
            descriptors,
        })
    }

    /// Prepares the calling thread: extended attributes of a file that is only found, not opened, can be named by a path
    /// below /proc/self/fd alone.
    pub fn enter_thread(&self) -> io::Result<()> {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_FS)?;
        nix::unistd::fchdir(self.descriptors.as_fd())?;
        // A new working directory comes with a new mask.
        nix::sys::stat::umask(Mode::empty());
        Ok(())
    }

    /// The file of a handle that is being read or written, if the device is to have it from now on: it is used often, and
    /// the device does with its contents exactly what this process would do.
    pub fn to_hand_over(&self, node: u64, handle: u64) -> Option<Arc<OpenFile>> {
        let open = self.open.get(handle, node).ok()?;
        let is_to = open.is_used_often() && !open.appends() && is_plain(&open.file).ok()?;
        is_to.then_some(open)
    }

    /// The guest has closed it.
    pub fn close(&self, handle: u64) {
        self.open.remove(handle);
    }

    /// What the guest means by a number.
    fn node(&self, number: u64) -> io::Result<Found> {
        let node = {
            // Whole entries are inserted and removed: a panic elsewhere leaves the map sound.
            let nodes = self.nodes.read().unwrap_or_else(PoisonError::into_inner);
            nodes.get(number).cloned().ok_or(Errno::ESTALE)?
        };
        let file = match &node.place {
            Place::Held(file) => Arc::clone(file),
            Place::Below { directory, path } => {
                let found = find_again(directory, path, node.identity);
                // Moved or removed while it is open: it is what is open.
                found.or_else(|error| self.open.any_of(number).ok_or(error))?
            }
        };
        Ok(Found { file, node })
    }

    fn nodes(&self) -> std::sync::RwLockWriteGuard<'_, Nodes> {
        self.nodes.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Finds `name` in a directory and tells the guest of it.
    fn find(&self, parent: &Found, name: &CStr) -> io::Result<Entry> {
        check_name(name)?;
        // Most often the guest only asks whether it is still the file that it knows: nothing is opened then.
        let status = host::status_of(&parent.file, name)?;
        let mut nodes = self.nodes();
        if let Some(number) = nodes.look_up_held(status.identity, status.mount) {
            return Ok(entry(&mut nodes, number, status));
        }
        drop(nodes);
        self.find_new(parent, name)
    }

    /// The same where it most likely does not know the file.
    fn find_new(&self, parent: &Found, name: &CStr) -> io::Result<Entry> {
        check_name(name)?;
        let file = Arc::new(openat(&parent.file, name, PATH_ONLY, Mode::empty())?);
        let status = host::status(&file)?;
        let mut nodes = self.nodes();
        let hold = nodes.held() < self.hold_at_most;
        let place = self.place(parent, name, &file, &status, hold);
        let number = match nodes.look_up(status.identity) {
            Some((number, known)) => {
                let moved = matches!(
                    (&known.place, &place),
                    (Place::Below { .. }, Place::Below { .. })
                );
                // A volume may be there twice, once read-only. To the guest it is one file, which it may write to if it
                // may so by one of its names: its kernel knows by which.
                if moved || known.mount != status.mount && !host::is_read_only(&file)? {
                    nodes.set_place(number, place, status.mount);
                }
                number
            }
            None => nodes.add(node(place, &status)),
        };
        Ok(entry(&mut nodes, number, status))
    }

    /// How the file `name` of a directory is to be found again.
    fn place(
        &self,
        parent: &Found,
        name: &CStr,
        file: &Arc<OwnedFd>,
        status: &Status,
        hold: bool,
    ) -> Place {
        let name = Path::new(OsStr::from_bytes(name.to_bytes()));
        match &parent.node.place {
            Place::Below { directory, path } => Place::Below {
                directory: Arc::clone(directory),
                path: path.join(name),
            },
            Place::Held(directory)
                if !hold
                    || status.mount != parent.node.mount
                        && parent.node.mount != self.root_mount =>
            {
                Place::Below {
                    directory: Arc::clone(directory),
                    path: name.to_owned(),
                }
            }
            Place::Held(_) => Place::Held(Arc::clone(file)),
        }
    }

    /// The attributes that the guest is to see.
    fn attributes(&self, file: &impl AsFd) -> io::Result<(libc::stat64, Duration)> {
        let status = host::status(file)?;
        Ok((shown(&mut self.nodes(), status), VALIDITY))
    }

    /// Whether a file that is opened certainly has the contents that it had when it was opened before: then what the guest
    /// keeps of them is good.
    fn is_as_opened_before(&self, number: u64, file: &OwnedFd) -> io::Result<bool> {
        let Status { attributes, .. } = host::status(file)?;
        let stamp = Stamp {
            size: attributes.st_size,
            modified: (attributes.st_mtime, attributes.st_mtime_nsec),
            changed: (attributes.st_ctime, attributes.st_ctime_nsec),
        };
        let changed = Duration::new(
            attributes.st_ctime.try_into().unwrap_or(u64::MAX),
            attributes.st_ctime_nsec as u32,
        );
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        // A clock that was set back makes it younger than nothing.
        let age = now.unwrap_or_default().checked_sub(changed);
        let is_settled = age.is_some_and(|age| age > SETTLED);
        Ok(self.nodes().open(number, stamp, is_settled))
    }

    /// Opens a file that was only found.
    fn reopen(&self, found: &Found, flags: OFlag) -> io::Result<OwnedFd> {
        if !matches!(found.node.kind, libc::S_IFREG | libc::S_IFDIR) {
            return Err(Errno::EBADF.into());
        }
        // The link in /proc is to be followed. The node's page cache is the truth: direct I/O ends there.
        let flags = flags & OPENED | OFlag::O_CLOEXEC;
        let path = descriptor_path(&found.file);
        Ok(openat(
            &self.descriptors,
            path.as_c_str(),
            flags,
            Mode::empty(),
        )?)
    }
}

/// File systems of this node alone. Those on disks tell what is in the page cache (`RWF_NOWAIT`).
const LOCAL: [FsType; 4] = [
    EXT4_SUPER_MAGIC,
    XFS_SUPER_MAGIC,
    BTRFS_SUPER_MAGIC,
    TMPFS_MAGIC,
];

const PATH_ONLY: OFlag = OFlag::O_PATH
    .union(OFlag::O_NOFOLLOW)
    .union(OFlag::O_CLOEXEC);

/// What of a process's flags its file has here.
const OPENED: OFlag = OFlag::O_ACCMODE
    .union(OFlag::O_APPEND)
    .union(OFlag::O_TRUNC)
    .union(OFlag::O_DIRECTORY)
    .union(OFlag::O_SYNC)
    .union(OFlag::O_DSYNC)
    .union(OFlag::O_NOATIME);

/// Whether a file is a regular one without set-uid and set-gid bits, which a process without `CAP_FSETID` takes away, on
/// a disk of the node. A process that waits for another machine may wait for ever, and must not be the pod's monitor.
fn is_plain(file: &File) -> io::Result<bool> {
    const BITS: libc::mode_t = libc::S_IFMT | libc::S_ISUID | libc::S_ISGID;
    let mode = host::status(file)?.attributes.st_mode;
    let kind = nix::sys::statfs::fstatfs(file)?.filesystem_type();
    Ok(mode & BITS == libc::S_IFREG && LOCAL.contains(&kind))
}

/// What is at a path, if it is that file.
fn find_again(directory: &OwnedFd, path: &Path, identity: Identity) -> io::Result<Arc<OwnedFd>> {
    let how = OpenHow::new()
        .flags(PATH_ONLY)
        .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS);
    let file = openat2(directory, path, how).map_err(|_| Errno::ESTALE)?;
    // Another one has its name: the guest's kernel looks again.
    if host::status(&file)?.identity != identity {
        return Err(Errno::ESTALE.into());
    }
    Ok(Arc::new(file))
}

fn node(place: Place, status: &Status) -> Node {
    Node {
        place,
        identity: status.identity,
        kind: status.attributes.st_mode & libc::S_IFMT,
        mount: status.mount,
    }
}

/// What the guest is told of a file.
fn entry(nodes: &mut Nodes, number: u64, status: Status) -> Entry {
    Entry {
        inode: number,
        generation: 0,
        attr: shown(nodes, status),
        attr_flags: 0,
        attr_timeout: VALIDITY,
        entry_timeout: VALIDITY,
    }
}

fn shown(nodes: &mut Nodes, status: Status) -> libc::stat64 {
    let Identity { device, number, .. } = status.identity;
    let mut attributes = status.attributes;
    attributes.st_ino = nodes.shown_number(device, number);
    attributes
}

/// One component of a path.
fn check_name(name: &CStr) -> io::Result<()> {
    let name = name.to_bytes();
    if name.is_empty() || name == b"." || name == b".." || name.contains(&b'/') {
        return Err(Errno::EINVAL.into());
    }
    Ok(())
}

/// Path of a file below /proc/self/fd.
fn descriptor_path(file: &OwnedFd) -> std::ffi::CString {
    let number = file.as_raw_fd().to_string();
    // Digits.
    std::ffi::CString::new(number).unwrap_or_default()
}

#[cfg(test)]
mod tests;
