//! How large a pod's VM is.

use podvisor_node::config;
use podvisor_proto::cri;
use podvisor_proto::monitor::Backend;

use crate::error::{Error, Result};

/// vCPUs and memory of a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VmSize {
    /// At least 1.
    pub vcpus: u32,
    /// Bytes, a multiple of 2 MiB, so that huge pages can back it.
    pub memory_bytes: u64,
    /// Pages of 2 MiB of that memory that are set aside for who asks for such pages.
    pub huge_pages: u64,
}

const MIB: u64 = 1 << 20;

impl VmSize {
    /// Whether a VM of this size has what `other` asks for, but for memory, which it can be given.
    pub fn holds(&self, other: &Self) -> bool {
        other.vcpus <= self.vcpus && other.huge_pages <= self.huge_pages
    }
}

impl std::fmt::Display for VmSize {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { vcpus, .. } = self;
        write!(f, "{vcpus} vCPUs and {} MiB", self.memory_bytes / MIB)?;
        if self.huge_pages > 0 {
            write!(f, ", {} huge pages of it", self.huge_pages)?;
        }
        Ok(())
    }
}

/// Size of the only huge pages that the guest has, as kubelets name it and in bytes.
const HUGE_PAGE: (&str, u64) = ("2MB", 2 * MIB);

/// Huge pages that a pod asks for.
fn huge_pages(config: &cri::PodSandboxConfig) -> Result<u64> {
    let resources = config
        .linux
        .as_ref()
        .and_then(|linux| linux.resources.as_ref());
    let mut pages = 0;
    for limit in resources.map_or(&[][..], |r| &r.hugepage_limits) {
        if limit.page_size == HUGE_PAGE.0 {
            pages = limit.limit.div_ceil(HUGE_PAGE.1);
        } else if limit.limit > 0 {
            return Err(Error::Invalid {
                field: "config.linux.resources.hugepage_limits",
                problem: format!(
                    "a VM has huge pages of {}, not of {}",
                    HUGE_PAGE.0, limit.page_size
                ),
            });
        }
    }
    Ok(pages)
}

/// The size for a pod: what it names as resources and overhead (the sum of its containers' and the
/// RuntimeClass's), else the configured default. Huge pages come on top, as they are not part of the limit.
///
/// # Errors
/// INVALID_ARGUMENT: huge pages of a size that VMs do not have.
pub fn of(config: &cri::PodSandboxConfig, defaults: &config::Vm) -> Result<VmSize> {
    let linux = config.linux.as_ref();
    let memory = linux.and_then(memory_limit);
    let huge_pages = huge_pages(config)?;
    let memory = memory
        .unwrap_or(defaults.memory_mib * MIB)
        .max(defaults.min_memory_mib * MIB)
        .saturating_add(huge_pages.saturating_mul(HUGE_PAGE.1));
    let vcpus = linux
        .and_then(cpu_limit)
        .map_or(defaults.vcpus, |cpus| cpus.ceil() as u32);
    let host = std::thread::available_parallelism().map_or(1, |n| n.get() as u32);
    Ok(VmSize {
        vcpus: vcpus.clamp(1, host),
        memory_bytes: memory.checked_next_multiple_of(2 * MIB).unwrap_or(memory),
        huge_pages,
    })
}

/// Bytes that a VM for this pod has to have when its containers may use `containers` bytes together, of which no more than
/// `bound` counts.
///
/// # Errors
/// As with [`of`].
pub fn memory_with_containers(
    config: &cri::PodSandboxConfig,
    containers: u64,
    bound: u64,
    defaults: &config::Vm,
) -> Result<u64> {
    let size = of(config, defaults)?;
    if containers == 0 {
        return Ok(size.memory_bytes);
    }
    let linux = config.linux.as_ref();
    let overhead = linux.map_or(0, |linux| memory_bytes(linux.overhead.as_ref()));
    let huge = size.huge_pages.saturating_mul(HUGE_PAGE.1);
    let needed = containers.saturating_add(overhead).saturating_add(huge);
    Ok(size.memory_bytes.max(needed.min(bound)))
}

/// How much a VM in QEMU may grow where nothing is configured: QEMU keeps three bits for each page that there may be
/// (`ram_list.dirty_memory`), which is 0.3 MiB for this.
const QEMU_GROWTH: u64 = 3 << 30;

/// Bytes that a VM which begins with `boot` bytes may grow to, on a node that has `node` bytes.
pub fn max_memory(defaults: &config::Vm, backend: Backend, boot: u64, node: u64) -> u64 {
    match (defaults.max_memory_mib, backend) {
        (0, Backend::Kvm) => node,
        (0, Backend::Qemu) => node.min(boot.saturating_add(QEMU_GROWTH)),
        (mib, _) => mib.saturating_mul(MIB),
    }
}

/// Bytes of memory that the node has.
pub fn node_memory() -> u64 {
    // SAFETY: all zeroes is a valid value of this plain structure.
    let mut info: libc::sysinfo = unsafe { std::mem::zeroed() };
    // SAFETY: a structure that lives through the call, which fails only for a bad address.
    unsafe { libc::sysinfo(&raw mut info) };
    let bytes = info.totalram * u64::from(info.mem_unit);
    bytes / MIB * MIB
}

