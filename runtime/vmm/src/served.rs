//! What every transport does with a device: hand it its queues, count, find out whom to interrupt.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use virtio_queue::{Queue, QueueT as _};
use vm_memory::GuestMemoryMmap;

use crate::device::{CONFIG_CHANGED, Counter, DeviceError, DeviceEvent, QueueRef, VirtioDevice};

/// A device with its queues. One thread owns it.
pub struct Served {
    /// The device.
    pub device: Box<dyn VirtioDevice>,
    /// As many as the device has, set up or not.
    pub queues: Vec<Queue>,
    counters: Arc<DeviceCounters>,
}

impl Served {
    /// A device with queues that nobody has set up yet.
    pub fn new(name: &'static str, device: Box<dyn VirtioDevice>, queues: Vec<Queue>) -> Self {
        let counters = DeviceCounters {
            name,
            queues: queues.iter().map(|_| QueueCounters::default()).collect(),
            own: device.counters(),
        };
        Self {
            device,
            queues,
            counters: Arc::new(counters),
        }
    }

    /// What was counted, now and later.
    pub fn counters(&self) -> Arc<DeviceCounters> {
        Arc::clone(&self.counters)
    }

    /// Lets the device work. Returns the queues whose driver wants an interrupt (bit i is queue i), and
    /// [`CONFIG_CHANGED`].
    ///
    /// # Errors
    /// The device cannot go on.
    pub fn process(
        &mut self,
        memory: &GuestMemoryMmap,
        event: DeviceEvent,
    ) -> Result<u32, DeviceError> {
        if let DeviceEvent::Queue(index) = event {
            add(&self.counters.queues[index].kicks, 1);
        }
        let mut refs: Vec<_> = self.queues.iter_mut().map(QueueRef::new).collect();
        let used = self.device.process(memory, &mut refs, event)?;
        for (chains, counters) in refs.iter().map(QueueRef::used).zip(&self.counters.queues) {
            add(&counters.chains, chains);
        }
        let mut wanted = used & CONFIG_CHANGED;
        for (index, queue) in self.queues.iter_mut().enumerate() {
            if used & 1 << index == 0 {
                continue;
            }
            let counters = &self.counters.queues[index];
            if queue.needs_notification(memory)? {
                wanted |= 1 << index;
                add(&counters.interrupts, 1);
            }
        }
        Ok(wanted)
    }
}

/// Counters of a device, since the VM began.
#[derive(Debug)]
pub struct DeviceCounters {
    name: &'static str,
    queues: Vec<QueueCounters>,
    own: Vec<(&'static str, Counter)>,
}

#[derive(Debug, Default)]
struct QueueCounters {
    kicks: AtomicU64,
    chains: AtomicU64,
    interrupts: AtomicU64,
}

/// What a device has done so far.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceStats {
    /// Its name: "disk", "net".
    pub name: &'static str,
    /// Its queues, in the order of the virtio specification.
    pub queues: Vec<QueueStats>,
    /// What only this device counts, by name.
    pub own: Vec<(&'static str, u64)>,
}

/// What has gone through a queue so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QueueStats {
    /// How often the driver said that there are buffers.
    pub kicks: u64,
    /// Chains of buffers that the device has given back.
    pub chains: u64,
    /// Interrupts for them.
    pub interrupts: u64,
}

impl DeviceCounters {
    /// The counts of this moment.
    pub fn read(&self) -> DeviceStats {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let queue = |queue: &QueueCounters| QueueStats {
            kicks: get(&queue.kicks),
            chains: get(&queue.chains),
            interrupts: get(&queue.interrupts),
        };
        DeviceStats {
            name: self.name,
            queues: self.queues.iter().map(queue).collect(),
            own: self
                .own
                .iter()
                .map(|(name, value)| (*name, get(value)))
                .collect(),
        }
    }
}

fn add(counter: &AtomicU64, count: u64) {
    counter.fetch_add(count, Ordering::Relaxed);
}
