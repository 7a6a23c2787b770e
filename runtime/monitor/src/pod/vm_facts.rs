//! What is known of the VM, for who inspects it.

use std::sync::OnceLock;

use podvisor_proto::monitor::{AddressRange, Counter, DeviceStats, QueueStats, VmStatsResponse};
use podvisor_vmm::{Ram, VmCounters, Vmm};

/// The VM's size, and its counters once it runs.
pub struct VmFacts {
    vcpus: u32,
    memory_bytes: u64,
    running: OnceLock<Running>,
}

struct Running {
    backend: &'static str,
    counters: VmCounters,
    ram: Ram,
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

    /// The VM runs.
    pub fn set_running(&self, vm: &dyn Vmm) {
        // A monitor starts one VM in its life.
        let _ = self.running.set(Running {
            backend: vm.backend(),
            counters: vm.counters(),
            ram: vm.ram(),
        });
    }

    /// The VM's memory. `None`: it never ran.
    pub fn ram(&self) -> Option<&Ram> {
        self.running.get().map(|running| &running.ram)
    }

    /// Bytes of memory that the VM has.
    pub fn memory_bytes(&self) -> u64 {
        self.ram().map_or(self.memory_bytes, Ram::bytes)
    }

    /// Counters of this moment. `None`: the VM never ran.
    pub fn stats(&self) -> Option<VmStatsResponse> {
        let running = self.running.get()?;
        let stats = running.counters.read();
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
            backend: running.backend.to_owned(),
            vcpus: self.vcpus,
            memory_bytes: running.ram.bytes(),
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
