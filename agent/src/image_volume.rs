//! Images as volumes: layers joined read-only, and a path in them.

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::mount::{MntFlags, umount2};
use nix::sys::stat::{SFlag, fstat};

use crate::mount::{Attributes, FileSystem, Mount, MountError};
use podvisor_root::in_root::Root;

/// Why an image is not a volume. How the messages begin is the CRI's to say.
#[derive(Debug, thiserror::Error)]
pub enum ImageVolumeError {
    /// A malformed request.
    #[error("ImageVolumeMountFailed: an image without layers")]
    Empty,
    /// Not in the image, or no path.
    #[error("ImageVolumeMountFailed: image_sub_path {}: {source}", path.display())]
    SubPath {
        /// What was asked for.
        path: PathBuf,
        /// Why it cannot be.
        source: io::Error,
    },
    /// The kernel refused.
    #[error("ImageVolumeMountFailed: {0}")]
    Mount(#[from] MountError),
}

const READ_ONLY: Attributes = Attributes {
    set: libc::MOUNT_ATTR_RDONLY,
    clear: 0,
    propagation: 0,
};

/// Mounts `sub_path` of an image of these layers (lowest first) in `directory`, under the name `name`, which nothing has.
pub fn mount(
    layers: &[PathBuf],
    sub_path: &Path,
    directory: &Path,
    name: &str,
) -> Result<(), ImageVolumeError> {
    fs::create_dir_all(directory).map_err(MountError::from)?;
    let image = match layers {
        [] => return Err(ImageVolumeError::Empty),
        [layer] => layer.clone(),
        layers => {
            let whole = directory.join(format!("{name}.whole"));
            fs::create_dir(&whole).map_err(MountError::from)?;
            let overlay = FileSystem::open(c"overlay")?;
            for layer in layers.iter().rev() {
                overlay.set(c"lowerdir+", layer.as_os_str().as_bytes())?;
            }
            overlay.mount(libc::MOUNT_ATTR_RDONLY)?.attach_at(&whole)?;
            whole
        }
    };
    let place = find(&image, sub_path).map_err(|source| ImageVolumeError::SubPath {
        path: sub_path.to_owned(),
        source,
    })?;
    let target = directory.join(name);
    make_place_for(&place, &target).map_err(MountError::from)?;
    let volume = Mount::again(place.as_fd(), false).map_err(MountError::from)?;
    READ_ONLY
        .apply(volume.as_fd(), false)
        .map_err(MountError::from)?;
    Ok(volume.attach_at(&target)?)
}

/// What is at `sub_path` of an image.
fn find(image: &Path, sub_path: &Path) -> io::Result<OwnedFd> {
    if sub_path
        .components()
        .any(|part| part == Component::ParentDir)
    {
        return Err(Errno::EINVAL.into());
    }
    let path = Path::new("/").join(sub_path);
    Ok(Root::new(image)?.open(&path, OFlag::O_PATH)?)
}

/// Makes an empty directory, or file, as `place` is one.
fn make_place_for(place: &OwnedFd, target: &Path) -> io::Result<()> {
    if SFlag::from_bits_truncate(fstat(place)?.st_mode).contains(SFlag::S_IFDIR) {
        fs::create_dir(target)
    } else {
        fs::File::create(target).map(drop)
    }
}

/// Unmounts all image volumes in a directory. What is not there is not an error.
pub fn remove_all(directory: &Path) -> io::Result<()> {
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    for entry in entries {
        match umount2(&entry?.path(), MntFlags::UMOUNT_NOFOLLOW) {
            Ok(()) | Err(Errno::EINVAL | Errno::ENOENT) => {}
            Err(error) => return Err(error.into()),
        }
    }
    fs::remove_dir_all(directory)
}
