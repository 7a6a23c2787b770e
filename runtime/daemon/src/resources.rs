//! UpdateContainerResources, and the CPUs of the node that a pod's VM may run on.

use std::sync::Arc;

use podvisor_node::cgroup::{CgroupError, PodCgroup};
use podvisor_node::inventory;
use podvisor_proto::{cri, monitor};
use tracing::warn;

use crate::daemon::{Daemon, blocking, within};
use crate::error::{Error, Result};
use crate::pod::Pod;
use crate::spec::resources::{self, numbers};
use crate::vm_size;

/// Longer than the monitor's own deadline for the agent.
const CALL: std::time::Duration = std::time::Duration::from_mins(1);

impl Daemon {
    /// Sets limits of a container that is created or runs. What is 0 or empty stays as it is.
    ///
    /// # Errors
    /// INVALID_ARGUMENT; FAILED_PRECONDITION: it has ended, or it uses more memory than it is to have.
    /// The limits are then those of before.
    pub async fn update_container_resources(
        &self,
        request: cri::UpdateContainerResourcesRequest,
    ) -> Result<()> {
        let container = self.pods.find_container(&request.container_id)?;
        let monitor = container.pod.ready_monitor()?;
        let Some(changes) = request.linux else {
            return Ok(());
        };
        // One change at a time: each is made from what the one before left.
        let _turn = container.updating.lock().await;
        let state = container.state().state();
        if state == monitor::ContainerState::Exited {
            return Err(Error::Precondition(format!(
                "container {} has ended",
                container.record.id
            )));
        }
        let mut merged = container.limits();
        merge(&mut merged, changes);
        check_cpus(&merged)?;
        let spec = resources::of(&merged)?;
        let request = monitor::UpdateContainerRequest {
            id: container.record.id.clone(),
            resources: serde_json::to_vec(&spec)
                .map_err(|error| Error::io("OCI resources")(std::io::Error::other(error)))?,
        };
        self.make_room(&container.pod, Some((&container.record.id, &merged)))
            .await?;
        let mut client = monitor.client();
        within(CALL, "UpdateContainer", client.update_container(request)).await?;
        container.set_limits(merged);
        self.store.put_container(container.record()).await?;
        self.place(&container.pod).await
    }

    /// Changes what a pod may have, all its containers together.
    ///
    /// The group that `cgroup_parent` names is its maker's: a kubelet has changed it before it calls. Without one
    /// the pod's own group gets the limits. A VM is given more memory, and keeps it; its CPUs and huge pages are those
    /// that it was made with: less is a matter of limits, more is refused.
    ///
    /// # Errors
    /// INVALID_ARGUMENT; FAILED_PRECONDITION: the VM cannot be as large, or the pod's own group cannot have the limits, because
    /// more memory is in use or the node lacks a controller.
    pub async fn update_pod_sandbox_resources(
        &self,
        request: cri::UpdatePodSandboxResourcesRequest,
    ) -> Result<()> {
        let pod = self.pods.find(&request.pod_sandbox_id)?;
        pod.ready_monitor()?;
        let _one_at_a_time = pod.lifecycle.lock().await;
        let record = pod.record();
        let on_host = Self::is_on_host(&record);
        let made = record.config.unwrap_or_default();
        let mut wanted = made.clone();
        let linux = wanted.linux.get_or_insert_default();
        if let Some(updated) = record.updated {
            *linux = updated;
        }
        if let Some(changes) = request.resources {
            merge(linux.resources.get_or_insert_default(), changes);
        }
        if let Some(changes) = request.overhead {
            merge(linux.overhead.get_or_insert_default(), changes);
        }
        let limits = linux.clone();
        if !on_host {
            let (is, asked) = (
                vm_size::of(&made, &self.config.vm)?,
                vm_size::of(&wanted, &self.config.vm)?,
            );
            if !is.holds(&asked) {
                return Err(Error::Precondition(format!(
                    "sandbox {} has a VM of {is} and would need one of {asked}: only its memory can grow",
                    pod.id
                )));
            }
            self.grow(&pod, asked.memory_bytes).await?;
        }
        if limits.cgroup_parent.is_empty() {
            self.limit_group(&pod.id, &made, limits.clone(), on_host)
                .await?;
        }
        self.store.put_sandbox(pod.set_limits(limits)).await?;
        Ok(())
    }

