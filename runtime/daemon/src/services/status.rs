//! Version, Status, RuntimeConfig, and the JSON that verbose answers carry.

use std::collections::HashMap;

use podvisor_proto::cri;
use podvisor_proto::monitor::{self, Backend};
use serde_json::json;

use crate::config::CgroupDriver;
use crate::daemon::Daemon;
use crate::handlers;
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

pub async fn status(daemon: &Daemon, verbose: bool) -> cri::StatusResponse {
    let network = daemon.cni.status().await;
    let missing = missing_file(daemon).map(|what| ("RuntimeIncomplete", what));
    let unusable = daemon.vmm.problem();
    let problem = missing.or(unusable.map(|why| ("KvmUnusable", why.to_owned())));
    let conditions = vec![
        condition("RuntimeReady", problem),
        condition(
            "NetworkReady",
            network
                .as_ref()
                .err()
                .map(|error| ("NetworkPluginNotReady", error.to_string())),
        ),
    ];
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
        let vmm = match daemon.vmm.backend {
            Backend::Kvm => json!({ "backend": "kvm" }),
            Backend::Qemu => json!({ "backend": "qemu", "accelerator": daemon.vmm.accel }),
        };
        info.insert(
            "podvisor".to_owned(),
            json!({
                "version": env!("CARGO_PKG_VERSION"),
                "vmm": vmm,
                "kvm_problem": daemon.vmm.kvm_problem,
                "warnings": daemon.warnings,
                "network": network.ok().map(|network| json!({
                    "name": network.name,
                    "file": network.file,
                    "ignored": network.ignored,
                })),
            })
            .to_string(),
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
