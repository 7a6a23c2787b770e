//! Completes the OCI runtime spec that came from the host: root, user, namespaces, control group, and
//! the pod's own files. The result is what the launcher runs.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use oci_spec::runtime::{
    LinuxNamespaceType, LinuxSeccomp, Mount, MountBuilder, Process, Root, RootBuilder, Spec,
    UserBuilder,
};
use podvisor_proto::agent::ResolvedUser;

use crate::device_filter::{DeviceFilter, DeviceFilterError};
use crate::sandbox::files;
use crate::user::Account;

/// Most bytes of a spec.
pub const LIMIT: usize = 2 * 1024 * 1024;
/// In place of a path: the namespace that the pod's containers share.
const POD: &str = "pod";
/// What `PATH` means where none is set, as in containerd.
pub const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Why a spec cannot be run.
#[derive(Debug, thiserror::Error)]
pub enum SpecError {
    /// See [`LIMIT`].
    #[error("the spec has {0} bytes, more than {LIMIT}")]
    TooLarge(usize),
    /// Not a spec.
    #[error("the spec is not an OCI runtime spec: {0}")]
    Parse(#[from] serde_json::Error),
    /// A required part.
    #[error("the spec has no {0}")]
    Missing(&'static str),
    /// The host decides what is shared, the guest where it is.
    #[error("namespace {0} has a path that is not \"{POD}\"")]
    NamespacePath(LinuxNamespaceType),
    /// Not shared between containers.
    #[error("namespace {0} cannot be the pod's")]
    NotShared(LinuxNamespaceType),
    /// See [`DeviceFilterError`].
    #[error(transparent)]
    Devices(#[from] DeviceFilterError),
    /// A part that cannot be built again from itself.
    #[error("the spec is inconsistent: {0}")]
    Inconsistent(#[from] oci_spec::OciSpecError),
}

/// A spec from the host, looked at.
pub struct ContainerSpec {
    spec: Spec,
    /// Types whose path is [`POD`].
    shared: HashSet<LinuxNamespaceType>,
}

impl ContainerSpec {
    /// Parses and checks.
    pub fn parse(bytes: &[u8]) -> Result<Self, SpecError> {
        if bytes.len() > LIMIT {
            return Err(SpecError::TooLarge(bytes.len()));
        }
        let spec: Spec = serde_json::from_slice(bytes)?;
        let process = spec
            .process()
            .as_ref()
            .ok_or(SpecError::Missing("process"))?;
        if process.args().as_ref().is_none_or(Vec::is_empty) {
            return Err(SpecError::Missing("process.args"));
        }
        let linux = spec.linux().as_ref().ok_or(SpecError::Missing("linux"))?;
        let namespaces = linux.namespaces().as_deref().unwrap_or_default();
        let mut shared = HashSet::new();
        for namespace in namespaces {
            match namespace.path() {
                None => {}
                Some(path) if path == Path::new(POD) => {
                    if !matches!(
                        namespace.typ(),
                        LinuxNamespaceType::Ipc | LinuxNamespaceType::Uts | LinuxNamespaceType::Pid
                    ) {
                        return Err(SpecError::NotShared(namespace.typ()));
                    }
                    shared.insert(namespace.typ());
                }
                Some(_) => return Err(SpecError::NamespacePath(namespace.typ())),
            }
        }
        // Without these two, the container would be in the agent's own.
        for (kind, name) in [
            (LinuxNamespaceType::Mount, "mount namespace"),
            (LinuxNamespaceType::Pid, "pid namespace"),
        ] {
            if !namespaces.iter().any(|namespace| namespace.typ() == kind) {
                return Err(SpecError::Missing(name));
            }
        }
        Ok(Self { spec, shared })
    }

    /// Whether the container shares the pod's namespace of this type.
    pub fn shares(&self, kind: LinuxNamespaceType) -> bool {
        self.shared.contains(&kind)
    }

    /// Where the process starts.
    pub fn cwd(&self) -> &Path {
        // `parse` has seen the process.
        self.spec
            .process()
            .as_ref()
            .map_or(Path::new("/"), |process| process.cwd().as_path())
    }

    /// Fills in what is the guest's to say.
    pub fn complete(
        mut self,
        rootfs: &Path,
        account: &Account,
        hostname: &str,
    ) -> Result<CompleteSpec, SpecError> {
        let read_only = self.spec.root().as_ref().and_then(Root::readonly);
        self.spec.set_root(Some(
            RootBuilder::default()
                .path(rootfs)
                .readonly(read_only.unwrap_or(false))
                .build()?,
        ));
        // In a uts namespace of its own a container still has the pod's name.
        self.spec.set_hostname(Some(hostname.to_owned()));
        let own_files = pod_mounts(&self, read_only.unwrap_or(false))?;
        let mut mounts = self.spec.mounts().clone().unwrap_or_default();
        if self.shares(LinuxNamespaceType::Ipc) {
            // It comes with the ipc namespace (shm_open(3) and shmget(2) are one family).
            mounts.retain(|mount| mount.destination() != Path::new("/dev/shm"));
        }
        mounts.extend(own_files);
        self.spec.set_mounts(Some(mounts));

        let mut process = self
            .spec
            .process()
            .clone()
            .ok_or(SpecError::Missing("process"))?;
        complete_process(&mut process, account)?;
        self.spec.set_process(Some(process.clone()));

        let mut linux = self
            .spec
            .linux()
            .clone()
            .ok_or(SpecError::Missing("linux"))?;
        let mut namespaces = linux.namespaces().clone().unwrap_or_default();
        for namespace in &mut namespaces {
            if self.shared.contains(&namespace.typ()) {
                let name = namespace.typ().to_string();
                namespace.set_path(Some(files::namespace(&name)));
            }
        }
        linux.set_namespaces(Some(namespaces));
        let devices = linux
            .resources()
            .as_ref()
            .and_then(|resources| resources.devices().as_deref());
        let devices = DeviceFilter::compile(devices)?;
        let seccomp = linux.seccomp().clone();
        self.spec.set_linux(Some(linux));
        Ok(CompleteSpec {
            spec: self.spec,
            process,
            seccomp,
            devices,
        })
    }
}

/// A spec that can run, and the parts of it that an exec takes over.
pub struct CompleteSpec {
    /// For the launcher.
    pub spec: Spec,
    /// Template of each exec's process.
    pub process: Process,
    /// Filter of each exec.
    pub seccomp: Option<LinuxSeccomp>,
    /// What devices the container may use, if that is restricted.
    pub devices: Option<DeviceFilter>,
}

fn complete_process(process: &mut Process, account: &Account) -> Result<(), SpecError> {
    let ResolvedUser {
        uid,
        gid,
        supplemental_groups,
    } = &account.ids;
    let mut user = UserBuilder::default()
        .uid(*uid)
        .gid(*gid)
        .additional_gids(supplemental_groups.clone())
        .build()?;
    user.set_umask(process.user().umask());
    process.set_user(user);

    let mut environment = process.env().clone().unwrap_or_default();
    let has = |environment: &[String], name: &str| {
        environment
            .iter()
            .any(|entry| entry.split_once('=').is_some_and(|(key, _)| key == name))
    };
    if !has(&environment, "PATH") {
        environment.push(format!("PATH={DEFAULT_PATH}"));
    }
    if !has(&environment, "HOME") {
        environment.push(format!("HOME={}", account.home));
    }
    process.set_env(Some(environment));
    Ok(())
}

/// Bind mounts of the pod's files, where the spec does not bring its own.
fn pod_mounts(container: &ContainerSpec, read_only: bool) -> Result<Vec<Mount>, SpecError> {
    let present: HashSet<&Path> = container
        .spec
        .mounts()
        .iter()
        .flatten()
        .map(|mount| mount.destination().as_path())
        .collect();
    let access = if read_only { "ro" } else { "rw" };
    let mut mounts = Vec::new();
    for (destination, source) in [
        ("/etc/hostname", files::hostname()),
        ("/etc/hosts", files::hosts()),
        ("/etc/resolv.conf", files::resolv_conf()),
    ] {
        if !present.contains(Path::new(destination)) {
            mounts.push(bind(destination, source, &["rbind", "rprivate", access])?);
        }
    }
    if container.shares(LinuxNamespaceType::Ipc) {
        let options = ["rbind", "rprivate", "nosuid", "nodev", "noexec"];
        mounts.push(bind("/dev/shm", files::shm(), &options)?);
    }
    Ok(mounts)
}

fn bind(destination: &str, source: PathBuf, options: &[&str]) -> Result<Mount, SpecError> {
    Ok(MountBuilder::default()
        .destination(destination)
        .typ("bind")
        .source(source)
        .options(
            options
                .iter()
                .map(|option| (*option).to_owned())
                .collect::<Vec<_>>(),
        )
        .build()?)
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
            .complete(Path::new("/r"), &account(), "pod-1")
            .unwrap();
        let spec = complete.spec;
        let root = spec.root().as_ref().unwrap();
        assert_eq!(root.path(), Path::new("/r"));
        assert_eq!(root.readonly(), Some(true));
        assert_eq!(spec.hostname().as_deref(), Some("pod-1"));
        let process = spec.process().as_ref().unwrap();
        assert_eq!((process.user().uid(), process.user().gid()), (33, 34));
        let environment = process.env().as_ref().unwrap();
        assert!(environment.contains(&"HOME=/var/www".to_owned()));
        assert!(environment.contains(&format!("PATH={DEFAULT_PATH}")));
        let linux = spec.linux().as_ref().unwrap();
        let path = |kind| {
            let namespaces = linux.namespaces().as_ref().unwrap();
            namespaces
                .iter()
                .find(|n| n.typ() == kind)
                .unwrap()
                .path()
                .clone()
        };
        assert_eq!(path(LinuxNamespaceType::Ipc), Some(files::namespace("ipc")));
        assert_eq!(path(LinuxNamespaceType::Uts), None);
    }

    #[test]
    fn the_pods_files_are_bound_unless_the_spec_brings_its_own() {
        let complete = parse(&sample())
            .unwrap()
            .complete(Path::new("/r"), &account(), "pod-1")
            .unwrap();
        let mounts = complete.spec.mounts().clone().unwrap();
        let sources = |destination: &str| {
            mounts
                .iter()
                .filter(|mount| mount.destination() == Path::new(destination))
                .map(|mount| mount.source().clone().unwrap())
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
        assert!(with("/process/args", json!([])).is_some());
        assert!(parse(&json!({"ociVersion": "1.2.0"})).is_err());
        assert!(ContainerSpec::parse(b"{").is_err());
        assert!(ContainerSpec::parse(&vec![b' '; LIMIT + 1]).is_err());
    }
}
