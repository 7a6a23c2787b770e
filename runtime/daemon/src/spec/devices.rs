//! Devices: what a container may use, and the nodes that it is given.
//!
//! A VM has its own kernel: a device of the node is not there. A character device that the guest's kernel
//! has by the same number is that one; block devices are the volumes' (`crate::volumes`); everything else is
//! refused, there. On the host, all is as it is.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use nix::sys::stat::{SFlag, major, minor};
use oci_spec::runtime::{
    LinuxDevice, LinuxDeviceBuilder, LinuxDeviceCgroup, LinuxDeviceCgroupBuilder, LinuxDeviceType,
};
use podvisor_proto::cri;
use tonic::Code;

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

/// The container's devices, as far as the guest has them.
///
/// # Errors
/// INVALID_ARGUMENT: a path or permissions that are none.
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
            .access(match device.permissions.as_str() {
                "" => "rwm",
                named => named,
            });
        if !privileged {
            rules.push(rule.build().map_err(build_error)?);
        }
        nodes.push(node);
    }
    Ok(Devices { nodes, rules })
}

/// The container's devices on the host: what is asked for, or all there are. Blocking.
///
/// # Errors
/// INVALID_ARGUMENT: a path or permissions that are none; FAILED_PRECONDITION: no device.
pub fn on_host(config: &cri::ContainerConfig) -> Result<Devices> {
    let rule = |allow| LinuxDeviceCgroupBuilder::default().allow(allow);
    let everything = |allow| rule(allow).access("rwm").build().map_err(build_error);
    let mut devices = Devices::default();
    if super::security(config).privileged {
        devices.rules.push(everything(true)?);
        below(Path::new("/dev"), Path::new("/dev"), &mut devices.nodes)
            .map_err(Error::io("listing /dev"))?;
        // Those that each container has anyway, or of its own (runtime-spec, "Default Devices").
        let own = |path: &Path| {
            ["/dev/console", "/dev/ptmx", "/dev/tty"]
                .iter()
                .any(|own| path == Path::new(own))
                || ["/dev/pts", "/dev/shm", "/dev/mqueue"]
                    .iter()
                    .any(|own| path.starts_with(own))
        };
        devices.nodes.retain(|node| !own(node.path()));
        return Ok(devices);
    }
    devices.rules.push(everything(false)?);
    for (index, device) in config.devices.iter().enumerate() {
        let refuse = |code, field, problem: String| Error::Element {
            list: "devices",
            index,
            field,
            problem,
            code,
        };
        if !device.container_path.starts_with('/') {
            let problem = format!("{:?} is not absolute", device.container_path);
            return Err(refuse(Code::InvalidArgument, "container_path", problem));
        }
        if !device
            .permissions
            .chars()
            .all(|letter| "rwm".contains(letter))
        {
            let problem = "are made of r, w and m".into();
            return Err(refuse(Code::InvalidArgument, "permissions", problem));
        }
        let mut nodes = Vec::new();
        let found = below(
            Path::new(&device.host_path),
            Path::new(&device.container_path),
            &mut nodes,
        );
        let problem = match found {
            Err(error) => Some(error.to_string()),
            Ok(()) if nodes.is_empty() => Some("is no device".into()),
            Ok(()) => None,
        };
        if let Some(problem) = problem {
            let problem = format!("{}: {problem}", device.host_path);
            return Err(refuse(Code::FailedPrecondition, "host_path", problem));
        }
        for node in &nodes {
            let rule = rule(true)
                .typ(node.typ())
                .major(node.major())
                .minor(node.minor());
            let rule = rule.access(match device.permissions.as_str() {
                "" => "rwm",
                named => named,
            });
            devices.rules.push(rule.build().map_err(build_error)?);
        }
        devices.nodes.extend(nodes);
    }
    Ok(devices)
}

/// The device at `path`, or all in the folder `path`, as nodes at `target`.
fn below(path: &Path, target: &Path, nodes: &mut Vec<LinuxDevice>) -> io::Result<()> {
    let status = fs::metadata(path)?;
    let kind = match SFlag::from_bits_truncate(status.mode()) & SFlag::S_IFMT {
        SFlag::S_IFCHR => LinuxDeviceType::C,
        SFlag::S_IFBLK => LinuxDeviceType::B,
        SFlag::S_IFDIR => {
            for entry in fs::read_dir(path)? {
                let entry = entry?;
                // Links name what is there by another name, too; what goes away meanwhile is not there.
                if !entry.file_type()?.is_symlink() {
                    let _ = below(&entry.path(), &target.join(entry.file_name()), nodes);
                }
            }
            return Ok(());
        }
        _ => return Ok(()),
    };
    let node = LinuxDeviceBuilder::default()
        .path(target)
        .typ(kind)
        .major(major(status.rdev()) as i64)
        .minor(minor(status.rdev()) as i64)
        .file_mode(status.mode() & 0o7777)
        .uid(status.uid())
        .gid(status.gid())
        .build();
    nodes.push(node.map_err(io::Error::other)?);
    Ok(())
}

/// Whether a device of the host, by its mode and number, is one that the guest has, too.
pub fn is_in_guest(mode: u32, number: u64) -> bool {
    let kind = SFlag::from_bits_truncate(mode) & SFlag::S_IFMT;
    kind == SFlag::S_IFCHR && IN_GUEST.contains(&(major(number), minor(number)))
}

/// None: not one that the guest has.
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
    let status = match tokio::fs::metadata(host_path).await {
        Ok(status) if is_in_guest(status.mode(), status.rdev()) => status,
        _ => return Ok(None),
    };
    if !container_path.starts_with('/') {
        return Err(invalid(format!(
            "container_path {container_path:?} is not absolute"
        )));
    }
    if !permissions.chars().all(|letter| "rwm".contains(letter)) {
        return Err(invalid(format!(
            "permissions {permissions:?} are not of \"rwm\""
        )));
    }
    LinuxDeviceBuilder::default()
        .path(container_path)
        .typ(LinuxDeviceType::C)
        .major(major(status.rdev()) as i64)
        .minor(minor(status.rdev()) as i64)
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

    #[test]
    fn on_the_host_there_are_more() {
        let devices = on_host(&device("/dev/loop-control", "/dev/x", "r")).unwrap();
        assert_eq!(devices.nodes[0].path(), Path::new("/dev/x"));
        assert_eq!(devices.rules[1].access().as_deref(), Some("r"));
        for bad in ["/dev/no-such-device", "/etc/passwd", "/etc"] {
            let error = on_host(&device(bad, "/dev/x", "")).unwrap_err();
            assert!(
                error
                    .to_string()
                    .starts_with("config.devices[0].host_path: "),
                "{error}"
            );
        }
        let mut config = cri::ContainerConfig::default();
        let linux = config.linux.get_or_insert_default();
        linux.security_context.get_or_insert_default().privileged = true;
        let all = on_host(&config).unwrap();
        let has = |path: &str| all.nodes.iter().any(|node| node.path() == Path::new(path));
        assert!(has("/dev/null") && !has("/dev/ptmx"));
    }

    #[tokio::test]
    async fn what_only_the_host_has_is_not_given() {
        for other in ["/dev/no-such-device", "/dev", "/etc/passwd"] {
            let devices = of(&device(other, "/dev/x", "r")).await.unwrap();
            assert!(devices.nodes.is_empty(), "{other}");
        }
        for (path, permissions) in [("dev/x", "rw"), ("/dev/x", "rx")] {
            let error = of(&device("/dev/zero", path, permissions))
                .await
                .unwrap_err();
            assert!(matches!(error, Error::Invalid { .. }), "{error}");
        }
    }
}
