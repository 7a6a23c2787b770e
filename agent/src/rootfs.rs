//! A container's root: image layers below, a writable directory of the scratch area above, joined by
//! overlayfs (Documentation/filesystems/overlayfs.rst).

use std::ffi::{CStr, CString};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::mount::{MntFlags, umount2};

/// Overlayfs takes this many lower layers (`OVL_MAX_STACK`).
const LAYER_LIMIT: usize = 500;

/// Why a root is not there.
#[derive(Debug, thiserror::Error)]
pub enum RootfsError {
    /// See [`LAYER_LIMIT`].
    #[error("{0} layers: overlayfs takes at most {LAYER_LIMIT}")]
    TooManyLayers(usize),
    /// The kernel refused.
    #[error("cannot mount the root file system: {source}{explanation}")]
    Mount {
        /// The error's number.
        source: io::Error,
        /// What the file system itself had to say.
        explanation: String,
    },
    /// Directories for it.
    #[error("cannot prepare the root file system: {0}")]
    Prepare(#[from] io::Error),
}

/// The directories of one container's root.
pub struct Rootfs {
    target: PathBuf,
    scratch: PathBuf,
}

impl Rootfs {
    /// `target`: where it is mounted. `scratch`: a directory of its own on the scratch area.
    pub fn new(target: PathBuf, scratch: PathBuf) -> Self {
        Self { target, scratch }
    }

    /// Where the root is mounted.
    pub fn path(&self) -> &Path {
        &self.target
    }

    /// Mounts `layers` (lowest first) and the writable layer. When this fails, nothing stays.
    pub fn mount(&self, layers: &[PathBuf]) -> Result<(), RootfsError> {
        if layers.len() > LAYER_LIMIT {
            return Err(RootfsError::TooManyLayers(layers.len()));
        }
        self.try_mount(layers).inspect_err(|_| {
            let _ = self.remove();
        })
    }

    fn try_mount(&self, layers: &[PathBuf]) -> Result<(), RootfsError> {
        let upper = self.scratch.join("upper");
        let work = self.scratch.join("work");
        // Overlayfs wants a layer below; that of an image without layers is empty.
        let empty = self.scratch.join("empty");
        for directory in [&self.target, &upper, &work, &empty] {
            std::fs::create_dir_all(directory)?;
        }
        let context = FsContext::open(c"overlay")?;
        let empty = [empty];
        let lowest_first = if layers.is_empty() { &empty } else { layers };
        // "lowerdir+" adds below what is there, one path a time: no limit of one page for all.
        for layer in lowest_first.iter().rev() {
            context.set(c"lowerdir+", layer)?;
        }
        context.set(c"upperdir", &upper)?;
        context.set(c"workdir", &work)?;
        // The upper layer ends with the pod: its fsyncs would protect what nobody will read.
        context.set_flag(c"volatile")?;
        context.mount_at(&self.target)
    }

    /// Unmounts it and deletes the writable layer. What is not there is not an error.
    ///
    /// # Errors
    /// It is still in use, or a deletion failed.
    pub fn remove(&self) -> io::Result<()> {
        match umount2(&self.target, MntFlags::UMOUNT_NOFOLLOW) {
            Ok(()) | Err(Errno::EINVAL | Errno::ENOENT) => {}
            Err(error) => return Err(error.into()),
        }
        for directory in [&self.target, &self.scratch] {
            match std::fs::remove_dir_all(directory) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }
}

/// A mount in the making (fsopen(2)).
struct FsContext(OwnedFd);

/// linux/mount.h, `enum fsconfig_command` and flags.
const FSOPEN_CLOEXEC: libc::c_uint = 1;
const FSMOUNT_CLOEXEC: libc::c_uint = 1;
const FSCONFIG_SET_FLAG: libc::c_uint = 0;
const FSCONFIG_SET_STRING: libc::c_uint = 1;
const FSCONFIG_CMD_CREATE: libc::c_uint = 6;
const MOVE_MOUNT_F_EMPTY_PATH: libc::c_uint = 4;

impl FsContext {
    fn open(file_system: &CStr) -> Result<Self, RootfsError> {
        // SAFETY: a string and a flag.
        let result =
            unsafe { libc::syscall(libc::SYS_fsopen, file_system.as_ptr(), FSOPEN_CLOEXEC) };
        let fd = Errno::result(result).map_err(io::Error::from)?;
        // SAFETY: fsopen has just returned this descriptor, nobody else has it.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd as RawFd) }))
    }

    fn set(&self, key: &CStr, value: &Path) -> Result<(), RootfsError> {
        let value = CString::new(value.as_os_str().as_bytes()).map_err(io::Error::from)?;
        self.configure(FSCONFIG_SET_STRING, Some(key), Some(&value))
    }

    fn set_flag(&self, key: &CStr) -> Result<(), RootfsError> {
        self.configure(FSCONFIG_SET_FLAG, Some(key), None)
    }

    fn mount_at(self, target: &Path) -> Result<(), RootfsError> {
        self.configure(FSCONFIG_CMD_CREATE, None, None)?;
        // SAFETY: a descriptor and numbers.
        let result =
            unsafe { libc::syscall(libc::SYS_fsmount, self.0.as_raw_fd(), FSMOUNT_CLOEXEC, 0) };
        let fd = Errno::result(result).map_err(|error| self.error(error))?;
        // SAFETY: fsmount has just returned this descriptor, nobody else has it.
        let mounted = unsafe { OwnedFd::from_raw_fd(fd as RawFd) };
        let target = CString::new(target.as_os_str().as_bytes()).map_err(io::Error::from)?;
        // SAFETY: descriptors and strings that live through the call.
        let result = unsafe {
            libc::syscall(
                libc::SYS_move_mount,
                mounted.as_raw_fd(),
                c"".as_ptr(),
                libc::AT_FDCWD,
                target.as_ptr(),
                MOVE_MOUNT_F_EMPTY_PATH,
            )
        };
        Errno::result(result).map_err(io::Error::from)?;
        Ok(())
    }

    fn configure(
        &self,
        command: libc::c_uint,
        key: Option<&CStr>,
        value: Option<&CStr>,
    ) -> Result<(), RootfsError> {
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

    /// The error with the messages that the file system left on the context's descriptor.
    fn error(&self, errno: Errno) -> RootfsError {
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
        RootfsError::Mount {
            source: errno.into(),
            explanation,
        }
    }
}
