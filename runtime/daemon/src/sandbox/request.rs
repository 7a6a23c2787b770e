//! What a RunPodSandbox request may ask for.

use podvisor_network::{PortMapping, Protocol};
use podvisor_proto::cri;

use crate::confinement;
use crate::error::{Error, Result};
use crate::user_namespace;

/// The pod's ports.
///
/// # Errors
/// A port or an address that is none.
pub fn port_mappings(config: &cri::PodSandboxConfig) -> Result<Vec<PortMapping>> {
    let invalid = |problem: String| Error::Invalid {
        field: "config.port_mappings",
        problem,
    };
    let port =
        |number: i32| u16::try_from(number).map_err(|_| invalid(format!("{number} is not a port")));
    config
        .port_mappings
        .iter()
        .map(|mapping| {
            Ok(PortMapping {
                host_port: port(mapping.host_port)?,
                container_port: port(mapping.container_port)?,
                protocol: match mapping.protocol() {
                    cri::Protocol::Tcp => Protocol::Tcp,
                    cri::Protocol::Udp => Protocol::Udp,
                    cri::Protocol::Sctp => Protocol::Sctp,
                },
                host_ip: match mapping.host_ip.as_str() {
                    "" => None,
                    ip => Some(
                        ip.parse()
                            .map_err(|_| invalid(format!("{ip:?} is no address")))?,
                    ),
                },
            })
        })
        .collect()
}

/// Refuses what contradicts the CRI, with the field's path.
///
/// # Errors
/// INVALID_ARGUMENT.
pub fn validate(config: &cri::PodSandboxConfig) -> Result<()> {
    let invalid = |field, problem: &str| {
        Err(Error::Invalid {
            field,
            problem: problem.into(),
        })
    };
    let Some(metadata) = &config.metadata else {
        return invalid("config.metadata", "missing");
    };
    for (field, value) in [
        ("config.metadata.name", &metadata.name),
        ("config.metadata.namespace", &metadata.namespace),
        ("config.metadata.uid", &metadata.uid),
    ] {
        if value.is_empty() {
            return invalid(field, "must not be empty");
        }
    }
    port_mappings(config)?;
    if config.hostname.len() > 64 {
        return invalid("config.hostname", "longer than 64 bytes");
    }
    let linux = config.linux.clone().unwrap_or_default();
    for (name, value) in &linux.sysctls {
        sysctl(name, value)?;
    }
    Ok(())
}

fn namespace_options(config: &cri::PodSandboxConfig) -> cri::NamespaceOption {
    let linux = config.linux.clone().unwrap_or_default();
    let security = linux.security_context.unwrap_or_default();
    security.namespace_options.unwrap_or_default()
}

/// Refuses what a VM cannot give.
///
/// # Errors
/// FAILED_PRECONDITION; INVALID_ARGUMENT for what is no profile, no label, and for user namespaces that the CRI does not have.
pub fn for_a_vm(config: &cri::PodSandboxConfig) -> Result<()> {
    let options = namespace_options(config);
    for (field, mode, what) in [
        ("network", options.network(), "the host's network"),
        ("pid", options.pid(), "the host's processes"),
        ("ipc", options.ipc(), "the host's IPC objects"),
    ] {
        if mode == cri::NamespaceMode::Node {
            return Err(Error::Precondition(format!(
                "config.linux.security_context.namespace_options.{field}: a pod in a VM cannot have {what}"
            )));
        }
    }
    confinement::of_vm(config)?;
    user_namespace::of_pod(config).map(drop)
}

/// Refuses what pods on the host do not have.
///
/// # Errors
/// UNIMPLEMENTED; INVALID_ARGUMENT for user namespaces that the CRI does not have.
pub fn for_the_host(config: &cri::PodSandboxConfig) -> Result<()> {
    match user_namespace::of_pod(config)? {
        None => Ok(()),
        Some(_) => Err(Error::Unsupported {
            field: "config.linux.security_context.namespace_options.userns_options",
            what: "a user namespace on the host".into(),
        }),
    }
}

/// Sysctls of the namespaces that a pod has of its own, as runc knows them: ipc, network, and of uts the
/// domain name.
const IPC: [&str; 8] = [
    "kernel.msgmax",
    "kernel.msgmnb",
    "kernel.msgmni",
    "kernel.sem",
    "kernel.shmall",
    "kernel.shmmax",
    "kernel.shmmni",
    "kernel.shm_rmid_forced",
];
const PREFIXES: [&str; 2] = ["fs.mqueue.", "net."];

