//! What a container sees of file systems: its root with all mounts of the spec, devices, and what is
//! masked. All of it is made from outside, before the root is changed, and every place in the root is a
//! descriptor that was found without leaving the root: the image, and who else writes to a volume, choose
//! names there.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, open};
use nix::sys::stat::{Mode, SFlag, fstat, major, makedev, minor, mknodat, umask};
use nix::unistd::{Gid, Uid, dup2_stderr, dup2_stdin, dup2_stdout, fchownat, symlinkat};

use super::process::Failure;
use crate::mount::{Attributes, FileSystem, Mount, MountError, Options};
use crate::oci::{self, Device, NodeKind, Spec};
use podvisor_root::in_root::Root;

/// Devices that every container has (runtime-spec, config-linux.md, "Default Devices"): name, major and
/// minor number.
const DEVICES: [(&str, u64, u64); 6] = [
    ("null", 1, 3),
    ("zero", 1, 5),
    ("full", 1, 7),
    ("random", 1, 8),
    ("urandom", 1, 9),
    ("tty", 5, 0),
];
const NULL: &str = "/dev/null";
const NULL_NUMBERS: (u64, u64) = (1, 3);
/// Links that every container has ("Dev symbolic links").
const LINKS: [(&str, &str); 5] = [
    ("fd", "/proc/self/fd"),
    ("stdin", "/proc/self/fd/0"),
    ("stdout", "/proc/self/fd/1"),
    ("stderr", "/proc/self/fd/2"),
    ("ptmx", "pts/ptmx"),
];

/// Makes everything in the root of `spec`, which is mounted already. The process is in the container's
/// namespaces.
pub fn build(spec: &Spec) -> Result<Root, Failure> {
    let linux = &spec.linux;
    let root = Root::new(&spec.root.path)
        .map_err(|error| Failure::other("opening the root file system", &error))?;
    for mount in &spec.mounts {
        add(&root, mount).map_err(|error| {
            let destination = mount.destination.display();
            Failure::other(&format!("mounting {destination}"), &error)
        })?;
    }
    add_devices(&root, &linux.devices).map_err(|error| Failure::other("making devices", &error))?;
    replace_null(&root).map_err(|error| Failure::other("placing the standard streams", &error))?;
    for path in &linux.readonly_paths {
        make_read_only(&root, path).map_err(|error| {
            Failure::other(&format!("making {} read-only", path.display()), &error)
        })?;
    }
    mask(&root, &linux.masked_paths).map_err(|error| Failure::other("masking paths", &error))?;
    if spec.root.readonly {
        READ_ONLY
            .apply(root.as_fd(), false)
            .map_err(|error| Failure::other("making the root read-only", &error))?;
    }
    Ok(root)
}

const READ_ONLY: Attributes = Attributes {
    set: libc::MOUNT_ATTR_RDONLY,
    clear: 0,
    propagation: 0,
};

/// Adds one mount of the spec.
fn add(root: &Root, spec: &oci::Mount) -> Result<(), MountError> {
    let options = Options::parse(spec.options.iter().map(String::as_str));
    let destination = &spec.destination;
    let (mount, place) = if options.bind || spec.kind == "bind" {
        let source = spec.source.as_deref().ok_or(Errno::EINVAL)?;
        // A path of the agent's own, or one below it that the host names: links are followed.
        let source = open(source, OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty())?;
        let mount = Mount::again(source.as_fd(), options.bind_recursive)?;
        options.attributes.apply(mount.as_fd(), false)?;
        (mount, place_for(root, destination, source.as_fd())?)
    } else {
        let place = match spec.kind.as_str() {
            // What relies on /proc and /sys being where their names say must not be led astray.
            "proc" | "sysfs" => root.directory_without_links(destination)?,
            _ => root.directory(destination)?,
        };
        (make(&spec.kind, spec.source.as_deref(), &options)?, place)
    };
    options.recursive.apply(mount.as_fd(), true)?;
    Ok(mount.attach(place.as_fd())?)
}

/// Where `source` can be mounted: a directory or a file, as it is one.
fn place_for(root: &Root, path: &Path, source: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    if SFlag::from_bits_truncate(fstat(source)?.st_mode).contains(SFlag::S_IFDIR) {
        root.directory(path)
    } else {
        root.file(path)
    }
}

/// A new file system.
fn make(kind: &str, source: Option<&Path>, options: &Options) -> Result<Mount, MountError> {
    // The guest has version 2 alone, and a container its own part of it: that of its cgroup namespace.
    let kind = if kind == "cgroup" { "cgroup2" } else { kind };
    let text = |text: &str| CString::new(text).map_err(io::Error::from);
    let file_system = FileSystem::open(&text(kind)?)?;
    if let Some(source) = source {
        file_system.set(c"source", source.as_os_str().as_encoded_bytes())?;
    }
    for option in &options.data {
        match option.split_once('=') {
            Some((key, value)) => file_system.set(&text(key)?, value.as_bytes())?,
            None => file_system.set_flag(&text(option)?)?,
        }
    }
    let mount = file_system.mount(options.attributes.set)?;
    let propagation = Attributes {
        propagation: options.attributes.propagation,
        ..Attributes::default()
    };
    propagation.apply(mount.as_fd(), false)?;
    Ok(mount)
}

