//! What a container sees of file systems: its root with all mounts of the spec, devices, and what is
//! masked. All of it is made from outside, before the root is changed, and every place in the root is a
//! descriptor that was found without leaving the root: the image, and who else writes to a volume, choose
//! names there.

use std::collections::HashMap;
use std::ffi::{CString, OsStr};
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
use crate::user_namespace::IdMap;
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
const DEVICE_DIRECTORY: &str = "/dev";
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

/// What the guest's root has made for a container in the pod's user namespace, whose root could not: files that are the
/// guest's, device nodes, sysfs. Nothing for other containers, which make it themselves.
#[derive(Default)]
pub struct Prepared {
    /// By their places in the spec.
    mounts: HashMap<usize, Mount>,
    /// The root file system.
    root: Option<Mount>,
}

/// Makes it, before the process is in the namespaces that are the container's own.
pub fn prepare(spec: &Spec, ids: IdMap) -> Result<Prepared, Failure> {
    let root = Root::new(&spec.root.path)
        .map_err(|error| Failure::other("opening the root file system", &error))?;
    let mut prepared = Prepared::default();
    let mut device_directory = None;
    for (place, mount) in spec.mounts.iter().enumerate() {
        let mut options = Options::parse(mount.options.iter().map(String::as_str));
        let is_devices = mount.destination == Path::new(DEVICE_DIRECTORY);
        match mount.kind.as_str() {
            "sysfs" => {}
            "tmpfs" if is_devices => {
                let owner = ids.root();
                let data = [format!("uid={owner}"), format!("gid={owner}")];
                options.data.extend(data);
                device_directory = Some(place);
            }
            _ if is_bind(mount, &options) => {}
            _ => continue,
        }
        let made = new_mount(mount, &options).map_err(|error| cannot_mount(mount, &error))?;
        prepared.mounts.insert(place, made);
    }
    let directory = device_directory.and_then(|place| prepared.mounts.get(&place));
    let directory = match directory {
        Some(mount) => mount.as_fd().try_clone_to_owned(),
        None => root.directory(Path::new(DEVICE_DIRECTORY)),
    };
    directory
        .and_then(|directory| add_devices(&root, &directory.into(), &spec.linux.devices, Some(ids)))
        .map_err(|error| Failure::other("making devices", &error))?;
    // The one that is there is locked where it is in the mount namespace of another user namespace.
    let again = Mount::again(root.as_fd(), false);
    prepared.root =
        Some(again.map_err(|error| Failure::other("mounting the root file system", &error))?);
    Ok(prepared)
}

