//! A container's bundle: what its specification leaves to who runs it (monitor.proto, CreateContainer).

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use oci_spec::runtime::{
    LinuxNamespaceType, LinuxResources, Mount, MountBuilder, Spec, User as UserSpec,
};
use podvisor_proto::agent::{ResolvedUser, User};
use podvisor_root::in_root::Root;
use podvisor_root::user;
use serde_json::Value;

use super::{HostError, kernel};

const FILE: &str = "config.json";

/// The path that means: the pod's own.
const POD: &str = "pod";

/// Before an id: that container's own.
const CONTAINER: &str = "container:";

/// Files of the pod that each container has, unless it brings its own.
const FILES: [(&str, &str); 3] = [
    ("hostname", "/etc/hostname"),
    ("hosts", "/etc/hosts"),
    ("resolv.conf", "/etc/resolv.conf"),
];

/// Where namespaces are. `kind` is as in `/proc/PID/ns`.
pub trait Namespaces {
    /// Of the pod.
    fn of_pod(&self, kind: &str) -> Result<PathBuf, HostError>;
    /// Of one of its containers.
    fn of_container(&self, id: &str, kind: &str) -> Result<PathBuf, HostError>;
}

/// Whether a namespace is to be the container's own: not the host's, not another's.
pub fn is_own(spec: &Spec, kind: LinuxNamespaceType) -> bool {
    let linux = spec.linux().as_ref();
    let mut namespaces = linux
        .into_iter()
        .flat_map(|linux| linux.namespaces().iter().flatten());
    namespaces.any(|namespace| namespace.typ() == kind && namespace.path().is_none())
}

/// Fills in the user's numbers, the namespaces, and the pod's files, which are in `dir`.
pub fn complete(
    mut spec: Spec,
    bundle: &Path,
    dir: &Path,
    wanted: &User,
    namespaces: &impl Namespaces,
) -> Result<(Spec, ResolvedUser), HostError> {
    let missing = |what: &str| HostError::Spec(format!("no {what}"));
    let root = Root::new(&bundle.join("rootfs")).map_err(kernel("the root file system"))?;
    let account = user::resolve(&root, wanted)?;
    let process = spec
        .process_mut()
        .as_mut()
        .ok_or_else(|| missing("process"))?;
    let mut numbers = UserSpec::default();
    numbers
        .set_uid(account.ids.uid)
        .set_gid(account.ids.gid)
        .set_additional_gids(Some(account.ids.supplemental_groups.clone()));
    process.set_user(numbers);
    let mut env = process.env().clone().unwrap_or_default();
    if !env.iter().any(|entry| entry.starts_with("HOME=")) {
        env.push(format!("HOME={}", account.home));
    }
    process.set_env(Some(env));

    let linux = spec.linux_mut().as_mut().ok_or_else(|| missing("linux"))?;
    for namespace in linux.namespaces_mut().iter_mut().flatten() {
        let Some(path) = namespace.path().as_ref().and_then(|path| path.to_str()) else {
            continue;
        };
        let kind = match namespace.typ() {
            LinuxNamespaceType::Network => "net",
            LinuxNamespaceType::Mount => "mnt",
            LinuxNamespaceType::Ipc => "ipc",
            LinuxNamespaceType::Uts => "uts",
            LinuxNamespaceType::Pid => "pid",
            LinuxNamespaceType::User => "user",
            LinuxNamespaceType::Cgroup => "cgroup",
            LinuxNamespaceType::Time => "time",
        };
        let real = match path.strip_prefix(CONTAINER) {
            Some(id) => Some(namespaces.of_container(id, kind)?),
            None if path == POD => Some(namespaces.of_pod(kind)?),
            None => None,
        };
        if real.is_some() {
            namespace.set_path(real);
        }
    }
    let mut mounts = spec.mounts().clone().unwrap_or_default();
    for (name, target) in FILES {
        if !mounts
            .iter()
            .any(|mount| mount.destination() == Path::new(target))
        {
            mounts.push(bind(&dir.join(name), target)?);
        }
    }
    spec.set_mounts(Some(mounts));
    Ok((spec, account.ids))
}

fn bind(source: &Path, target: &str) -> Result<Mount, HostError> {
    MountBuilder::default()
        .destination(target)
        .typ("bind")
        .source(source)
        .options(["rbind", "rprivate", "rw"].map(str::to_owned))
        .build()
        .map_err(|error| HostError::Spec(error.to_string()))
}

/// Reads the specification.
pub fn read(bundle: &Path) -> Result<Spec, HostError> {
    let text = fs::read(bundle.join(FILE)).map_err(kernel("reading the bundle"))?;
    serde_json::from_slice(&text).map_err(|error| HostError::Spec(error.to_string()))
}

/// Writes the specification.
pub fn write(bundle: &Path, spec: &Spec) -> Result<(), HostError> {
    let text = serde_json::to_vec(spec).map_err(|error| HostError::Spec(error.to_string()))?;
    let result: io::Result<()> = fs::write(bundle.join(FILE), text);
    result.map_err(kernel("writing the bundle"))
}