/// Makes the devices of the spec, those that every container has, and links. What is there stays.
fn add_devices(root: &Root, devices: &[Device]) -> io::Result<()> {
    // Modes are as they are written.
    let previous = umask(Mode::empty());
    let directory = root.directory(Path::new("/dev"))?;
    for device in devices {
        add_device(root, device)?;
    }
    for (name, major, minor) in DEVICES {
        let mode = Mode::from_bits_truncate(0o666);
        present(mknodat(
            &directory,
            name,
            SFlag::S_IFCHR,
            mode,
            makedev(major, minor),
        ))?;
    }
    for (name, target) in LINKS {
        present(symlinkat(target, &directory, name))?;
    }
    umask(previous);
    Ok(())
}

fn add_device(root: &Root, device: &Device) -> io::Result<()> {
    let kind = match device.kind {
        NodeKind::Block => SFlag::S_IFBLK,
        NodeKind::Character => SFlag::S_IFCHR,
        NodeKind::Fifo => SFlag::S_IFIFO,
    };
    let path = &device.path;
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(Errno::EINVAL.into());
    };
    let parent = root.directory(parent)?;
    let mode = Mode::from_bits_truncate(device.file_mode.unwrap_or(0o666) & 0o7777);
    let number = makedev(device.major, device.minor);
    present(mknodat(&parent, name, kind, mode, number))?;
    let owner = (device.uid.map(Uid::from_raw), device.gid.map(Gid::from_raw));
    if owner != (None, None) {
        fchownat(
            &parent,
            name,
            owner.0,
            owner.1,
            AtFlags::AT_SYMLINK_NOFOLLOW,
        )?;
    }
    Ok(())
}

/// What exists already is as good.
fn present(made: nix::Result<()>) -> nix::Result<()> {
    match made {
        Err(Errno::EEXIST) => Ok(()),
        result => result,
    }
}

/// The container's /dev/null, which must be one.
fn null(root: &Root) -> io::Result<OwnedFd> {
    let null = root.open(Path::new(NULL), OFlag::O_RDWR)?;
    if is_null(null.as_fd())? {
        Ok(null)
    } else {
        Err(io::Error::other("the image's /dev/null is something else"))
    }
}

fn is_null(fd: BorrowedFd<'_>) -> nix::Result<bool> {
    let status = fstat(fd)?;
    let kind = SFlag::from_bits_truncate(status.st_mode) & SFlag::S_IFMT;
    let numbers = (major(status.st_rdev), minor(status.st_rdev));
    Ok(kind == SFlag::S_IFCHR && numbers == NULL_NUMBERS)
}

/// Standard streams that are the guest's /dev/null become the container's: what it does to the node
/// changes nothing for others.
fn replace_null(root: &Root) -> io::Result<()> {
    if is_null(io::stdin().as_fd())? {
        dup2_stdin(null(root)?)?;
    }
    if is_null(io::stdout().as_fd())? {
        dup2_stdout(null(root)?)?;
    }
    if is_null(io::stderr().as_fd())? {
        dup2_stderr(null(root)?)?;
    }
    Ok(())
}

/// Mounts what is at `path` again on itself, read-only; nothing to do when nothing is there.
fn make_read_only(root: &Root, path: &Path) -> io::Result<()> {
    let Some(place) = existing(root, path)? else {
        return Ok(());
    };
    let mount = Mount::again(place.as_fd(), true)?;
    let read_only = libc::MOUNT_ATTR_RDONLY
        | libc::MOUNT_ATTR_NOSUID
        | libc::MOUNT_ATTR_NODEV
        | libc::MOUNT_ATTR_NOEXEC;
    let read_only = Attributes {
        set: read_only,
        ..Attributes::default()
    };
    read_only.apply(mount.as_fd(), false)?;
    Ok(mount.attach(place.as_fd())?)
}

/// Hides each of `paths` that is there: directories below an empty one that is read-only and the same
/// for all, everything else below /dev/null.
fn mask(root: &Root, paths: &[PathBuf]) -> Result<(), MountError> {
    let (mut empty, mut nothing) = (None, None);
    for path in paths {
        let Some(place) = existing(root, path)? else {
            continue;
        };
        let directory =
            SFlag::from_bits_truncate(fstat(&place)?.st_mode) & SFlag::S_IFMT == SFlag::S_IFDIR;
        let cover = match (directory, &empty, &nothing) {
            (true, Some(mount), _) => Mount::again(AsFd::as_fd(mount), false)?,
            (true, None, _) => FileSystem::open(c"tmpfs")?.mount(libc::MOUNT_ATTR_RDONLY)?,
            (false, _, Some(null)) => Mount::again(OwnedFd::as_fd(null), false)?,
            (false, _, None) => {
                let null = nothing.insert(null(root)?);
                Mount::again(null.as_fd(), false)?
            }
        };
        cover.attach(place.as_fd())?;
        if directory {
            empty.get_or_insert(cover);
        }
    }
    Ok(())
}

/// What is at `path`, if anything is.
fn existing(root: &Root, path: &Path) -> nix::Result<Option<OwnedFd>> {
    match root.open(path, OFlag::O_PATH) {
        Ok(place) => Ok(Some(place)),
        Err(Errno::ENOENT | Errno::ENOTDIR) => Ok(None),
        Err(error) => Err(error),
    }
}