/// Refuses sysctls that are no pod's. In a VM they could be set, but the pod would run on no other node.
fn sysctl(name: &str, value: &str) -> Result<()> {
    let invalid = |problem: String| {
        Err(Error::Invalid {
            field: "config.linux.sysctls",
            problem,
        })
    };
    // "net/ipv4/ip_forward" is the same name, and so is "net.ipv4.conf.eth0/1.forwarding" another one.
    let dotted = match name.find(['.', '/']) {
        Some(at) if name.as_bytes()[at] == b'/' => name.replace('/', "."),
        _ => name.to_owned(),
    };
    let is_pods = IPC.contains(&dotted.as_str())
        || dotted == "kernel.domainname"
        || PREFIXES.iter().any(|prefix| dotted.starts_with(prefix));
    if !is_pods {
        return invalid(format!("{name:?} is not in a namespace of the pod's own"));
    }
    if value.contains(['\0', '\n']) {
        return invalid(format!("{name}: {value:?} is no value"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn valid() -> cri::PodSandboxConfig {
        cri::PodSandboxConfig {
            metadata: Some(cri::PodSandboxMetadata {
                name: "p".into(),
                uid: "u".into(),
                namespace: "n".into(),
                attempt: 0,
            }),
            ..Default::default()
        }
    }

    #[test]
    fn the_field_that_is_wrong_is_named() {
        validate(&valid()).unwrap();
        let error = validate(&cri::PodSandboxConfig::default()).unwrap_err();
        assert!(error.to_string().contains("config.metadata"), "{error}");
        let mut config = valid();
        config.metadata.as_mut().unwrap().uid.clear();
        let error = validate(&config).unwrap_err().to_string();
        assert!(error.contains("config.metadata.uid"), "{error}");
    }

    #[test]
    fn host_namespaces_are_refused_with_the_reason() {
        let mut config = valid();
        config.linux = Some(cri::LinuxPodSandboxConfig {
            security_context: Some(cri::LinuxSandboxSecurityContext {
                namespace_options: Some(cri::NamespaceOption {
                    network: cri::NamespaceMode::Node as i32,
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        });
        let error = for_a_vm(&config).unwrap_err();
        assert!(matches!(error, Error::Precondition(_)), "{error}");
    }

    #[test]
    fn only_sysctls_of_the_pods_namespaces_are_taken() {
        let with = |name: &str, value: &str| {
            let mut config = valid();
            config.linux = Some(cri::LinuxPodSandboxConfig {
                sysctls: [(name.to_owned(), value.to_owned())].into(),
                ..Default::default()
            });
            validate(&config)
        };
        for name in [
            "kernel.shm_rmid_forced",
            "fs.mqueue.msg_max",
            "net.ipv4.ip_forward",
            "net/ipv4/ip_forward",
            "kernel.domainname",
        ] {
            with(name, "1").unwrap();
        }
        for (name, value) in [
            ("kernel.panic", "1"),
            ("vm.swappiness", "1"),
            ("kernel.hostname", "x"),
            ("", "x"),
            ("kernel/panic", "1"),
            ("net.ipv4.ip_forward", "1\n"),
        ] {
            let error = with(name, value).unwrap_err();
            assert!(
                error.to_string().starts_with("config.linux.sysctls"),
                "{error}"
            );
        }
    }

    #[test]
    fn a_user_namespace_needs_a_vm() {
        let ids = vec![cri::IdMapping {
            host_id: 100_000,
            container_id: 0,
            length: 65536,
        }];
        let users = cri::UserNamespace {
            mode: cri::NamespaceMode::Pod as i32,
            uids: ids.clone(),
            gids: ids,
        };
        let mut config = valid();
        config.linux = Some(cri::LinuxPodSandboxConfig {
            security_context: Some(cri::LinuxSandboxSecurityContext {
                namespace_options: Some(cri::NamespaceOption {
                    userns_options: Some(users),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        });
        for_a_vm(&config).unwrap();
        let refused = for_the_host(&config);
        assert!(
            matches!(refused, Err(Error::Unsupported { .. })),
            "{refused:?}"
        );
        for_the_host(&valid()).unwrap();
    }

    #[test]
    fn ports_are_checked() {
        let mut config = valid();
        let mapping = |host_port, container_port, host_ip: &str| cri::PortMapping {
            container_port,
            host_port,
            protocol: cri::Protocol::Udp as i32,
            host_ip: host_ip.into(),
        };
        config.port_mappings = vec![mapping(8080, 80, "127.0.0.1"), mapping(0, 81, "")];
        let mappings = port_mappings(&config).unwrap();
        assert_eq!(
            (mappings[0].host_port, mappings[0].protocol),
            (8080, Protocol::Udp)
        );
        for bad in [
            mapping(-1, 80, ""),
            mapping(1, 65536, ""),
            mapping(1, 1, "host"),
        ] {
            config.port_mappings = vec![bad];
            assert!(matches!(validate(&config), Err(Error::Invalid { .. })));
        }
    }
}
