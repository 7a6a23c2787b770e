//! Which namespaces a container has of its own, and which it shares.

use std::path::PathBuf;

use oci_spec::runtime::{LinuxNamespace, LinuxNamespaceBuilder, LinuxNamespaceType};
use podvisor_proto::cri::{self, NamespaceMode};

use super::build_error;
use crate::error::{Error, Result};
use crate::host::HostPod;
use crate::user_namespace;

/// Namespace path that the agent replaces by the pod's own.
const POD: &str = "pod";

/// Namespace path, before an id, that the agent replaces by that container's own.
const CONTAINER: &str = "container:";

/// The namespaces. `users`: the pod's map of users, if it has a user namespace. `target`: the container whose processes
/// this one sees, when its pid mode is TARGET.
///
/// # Errors
/// FAILED_PRECONDITION for what only the host has, INVALID_ARGUMENT for modes that the CRI does not have.
pub fn of(
    security: &cri::LinuxContainerSecurityContext,
    users: Option<&cri::IdMapping>,
    target: Option<&str>,
) -> Result<Vec<LinuxNamespace>> {
    let options = security.namespace_options.clone().unwrap_or_default();
    pod_level("network", options.network(), "the host's network")?;
    pod_level("ipc", options.ipc(), "the host's IPC objects")?;
    user_namespace::check_container(&options, users)?;
    let pids = match (options.pid(), target) {
        (NamespaceMode::Pod, _) => Some(POD.to_owned()),
        (NamespaceMode::Container, _) => None,
        (NamespaceMode::Node, _) => return Err(host("pid", "the host's processes")),
        (NamespaceMode::Target, Some(id)) => Some(format!("{CONTAINER}{id}")),
        (NamespaceMode::Target, None) => return Err(no_target()),
    };
    let pod = || Some(POD.to_owned());
    let mut namespaces = vec![
        (LinuxNamespaceType::Mount, None),
        (LinuxNamespaceType::Pid, pids),
        (LinuxNamespaceType::Ipc, pod()),
        (LinuxNamespaceType::Uts, pod()),
        (LinuxNamespaceType::Cgroup, None),
    ];
    if users.is_some() {
        // The user namespace owns the pod's network; without, the pod's is the guest's.
        namespaces.extend([
            (LinuxNamespaceType::User, pod()),
            (LinuxNamespaceType::Network, pod()),
        ]);
    }
    namespaces
        .into_iter()
        .map(|(kind, path)| namespace(kind, path.map(PathBuf::from)))
        .collect()
}

/// The namespaces of a container on the host: those of its pod, or the host's.
///
/// # Errors
/// INVALID_ARGUMENT: modes that the CRI does not have, a user namespace that is not the pod's.
pub fn on_host(
    security: &cri::LinuxContainerSecurityContext,
    target: Option<&str>,
    host_pod: &HostPod,
) -> Result<Vec<LinuxNamespace>> {
    let options = security.namespace_options.clone().unwrap_or_default();
    // Its pod has none: [`crate::sandbox`] has seen to that.
    user_namespace::check_container(&options, None)?;
    let mut wanted = vec![
        (LinuxNamespaceType::Mount, None),
        (LinuxNamespaceType::Cgroup, None),
    ];
    if let Some(netns) = &host_pod.netns {
        wanted.push((LinuxNamespaceType::Network, Some(netns.clone())));
    }
    if host_pod.own_ipc {
        wanted.push((LinuxNamespaceType::Ipc, Some(POD.into())));
    }
    if host_pod.own_uts {
        wanted.push((LinuxNamespaceType::Uts, Some(POD.into())));
    }
    match (options.pid(), target) {
        (NamespaceMode::Node, _) => {}
        (NamespaceMode::Pod, _) => wanted.push((LinuxNamespaceType::Pid, Some(POD.into()))),
        (NamespaceMode::Container, _) => wanted.push((LinuxNamespaceType::Pid, None)),
        (NamespaceMode::Target, Some(id)) => {
            let path = format!("{CONTAINER}{id}");
            wanted.push((LinuxNamespaceType::Pid, Some(path.into())));
        }
        (NamespaceMode::Target, None) => return Err(no_target()),
    }
    wanted
        .into_iter()
        .map(|(kind, path)| namespace(kind, path))
        .collect()
}

fn namespace(kind: LinuxNamespaceType, path: Option<PathBuf>) -> Result<LinuxNamespace> {
    let namespace = LinuxNamespaceBuilder::default().typ(kind);
    match path {
        Some(path) => namespace.path(path),
        None => namespace,
    }
    .build()
    .map_err(build_error)
}

fn no_target() -> Error {
    Error::Invalid {
        field: "config.linux.security_context.namespace_options.target_id",
        problem: "must not be empty".into(),
    }
}

/// A namespace that all containers of a pod share.
fn pod_level(kind: &str, mode: NamespaceMode, what: &str) -> Result<()> {
    match mode {
        NamespaceMode::Pod => Ok(()),
        NamespaceMode::Node => Err(host(kind, what)),
        NamespaceMode::Container | NamespaceMode::Target => Err(Error::Invalid {
            field: "config.linux.security_context.namespace_options",
            problem: format!(
                "{kind}: the mode is POD or NODE, not {}",
                mode.as_str_name()
            ),
        }),
    }
}

fn host(kind: &str, what: &str) -> Error {
    Error::Precondition(format!(
        "config.linux.security_context.namespace_options.{kind}: a container in a VM cannot have {what}"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn namespaces_are_shared_as_the_pod_says() {
        let with = |options: cri::NamespaceOption| {
            let context = cri::LinuxContainerSecurityContext {
                namespace_options: Some(options),
                ..Default::default()
            };
            of(&context, None, Some("abc")).map(|list| {
                let pid = list.iter().find(|n| n.typ() == LinuxNamespaceType::Pid);
                pid.unwrap().path().clone()
            })
        };
        let pid = |mode: NamespaceMode| {
            with(cri::NamespaceOption {
                pid: mode as i32,
                ..Default::default()
            })
        };
        assert_eq!(pid(NamespaceMode::Pod).unwrap(), Some("pod".into()));
        assert_eq!(pid(NamespaceMode::Container).unwrap(), None);
        assert_eq!(
            pid(NamespaceMode::Target).unwrap(),
            Some("container:abc".into())
        );
        assert!(matches!(
            pid(NamespaceMode::Node),
            Err(Error::Precondition(_))
        ));
        let ipc = |mode: NamespaceMode| {
            with(cri::NamespaceOption {
                ipc: mode as i32,
                ..Default::default()
            })
        };
        assert!(matches!(
            ipc(NamespaceMode::Node),
            Err(Error::Precondition(_))
        ));
        assert!(matches!(
            ipc(NamespaceMode::Container),
            Err(Error::Invalid { .. })
        ));
    }
}
