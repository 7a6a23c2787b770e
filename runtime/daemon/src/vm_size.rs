//! How large a pod's VM is.

use podvisor_proto::cri;

use crate::config;

/// vCPUs and memory of a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VmSize {
    /// At least 1.
    pub vcpus: u32,
    /// Bytes, a multiple of 2 MiB, so that huge pages can back it.
    pub memory_bytes: u64,
}

const MIB: u64 = 1 << 20;

/// The size for a pod: what it names as resources and overhead (the sum of its containers' and the
/// RuntimeClass's), else the configured default.
pub fn of(config: &cri::PodSandboxConfig, defaults: &config::Vm) -> VmSize {
    let linux = config.linux.as_ref();
    let resources = linux.and_then(|linux| linux.resources.as_ref());
    let overhead = linux.and_then(|linux| linux.overhead.as_ref());
    let limit = resources.map_or(0, |r| r.memory_limit_in_bytes.max(0) as u64);
    let memory = if limit == 0 {
        defaults.memory_mib * MIB
    } else {
        limit + overhead.map_or(0, |r| r.memory_limit_in_bytes.max(0) as u64)
    };
    let memory = memory.max(defaults.min_memory_mib * MIB);
    let vcpus = match resources.map_or(0.0, cpus) {
        limit if limit > 0.0 => (limit + overhead.map_or(0.0, cpus)).ceil() as u32,
        _ => defaults.vcpus,
    };
    let host = std::thread::available_parallelism().map_or(1, |n| n.get() as u32);
    VmSize {
        vcpus: vcpus.clamp(1, host),
        memory_bytes: memory.next_multiple_of(2 * MIB),
    }
}

/// CPUs that a CFS quota allows; 0: no limit.
fn cpus(resources: &cri::LinuxContainerResources) -> f64 {
    if resources.cpu_quota <= 0 {
        return 0.0;
    }
    let period = match resources.cpu_period {
        period if period > 0 => period,
        _ => 100_000,
    };
    resources.cpu_quota as f64 / period as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(memory: i64, quota: i64, overhead: i64) -> cri::PodSandboxConfig {
        cri::PodSandboxConfig {
            linux: Some(cri::LinuxPodSandboxConfig {
                resources: Some(cri::LinuxContainerResources {
                    memory_limit_in_bytes: memory,
                    cpu_quota: quota,
                    cpu_period: 100_000,
                    ..Default::default()
                }),
                overhead: Some(cri::LinuxContainerResources {
                    memory_limit_in_bytes: overhead,
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    #[test]
    fn a_pod_without_limits_gets_the_default() {
        let defaults = config::Vm::default();
        let size = of(&cri::PodSandboxConfig::default(), &defaults);
        assert_eq!(size.memory_bytes, defaults.memory_mib * MIB);
        assert_eq!(size.vcpus, 1);
        // Overhead alone is no limit.
        assert_eq!(of(&pod(0, 0, 64 << 20), &defaults), size);
    }

    #[test]
    fn limits_and_overhead_add_up() {
        let size = of(&pod(1 << 30, 50_000, 160 << 20), &config::Vm::default());
        assert_eq!(size.memory_bytes, (1024 + 160) * MIB);
        assert_eq!(size.vcpus, 1);
    }

    #[test]
    fn no_vm_is_too_small_to_boot() {
        let defaults = config::Vm::default();
        let size = of(&pod(4096, 1, 0), &defaults);
        assert_eq!(size.memory_bytes, defaults.min_memory_mib * MIB);
    }
}