/// Makes everything in the root of `spec`, which is mounted already. The process is in the container's
/// namespaces.
pub fn build(spec: &Spec, mut prepared: Prepared) -> Result<Root, Failure> {
    let linux = &spec.linux;
    let step = |what| move |error: io::Error| Failure::other(what, &error);
    let mut root = Root::new(&spec.root.path).map_err(step("opening the root file system"))?;
    let is_prepared = prepared.root.is_some();
    if let Some(again) = prepared.root {
        again
            .attach(root.as_fd())
            .map_err(|error| Failure::other("mounting the root file system", &error))?;
        root = Root::new(&spec.root.path).map_err(step("opening the root file system"))?;
    }
    for (place, mount) in spec.mounts.iter().enumerate() {
        add(&root, mount, prepared.mounts.remove(&place))
            .map_err(|error| cannot_mount(mount, &error))?;
    }
    if is_prepared {
        // As root of the container, whose it is to be.
        root.directory(&spec.process.cwd)
            .map_err(step("making the working directory"))?;
    } else {
        root.directory(Path::new(DEVICE_DIRECTORY))
            .and_then(|directory| add_devices(&root, &directory.into(), &linux.devices, None))
            .map_err(step("making devices"))?;
    }
    replace_null(&root).map_err(step("placing the standard streams"))?;
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

fn cannot_mount(mount: &oci::Mount, error: &MountError) -> Failure {
    let destination = mount.destination.display();
    Failure::other(&format!("mounting {destination}"), error)
}

/// Adds one mount of the spec, `prepared` or new.
fn add(root: &Root, spec: &oci::Mount, prepared: Option<Mount>) -> Result<(), MountError> {
    let mount = match prepared {
        Some(mount) => mount,
        None => new_mount(
            spec,
            &Options::parse(spec.options.iter().map(String::as_str)),
        )?,
    };
    let destination = &spec.destination;
    let place = match spec.kind.as_str() {
        // What relies on /proc and /sys being where their names say must not be led astray.
        "proc" | "sysfs" => root.directory_without_links(destination)?,
        _ => place_for(root, destination, mount.as_fd())?,
    };
    Ok(mount.attach(place.as_fd())?)
}

fn is_bind(spec: &oci::Mount, options: &Options) -> bool {
    options.bind || spec.kind == "bind"
}

/// The mount of a spec, nowhere yet.
fn new_mount(spec: &oci::Mount, options: &Options) -> Result<Mount, MountError> {
    let mount = if is_bind(spec, options) {
        let source = spec.source.as_deref().ok_or(Errno::EINVAL)?;
        // A path of the agent's own, or one below it that the host names: links are followed.
        let source = open(source, OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty())?;
        let mount = Mount::again(source.as_fd(), options.bind_recursive)?;
        options.attributes.apply(mount.as_fd(), false)?;
        mount
    } else {
        make(&spec.kind, spec.source.as_deref(), options)?
    };
    options.recursive.apply(mount.as_fd(), true)?;
    Ok(mount)
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

/// Makes the devices of the spec, those that every container has, and links, in `directory`, which is the container's
/// /dev, and elsewhere in its root. What is there stays.
fn add_devices(
    root: &Root,
    directory: &Root,
    devices: &[Device],
    ids: Option<IdMap>,
) -> io::Result<()> {
    // Modes are as they are written.
    let previous = umask(Mode::empty());
    for device in devices {
        match device.path.strip_prefix(DEVICE_DIRECTORY) {
            Ok(path) => add_device(directory, path, device, ids)?,
            Err(_) => add_device(root, &device.path, device, ids)?,
        }
    }
    for (name, major, minor) in DEVICES {
        let mode = Mode::from_bits_truncate(0o666);
        present(mknodat(
            directory,
            name,
            SFlag::S_IFCHR,
            mode,
            makedev(major, minor),
        ))?;
    }
    for (name, target) in LINKS {
        present(symlinkat(target, directory, name))?;
    }
    if let Some(ids) = ids {
        let devices = DEVICES.iter().map(|(name, ..)| name);
        for name in devices.chain(LINKS.iter().map(|(name, _)| name)) {
            let root = Some(ids.root());
            give(directory, OsStr::new(name), (root, root))?;
        }
    }
    umask(previous);
    Ok(())
}

fn add_device(root: &Root, path: &Path, device: &Device, ids: Option<IdMap>) -> io::Result<()> {
    let kind = match device.kind {
        NodeKind::Block => SFlag::S_IFBLK,
        NodeKind::Character => SFlag::S_IFCHR,
        NodeKind::Fifo => SFlag::S_IFIFO,
    };
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(Errno::EINVAL.into());
    };
    let parent = root.directory(parent)?;
    let mode = Mode::from_bits_truncate(device.file_mode.unwrap_or(0o666) & 0o7777);
    let number = makedev(device.major, device.minor);
    present(mknodat(&parent, name, kind, mode, number))?;
    let owner = match ids {
        None => (device.uid, device.gid),
        // An id that the namespace does not have is nobody there, as it would be with runc.
        Some(ids) => (
            ids.outside(device.uid.unwrap_or_default()),
            ids.outside(device.gid.unwrap_or_default()),
        ),
    };
    give(&parent, name, owner)
}

/// Gives a device to a user and a group.
fn give(directory: impl AsFd, name: &OsStr, owner: (Option<u32>, Option<u32>)) -> io::Result<()> {
    let (user, group) = (owner.0.map(Uid::from_raw), owner.1.map(Gid::from_raw));
    Ok(fchownat(
        directory,
        name,
        user,
        group,
        AtFlags::AT_SYMLINK_NOFOLLOW,
    )?)
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
