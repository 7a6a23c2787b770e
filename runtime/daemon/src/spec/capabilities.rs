//! Capabilities: the default set, and what a pod adds to and drops from it.

use std::collections::HashSet;

use oci_spec::runtime::Capability;
use podvisor_proto::cri;

use crate::error::{Error, Result};

/// What every container may do unless the pod says otherwise: the set that Docker and containerd give.
const DEFAULT_CAPABILITIES: [Capability; 14] = [
    Capability::Chown,
    Capability::DacOverride,
    Capability::Fsetid,
    Capability::Fowner,
    Capability::Mknod,
    Capability::NetRaw,
    Capability::Setgid,
    Capability::Setuid,
    Capability::Setfcap,
    Capability::Setpcap,
    Capability::NetBindService,
    Capability::SysChroot,
    Capability::Kill,
    Capability::AuditWrite,
];

/// All that Linux 6.12 knows, by number (linux/capability.h).
const ALL_CAPABILITIES: [Capability; 41] = [
    Capability::Chown,
    Capability::DacOverride,
    Capability::DacReadSearch,
    Capability::Fowner,
    Capability::Fsetid,
    Capability::Kill,
    Capability::Setgid,
    Capability::Setuid,
    Capability::Setpcap,
    Capability::LinuxImmutable,
    Capability::NetBindService,
    Capability::NetBroadcast,
    Capability::NetAdmin,
    Capability::NetRaw,
    Capability::IpcLock,
    Capability::IpcOwner,
    Capability::SysModule,
    Capability::SysRawio,
    Capability::SysChroot,
    Capability::SysPtrace,
    Capability::SysPacct,
    Capability::SysAdmin,
    Capability::SysBoot,
    Capability::SysNice,
    Capability::SysResource,
    Capability::SysTime,
    Capability::SysTtyConfig,
    Capability::Mknod,
    Capability::Lease,
    Capability::AuditWrite,
    Capability::AuditControl,
    Capability::Setfcap,
    Capability::MacOverride,
    Capability::MacAdmin,
    Capability::Syslog,
    Capability::WakeAlarm,
    Capability::BlockSuspend,
    Capability::AuditRead,
    Capability::Perfmon,
    Capability::Bpf,
    Capability::CheckpointRestore,
];

/// The kernel's number of a capability.
pub fn number(capability: Capability) -> usize {
    let mut all = ALL_CAPABILITIES.iter();
    // All are there: a test counts them.
    all.position(|one| *one == capability)
        .unwrap_or(ALL_CAPABILITIES.len())
}

/// A container's sets.
#[derive(Debug, Default)]
pub struct Capabilities {
    /// Bounding, effective and permitted.
    pub granted: HashSet<Capability>,
    /// What a process that is not root's keeps when it executes a program. All of it is granted.
    pub ambient: HashSet<Capability>,
}

/// The container's sets.
///
/// # Errors
/// A name that Linux does not have.
pub fn of(security: &cri::LinuxContainerSecurityContext) -> Result<Capabilities> {
    if security.privileged {
        return Ok(Capabilities {
            granted: ALL_CAPABILITIES.into_iter().collect(),
            ambient: HashSet::new(),
        });
    }
    let mut granted: HashSet<Capability> = DEFAULT_CAPABILITIES.into_iter().collect();
    let Some(change) = &security.capabilities else {
        return Ok(Capabilities {
            granted,
            ambient: HashSet::new(),
        });
    };
    // "ALL" first, so that single ones can be taken out of or put into it (containerd does so).
    let (all, added) = named(&change.add_capabilities)?;
    if all {
        granted.extend(ALL_CAPABILITIES);
    }
    let (all, dropped) = named(&change.drop_capabilities)?;
    if all {
        granted.clear();
    }
    granted.extend(added);
    for one in dropped {
        granted.remove(&one);
    }
    let (all, mut ambient) = named(&change.add_ambient_capabilities)?;
    if all {
        ambient = ALL_CAPABILITIES.to_vec();
    }
    granted.extend(&ambient);
    Ok(Capabilities {
        granted,
        ambient: ambient.into_iter().collect(),
    })
}

/// Whether "ALL" is among the names, and what the others name.
fn named(names: &[String]) -> Result<(bool, Vec<Capability>)> {
    let (all, names): (Vec<_>, Vec<_>) = names
        .iter()
        .partition(|name| name.eq_ignore_ascii_case("ALL"));
    let named = names.into_iter().map(|name| capability(name));
    Ok((!all.is_empty(), named.collect::<Result<_>>()?))
}

fn capability(name: &str) -> Result<Capability> {
    let upper = name.to_ascii_uppercase();
    upper
        .trim_start_matches("CAP_")
        .parse()
        .map_err(|_| Error::Invalid {
            field: "config.linux.security_context.capabilities",
            problem: format!("no capability is named {name:?}"),
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capabilities_add_and_drop() {
        let set = |add: &[&str], drop: &[&str]| {
            of(&cri::LinuxContainerSecurityContext {
                capabilities: Some(cri::Capability {
                    add_capabilities: add.iter().map(|&c| c.to_owned()).collect(),
                    drop_capabilities: drop.iter().map(|&c| c.to_owned()).collect(),
                    ..Default::default()
                }),
                ..Default::default()
            })
            .map(|sets| sets.granted)
        };
        assert_eq!(set(&[], &[]).unwrap().len(), 14);
        assert_eq!(set(&["ALL"], &[]).unwrap().len(), 41);
        assert_eq!(set(&[], &["all"]).unwrap().len(), 0);
        let one = set(&["NET_ADMIN"], &["ALL"]).unwrap();
        assert_eq!(one, HashSet::from([Capability::NetAdmin]));
        assert_eq!(set(&["CAP_NET_ADMIN"], &["ALL"]).unwrap(), one);
        assert_eq!(set(&["ALL"], &["SYS_ADMIN"]).unwrap().len(), 40);
        assert!(set(&["NO_SUCH"], &[]).is_err());
    }

    #[test]
    fn ambient_ones_are_granted_too() {
        let sets = of(&cri::LinuxContainerSecurityContext {
            capabilities: Some(cri::Capability {
                drop_capabilities: vec!["ALL".into()],
                add_ambient_capabilities: vec!["NET_BIND_SERVICE".into()],
                ..Default::default()
            }),
            ..Default::default()
        })
        .unwrap();
        assert_eq!(sets.ambient, HashSet::from([Capability::NetBindService]));
        assert_eq!(sets.granted, sets.ambient);
    }
}
