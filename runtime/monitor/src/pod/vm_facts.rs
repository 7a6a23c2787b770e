//! What is known of the VM, for who inspects it.

use std::sync::OnceLock;

use podvisor_proto::monitor::{AddressRange, Counter, DeviceStats, QueueStats, VmStatsResponse};
use podvisor_vmm::VmCounters;

/// The VM's size, and its counters once it runs.
pub struct VmFacts {
    vcpus: u32,
    memory_bytes: u64,
    running: OnceLock<(&'static str, VmCounters)>,
}

impl VmFacts {
    /// Of a VM that is yet to start.
    pub fn new(vcpus: u32, memory_bytes: u64) -> Self {
        Self {
            vcpus,
            memory_bytes,
            running: OnceLock::new(),
        }
    }

    /// The VM runs, on this backend.
    pub fn set_running(&self, backend: &'static str, counters: VmCounters) {
        // A monitor starts one VM in its life.
        let _ = self.running.set((backend, counters));
    }

    /// Counters of this moment. `None`: the VM never ran.
    pub fn stats(&self) -> Option<VmStatsResponse> {
        let (backend, counters) = self.running.get()?;
        let stats = counters.read();
        let devices = stats.devices.into_iter().map(|device| DeviceStats {
            name: device.name.to_owned(),
            queues: device
                .queues
                .into_iter()
                .map(|queue| QueueStats {
                    kicks: queue.kicks,
                    chains: queue.chains,
                    interrupts: queue.interrupts,
                })
                .collect(),
            counters: to_counters(device.own),
        });
        let guest_memory = stats.guest_memory.into_iter();
        Some(VmStatsResponse {
            backend: (*backend).to_owned(),
            vcpus: self.vcpus,
            memory_bytes: self.memory_bytes,
            exits: to_counters(stats.exits),
            devices: devices.collect(),
            guest_memory: guest_memory
                .map(|(start, length)| AddressRange { start, length })
                .collect(),
        })
    }
}

fn to_counters(counts: Vec<(&'static str, u64)>) -> Vec<Counter> {
    let counts = counts.into_iter();
    counts
        .map(|(name, count)| Counter {
            name: name.to_owned(),
            count,
        })
        .collect()
}
