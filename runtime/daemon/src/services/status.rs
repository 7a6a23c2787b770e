//! Version, Status, RuntimeConfig, and the JSON that verbose answers carry.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;

use podvisor_network::{CniError, NetworkStatus};
use podvisor_node::config::CgroupDriver;
use podvisor_node::handlers;
use podvisor_proto::cri;
use podvisor_proto::monitor::{self, Backend};
use serde_json::json;
use tracing::info;

use crate::daemon::Daemon;
use crate::error::{Error, Result};
use crate::pod::{Container, Pod};

pub fn version() -> cri::VersionResponse {
    cri::VersionResponse {
        // "0.1.0" by convention: the kubelet's own kubeRuntimeAPIVersion.
        version: "0.1.0".into(),
        runtime_name: "podvisor".into(),
        runtime_version: env!("CARGO_PKG_VERSION").into(),
        runtime_api_version: "v1".into(),
    }
}

pub fn runtime_config(daemon: &Daemon) -> cri::RuntimeConfigResponse {
    let driver = match daemon.config.cgroup.driver {
        CgroupDriver::Cgroupfs => cri::CgroupDriver::Cgroupfs,
        CgroupDriver::Systemd => cri::CgroupDriver::Systemd,
    };
    cri::RuntimeConfigResponse {
        linux: Some(cri::LinuxRuntimeConfiguration {
            cgroup_driver: driver as i32,
        }),
    }
}

/// Takes note of the node's pod CIDRs. CNI's configuration says which addresses pods have; there is no template of one
/// to be filled in, as containerd has for nodes without a network add-on.
///
/// # Errors
/// INVALID_ARGUMENT: not a list of CIDRs.
pub fn update_runtime_config(
    daemon: &Daemon,
    request: cri::UpdateRuntimeConfigRequest,
) -> Result<()> {
    let config = request.runtime_config.unwrap_or_default();
    let cidrs = config.network_config.unwrap_or_default().pod_cidr;
    // Nothing to tell is nothing to change.
    if cidrs.is_empty() {
        return Ok(());
    }
    if let Some(wrong) = cidrs.split(',').find(|cidr| !is_cidr(cidr.trim())) {
        return Err(Error::Invalid {
            field: "runtime_config.network_config.pod_cidr",
            problem: format!("{wrong:?} is no address and prefix length"),
        });
    }
    info!(cidrs, "pod CIDR: CNI's configuration decides");
    *daemon.pod_cidr() = cidrs;
    Ok(())
}

fn is_cidr(text: &str) -> bool {
    let Some((address, length)) = text.split_once('/') else {
        return false;
    };
    let Ok(address) = address.parse::<IpAddr>() else {
        return false;
    };
    let bits = if address.is_ipv4() { 32 } else { 128 };
    length.parse::<u8>().is_ok_and(|length| length <= bits)
}

/// RuntimeReady and NetworkReady.
pub fn conditions(
    daemon: &Daemon,
    network: &Result<NetworkStatus, CniError>,
) -> Vec<cri::RuntimeCondition> {
    let missing = missing_file(daemon).map(|what| ("RuntimeIncomplete", what));
    let unusable = daemon.vmm.problem();
    let problem = missing.or(unusable.map(|why| ("KvmUnusable", why.to_owned())));
    let network = network.as_ref().err();
    vec![
        condition("RuntimeReady", problem),
        condition(
            "NetworkReady",
            network.map(|error| ("NetworkPluginNotReady", error.to_string())),
        ),
    ]
}

pub async fn status(daemon: &Daemon, verbose: bool) -> cri::StatusResponse {
    let network = daemon.cni.status().await;
    let conditions = conditions(daemon, &network);
    let features = |in_vm: bool| cri::RuntimeHandlerFeatures {
        recursive_read_only_mounts: true,
        user_namespaces: in_vm,
    };
    let handler = |name: &str| cri::RuntimeHandler {
        name: name.into(),
        features: Some(features(handlers::is_vm(name))),
    };
    let default = cri::RuntimeHandler {
        name: String::new(),
        features: Some(features(handlers::is_vm(&daemon.config.default_handler))),
    };
    // A handler whose OCI runtime is not installed would be a promise to the scheduler.
    let usable = |name: &&str| handlers::runtime(&daemon.config, name).is_ok();
    let named = handlers::names(&daemon.config).filter(usable).map(handler);
    let mut info = HashMap::new();
    if verbose {
        info.insert(
            "podvisor".to_owned(),
            about(daemon, network.ok()).to_string(),
        );
        if let Ok(config) = serde_json::to_string(&daemon.config) {
            info.insert("config".to_owned(), config);
        }
    }
    cri::StatusResponse {
        status: Some(cri::RuntimeStatus { conditions }),
        info,
        runtime_handlers: std::iter::once(default).chain(named).collect(),
        features: Some(cri::RuntimeFeatures {
            // The agent resolves groups by both policies.
            supplemental_groups_policy: true,
            ..Default::default()
        }),
    }
}

