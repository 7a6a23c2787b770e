//! Runtime handlers: what runs a pod's containers, and which pods go where.

use std::env;
use std::path::{Path, PathBuf};

use podvisor_proto::cri;
use serde::{Deserialize, Serialize};

use crate::config::Config;

/// The handler that gives each pod a VM.
pub const PODVISOR: &str = "podvisor";

/// The handler that pods are routed to which a VM cannot hold.
pub const RUNC: &str = "runc";

/// Annotation of pods that were routed: to which handler.
pub const ROUTED_TO: &str = "podvisor.io/routed-to";
/// Annotation of pods that were routed: the [`Reason`].
pub const ROUTED_BECAUSE: &str = "podvisor.io/routed-because";

/// Where commands are looked for besides `$PATH`, which a service may lack.
const COMMANDS: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Why a pod cannot have a handler.
#[derive(Debug, thiserror::Error)]
pub enum HandlerError {
    /// Nobody knows it.
    #[error("no handler {name:?} here; there are {known:?}")]
    Unknown {
        /// As the caller wrote it.
        name: String,
        /// All that are configured.
        known: Vec<String>,
    },
    /// A record names it that was made by another configuration.
    #[error("handler {0:?}: is not configured")]
    NotConfigured(String),
    /// Its OCI runtime is not there.
    #[error("handler {name:?}: {} is not installed", runtime.display())]
    NotInstalled {
        /// The handler.
        name: String,
        /// As the configuration names it.
        runtime: PathBuf,
    },
}

/// What a pod can ask for that a VM cannot give.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reason {
    /// The host's network.
    HostNetwork,
    /// The host's processes.
    HostPid,
    /// The host's IPC objects.
    HostIpc,
    /// Privileges on the host. In a VM they would be privileges in the VM.
    Privileged,
}

impl Reason {
    /// As in the configuration file.
    pub fn name(self) -> &'static str {
        match self {
            Self::HostNetwork => "host-network",
            Self::HostPid => "host-pid",
            Self::HostIpc => "host-ipc",
            Self::Privileged => "privileged",
        }
    }

    /// Whether `config` asks for it.
    pub fn applies(self, config: &cri::PodSandboxConfig) -> bool {
        let linux = config.linux.as_ref();
        let security = linux.and_then(|linux| linux.security_context.as_ref());
        let options = security.and_then(|security| security.namespace_options.as_ref());
        let node = |mode: fn(&cri::NamespaceOption) -> cri::NamespaceMode| {
            options.is_some_and(|options| mode(options) == cri::NamespaceMode::Node)
        };
        match self {
            Self::HostNetwork => node(cri::NamespaceOption::network),
            Self::HostPid => node(cri::NamespaceOption::pid),
            Self::HostIpc => node(cri::NamespaceOption::ipc),
            Self::Privileged => security.is_some_and(|security| security.privileged),
        }
    }
}

/// Which handler a pod has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decision {
    /// Its name.
    pub handler: String,
    /// It was not asked for by name, but needs what only that handler has.
    pub routed: Option<Reason>,
}

/// Decides. A pod that names its handler has that one, or does not run.
///
/// # Errors
/// No such handler, or its runtime is not installed.
pub fn decide(
    config: &Config,
    pod: &cri::PodSandboxConfig,
    asked: &str,
) -> Result<Decision, HandlerError> {
    let handler = if asked.is_empty() {
        &config.default_handler
    } else {
        asked
    };
    if handler != PODVISOR && !config.handlers.contains_key(handler) {
        return Err(HandlerError::Unknown {
            name: handler.to_owned(),
            known: names(config).map(str::to_owned).collect(),
        });
    }
    let mut decision = Decision {
        handler: handler.to_owned(),
        routed: None,
    };
    if asked.is_empty() && handler == PODVISOR && may_be_routed(config, pod) {
        let mut reasons = config.route_to_runc.iter();
        decision.routed = reasons.find(|reason| reason.applies(pod)).copied();
    }
    if decision.routed.is_some() {
        RUNC.clone_into(&mut decision.handler);
    }
    runtime(config, &decision.handler)?;
    Ok(decision)
}

/// Whether the pod's Kubernetes namespace is one whose pods may be routed.
fn may_be_routed(config: &Config, pod: &cri::PodSandboxConfig) -> bool {
    let namespace = pod
        .metadata
        .as_ref()
        .map_or("", |metadata| metadata.namespace.as_str());
    config.route_namespaces.is_empty()
        || config
            .route_namespaces
            .iter()
            .any(|named| named == namespace)
}

