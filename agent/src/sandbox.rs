//! What all containers of the pod share: host name, resolver, hosts file, clock, the ipc, uts and
//! (when asked for) pid and user namespaces, /dev/shm, and the scratch area.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{MetadataExt as _, chown};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_settime};
use podvisor_proto::agent::ConfigureSandboxRequest;

use crate::disk::{Disk, DiskError, Range};
use crate::guest;
use crate::rootfs;
use crate::sysctl::{self, SysctlError};
use crate::user_namespace::{IdMap, UserNamespace};

/// Where everything of the pod is.
pub const DIRECTORY: &str = "/run/podvisor";
/// Name of the VM's virtio-fs device.
const VOLUMES_TAG: &str = "volumes";
/// How far ahead of a reader volumes are read. Linux' own 128 KiB are eight requests for a mebibyte, of which each waits
/// for the host.
const VOLUMES_READ_AHEAD_KIB: u32 = 512;
const SHM_DEFAULT: u64 = 64 * 1024 * 1024;
/// A difference between guest and host clock that nobody sees: 1 ms.
const CLOCK_TOLERANCE_NS: u64 = 1_000_000;
/// Linux `HOST_NAME_MAX`.
const HOSTNAME_LIMIT: usize = 64;

/// Why the sandbox is not set up.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// Another configuration is in force.
    #[error("the sandbox is configured already, and differently")]
    Different,
    /// Containers need it first.
    #[error("the sandbox is not configured")]
    NotConfigured,
    /// A malformed request.
    #[error("the scratch segment is missing")]
    NoScratch,
    /// A malformed request.
    #[error("the host name is longer than {HOSTNAME_LIMIT} bytes or contains NUL")]
    Hostname,
    /// A malformed request.
    #[error("the user namespace's map begins at id 0 and ends before {}", u32::MAX)]
    UserNamespace,
    /// The scratch area.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// A kernel parameter.
    #[error(transparent)]
    Sysctl(#[from] SysctlError),
    /// The kernel refused something else.
    #[error("{action}: {source}")]
    Kernel {
        /// What was tried.
        action: &'static str,
        /// The kernel's reason.
        source: io::Error,
    },
}

/// Sets how far ahead of a reader the file system at `target` is read. Only sysfs has that, which nothing else here
/// needs.
fn set_read_ahead(target: &Path, kib: u32) -> io::Result<()> {
    let device = fs::metadata(target)?.dev();
    let (major, minor) = (libc::major(device), libc::minor(device));
    let sysfs = Path::new(DIRECTORY).join("sys");
    fs::create_dir_all(&sysfs)?;
    mount(
        Some("sysfs"),
        &sysfs,
        Some("sysfs"),
        MsFlags::empty(),
        None::<&str>,
    )?;
    let name = format!("class/bdi/{major}:{minor}/read_ahead_kb");
    let written = fs::write(sysfs.join(name), kib.to_string());
    umount2(&sysfs, MntFlags::MNT_DETACH)?;
    written
}

/// Wraps a failure with what was tried.
fn kernel<E: Into<io::Error>>(action: &'static str) -> impl FnOnce(E) -> SandboxError {
    move |error| SandboxError::Kernel {
        action,
        source: error.into(),
    }
}

/// Files of a configured sandbox, by what containers know them as.
pub mod files {
    use std::path::{Path, PathBuf};

    fn file(name: &str) -> PathBuf {
        Path::new(super::DIRECTORY).join(name)
    }

    /// Bound to /etc/hostname.
    pub fn hostname() -> PathBuf {
        file("hostname")
    }

    /// Bound to /etc/hosts.
    pub fn hosts() -> PathBuf {
        file("hosts")
    }

    /// Bound to /etc/resolv.conf.
    pub fn resolv_conf() -> PathBuf {
        file("resolv.conf")
    }

    /// Bound to /dev/shm.
    pub fn shm() -> PathBuf {
        file("shm")
    }

    /// The host's files: a directory for each container that has some.
    pub fn volumes() -> PathBuf {
        file("volumes")
    }

    /// Holds each container's writable layer.
    pub fn scratch() -> PathBuf {
        file("scratch")
    }

    /// A namespace, by its name in /proc/PID/ns.
    pub fn namespace(name: &str) -> PathBuf {
        file("ns").join(name)
    }
}

/// The pod's configuration, once it is known.
#[derive(Default)]
pub struct Sandbox {
    configured: Option<ConfigureSandboxRequest>,
    user_namespace: Option<UserNamespace>,
    has_volumes: bool,
}

impl Sandbox {
    /// Applies `request`. The same request again only sets the clock. Blocks for the time of a mount, and
    /// leaves the calling thread in the pod's namespaces: it should end then. With a user namespace, these are there
    /// already ([`crate::launcher::Launcher::make_namespaces`]).
    pub fn configure(
        &mut self,
        mut request: ConfigureSandboxRequest,
        disk: &mut Disk,
    ) -> Result<(), SandboxError> {
        set_clock(request.time_ns)?;
        request.time_ns = 0;
        match &self.configured {
            Some(configured) if *configured == request => return Ok(()),
            Some(_) => return Err(SandboxError::Different),
            None => {}
        }
        let scratch: Range = request.scratch.ok_or(SandboxError::NoScratch)?.try_into()?;
        if request.hostname.len() > HOSTNAME_LIMIT || request.hostname.contains('\0') {
            return Err(SandboxError::Hostname);
        }
        for name in request.sysctls.keys() {
            sysctl::check(name)?;
        }

        let user_namespace = id_map(&request)?
            .map(UserNamespace::open)
            .transpose()
            .map_err(kernel("opening the pod's user namespace"))?;
        let root = user_namespace.as_ref().map_or(0, |own| own.ids.root());
        let hostname = format!("{}\n", request.hostname);
        for (path, content) in [
            (files::hostname(), &hostname),
            (files::hosts(), &request.hosts),
            (files::resolv_conf(), &request.resolv_conf),
        ] {
            fs::write(&path, content)
                .and_then(|()| chown(&path, Some(root), Some(root)))
                .map_err(kernel("writing the pod's files"))?;
        }
        rootfs::make_lowest_layer(root).map_err(kernel("making the lowest layer"))?;
        mount_shm(request.shm_bytes, root)?;
        if let Some(own) = &user_namespace {
            join_namespaces().map_err(kernel("joining the pod's namespaces"))?;
            guest::set_loopback_up().map_err(kernel("taking the loopback interface up"))?;
            disk.map_ids(Arc::clone(&own.file));
        } else {
            make_namespaces()?;
        }
        set_up_namespaces(&request)?;
        // Last: what came before can be done twice, should this fail and be asked for again.
        disk.mount_scratch(scratch, &files::scratch())?;
        self.configured = Some(request);
        self.user_namespace = user_namespace;
        Ok(())
    }

