//! Mounts by file descriptors: fsopen(2), open_tree(2), mount_setattr(2), move_mount(2). What a mount is
//! made of and where it goes is settled before anything is named by a path that a container could change.

mod options;

use std::ffi::{CStr, CString};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use nix::errno::Errno;

pub use options::Options;

/// `enum fsconfig_command` (linux/mount.h).
const SET_FLAG: libc::c_uint = 0;
const SET_STRING: libc::c_uint = 1;
const CREATE: libc::c_uint = 6;

/// The kernel refused to make a file system or to mount it.
#[derive(Debug, thiserror::Error)]
#[error("{source}{explanation}")]
pub struct MountError {
    /// The error's number.
    source: io::Error,
    /// What the file system itself had to say.
    explanation: String,
}

impl From<io::Error> for MountError {
    fn from(source: io::Error) -> Self {
        Self {
            source,
            explanation: String::new(),
        }
    }
}

impl From<Errno> for MountError {
    fn from(error: Errno) -> Self {
        io::Error::from(error).into()
    }
}

/// A file system in the making.
pub struct FileSystem(OwnedFd);

impl FileSystem {
    /// Of this kind.
    pub fn open(kind: &CStr) -> Result<Self, MountError> {
        // SAFETY: a string and a flag.
        let result =
            unsafe { libc::syscall(libc::SYS_fsopen, kind.as_ptr(), libc::FSOPEN_CLOEXEC) };
        Ok(Self(descriptor(result)?))
    }

    /// Sets an option to a value.
    pub fn set(&self, key: &CStr, value: &[u8]) -> Result<(), MountError> {
        let value = CString::new(value).map_err(io::Error::from)?;
        self.configure(SET_STRING, Some(key), Some(&value))
    }

    /// Sets an option that has no value.
    pub fn set_flag(&self, key: &CStr) -> Result<(), MountError> {
        self.configure(SET_FLAG, Some(key), None)
    }

    /// Makes it, as a mount that is nowhere yet. `attributes`: `MOUNT_ATTR_*`.
    pub fn mount(self, attributes: u64) -> Result<Mount, MountError> {
        self.configure(CREATE, None, None)?;
        // SAFETY: a descriptor and numbers.
        let result = unsafe {
            libc::syscall(
                libc::SYS_fsmount,
                self.0.as_raw_fd(),
                libc::FSMOUNT_CLOEXEC,
                attributes,
            )
        };
        Ok(Mount(
            descriptor(result).map_err(|error| self.error(error))?,
        ))
    }

    fn configure(
        &self,
        command: libc::c_uint,
        key: Option<&CStr>,
        value: Option<&CStr>,
    ) -> Result<(), MountError> {
        // SAFETY: a descriptor, and strings or null as the command wants them.
        let result = unsafe {
            libc::syscall(
                libc::SYS_fsconfig,
                self.0.as_raw_fd(),
                command,
                key.map_or(std::ptr::null(), CStr::as_ptr),
                value.map_or(std::ptr::null(), CStr::as_ptr),
                0,
            )
        };
        Errno::result(result)
            .map(drop)
            .map_err(|error| self.error(error))
    }

    /// The error with the messages that the file system left on the descriptor.
    fn error(&self, errno: Errno) -> MountError {
        let mut explanation = String::new();
        let mut messages = self.0.try_clone().map(File::from);
        let mut buffer = [0; 512];
        while let Ok(count @ 1..) = messages
            .as_mut()
            .map_or(Ok(0), |messages| messages.read(&mut buffer))
        {
            explanation.push_str("; ");
            explanation.push_str(String::from_utf8_lossy(&buffer[..count]).trim_end());
        }
        MountError {
            source: errno.into(),
            explanation,
        }
    }
}

/// A mount, by its root.
pub struct Mount(OwnedFd);

impl Mount {
    /// One more mount of what is at `place`, nowhere yet; with all that is mounted below if `recursive`.
    pub fn again(place: BorrowedFd<'_>, recursive: bool) -> nix::Result<Self> {
        let mut flags =
            libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC | libc::AT_EMPTY_PATH as u32;
        if recursive {
            flags |= libc::AT_RECURSIVE as u32;
        }
        // SAFETY: a descriptor, a string and flags.
        let result =
            unsafe { libc::syscall(libc::SYS_open_tree, place.as_raw_fd(), c"".as_ptr(), flags) };
        Ok(Self(descriptor(result)?))
    }

    /// Shows the ids of its files as `user_namespace` maps them, and stores those of new ones the other way round. The
    /// mount must be nowhere yet.
    pub fn map_ids(&self, user_namespace: BorrowedFd<'_>) -> nix::Result<()> {
        let attributes = libc::mount_attr {
            attr_set: libc::MOUNT_ATTR_IDMAP,
            attr_clr: 0,
            propagation: 0,
            userns_fd: user_namespace.as_raw_fd() as u64,
        };
        set_attributes(self.as_fd(), &attributes, 0)
    }

    /// Puts it on `place`.
    pub fn attach(&self, place: BorrowedFd<'_>) -> nix::Result<()> {
        self.move_to(place.as_raw_fd(), c"", libc::MOVE_MOUNT_T_EMPTY_PATH)
    }

    /// Puts it on the directory `path`, a path of the agent's own.
    pub fn attach_at(&self, path: &Path) -> Result<(), MountError> {
        let path = CString::new(path.as_os_str().as_bytes()).map_err(io::Error::from)?;
        Ok(self.move_to(libc::AT_FDCWD, &path, 0)?)
    }

    fn move_to(&self, directory: RawFd, path: &CStr, flags: libc::c_uint) -> nix::Result<()> {
        // SAFETY: descriptors, and strings that live through the call.
        let result = unsafe {
            libc::syscall(
                libc::SYS_move_mount,
                self.0.as_raw_fd(),
                c"".as_ptr(),
                directory,
                path.as_ptr(),
                libc::MOVE_MOUNT_F_EMPTY_PATH | flags,
            )
        };
        Errno::result(result).map(drop)
    }
}

impl AsFd for Mount {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// What mount_setattr(2) changes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Attributes {
    /// `MOUNT_ATTR_*` to set.
    pub set: u64,
    /// `MOUNT_ATTR_*` to clear, before `set`.
    pub clear: u64,
    /// `MS_SHARED` and its like, or 0.
    pub propagation: u64,
}

impl Attributes {
    /// Changes the mount whose root is `mount`, and those below it if `recursive`.
    pub fn apply(self, mount: BorrowedFd<'_>, recursive: bool) -> nix::Result<()> {
        if self == Self::default() {
            return Ok(());
        }
        let attributes = libc::mount_attr {
            attr_set: self.set,
            attr_clr: self.clear,
            propagation: self.propagation,
            userns_fd: 0,
        };
        let flags = if recursive { libc::AT_RECURSIVE } else { 0 };
        set_attributes(mount, &attributes, flags)
    }
}

/// mount_setattr(2) of the mount whose root is `mount`.
fn set_attributes(
    mount: BorrowedFd<'_>,
    attributes: &libc::mount_attr,
    flags: libc::c_int,
) -> nix::Result<()> {
    // SAFETY: a descriptor, a string, and a structure with its size.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            flags | libc::AT_EMPTY_PATH,
            &raw const *attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    Errno::result(result).map(drop)
}

/// The descriptor that a system call has just returned.
fn descriptor(result: libc::c_long) -> nix::Result<OwnedFd> {
    let fd = Errno::result(result)?;
    // SAFETY: the kernel has just made it, nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}
