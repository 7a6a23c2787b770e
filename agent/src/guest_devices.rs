//! All devices of the guest, for a container that may use any of them: what is in the guest's /dev.

use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use nix::sys::stat::{major, minor};

use crate::oci::{Device, NodeKind};

const DEVICES: &str = "/dev";
/// What a container has of its own.
const OWN: [&str; 5] = [
    "/dev/console",
    "/dev/mqueue",
    "/dev/ptmx",
    "/dev/pts",
    "/dev/shm",
];
/// Directories below /dev are few and flat.
const DEPTH: usize = 4;

/// Every block and character device, with its mode and owner.
pub fn all() -> io::Result<Vec<Device>> {
    let mut devices = Vec::new();
    collect(Path::new(DEVICES), DEPTH, &mut devices)?;
    Ok(devices)
}

fn collect(directory: &Path, depth: usize, devices: &mut Vec<Device>) -> io::Result<()> {
    for entry in std::fs::read_dir(directory)? {
        let entry = entry?;
        let path = entry.path();
        let kind = entry.file_type()?;
        if OWN.iter().any(|own| path == Path::new(own)) {
            continue;
        }
        if kind.is_dir() && depth > 0 {
            collect(&path, depth - 1, devices)?;
        }
        let kind = if kind.is_block_device() {
            NodeKind::Block
        } else if kind.is_char_device() {
            NodeKind::Character
        } else {
            continue;
        };
        devices.extend(device(path, kind));
    }
    Ok(())
}

/// None when it is gone again, as a layer's partition can be.
fn device(path: PathBuf, kind: NodeKind) -> Option<Device> {
    let status = std::fs::symlink_metadata(&path).ok()?;
    Some(Device {
        path,
        kind,
        major: major(status.rdev()),
        minor: minor(status.rdev()),
        file_mode: Some(status.mode() & 0o7777),
        uid: Some(status.uid()),
        gid: Some(status.gid()),
    })
}