    /// Gives the pod's VM the memory that its containers may use, if it has not got it yet: those that have not ended, by
    /// their limits, or the one that is named by its new ones.
    ///
    /// # Errors
    /// FAILED_PRECONDITION: it cannot have as much.
    pub async fn make_room(
        &self,
        pod: &Arc<Pod>,
        changed: Option<(&str, &cri::LinuxContainerResources)>,
    ) -> Result<()> {
        let record = pod.record();
        if Self::is_on_host(&record) {
            return Ok(());
        }
        let mut limits = 0_u64;
        for container in self.pods.containers_of(&pod.id) {
            if container.state().state() == monitor::ContainerState::Exited {
                continue;
            }
            let limit = match changed {
                Some((id, new)) if id == container.record.id => vm_size::memory_bytes(Some(new)),
                _ => vm_size::memory_bytes(Some(&container.limits())),
            };
            limits = limits.saturating_add(limit);
        }
        let mut config = record.config.unwrap_or_default();
        if record.updated.is_some() {
            config.linux = record.updated;
        }
        let defaults = &self.config.vm;
        // A limit is no wish for as much: where nobody has set a maximum, a VM has what it can.
        let bound = match defaults.max_memory_mib {
            0 => pod.snapshot().max_memory_bytes,
            _ => vm_size::node_memory(),
        };
        let needed = vm_size::memory_with_containers(&config, limits, bound, defaults)?;
        self.grow(pod, needed).await
    }

    /// Gives the pod's VM memory until it has at least `bytes`.
    ///
    /// # Errors
    /// FAILED_PRECONDITION: it cannot have as much.
    async fn grow(&self, pod: &Arc<Pod>, bytes: u64) -> Result<()> {
        let (has, max) = {
            let snapshot = pod.snapshot();
            (snapshot.memory_bytes, snapshot.max_memory_bytes)
        };
        if has >= bytes {
            return Ok(());
        }
        if has == 0 {
            // Until it is made anew, with what is needed.
            warn!(sandbox = pod.id, "its monitor cannot give a VM memory");
            return Ok(());
        }
        if bytes > max {
            return Err(Error::Precondition(format!(
                "sandbox {} has a VM of {} MiB, would need one of {} MiB, and can get to {} MiB (vm.max_memory_mib in the configuration)",
                pod.id,
                has >> 20,
                bytes.div_ceil(1 << 20),
                max >> 20,
            )));
        }
        let request = monitor::GrowRequest {
            memory_bytes: bytes,
        };
        let mut client = pod.ready_monitor()?.client();
        let grown = within(CALL, "Grow", client.grow(request)).await?;
        self.pods.apply(pod, grown.snapshot);
        Ok(())
    }

    /// Sets limits of the pod's own group. A VM's memory is as much as it was made with.
    async fn limit_group(
        &self,
        id: &str,
        config: &cri::PodSandboxConfig,
        limits: cri::LinuxPodSandboxConfig,
        memory: bool,
    ) -> Result<()> {
        let parent = self.cgroup_parent(config);
        let leaf = inventory::cgroup_leaf(&self.config.run_dir, id);
        let set = move || {
            let group = PodCgroup::at(&parent, &leaf)?;
            if memory {
                group.set_memory(vm_size::memory_limit(&limits))?;
            }
            group.set_cpus(vm_size::cpu_limit(&limits))
        };
        let refused = |error: CgroupError| Error::Precondition(error.to_string());
        blocking(move || set().map_err(refused)).await
    }

    /// Keeps the pod's VM on the CPUs and memory nodes of its containers: all those that any of them
    /// names, or those of the pod's parent when one names none.
    ///
    /// # Errors
    /// The node does not have them.
    pub async fn place(&self, pod: &Pod) -> Result<()> {
        if Self::is_on_host(&pod.record()) {
            // There the containers have control groups of their own.
            return Ok(());
        }
        let mut wanted = Vec::new();
        for container in self.pods.containers_of(&pod.id) {
            if container.state().state() != monitor::ContainerState::Exited {
                wanted.push(container.limits());
            }
        }
        let named = |limits: &cri::LinuxContainerResources| {
            !limits.cpuset_cpus.is_empty() || !limits.cpuset_mems.is_empty()
        };
        if !wanted.iter().any(named) {
            return Ok(());
        }
        let union = |list: fn(&cri::LinuxContainerResources) -> &str| {
            let lists: Vec<&str> = wanted.iter().map(list).collect();
            if lists.iter().any(|list| list.is_empty()) {
                String::new()
            } else {
                lists.join(",")
            }
        };
        let cpus = union(|limits| &limits.cpuset_cpus);
        let mems = union(|limits| &limits.cpuset_mems);
        let parent = self.cgroup_parent(&pod.record().config.unwrap_or_default());
        let leaf = inventory::cgroup_leaf(&self.config.run_dir, &pod.id);
        tokio::task::spawn_blocking(move || {
            PodCgroup::at(&parent, &leaf)?.set_cpuset(&cpus, &mems)
        })
        .await
        .map_err(|_| Error::Cancelled)??;
        Ok(())
    }
}

