//! Completes the OCI runtime spec that came from the host: root, user, namespaces, control group, and
//! the pod's own files. The result is what the launcher runs.

use std::path::{Component, Path, PathBuf};

use podvisor_proto::agent::ResolvedUser;

use crate::device_filter::{DeviceFilter, DeviceFilterError};
use crate::oci::{
    Device, DeviceKind, DeviceRule, Mount, Namespace, NamespaceKind, NodeKind, Process, Root, Spec,
    User,
};
use crate::sandbox::files;
use podvisor_root::user::Account;

/// Most bytes of a spec.
pub const LIMIT: usize = 2 * 1024 * 1024;
/// In place of a path: the namespace that the pod's containers share.
const POD: &str = "pod";
/// Type of a mount that comes from the host: its source is below the root of the volumes.
const VOLUME: &str = "volume";
/// Type of a mount of an image: its source is the number of an image volume.
const IMAGE: &str = "image";
/// Before an id, in place of a path: the namespace of that container.
const CONTAINER: &str = "container:";
/// What `PATH` means where none is set, as in containerd.
pub const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Why a spec cannot be run.
#[derive(Debug, thiserror::Error)]
pub enum SpecError {
    /// See [`LIMIT`].
    #[error("the spec has {0} bytes, more than {LIMIT}")]
    TooLarge(usize),
    /// Not a spec, or one that asks for what the guest does not do.
    #[error("the spec is not one that can be run: {0}")]
    Parse(#[from] serde_json::Error),
    /// A required part.
    #[error("the spec has no {0}")]
    Missing(&'static str),
    /// The host decides what is shared, the guest where it is.
    #[error("namespace {} has a path that is neither \"{POD}\" nor a container's", .0.file_name())]
    NamespacePath(NamespaceKind),
    /// Not shared between containers.
    #[error("namespace {} cannot be the pod's or another container's", .0.file_name())]
    NotShared(NamespaceKind),
    /// See [`crate::sandbox`].
    #[error("the namespaces user and network are both the pod's, or both the guest's")]
    NotOwn,
    /// The host says what is shared, the guest where it is.
    #[error("volume {} is not a path below the volumes", .0.display())]
    Volume(PathBuf),
    /// See [`DeviceFilterError`].
    #[error(transparent)]
    Devices(#[from] DeviceFilterError),
}

/// A spec from the host, looked at.
pub struct ContainerSpec(Spec);

impl ContainerSpec {
    /// Parses and checks.
    pub fn parse(bytes: &[u8]) -> Result<Self, SpecError> {
        if bytes.len() > LIMIT {
            return Err(SpecError::TooLarge(bytes.len()));
        }
        let spec: Spec = serde_json::from_slice(bytes)?;
        if spec.process.args.is_empty() {
            return Err(SpecError::Missing("process.args"));
        }
        let namespaces = &spec.linux.namespaces;
        for Namespace { kind, path } in namespaces {
            let Some(path) = path else { continue };
            let can_be_shared = if path == Path::new(POD) {
                matches!(
                    kind,
                    NamespaceKind::Ipc
                        | NamespaceKind::Uts
                        | NamespaceKind::Pid
                        | NamespaceKind::Network
                        | NamespaceKind::User
                )
            } else if container(path).is_some() {
                *kind == NamespaceKind::Pid
            } else {
                return Err(SpecError::NamespacePath(*kind));
            };
            if !can_be_shared {
                return Err(SpecError::NotShared(*kind));
            }
        }
        let pods_own = |wanted| {
            let mut namespaces = namespaces.iter();
            let found = namespaces.find(|namespace| namespace.kind == wanted);
            found.map(|namespace| namespace.path.is_some())
        };
        // One of the container's own would have no interface, or no users. The two come together.
        match (
            pods_own(NamespaceKind::User),
            pods_own(NamespaceKind::Network),
        ) {
            (None, None) | (Some(true), Some(true)) => {}
            _ => return Err(SpecError::NotOwn),
        }
        // Without these two, the container would be in the agent's own.
        for (required, name) in [
            (NamespaceKind::Mount, "mount namespace"),
            (NamespaceKind::Pid, "pid namespace"),
        ] {
            if !namespaces
                .iter()
                .any(|namespace| namespace.kind == required)
            {
                return Err(SpecError::Missing(name));
            }
        }
        for mount in spec.mounts.iter().filter(|mount| is_volume(mount)) {
            let source = mount.source.clone().unwrap_or_default();
            let is_name = |component| matches!(component, Component::Normal(_));
            if source.as_os_str().is_empty() || !source.components().all(is_name) {
                return Err(SpecError::Volume(source));
            }
        }
        Ok(Self(spec))
    }

    /// Whether it has mounts that come from the host.
    pub fn has_volumes(&self) -> bool {
        self.0.mounts.iter().any(|mount| mount.kind == VOLUME)
    }

    /// Whether the container shares the pod's namespace of this kind.
    pub fn shares(&self, kind: NamespaceKind) -> bool {
        let namespaces = &self.0.linux.namespaces;
        namespaces.iter().any(|namespace| {
            namespace.kind == kind && namespace.path.as_deref() == Some(Path::new(POD))
        })
    }

    /// The container whose pid namespace this one shares, by id.
    pub fn pid_target(&self) -> Option<&str> {
        let mut namespaces = self.0.linux.namespaces.iter();
        let pid = namespaces.find(|namespace| namespace.kind == NamespaceKind::Pid)?;
        container(pid.path.as_deref()?)
    }

    /// Adds devices.
    pub fn add_devices(&mut self, devices: Vec<Device>) {
        self.0.linux.devices.extend(devices);
    }

    /// Gives the container a block device, `number` as in `st_rdev`.
    pub fn add_block_device(&mut self, path: PathBuf, number: u64, read_only: bool) {
        let (major, minor) = (libc::major(number), libc::minor(number));
        let linux = &mut self.0.linux;
        linux.devices.push(Device {
            path,
            kind: NodeKind::Block,
            major: major.into(),
            minor: minor.into(),
            file_mode: Some(0o660),
            uid: None,
            gid: None,
        });
        // Without rules all devices may be used.
        let rules = &mut linux.resources.devices;
        if !rules.is_empty() {
            let access = if read_only { "rm" } else { "rwm" };
            rules.push(DeviceRule {
                allow: true,
                kind: DeviceKind::Block,
                major: Some(major.into()),
                minor: Some(minor.into()),
                access: Some(access.to_owned()),
            });
        }
    }

    /// Whether it may write to the files of its control group.
    pub fn manages_cgroup(&self) -> bool {
        let mut mounts = self.0.mounts.iter();
        mounts.any(|mount| mount.kind == "cgroup" && !mount.options.iter().any(|o| o == "ro"))
    }

    /// Where the process starts.
    pub fn cwd(&self) -> &Path {
        &self.0.process.cwd
    }

    /// Fills in what is the guest's to say. `images`: a directory with the image volumes, by their numbers.
    pub fn complete(
        mut self,
        rootfs: &Path,
        images: &Path,
        account: &Account,
        hostname: &str,
    ) -> Result<CompleteSpec, SpecError> {
        let devices = DeviceFilter::compile(&self.0.linux.resources.devices)?;
        let shares_ipc = self.shares(NamespaceKind::Ipc);
        let spec = &mut self.0;
        spec.root = Root {
            path: rootfs.to_owned(),
            readonly: spec.root.readonly,
        };
        // In a uts namespace of its own a container still has the pod's name.
        hostname.clone_into(&mut spec.hostname);
        if shares_ipc {
            // It comes with the ipc namespace (shm_open(3) and shmget(2) are one family), unless it is a volume.
            spec.mounts
                .retain(|mount| mount.destination != Path::new("/dev/shm") || is_volume(mount));
        }
        let own_files = pod_mounts(&spec.mounts, shares_ipc, spec.root.readonly);
        let first_volume = spec.mounts.iter().position(is_volume);
        // Volumes may be mounted below these.
        let place = first_volume.unwrap_or(spec.mounts.len());
        spec.mounts.splice(place..place, own_files);
        for mount in &mut spec.mounts {
            let place = match mount.kind.as_str() {
                VOLUME => files::volumes(),
                IMAGE => images.to_owned(),
                _ => continue,
            };
            "bind".clone_into(&mut mount.kind);
            let source = mount.source.take().unwrap_or_default();
            mount.source = Some(place.join(source));
        }
        complete_process(&mut spec.process, account);
        for namespace in &mut spec.linux.namespaces {
            if namespace.path.as_deref() == Some(Path::new(POD)) {
                namespace.path = Some(files::namespace(namespace.kind.file_name()));
            }
        }
        Ok(CompleteSpec {
            spec: self.0,
            devices,
        })
    }
}

/// The id in a path that stands for a container's namespace.
fn container(path: &Path) -> Option<&str> {
    path.to_str()?.strip_prefix(CONTAINER)
}

/// A spec that can run.
pub struct CompleteSpec {
    /// For the launcher.
    pub spec: Spec,
    /// What devices the container may use, if that is restricted.
    pub devices: Option<DeviceFilter>,
}

fn complete_process(process: &mut Process, account: &Account) {
    let ResolvedUser {
        uid,
        gid,
        supplemental_groups,
    } = &account.ids;
    process.user = User {
        uid: *uid,
        gid: *gid,
        umask: process.user.umask,
        additional_gids: supplemental_groups.clone(),
    };
    for (name, value) in [("PATH", DEFAULT_PATH), ("HOME", &account.home)] {
        let is_set = |entry: &String| entry.split_once('=').is_some_and(|(key, _)| key == name);
        if !process.env.iter().any(is_set) {
            process.env.push(format!("{name}={value}"));
        }
    }
}

fn is_volume(mount: &Mount) -> bool {
    mount.kind == VOLUME || mount.kind == IMAGE
}

/// Bind mounts of the pod's files, where the spec does not bring its own.
fn pod_mounts(present: &[Mount], shares_ipc: bool, read_only: bool) -> Vec<Mount> {
    let access = if read_only { "ro" } else { "rw" };
    let mut mounts = Vec::new();
    for (destination, source) in [
        ("/etc/hostname", files::hostname()),
        ("/etc/hosts", files::hosts()),
        ("/etc/resolv.conf", files::resolv_conf()),
    ] {
        if !present
            .iter()
            .any(|mount| mount.destination == Path::new(destination))
        {
            mounts.push(bind(destination, source, &["rbind", "rprivate", access]));
        }
    }
    let has_shm = present
        .iter()
        .any(|mount| mount.destination == Path::new("/dev/shm"));
    if shares_ipc && !has_shm {
        let options = ["rbind", "rprivate", "nosuid", "nodev", "noexec"];
        mounts.push(bind("/dev/shm", files::shm(), &options));
    }
    mounts
}

fn bind(destination: &str, source: PathBuf, options: &[&str]) -> Mount {
    Mount {
        destination: destination.into(),
        kind: "bind".to_owned(),
        source: Some(source),
        options: options.iter().map(|option| (*option).to_owned()).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn sample() -> Value {
        json!({
            "ociVersion": "1.2.0",
            "process": { "args": ["sh"], "env": ["A=b"], "cwd": "/work",
                "user": { "uid": 0, "gid": 0 } },
            "root": { "path": "", "readonly": true },
            "mounts": [
                { "destination": "/dev/shm", "type": "tmpfs", "source": "shm" },
                { "destination": "/etc/hosts", "type": "bind", "source": "/x" },
            ],
            "linux": { "namespaces": [
                { "type": "mount" }, { "type": "pid" },
                { "type": "ipc", "path": "pod" }, { "type": "uts" },
            ] },
            "annotations": { "org.example.note": "none of our business" },
        })
    }

    fn parse(value: &Value) -> Result<ContainerSpec, SpecError> {
        ContainerSpec::parse(value.to_string().as_bytes())
    }

    fn account() -> Account {
        Account {
            ids: ResolvedUser {
                uid: 33,
                gid: 34,
                supplemental_groups: vec![34, 5],
            },
            home: "/var/www".to_owned(),
        }
    }

    #[test]
    fn the_guest_fills_in_its_part() {
        let container = parse(&sample()).unwrap();
        assert_eq!(container.cwd(), Path::new("/work"));
        let complete = container
            .complete(Path::new("/r"), Path::new("/i"), &account(), "pod-1")
            .unwrap();
        let spec = complete.spec;
        assert_eq!(spec.root.path, Path::new("/r"));
        assert!(spec.root.readonly);
        assert_eq!(spec.hostname, "pod-1");
        assert_eq!((spec.process.user.uid, spec.process.user.gid), (33, 34));
        let environment = &spec.process.env;
        assert!(environment.contains(&"HOME=/var/www".to_owned()));
        assert!(environment.contains(&format!("PATH={DEFAULT_PATH}")));
        let path = |kind| {
            let mut namespaces = spec.linux.namespaces.iter();
            namespaces.find(|n| n.kind == kind).unwrap().path.clone()
        };
        assert_eq!(path(NamespaceKind::Ipc), Some(files::namespace("ipc")));
        assert_eq!(path(NamespaceKind::Uts), None);
        // What is written for the launcher is what it reads.
        let text = serde_json::to_string(&spec).unwrap();
        let again: Spec = serde_json::from_str(&text).unwrap();
        assert_eq!(serde_json::to_string(&again).unwrap(), text);
    }

    #[test]
    fn a_container_can_share_anothers_processes() {
        let mut spec = sample();
        spec["linux"]["namespaces"][1]["path"] = json!("container:abc");
        let spec = parse(&spec).unwrap();
        assert_eq!(spec.pid_target(), Some("abc"));
        assert!(!spec.shares(NamespaceKind::Pid), "the pod's is another one");
        assert_eq!(parse(&sample()).unwrap().pid_target(), None);
    }

    #[test]
    fn the_pods_files_are_bound_unless_the_spec_brings_its_own() {
        let complete = parse(&sample())
            .unwrap()
            .complete(Path::new("/r"), Path::new("/i"), &account(), "pod-1")
            .unwrap();
        let mounts = complete.spec.mounts;
        let sources = |destination: &str| {
            mounts
                .iter()
                .filter(|mount| mount.destination == Path::new(destination))
                .map(|mount| mount.source.clone().unwrap())
                .collect::<Vec<_>>()
        };
        assert_eq!(sources("/etc/hosts"), [Path::new("/x")]);
        assert_eq!(sources("/etc/hostname"), [files::hostname()]);
        assert_eq!(sources("/dev/shm"), [files::shm()]);
    }

    #[test]
    fn specs_that_would_leave_the_container_are_refused() {
        let with = |pointer: &str, value: Value| {
            let mut spec = sample();
            *spec.pointer_mut(pointer).unwrap() = value;
            parse(&spec).err().map(|error| error.to_string())
        };
        assert!(
            with("/linux/namespaces/0/type", json!("cgroup"))
                .unwrap()
                .contains("mount")
        );
        assert!(
            with("/linux/namespaces/1/type", json!("cgroup"))
                .unwrap()
                .contains("pid")
        );
        assert!(with("/linux/namespaces/2/path", json!("/proc/1/ns/ipc")).is_some());
        assert!(
            with(
                "/linux/namespaces/0",
                json!({"type": "mount", "path": "pod"})
            )
            .is_some()
        );
        assert!(
            with(
                "/linux/namespaces/3",
                json!({"type": "uts", "path": "container:a"})
            )
            .is_some()
        );
        assert!(with("/process/args", json!([])).is_some());
        assert!(parse(&json!({"ociVersion": "1.2.0"})).is_err());
        // Not something to be ignored.
        let mut mapped = sample();
        mapped["linux"]["uidMappings"] = json!([]);
        assert!(parse(&mapped).is_err());
        assert!(ContainerSpec::parse(b"{").is_err());
        assert!(ContainerSpec::parse(&vec![b' '; LIMIT + 1]).is_err());
    }
}
