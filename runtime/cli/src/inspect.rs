//! `podvisor inspect`: what podvisord and the monitor know of a pod, as one JSON document.

use podvisor_proto::{cri, monitor};
use serde_json::{Map, Value, json};

use crate::client::{self, ClientError, Daemon};
use crate::{Context, memory, pods};

/// Options of `podvisor inspect`.
#[derive(Debug, clap::Args)]
pub struct InspectArgs {
    /// Pod: its id, the beginning of its id, its name or NAMESPACE/NAME
    pod: String,
}

/// Prints what can be had: either side may be away.
pub async fn inspect(context: &Context, args: InspectArgs) -> anyhow::Result<()> {
    let run_dir = &context.config.run_dir;
    let id = pods::resolve(&context.socket, run_dir, &args.pod).await?;
    let snapshot = client::snapshot(run_dir, &id).await;
    let document = json!({
        "id": id,
        "podvisord": or_error(status(context, &id).await),
        "vm": or_error(vm(context, &id).await),
        "monitor": or_error(snapshot.map(|snapshot| snapshot_json(&snapshot))),
    });
    println!("{}", serde_json::to_string_pretty(&document)?);
    Ok(())
}

/// The VM: what it has, and what it has done.
async fn vm(context: &Context, id: &str) -> Result<Value, ClientError> {
    let run_dir = &context.config.run_dir;
    let stats = client::vm_stats(run_dir, id).await?;
    let monitor_pid = client::snapshot(run_dir, id).await?.monitor_pid;
    // As root it can be read, unless the pod ends just now.
    let mut processes = memory::of_pod(monitor_pid, &stats.guest_memory).unwrap_or_default();
    let server = memory::volume_server(&client::sandbox_dir(run_dir, id));
    processes.extend(server.ok().flatten());
    let resident: u64 = processes.iter().map(|p| p.usage.guest_ram_pss).sum();
    let overhead: u64 = processes.iter().map(|p| p.usage.pss).sum();
    let devices = stats.devices.into_iter().map(|device| {
        let queues = device.queues.into_iter().map(|queue| {
            json!({
                "kicks": queue.kicks,
                "chains": queue.chains,
                "interrupts": queue.interrupts,
            })
        });
        json!({
            "name": device.name,
            "queues": queues.collect::<Vec<_>>(),
            "counters": counters_json(device.counters),
        })
    });
    Ok(json!({
        "backend": stats.backend,
        "vcpus": stats.vcpus,
        "memory_bytes": stats.memory_bytes,
        "memory_resident_bytes": resident,
        "overhead_bytes": overhead,
        "exits": counters_json(stats.exits),
        "devices": devices.collect::<Vec<_>>(),
    }))
}

fn counters_json(counters: Vec<monitor::Counter>) -> Map<String, Value> {
    let counters = counters.into_iter();
    counters
        .map(|counter| (counter.name, counter.count.into()))
        .collect()
}

fn or_error(result: Result<Value, ClientError>) -> Value {
    result.unwrap_or_else(|error| json!({ "error": error.to_string() }))
}

async fn status(context: &Context, id: &str) -> Result<Value, ClientError> {
    let mut daemon = Daemon::connect(&context.socket).await?;
    let response = daemon
        .runtime
        .pod_sandbox_status(client::within(
            client::CALL,
            cri::PodSandboxStatusRequest {
                pod_sandbox_id: id.to_owned(),
                verbose: true,
            },
        ))
        .await
        .map_err(client::failed("PodSandboxStatus"))?
        .into_inner();
    // The daemon's own additions are JSON in strings, as crictl expects them.
    let info: Map<String, Value> = response
        .info
        .into_iter()
        .map(|(key, text)| {
            let value = serde_json::from_str(&text).unwrap_or(Value::String(text));
            (key, value)
        })
        .collect();
    let status = response.status.unwrap_or_default();
    let state = status.state().as_str_name();
    let network = status.network.unwrap_or_default();
    let metadata = status.metadata.unwrap_or_default();
    Ok(json!({
        "state": state,
        "name": metadata.name,
        "namespace": metadata.namespace,
        "uid": metadata.uid,
        "attempt": metadata.attempt,
        "created_at": status.created_at,
        "ip": network.ip,
        "additional_ips": network.additional_ips.into_iter().map(|ip| ip.ip).collect::<Vec<_>>(),
        "handler": status.runtime_handler,
        "labels": status.labels,
        "annotations": status.annotations,
        "info": info,
    }))
}

fn snapshot_json(snapshot: &monitor::Snapshot) -> Value {
    let containers = snapshot.containers.iter().map(|container| {
        json!({
            "id": container.id,
            "state": container.state().as_str_name(),
            "created_ns": container.created_ns,
            "started_ns": container.started_ns,
            "finished_ns": container.finished_ns,
            "exit_code": container.exit_code,
            "reason": container.reason,
            "message": container.message,
            "guest_pid": container.pid,
        })
    });
    let timeline = snapshot.timeline.iter().map(|entry| {
        json!({
            "phase": entry.phase,
            "start_ms": entry.start_ns as f64 / 1e6,
            "end_ms": entry.end_ns as f64 / 1e6,
        })
    });
    json!({
        "state": snapshot.state().as_str_name(),
        "reason": snapshot.reason,
        "message": snapshot.message,
        "revision": snapshot.revision,
        "monitor_pid": snapshot.monitor_pid,
        "vmm_pid": snapshot.vmm_pid,
        "agent_version": snapshot.agent_version,
        "kernel_release": snapshot.kernel_release,
        "guest_memory_total_bytes": snapshot.guest_memory_total_bytes,
        "guest_memory_available_bytes": snapshot.guest_memory_available_bytes,
        "timeline": timeline.collect::<Vec<_>>(),
        "containers": containers.collect::<Vec<_>>(),
    })
}
