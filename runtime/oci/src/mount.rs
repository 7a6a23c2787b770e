//! Mounting files and folders on the host.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, umount2};
use nix::sys::statfs::{FsType, statfs};

/// Magic number of EROFS (statfs(2), linux/magic.h).
const EROFS: FsType = FsType(0xE0F5_E1E2);

/// From linux/loop.h.
const LOOP_CTL_GET_FREE: libc::Ioctl = 0x4C82;
const LOOP_CONFIGURE: libc::Ioctl = 0x4C0A;
const LO_FLAGS_READ_ONLY: u32 = 1;
const LO_FLAGS_AUTOCLEAR: u32 = 4;

/// Others may take the same free loop device first.
const LOOP_TRIES: usize = 32;

/// `struct loop_config` of linux/loop.h (loop(4), LOOP_CONFIGURE).
#[repr(C)]
struct LoopConfig {
    fd: u32,
    block_size: u32,
    info: LoopInfo,
    reserved: [u64; 8],
}

/// `struct loop_info64`.
#[repr(C)]
struct LoopInfo {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    size_limit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; 64],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

/// A mount of any kind.
pub fn mount(
    source: &Path,
    target: &Path,
    kind: &str,
    flags: MsFlags,
    options: &str,
) -> io::Result<()> {
    Ok(nix::mount::mount(
        Some(source),
        target,
        Some(kind),
        flags,
        Some(options),
    )?)
}

/// Mounts an EROFS image at `target`: the file itself where the kernel can (since Linux 6.12), else through a loop
/// device that goes away with the mount.
pub fn erofs(image: &Path, target: &Path) -> io::Result<()> {
    let flags = MsFlags::MS_RDONLY | MsFlags::MS_NODEV;
    match mount(image, target, "erofs", flags, "") {
        Err(error) if error.raw_os_error() == Some(libc::ENOTBLK) => {
            let (_device, path) = loop_device(image)?;
            mount(&path, target, "erofs", flags, "")
        }
        result => result,
    }
}

/// Whether an EROFS is mounted at `path`.
pub fn is_erofs(path: &Path) -> bool {
    statfs(path).is_ok_and(|status| status.filesystem_type() == EROFS)
}

/// Takes away what is mounted at `path`, as soon as nobody uses it; fine when nothing is.
pub fn unmount(path: &Path) -> io::Result<()> {
    match umount2(path, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
        Ok(()) | Err(Errno::EINVAL | Errno::ENOENT) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// A read-only loop device of `file`; the kernel takes it back when it is neither open nor mounted.
fn loop_device(file: &Path) -> io::Result<(File, PathBuf)> {
    let backing = File::open(file)?;
    let control = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/loop-control")?;
    for _ in 0..LOOP_TRIES {
        // SAFETY: no argument.
        let number = unsafe { libc::ioctl(control.as_raw_fd(), LOOP_CTL_GET_FREE) };
        let path = PathBuf::from(format!("/dev/loop{}", Errno::result(number)?));
        let device = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_CLOEXEC)
            .open(&path)?;
        // SAFETY: all zeros is a valid loop_config.
        let mut config: LoopConfig = unsafe { std::mem::zeroed() };
        config.fd = backing.as_raw_fd() as u32;
        config.info.flags = LO_FLAGS_READ_ONLY | LO_FLAGS_AUTOCLEAR;
        // SAFETY: the structure lives through the call and has the layout of linux/loop.h.
        let result = unsafe { libc::ioctl(device.as_raw_fd(), LOOP_CONFIGURE, &raw const config) };
        match Errno::result(result) {
            Ok(_) => return Ok((device, path)),
            Err(Errno::EBUSY) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Err(Errno::EBUSY.into())
}

/// Removes a folder that nothing is in; fine when it is gone.
pub(crate) fn remove_dir(path: &Path) -> io::Result<()> {
    match fs::remove_dir(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_layout() {
        assert_eq!(size_of::<LoopInfo>(), 232);
        assert_eq!(size_of::<LoopConfig>(), 304);
    }
}
