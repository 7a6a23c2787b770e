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

/// All that Linux 6.12 knows.
const ALL_CAPABILITIES: [Capability; 41] = [
    Capability::AuditControl,
    Capability::AuditRead,
    Capability::AuditWrite,
    Capability::BlockSuspend,
    Capability::Bpf,
    Capability::CheckpointRestore,
    Capability::Chown,
    Capability::DacOverride,
    Capability::DacReadSearch,
    Capability::Fowner,
    Capability::Fsetid,
    Capability::IpcLock,
    Capability::IpcOwner,
    Capability::Kill,
    Capability::Lease,
    Capability::LinuxImmutable,
    Capability::MacAdmin,
    Capability::MacOverride,
    Capability::Mknod,
    Capability::NetAdmin,
    Capability::NetBindService,
    Capability::NetBroadcast,
    Capability::NetRaw,
    Capability::Perfmon,
    Capability::Setfcap,
    Capability::Setgid,
    Capability::Setpcap,
    Capability::Setuid,
    Capability::SysAdmin,
    Capability::SysBoot,
    Capability::SysChroot,
    Capability::SysModule,
    Capability::SysNice,
    Capability::SysPacct,
    Capability::SysPtrace,
    Capability::SysRawio,
    Capability::SysResource,
    Capability::SysTime,
    Capability::SysTtyConfig,
    Capability::Syslog,
    Capability::WakeAlarm,
];

/// The container's set.
///
/// # Errors
/// A name that Linux does not have.
pub fn of(security: &cri::LinuxContainerSecurityContext) -> Result<HashSet<Capability>> {
    if security.privileged {
        return Ok(ALL_CAPABILITIES.into_iter().collect());
    }
    let mut set: HashSet<Capability> = DEFAULT_CAPABILITIES.into_iter().collect();
    let Some(change) = &security.capabilities else {
        return Ok(set);
    };
    let is_all = |name: &String| name.eq_ignore_ascii_case("ALL");
    // "ALL" first, so that single ones can be taken out of or put into it (containerd does so).
    if change.add_capabilities.iter().any(is_all) {
        set.extend(ALL_CAPABILITIES);
    }
    if change.drop_capabilities.iter().any(is_all) {
        set.clear();
    }
    for name in change.add_capabilities.iter().filter(|name| !is_all(name)) {
        set.insert(capability(name)?);
    }
    for name in change.drop_capabilities.iter().filter(|name| !is_all(name)) {
        set.remove(&capability(name)?);
    }
    Ok(set)
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
}