/// What an operator may want to know of this podvisord.
fn about(daemon: &Daemon, network: Option<NetworkStatus>) -> serde_json::Value {
    let vmm = match daemon.vmm.backend {
        Backend::Kvm => json!({ "backend": "kvm" }),
        Backend::Qemu => json!({ "backend": "qemu", "accelerator": daemon.vmm.accel }),
    };
    let handlers: BTreeMap<_, _> = handlers::names(&daemon.config)
        .map(|name| match handlers::runtime(&daemon.config, name) {
            Ok(None) => (name, json!({ "runs": "VMs" })),
            Ok(Some(runtime)) => (name, json!({ "runs": "on the node", "runtime": runtime })),
            Err(error) => (name, json!({ "unusable": error.to_string() })),
        })
        .collect();
    let kernel = nix::sys::utsname::uname().ok();
    json!({
        "version": env!("CARGO_PKG_VERSION"),
        "pid": std::process::id(),
        "nodeKernel": kernel.map(|kernel| kernel.release().to_string_lossy().into_owned()),
        "vmm": vmm,
        "kvm_problem": daemon.vmm.kvm_problem,
        "warnings": daemon.warnings,
        "handlers": handlers,
        "guest": {
            "kernel": daemon.config.kernel_path(),
            "initramfs": daemon.config.initramfs_path(),
        },
        "network": network.map(|network| json!({
            "name": network.name,
            "file": network.file,
            "ignored": network.ignored,
        })),
        "podCIDR": *daemon.pod_cidr(),
    })
}

/// The first thing without which no pod can start.
fn missing_file(daemon: &Daemon) -> Option<String> {
    let qemu = (daemon.vmm.backend == Backend::Qemu).then(|| daemon.config.qemu.binary.clone());
    [
        ("guest kernel", Some(daemon.config.kernel_path())),
        ("guest initramfs", Some(daemon.config.initramfs_path())),
        ("QEMU", qemu),
    ]
    .into_iter()
    .filter_map(|(what, path)| Some((what, path?)))
    .find(|(_, path)| !path.exists())
    .map(|(what, path)| format!("{what} {} is not there", path.display()))
}

fn condition(kind: &str, problem: Option<(&str, String)>) -> cri::RuntimeCondition {
    let (reason, message) = problem.clone().unwrap_or_default();
    cri::RuntimeCondition {
        r#type: kind.into(),
        status: problem.is_none(),
        reason: reason.into(),
        message,
    }
}

/// `info` of PodSandboxStatus: the VM, and how its start went.
pub fn pod_info(pod: &Pod) -> HashMap<String, String> {
    let record = pod.record();
    let snapshot = pod.snapshot();
    HashMap::from([
        (
            "timeline".to_owned(),
            json!(timeline(&record.timeline, &snapshot.timeline)).to_string(),
        ),
        (
            "handler".to_owned(),
            json!({
                "name": if record.handler.is_empty() { handlers::PODVISOR } else { &record.handler },
                "routedBecause": record.routed,
            })
            .to_string(),
        ),
        (
            "vm".to_owned(),
            json!({
                "state": snapshot.state().as_str_name(),
                "reason": snapshot.reason,
                "message": snapshot.message,
                "monitorPid": snapshot.monitor_pid,
                "vmmPid": snapshot.vmm_pid,
                "agentVersion": snapshot.agent_version,
                "kernelRelease": snapshot.kernel_release,
                "memoryBytes": snapshot.memory_bytes,
                "guestMemoryTotalBytes": snapshot.guest_memory_total_bytes,
                "guestMemoryAvailableBytes": snapshot.guest_memory_available_bytes,
            })
            .to_string(),
        ),
    ])
}

fn timeline(
    daemon: &[monitor::TimelineEntry],
    monitor: &[monitor::TimelineEntry],
) -> Vec<serde_json::Value> {
    let milliseconds = |ns: u64| (ns as f64 / 1e4).round() / 1e2;
    let mut entries: Vec<_> = daemon.iter().chain(monitor).collect();
    entries.sort_by_key(|entry| entry.start_ns);
    entries
        .into_iter()
        .map(|entry| {
            json!({
                "phase": entry.phase,
                "start_ms": milliseconds(entry.start_ns),
                "end_ms": milliseconds(entry.end_ns),
            })
        })
        .collect()
}

/// `info` of ContainerStatus.
pub fn container_info(container: &Container) -> HashMap<String, String> {
    let state = container.state();
    HashMap::from([(
        "info".to_owned(),
        json!({
            "sandboxID": container.record.sandbox_id,
            "guestPid": state.pid,
            "imageID": container.record.image_id,
            "stopSignal": container.record.stop_signal,
        })
        .to_string(),
    )])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cidrs_of_both_families() {
        for good in ["10.0.0.0/16", "fd00::/64", "0.0.0.0/0"] {
            assert!(is_cidr(good), "{good}");
        }
        for bad in [
            "",
            "10.0.0.0",
            "10.0.0.0/33",
            "fd00::/129",
            "x/8",
            "10.0.0.0/-1",
        ] {
            assert!(!is_cidr(bad), "{bad}");
        }
    }
}
