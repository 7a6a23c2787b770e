//! What differs in the spec of a container on the host: it is the node's own kernel that carries it out.

use std::collections::HashSet;
use std::fs;

use oci_spec::runtime::{Capability, Process, Spec};
use podvisor_proto::cri;

use super::capabilities;
use crate::confinement::Confinement;
use crate::host::HostPod;

/// linux/capability.h
const CAP_SYS_RESOURCE: u8 = 24;

/// Adapts the spec of a container.
pub fn adapt(
    spec: &mut Spec,
    config: &cri::ContainerConfig,
    sandbox: &cri::PodSandboxConfig,
    host_pod: &HostPod,
    confinement: Confinement,
) {
    if let Some(process) = spec.process_mut() {
        // podvisord's own, those of a usual service: it may not be able to raise them.
        process.set_rlimits(None);
        let bounding = bounding_capabilities();
        keep_capabilities(process, bounding);
        if bounding & (1 << CAP_SYS_RESOURCE) == 0 {
            // It cannot be lowered then (proc_pid_oom_score_adj(5)); podvisord has said so at its start.
            let wanted = process.oom_score_adj().unwrap_or_default();
            process.set_oom_score_adj(Some(wanted.max(own_oom_score_adj())));
        }
        process.set_apparmor_profile(confinement.apparmor);
        process.set_selinux_label(confinement.selinux.clone());
    }
    // The monitor's, or the node's; the builder has a name of its own.
    spec.set_hostname(None);
    let mut mounts = spec.mounts().clone().unwrap_or_default();
    for mount in &mut mounts {
        if mount.destination().as_os_str() == "/dev/shm" {
            mount.set_source(Some(host_pod.shm.clone()));
        }
    }
    spec.set_mounts(Some(mounts));
    if let Some(linux) = spec.linux_mut() {
        // The OCI runtime refuses those of a namespace that is the host's.
        let asked = sandbox.linux.as_ref().map(|linux| linux.sysctls.clone());
        linux.set_sysctl(asked.filter(|sysctls| !sysctls.is_empty()));
        linux.set_rootfs_propagation(root_propagation(config));
        linux.set_mount_label(confinement.selinux);
    }
}

/// A mount in the root propagates as its volume's does only where the root's own mount lets it (runc, libcontainer).
fn root_propagation(config: &cri::ContainerConfig) -> Option<String> {
    use cri::MountPropagation::{PropagationBidirectional, PropagationHostToContainer};
    let has = |wanted| {
        config
            .mounts
            .iter()
            .any(|mount| mount.propagation() == wanted)
    };
    let kind = match (
        has(PropagationBidirectional),
        has(PropagationHostToContainer),
    ) {
        (true, _) => "rshared",
        (false, true) => "rslave",
        (false, false) => return None,
    };
    Some(kind.to_owned())
}

/// Nobody can give what the node's root does not have.
fn keep_capabilities(process: &mut Process, bounding: u64) {
    let Some(mut sets) = process.capabilities().clone() else {
        return;
    };
    let kept = |set: &Option<HashSet<Capability>>| {
        let all = set.iter().flatten().copied();
        Some(
            all.filter(|one| bounding & (1 << capabilities::number(*one)) != 0)
                .collect(),
        )
    };
    sets.set_bounding(kept(sets.bounding()));
    sets.set_effective(kept(sets.effective()));
    sets.set_permitted(kept(sets.permitted()));
    sets.set_inheritable(kept(sets.inheritable()));
    sets.set_ambient(kept(sets.ambient()));
    process.set_capabilities(Some(sets));
}

/// This process's, a bit for each number; all, should it not be known.
fn bounding_capabilities() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mut lines = status.lines();
    let set = lines.find_map(|line| line.strip_prefix("CapBnd:"));
    set.and_then(|set| u64::from_str_radix(set.trim(), 16).ok())
        .unwrap_or(u64::MAX)
}

fn own_oom_score_adj() -> i32 {
    let own = fs::read_to_string("/proc/self/oom_score_adj").unwrap_or_default();
    own.trim().parse().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_root_has_is_given() {
        let mut process = Process::default();
        let all = HashSet::from([Capability::Chown, Capability::SysResource]);
        let mut sets = oci_spec::runtime::LinuxCapabilities::default();
        sets.set_bounding(Some(all.clone()));
        sets.set_effective(Some(all));
        process.set_capabilities(Some(sets));
        keep_capabilities(&mut process, 1);
        let sets = process.capabilities().clone().unwrap();
        let chown = HashSet::from([Capability::Chown]);
        assert_eq!(sets.bounding().as_ref(), Some(&chown));
        assert_eq!(sets.effective().as_ref(), Some(&chown));
    }

    #[test]
    fn the_root_propagates_when_a_volume_does() {
        let with = |propagation: cri::MountPropagation| cri::ContainerConfig {
            mounts: vec![cri::Mount {
                propagation: propagation as i32,
                ..Default::default()
            }],
            ..Default::default()
        };
        use cri::MountPropagation::{PropagationBidirectional, PropagationPrivate};
        assert_eq!(root_propagation(&with(PropagationPrivate)), None);
        let both = root_propagation(&with(PropagationBidirectional));
        assert_eq!(both.as_deref(), Some("rshared"));
    }
}