/// The OCI runtime's binary of a handler. `None`: it makes VMs.
///
/// # Errors
/// It is not installed, or the handler is not configured any more.
pub fn runtime(config: &Config, handler: &str) -> Result<Option<PathBuf>, HandlerError> {
    if is_vm(handler) {
        return Ok(None);
    }
    let Some(configured) = config.handlers.get(handler) else {
        return Err(HandlerError::NotConfigured(handler.to_owned()));
    };
    let not_there = || HandlerError::NotInstalled {
        name: handler.to_owned(),
        runtime: configured.runtime.clone(),
    };
    find(&configured.runtime).map(Some).ok_or_else(not_there)
}

/// Whether a handler makes VMs. Records of a time before there were others name none.
pub fn is_vm(handler: &str) -> bool {
    matches!(handler, "" | PODVISOR)
}

/// All handlers by name; of those with an OCI runtime, the installed ones are of use.
pub fn names(config: &Config) -> impl Iterator<Item = &str> {
    std::iter::once(PODVISOR).chain(config.handlers.keys().map(String::as_str))
}

/// A command's file: a path as it is, a name where commands are.
fn find(command: &Path) -> Option<PathBuf> {
    if command.components().count() > 1 {
        return command.is_file().then(|| command.to_owned());
    }
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain(env::split_paths(COMMANDS))
        .map(|dir| dir.join(command))
        .find(|file| file.is_file())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Handler;

    fn config() -> Config {
        let mut config = Config::default();
        let sh = Handler {
            runtime: "sh".into(),
        };
        config.handlers = [(RUNC.to_owned(), sh)].into();
        config
    }

    fn pod(security: cri::LinuxSandboxSecurityContext) -> cri::PodSandboxConfig {
        cri::PodSandboxConfig {
            metadata: Some(cri::PodSandboxMetadata {
                namespace: "kube-system".into(),
                ..Default::default()
            }),
            linux: Some(cri::LinuxPodSandboxConfig {
                security_context: Some(security),
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    fn privileged() -> cri::PodSandboxConfig {
        pod(cri::LinuxSandboxSecurityContext {
            privileged: true,
            ..Default::default()
        })
    }

    fn host(set: fn(&mut cri::NamespaceOption)) -> cri::PodSandboxConfig {
        let mut options = cri::NamespaceOption::default();
        set(&mut options);
        pod(cri::LinuxSandboxSecurityContext {
            namespace_options: Some(options),
            ..Default::default()
        })
    }

    #[test]
    fn a_name_is_obeyed() {
        let config = config();
        for (asked, handler) in [("", PODVISOR), (PODVISOR, PODVISOR), (RUNC, RUNC)] {
            let decision = decide(&config, &cri::PodSandboxConfig::default(), asked).unwrap();
            assert_eq!(
                (decision.handler.as_str(), decision.routed),
                (handler, None)
            );
        }
        let named = decide(&config, &privileged(), PODVISOR).unwrap();
        assert_eq!(named.handler, PODVISOR);
        let unknown = decide(&config, &privileged(), "gvisor");
        assert!(
            matches!(unknown, Err(HandlerError::Unknown { .. })),
            "{unknown:?}"
        );
    }

    #[test]
    fn what_a_vm_cannot_give_is_routed() {
        const NODE: i32 = cri::NamespaceMode::Node as i32;
        let mut config = config();
        for (pod, reason) in [
            (privileged(), Reason::Privileged),
            (host(|options| options.network = NODE), Reason::HostNetwork),
            (host(|options| options.pid = NODE), Reason::HostPid),
            (host(|options| options.ipc = NODE), Reason::HostIpc),
        ] {
            config.route_to_runc = Config::default().route_to_runc;
            config.route_namespaces = Vec::new();
            let decision = decide(&config, &pod, "").unwrap();
            assert_eq!(
                (decision.handler.as_str(), decision.routed),
                (RUNC, Some(reason))
            );
            config.route_namespaces = vec!["other".into()];
            assert_eq!(decide(&config, &pod, "").unwrap().handler, PODVISOR);
            config.route_namespaces.push("kube-system".into());
            assert_eq!(decide(&config, &pod, "").unwrap().handler, RUNC);
            config.route_to_runc.retain(|other| *other != reason);
            assert_eq!(decide(&config, &pod, "").unwrap().handler, PODVISOR);
        }
    }

    #[test]
    fn a_runtime_that_is_not_there_is_told() {
        let mut config = config();
        config.handlers.get_mut(RUNC).unwrap().runtime = "/nonexistent/runc".into();
        let error = decide(&config, &privileged(), "").unwrap_err();
        assert!(error.to_string().contains("/nonexistent/runc"), "{error}");
    }
}