/// Refuses CPUs that this node does not have.
///
/// # Errors
/// INVALID_ARGUMENT.
pub fn check_cpus(asked: &cri::LinuxContainerResources) -> Result<()> {
    for (field, list, online) in [
        (
            "cpuset_cpus",
            &asked.cpuset_cpus,
            "/sys/devices/system/cpu/online",
        ),
        (
            "cpuset_mems",
            &asked.cpuset_mems,
            "/sys/devices/system/node/online",
        ),
    ] {
        let invalid = |problem: String| Error::Invalid {
            field: "config.linux.resources",
            problem: format!("{field}: {problem}"),
        };
        let wanted = numbers(list).map_err(invalid)?;
        if wanted.is_empty() {
            continue;
        }
        // A kernel without NUMA has no such file, and one node.
        let online = std::fs::read_to_string(online).unwrap_or_else(|_| "0".into());
        let online = numbers(online.trim()).map_err(invalid)?;
        if let Some(absent) = wanted.iter().find(|number| !online.contains(number)) {
            return Err(invalid(format!("this node has no {absent}")));
        }
    }
    Ok(())
}

/// Takes over what `changes` names.
fn merge(limits: &mut cri::LinuxContainerResources, changes: cri::LinuxContainerResources) {
    for (old, new) in [
        (&mut limits.cpu_period, changes.cpu_period),
        (&mut limits.cpu_quota, changes.cpu_quota),
        (&mut limits.cpu_shares, changes.cpu_shares),
        (
            &mut limits.memory_limit_in_bytes,
            changes.memory_limit_in_bytes,
        ),
        (
            &mut limits.memory_swap_limit_in_bytes,
            changes.memory_swap_limit_in_bytes,
        ),
        (&mut limits.oom_score_adj, changes.oom_score_adj),
    ] {
        if new != 0 {
            *old = new;
        }
    }
    for (old, new) in [
        (&mut limits.cpuset_cpus, changes.cpuset_cpus),
        (&mut limits.cpuset_mems, changes.cpuset_mems),
    ] {
        if !new.is_empty() {
            *old = new;
        }
    }
    for new in changes.hugepage_limits {
        limits
            .hugepage_limits
            .retain(|old| old.page_size != new.page_size);
        limits.hugepage_limits.push(new);
    }
    limits.unified.extend(changes.unified);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_named_stays() {
        let mut limits = cri::LinuxContainerResources {
            cpu_shares: 2,
            memory_limit_in_bytes: 64 << 20,
            cpuset_cpus: "0".into(),
            ..Default::default()
        };
        let page = |limit| cri::HugepageLimit {
            page_size: "2MB".into(),
            limit,
        };
        limits.hugepage_limits.push(page(0));
        let changes = cri::LinuxContainerResources {
            memory_limit_in_bytes: 32 << 20,
            hugepage_limits: vec![page(1)],
            ..Default::default()
        };
        merge(&mut limits, changes);
        assert_eq!(limits.cpu_shares, 2);
        assert_eq!(limits.memory_limit_in_bytes, 32 << 20);
        assert_eq!(limits.cpuset_cpus, "0");
        assert_eq!(limits.hugepage_limits, [page(1)]);
    }

    #[test]
    fn cpus_of_another_node_are_refused() {
        let with = |cpus: &str| {
            check_cpus(&cri::LinuxContainerResources {
                cpuset_cpus: cpus.into(),
                ..Default::default()
            })
        };
        with("").unwrap();
        with("0").unwrap();
        assert!(matches!(with("60000"), Err(Error::Invalid { .. })));
    }
}