/// The limit; 0: none.
pub fn memory_bytes(resources: Option<&cri::LinuxContainerResources>) -> u64 {
    resources.map_or(0, |resources| resources.memory_limit_in_bytes.max(0) as u64)
}

/// Bytes of memory that the pod may use, its overhead among them; `None`: no limit.
pub fn memory_limit(linux: &cri::LinuxPodSandboxConfig) -> Option<u64> {
    let limit = memory_bytes(linux.resources.as_ref());
    (limit > 0).then(|| limit.saturating_add(memory_bytes(linux.overhead.as_ref())))
}

/// CPUs that the pod may use, its overhead among them; `None`: no limit.
pub fn cpu_limit(linux: &cri::LinuxPodSandboxConfig) -> Option<f64> {
    let limit = linux.resources.as_ref().map_or(0.0, cpus);
    (limit > 0.0).then(|| limit + linux.overhead.as_ref().map_or(0.0, cpus))
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

    const GIB: u64 = 1 << 30;

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
        let size = of(&cri::PodSandboxConfig::default(), &defaults).unwrap();
        assert_eq!(size.memory_bytes, defaults.memory_mib * MIB);
        assert_eq!(size.vcpus, 1);
        // Overhead alone is no limit.
        assert_eq!(of(&pod(0, 0, 64 << 20), &defaults).unwrap(), size);
    }

    #[test]
    fn limits_and_overhead_add_up() {
        let size = of(&pod(1 << 30, 50_000, 160 << 20), &config::Vm::default()).unwrap();
        assert_eq!(size.memory_bytes, (1024 + 160) * MIB);
        assert_eq!(size.vcpus, 1);
    }

    #[test]
    fn no_vm_is_too_small_to_boot() {
        let defaults = config::Vm::default();
        let size = of(&pod(4096, 1, 0), &defaults).unwrap();
        assert_eq!(size.memory_bytes, defaults.min_memory_mib * MIB);
    }

    #[test]
    fn containers_may_need_more_than_the_pod_named() {
        let need = |config: &_, containers| {
            memory_with_containers(config, containers, 4 << 30, &config::Vm::default()).unwrap()
        };
        let unnamed = cri::PodSandboxConfig::default();
        assert_eq!(need(&unnamed, 0), 512 * MIB);
        assert_eq!(need(&unnamed, 300 * MIB), 512 * MIB);
        assert_eq!(need(&unnamed, 600 * MIB), 600 * MIB);
        // More than the bound does not count.
        assert_eq!(need(&unnamed, 1 << 40), 4 << 30);
        assert_eq!(need(&unnamed, u64::MAX), 4 << 30);
        // Overhead comes with the containers' sum, too.
        assert_eq!(need(&pod(0, 0, 64 << 20), 600 * MIB), 664 * MIB);
        assert_eq!(need(&pod(1 << 30, 0, 64 << 20), 600 * MIB), 1088 * MIB);
        let mut huge = pod(0, 0, 0);
        let resources = huge.linux.as_mut().unwrap().resources.as_mut().unwrap();
        resources.hugepage_limits = vec![cri::HugepageLimit {
            page_size: "2MB".into(),
            limit: 64 << 20,
        }];
        assert_eq!(need(&huge, 600 * MIB), 664 * MIB);
    }

    #[test]
    fn a_vm_may_get_as_large_as_configured() {
        let mut defaults = config::Vm::default();
        let max = |defaults: &_, backend| max_memory(defaults, backend, GIB, 8 * GIB);
        assert_eq!(max(&defaults, Backend::Kvm), 8 * GIB);
        assert_eq!(max(&defaults, Backend::Qemu), 4 * GIB);
        assert_eq!(max_memory(&defaults, Backend::Qemu, GIB, 2 * GIB), 2 * GIB);
        defaults.max_memory_mib = 768;
        assert_eq!(max(&defaults, Backend::Kvm), 768 * MIB);
        assert_eq!(max(&defaults, Backend::Qemu), 768 * MIB);
        assert!(node_memory() > 64 * MIB);
    }

    #[test]
    fn huge_pages_come_on_top() {
        let mut config = pod(1 << 30, 0, 0);
        let page = |page_size: &str, limit| cri::HugepageLimit {
            page_size: page_size.into(),
            limit,
        };
        let resources = config.linux.as_mut().unwrap().resources.as_mut().unwrap();
        resources.hugepage_limits = vec![page("2MB", 64 << 20), page("1GB", 0)];
        assert_eq!(huge_pages(&config).unwrap(), 32);
        let size = of(&config, &config::Vm::default()).unwrap();
        assert_eq!(size.memory_bytes, (1024 + 64) * MIB);
        let resources = config.linux.as_mut().unwrap().resources.as_mut().unwrap();
        resources.hugepage_limits = vec![page("1GB", 1 << 30)];
        assert!(huge_pages(&config).is_err());
    }
}
