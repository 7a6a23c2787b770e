//! System calls on files.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use nix::errno::Errno;

use super::nodes::Identity;

/// What statx(2) says of a file.
pub struct Status {
    /// Which file.
    pub identity: Identity,
    /// The mount it was found in.
    pub mount: u64,
    /// As stat(2) has them.
    pub attributes: libc::stat64,
}

/// The status of an open file.
pub fn status(file: &impl AsFd) -> io::Result<Status> {
    status_of(file, c"")
}

/// The status of what has a name, which is one component or empty, in a directory.
pub fn status_of(directory: &impl AsFd, name: &CStr) -> io::Result<Status> {
    // SAFETY: all-zero is a valid statx.
    let mut statx: libc::statx = unsafe { std::mem::zeroed() };
    // SAFETY: a descriptor, a string, numbers, and a structure to be filled.
    let result = unsafe {
        libc::statx(
            directory.as_fd().as_raw_fd(),
            name.as_ptr(),
            libc::AT_EMPTY_PATH | libc::AT_SYMLINK_NOFOLLOW | libc::AT_NO_AUTOMOUNT,
            libc::STATX_BASIC_STATS | libc::STATX_MNT_ID,
            &raw mut statx,
        )
    };
    Errno::result(result)?;
    // SAFETY: all-zero is a valid stat.
    let mut attributes: libc::stat64 = unsafe { std::mem::zeroed() };
    attributes.st_dev = libc::makedev(statx.stx_dev_major, statx.stx_dev_minor);
    attributes.st_ino = statx.stx_ino;
    attributes.st_mode = statx.stx_mode.into();
    attributes.st_nlink = statx.stx_nlink.into();
    attributes.st_uid = statx.stx_uid;
    attributes.st_gid = statx.stx_gid;
    attributes.st_rdev = libc::makedev(statx.stx_rdev_major, statx.stx_rdev_minor);
    attributes.st_size = statx.stx_size as i64;
    attributes.st_blksize = statx.stx_blksize.into();
    attributes.st_blocks = statx.stx_blocks as i64;
    attributes.st_atime = statx.stx_atime.tv_sec;
    attributes.st_atime_nsec = statx.stx_atime.tv_nsec.into();
    attributes.st_mtime = statx.stx_mtime.tv_sec;
    attributes.st_mtime_nsec = statx.stx_mtime.tv_nsec.into();
    attributes.st_ctime = statx.stx_ctime.tv_sec;
    attributes.st_ctime_nsec = statx.stx_ctime.tv_nsec.into();
    let is_directory = u32::from(statx.stx_mode) & libc::S_IFMT == libc::S_IFDIR;
    Ok(Status {
        identity: Identity {
            device: (statx.stx_dev_major, statx.stx_dev_minor),
            number: statx.stx_ino,
            mount: is_directory.then_some(statx.stx_mnt_id),
        },
        mount: statx.stx_mnt_id,
        attributes,
    })
}

/// fstatvfs(3).
pub fn file_system(file: &OwnedFd) -> io::Result<libc::statvfs64> {
    // SAFETY: all-zero is a valid statvfs.
    let mut status: libc::statvfs64 = unsafe { std::mem::zeroed() };
    // SAFETY: a descriptor and a structure to be filled.
    let result = unsafe { libc::fstatvfs64(file.as_raw_fd(), &raw mut status) };
    Errno::result(result)?;
    Ok(status)
}

/// Whether the mount of a file is read-only.
pub fn is_read_only(file: &OwnedFd) -> io::Result<bool> {
    Ok(file_system(file)?.f_flag & libc::ST_RDONLY != 0)
}

/// Reads entries of a directory from `offset` on into `buffer` (getdents64(2)). Returns the bytes read.
pub fn read_directory(
    directory: &impl AsRawFd,
    offset: u64,
    buffer: &mut [u8],
) -> io::Result<usize> {
    // SAFETY: numbers.
    let position = unsafe { libc::lseek64(directory.as_raw_fd(), offset as i64, libc::SEEK_SET) };
    Errno::result(position)?;
    // SAFETY: the kernel writes to `buffer` alone.
    let count = unsafe {
        libc::syscall(
            libc::SYS_getdents64,
            directory.as_raw_fd(),
            buffer.as_mut_ptr(),
            buffer.len(),
        )
    };
    Ok(Errno::result(count)? as usize)
}

/// One entry of what [`read_directory`] has read.
pub struct DirectoryEntry<'a> {
    pub number: u64,
    /// Where the next one is.
    pub next: u64,
    pub kind: u8,
    pub name: &'a [u8],
}

/// The first entry, and the rest of `entries`.
pub fn first_entry(entries: &[u8]) -> Option<(DirectoryEntry<'_>, &[u8])> {
    // `struct linux_dirent64`: number, next offset, length, type, name and NUL.
    const NAME_AT: usize = 19;
    let number = u64::from_ne_bytes(entries.get(..8)?.try_into().ok()?);
    let next = u64::from_ne_bytes(entries.get(8..16)?.try_into().ok()?);
    let length = u16::from_ne_bytes(entries.get(16..18)?.try_into().ok()?);
    let (entry, rest) = entries.split_at_checked(length.into())?;
    let name = CStr::from_bytes_until_nul(entry.get(NAME_AT..)?).ok()?;
    let entry = DirectoryEntry {
        number,
        next,
        kind: entry[NAME_AT - 1],
        name: name.to_bytes(),
    };
    Some((entry, rest))
}

/// An attribute's value, or its length when `buffer` is empty. `file` is named as in `Passthrough::enter_thread`.
pub fn get_attribute(file: &CStr, name: &CStr, buffer: &mut [u8]) -> io::Result<usize> {
    // SAFETY: strings, and a buffer that the kernel writes to.
    let length = unsafe {
        libc::getxattr(
            file.as_ptr(),
            name.as_ptr(),
            buffer.as_mut_ptr().cast(),
            buffer.len(),
        )
    };
    Ok(Errno::result(length)? as usize)
}

/// The names of a file's attributes, or their length when `buffer` is empty.
pub fn list_attributes(file: &CStr, buffer: &mut [u8]) -> io::Result<usize> {
    // SAFETY: a string, and a buffer that the kernel writes to.
    let length =
        unsafe { libc::listxattr(file.as_ptr(), buffer.as_mut_ptr().cast(), buffer.len()) };
    Ok(Errno::result(length)? as usize)
}

/// Sets an attribute.
pub fn set_attribute(file: &CStr, name: &CStr, value: &[u8], flags: u32) -> io::Result<()> {
    // SAFETY: strings, and a value that the kernel reads.
    let result = unsafe {
        libc::setxattr(
            file.as_ptr(),
            name.as_ptr(),
            value.as_ptr().cast(),
            value.len(),
            flags as libc::c_int,
        )
    };
    Ok(Errno::result(result).map(drop)?)
}

/// Removes an attribute.
pub fn remove_attribute(file: &CStr, name: &CStr) -> io::Result<()> {
    // SAFETY: strings.
    let result = unsafe { libc::removexattr(file.as_ptr(), name.as_ptr()) };
    Ok(Errno::result(result).map(drop)?)
}