/// Changes the limits of `spec`, JSON of `linux.resources`, and writes it. Returns the limits of now.
pub fn update(bundle: &Path, spec: &Spec, changes: &[u8]) -> Result<LinuxResources, HostError> {
    let error = |error: serde_json::Error| HostError::Spec(error.to_string());
    let linux = spec.linux().clone().unwrap_or_default();
    let mut limits = serde_json::to_value(linux.resources()).map_err(error)?;
    merge(&mut limits, serde_json::from_slice(changes).map_err(error)?);
    let limits: LinuxResources = serde_json::from_value(limits).map_err(error)?;
    let mut spec = spec.clone();
    if let Some(linux) = spec.linux_mut() {
        linux.set_resources(Some(limits.clone()));
    }
    write(bundle, &spec)?;
    Ok(limits)
}

/// What `changes` names is so from now on.
fn merge(value: &mut Value, changes: Value) {
    match (value, changes) {
        (Value::Object(old), Value::Object(new)) => {
            for (key, change) in new {
                merge(old.entry(key).or_insert(Value::Null), change);
            }
        }
        (value, change) => *value = change,
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use serde_json::json;

    use super::*;

    struct Fixed;

    impl Namespaces for Fixed {
        fn of_pod(&self, kind: &str) -> Result<PathBuf, HostError> {
            Ok(Path::new("/pod").join(kind))
        }

        fn of_container(&self, id: &str, kind: &str) -> Result<PathBuf, HostError> {
            Ok(Path::new("/container").join(id).join(kind))
        }
    }

    fn spec() -> Spec {
        let spec = json!({
            "ociVersion": "1.0.2",
            "process": {"args": ["a"], "cwd": "/", "env": ["A=1"], "user": {"uid": 0, "gid": 0}},
            "mounts": [{"destination": "/etc/hosts", "source": "/mine"}],
            "linux": {
                "namespaces": [
                    {"type": "mount"},
                    {"type": "network", "path": "/run/netns/x"},
                    {"type": "uts", "path": "pod"},
                    {"type": "pid", "path": "container:abc"},
                ],
                "resources": {"memory": {"limit": 1}, "cpu": {"shares": 2}},
            },
        });
        serde_json::from_value(spec).expect("a specification")
    }

    #[test]
    fn what_is_left_open_is_filled_in() {
        let bundle = tempfile::tempdir().expect("temporary directory");
        let etc = bundle.path().join("rootfs/etc");
        fs::create_dir_all(&etc).expect("writable");
        fs::write(etc.join("passwd"), "web:x:33:44::/var/www:/bin/sh\n").expect("writable");
        // A link of the image's does not lead outside.
        symlink("/etc/group", etc.join("group")).expect("writable");
        let wanted = User {
            name: "web".to_owned(),
            ..User::default()
        };
        let dir = Path::new("/sandbox");
        let (spec, user) = complete(spec(), bundle.path(), dir, &wanted, &Fixed).expect("complete");
        assert_eq!((user.uid, user.gid), (33, 44));
        let json = serde_json::to_value(&spec).expect("JSON");
        assert_eq!(json["process"]["user"]["uid"], 33);
        assert_eq!(json["process"]["env"], json!(["A=1", "HOME=/var/www"]));
        let paths: Vec<_> = json["linux"]["namespaces"]
            .as_array()
            .expect("a list")
            .iter()
            .map(|namespace| namespace["path"].as_str().unwrap_or_default())
            .collect();
        assert_eq!(
            paths,
            ["", "/run/netns/x", "/pod/uts", "/container/abc/pid"]
        );
        let targets: Vec<_> = json["mounts"]
            .as_array()
            .expect("a list")
            .iter()
            .map(|mount| (mount["destination"].as_str(), mount["source"].as_str()))
            .collect();
        // Its own hosts file, the pod's other files.
        assert_eq!(
            targets,
            [
                (Some("/etc/hosts"), Some("/mine")),
                (Some("/etc/hostname"), Some("/sandbox/hostname")),
                (Some("/etc/resolv.conf"), Some("/sandbox/resolv.conf")),
            ]
        );
        assert!(is_own(&spec, LinuxNamespaceType::Mount));
        assert!(!is_own(&spec, LinuxNamespaceType::Pid));
        assert!(!is_own(&spec, LinuxNamespaceType::Ipc));
    }

    #[test]
    fn an_unknown_user_is_told() {
        let bundle = tempfile::tempdir().expect("temporary directory");
        fs::create_dir(bundle.path().join("rootfs")).expect("writable");
        let wanted = User {
            name: "nobody-here".to_owned(),
            ..User::default()
        };
        let result = complete(spec(), bundle.path(), Path::new("/s"), &wanted, &Fixed);
        assert!(matches!(result, Err(HostError::User(_))));
    }

    #[test]
    fn limits_that_are_not_named_stay() {
        let bundle = tempfile::tempdir().expect("temporary directory");
        let changes = json!({"memory": {"limit": 5}}).to_string();
        let limits = update(bundle.path(), &spec(), changes.as_bytes()).expect("updated");
        let json = serde_json::to_value(&limits).expect("JSON");
        assert_eq!(
            (&json["memory"]["limit"], &json["cpu"]["shares"]),
            (&json!(5), &json!(2))
        );
        let written = read(bundle.path()).expect("written");
        let linux = written.linux().clone().expect("linux");
        assert_eq!(linux.resources().as_ref(), Some(&limits));
    }
}
