//! Block devices of the node (CRI `devices`), which become segments of the pod's disk.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

use nix::fcntl::{OFlag, open};
use nix::sys::stat::{Mode, SFlag, fstat};
use podvisor_proto::cri;
use tonic::Code;

use super::absolute;
use crate::error::{Error, Result};
use crate::spec::devices::is_in_guest;

/// Segments are whole pages.
const ALIGNMENT: u64 = 4096;

nix::ioctl_read!(block_device_size, 0x12, 114, u64);

/// A block device, opened.
#[derive(Debug)]
pub struct BlockDevice {
    /// It.
    pub file: File,
    /// Bytes.
    pub length: u64,
    /// The container may not write to it.
    pub read_only: bool,
    /// In the container.
    pub container_path: String,
}

/// Opens the devices that CreateContainer asks for, but for those that the guest has by itself. Blocking.
///
/// # Errors
/// What contradicts the CRI, is not there, or is no block device, with the field's path.
pub fn open_devices(devices: &[cri::Device]) -> Result<Vec<BlockDevice>> {
    let devices = devices.iter().enumerate();
    devices
        .filter_map(|(index, device)| open_one(index, device).transpose())
        .collect()
}

fn open_one(index: usize, device: &cri::Device) -> Result<Option<BlockDevice>> {
    let refuse = |code, field, problem: String| Error::Element {
        list: "devices",
        index,
        field,
        problem,
        code,
    };
    let invalid = |field, problem: &str| refuse(Code::InvalidArgument, field, problem.to_owned());
    let container_path =
        absolute(&device.container_path).map_err(|problem| invalid("container_path", problem))?;
    let host_path = absolute(&device.host_path).map_err(|problem| invalid("host_path", problem))?;
    if !device.permissions.chars().all(|c| "rwm".contains(c)) {
        return Err(invalid("permissions", "are made of r, w and m"));
    }
    let read_only = !device.permissions.is_empty() && !device.permissions.contains('w');
    let unusable = |error: io::Error| {
        let problem = format!("{}: {error}", host_path.display());
        refuse(Code::FailedPrecondition, "host_path", problem)
    };
    let place = find(&host_path).map_err(unusable)?;
    let status = fstat(&place).map_err(|error| unusable(error.into()))?;
    if is_in_guest(status.st_mode, status.st_rdev) {
        return Ok(None);
    }
    let kind = status.st_mode;
    if SFlag::from_bits_truncate(kind) & SFlag::S_IFMT != SFlag::S_IFBLK {
        let problem = format!("{} is no block device: a VM", host_path.display());
        return Err(refuse(
            Code::Unimplemented,
            "host_path",
            problem + " has others only of its own",
        ));
    }
    let (file, length) = open_device(&place, read_only).map_err(unusable)?;
    if length == 0 || !length.is_multiple_of(ALIGNMENT) {
        let problem = format!(
            "{} has {length} bytes: not a multiple of {ALIGNMENT}",
            host_path.display()
        );
        return Err(refuse(Code::FailedPrecondition, "host_path", problem));
    }
    Ok(Some(BlockDevice {
        file,
        length,
        read_only,
        container_path: container_path.display().to_string(),
    }))
}

/// What is at a path, without using it: to open some devices is to use them.
fn find(path: &Path) -> io::Result<OwnedFd> {
    Ok(open(path, OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty())?)
}

fn open_device(place: &OwnedFd, read_only: bool) -> io::Result<(File, u64)> {
    let file = File::options()
        .read(true)
        .write(!read_only)
        .open(format!("/proc/self/fd/{}", place.as_raw_fd()))?;
    let mut length = 0;
    // SAFETY: BLKGETSIZE64 writes a number of 64 bits.
    unsafe { block_device_size(file.as_raw_fd(), &raw mut length) }?;
    Ok((file, length))
}
