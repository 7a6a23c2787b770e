//! Devices: what a container may use, and the nodes that it is given.
//!
//! A VM has its own kernel: a device of the node is not there. A character device that the guest's kernel
//! has by the same number is that one; block devices become segments of the pod's disk (`volumes::block`);
//! everything else is refused.

use std::os::unix::fs::{FileTypeExt, MetadataExt};

use nix::sys::stat::{major, minor};
use oci_spec::runtime::{
    LinuxDevice, LinuxDeviceBuilder, LinuxDeviceCgroup, LinuxDeviceCgroupBuilder, LinuxDeviceType,
};
use podvisor_proto::cri;

use super::build_error;
use crate::error::{Error, Result};

const FIELD: &str = "config.devices";

/// Character devices that are the same in every kernel: null, zero, full, random, urandom, tty, tun, fuse
/// (Documentation/admin-guide/devices.txt).
const IN_GUEST: [(u64, u64); 8] = [
    (1, 3),
    (1, 5),
    (1, 7),
    (1, 8),
    (1, 9),
    (5, 0),
    (10, 200),
    (10, 229),
];

/// Nodes, and the rules of who may use what. No rules: everything may be used.
#[derive(Debug, Default)]
pub struct Devices {
    /// To be made.
    pub nodes: Vec<LinuxDevice>,
    /// For the control group.
    pub rules: Vec<LinuxDeviceCgroup>,
}

/// The container's devices.
///
/// # Errors
/// INVALID_ARGUMENT: a path or permissions that are none. FAILED_PRECONDITION: a device that only the
/// host has.
pub async fn of(config: &cri::ContainerConfig) -> Result<Devices> {
    let privileged = super::security(config).privileged;
    let mut nodes = Vec::with_capacity(config.devices.len());
    let mut rules = Vec::new();
    if !privileged {
        // What every container may use, the agent adds.
        let nothing = LinuxDeviceCgroupBuilder::default()
            .allow(false)
            .access("rwm");
        rules.push(nothing.build().map_err(build_error)?);
    }
    for device in &config.devices {
        let Some(node) = node(device).await? else {
            continue;
        };
        let rule = LinuxDeviceCgroupBuilder::default()
            .allow(true)
            .typ(LinuxDeviceType::C)
            .major(node.major())
            .minor(node.minor())
            .access(device.permissions.clone());
        if !privileged {
            rules.push(rule.build().map_err(build_error)?);
        }
        nodes.push(node);
    }
    Ok(Devices { nodes, rules })
}

/// `None`: a block device.
async fn node(device: &cri::Device) -> Result<Option<LinuxDevice>> {
    let invalid = |problem: String| Error::Invalid {
        field: FIELD,
        problem,
    };
    let cri::Device {
        container_path,
        host_path,
        permissions,
    } = device;
    if !container_path.starts_with('/') {
        return Err(invalid(format!(
            "container_path {container_path:?} is not absolute"
        )));
    }
    if permissions.is_empty() || !permissions.chars().all(|letter| "rwm".contains(letter)) {
        return Err(invalid(format!(
            "permissions {permissions:?} are not of \"rwm\""
        )));
    }
    let status = tokio::fs::metadata(host_path)
        .await
        .map_err(|error| invalid(format!("host_path {host_path}: {error}")))?;
    if status.file_type().is_block_device() {
        return Ok(None);
    }
    let number = (major(status.rdev()), minor(status.rdev()));
    if !status.file_type().is_char_device() || !IN_GUEST.contains(&number) {
        return Err(Error::Precondition(format!(
            "{FIELD}: {host_path} is a device of the host; a container in a VM cannot have it"
        )));
    }
    LinuxDeviceBuilder::default()
        .path(container_path)
        .typ(LinuxDeviceType::C)
        .major(number.0 as i64)
        .minor(number.1 as i64)
        .file_mode(status.mode() & 0o7777)
        .uid(status.uid())
        .gid(status.gid())
        .build()
        .map(Some)
        .map_err(build_error)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(host_path: &str, container_path: &str, permissions: &str) -> cri::ContainerConfig {
        cri::ContainerConfig {
            devices: vec![cri::Device {
                container_path: container_path.into(),
                host_path: host_path.into(),
                permissions: permissions.into(),
            }],
            ..Default::default()
        }
    }

    #[tokio::test]
    async fn what_the_guest_has_too_is_given() {
        let mut config = device("/dev/zero", "/dev/nil", "rw");
        let devices = of(&config).await.unwrap();
        assert_eq!((devices.nodes[0].major(), devices.nodes[0].minor()), (1, 5));
        assert_eq!(devices.rules.len(), 2);
        assert!(!devices.rules[0].allow() && devices.rules[1].allow());
        let linux = config.linux.get_or_insert_default();
        linux.security_context.get_or_insert_default().privileged = true;
        let privileged = of(&config).await.unwrap();
        assert!(privileged.rules.is_empty(), "nothing is forbidden");
    }

    #[tokio::test]
    async fn what_only_the_host_has_is_refused() {
        for (config, precondition) in [
            (device("/dev/no-such-device", "/dev/x", "rw"), false),
            (device("/dev/zero", "dev/x", "rw"), false),
            (device("/dev/zero", "/dev/x", ""), false),
            (device("/dev/zero", "/dev/x", "rx"), false),
            (device("/dev", "/dev/x", "r"), true),
            (device("/etc/passwd", "/dev/x", "r"), true),
        ] {
            let error = of(&config).await.unwrap_err();
            let is = matches!(error, Error::Precondition(_));
            assert_eq!(is, precondition, "{error}");
        }
    }
}