    /// The pod's user namespace, if it has one.
    pub fn user_namespace(&self) -> Option<&UserNamespace> {
        self.user_namespace.as_ref()
    }

    /// Mounts the volumes, if they are not yet. Waits for the host to answer.
    pub fn mount_volumes(&mut self) -> Result<(), SandboxError> {
        if self.has_volumes {
            return Ok(());
        }
        let target = files::volumes();
        fs::create_dir_all(&target).map_err(kernel("making a directory for volumes"))?;
        mount(
            Some(VOLUMES_TAG),
            &target,
            Some("virtiofs"),
            MsFlags::empty(),
            None::<&str>,
        )
        .map_err(kernel("mounting the volumes"))?;
        self.has_volumes = true;
        if let Err(error) = set_read_ahead(&target, VOLUMES_READ_AHEAD_KIB) {
            crate::kmsg::error!("volumes are read with little ahead: {error}");
        }
        Ok(())
    }

    /// The pod's host name.
    pub fn hostname(&self) -> Result<&str, SandboxError> {
        self.configured
            .as_ref()
            .map(|configured| configured.hostname.as_str())
            .ok_or(SandboxError::NotConfigured)
    }
}

fn set_clock(time_ns: u64) -> Result<(), SandboxError> {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_nanos() as u64);
    if time_ns == 0 || now.abs_diff(time_ns) < CLOCK_TOLERANCE_NS {
        return Ok(());
    }
    let time = TimeSpec::new(
        (time_ns / 1_000_000_000) as libc::time_t,
        (time_ns % 1_000_000_000) as libc::c_long,
    );
    clock_settime(ClockId::CLOCK_REALTIME, time).map_err(kernel("setting the clock"))
}

/// The map of the user namespace that a request asks for.
pub fn id_map(request: &ConfigureSandboxRequest) -> Result<Option<IdMap>, SandboxError> {
    request
        .user_namespace
        .map(|mapping| IdMap::new(mapping).ok_or(SandboxError::UserNamespace))
        .transpose()
}

fn mount_shm(bytes: u64, owner: u32) -> Result<(), SandboxError> {
    let bytes = if bytes == 0 { SHM_DEFAULT } else { bytes };
    let target = files::shm();
    let again = target.exists();
    fs::create_dir_all(&target).map_err(kernel("making the pod's /dev/shm"))?;
    let mut flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    if again {
        flags |= MsFlags::MS_REMOUNT;
    }
    let options = format!("mode=1777,size={bytes},uid={owner},gid={owner}");
    mount(
        Some("shm"),
        &target,
        Some("tmpfs"),
        flags,
        Some(options.as_str()),
    )
    .map_err(kernel("mounting the pod's /dev/shm"))
}

/// Makes the ipc and uts namespaces that the pod's containers share. They are the calling thread's from then
/// on, and kept by mounts when it ends.
fn make_namespaces() -> Result<(), SandboxError> {
    unshare(CloneFlags::CLONE_NEWIPC | CloneFlags::CLONE_NEWUTS)
        .map_err(kernel("making the pod's ipc and uts namespaces"))?;
    for name in ["ipc", "uts"] {
        keep_namespace(Path::new("/proc/thread-self/ns"), name)
            .map_err(kernel("keeping the pod's namespaces"))?;
    }
    Ok(())
}

/// Moves the calling thread to the namespaces that the pod's user namespace owns.
fn join_namespaces() -> io::Result<()> {
    for name in ["ipc", "uts", "net"] {
        setns(File::open(files::namespace(name))?, CloneFlags::empty())?;
    }
    Ok(())
}

/// Sets host name and sysctls of the calling thread's namespaces: those of its namespaces are the pod's, all others the
/// guest's.
fn set_up_namespaces(request: &ConfigureSandboxRequest) -> Result<(), SandboxError> {
    nix::unistd::sethostname(&request.hostname).map_err(kernel("setting the host name"))?;
    for (name, value) in &request.sysctls {
        sysctl::set(name, value)?;
    }
    Ok(())
}

/// Keeps the namespace `name` of the directory `of` (a /proc/PID/ns) alive by a mount.
pub fn keep_namespace(of: &Path, name: &str) -> io::Result<PathBuf> {
    let target = files::namespace(name);
    if let Some(parent) = target.parent() {
        fs::create_dir_all(parent)?;
    }
    File::create(&target)?;
    mount(
        Some(&of.join(name)),
        &target,
        None::<&str>,
        MsFlags::MS_BIND,
        None::<&str>,
    )?;
    Ok(target)
}
