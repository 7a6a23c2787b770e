//! What pods and containers use. Lists are answered from here: neither a monitor nor a guest is asked for them.
//!
//! - [`sampling`]: how samples come in
//! - [`messages`]: CRI's messages of them
//! - [`metrics`], [`families`]: CRI's metrics, for kubelets that take those of cAdvisor from the runtime
//!
//! What a container uses is what its guest says, about this pod alone. What the pod costs the node is what the kernel of
//! the node says: of the pod's control group, in which are the VM, its monitor and podvisor-fs.

pub mod families;
pub mod messages;
pub mod metrics;
pub mod sampling;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use podvisor_proto::agent::{
    ContainerSample, FileSystemSample, InterfaceSample, SampleResponse, Usage,
};
use tokio::sync::Notify;

/// The newest sample of a pod, and who wants a newer one.
#[derive(Debug, Default)]
pub struct Samples {
    newest: Mutex<Option<Arc<Sample>>>,
    wanted: Notify,
}

/// What a pod used at one moment.
#[derive(Debug, Default)]
pub struct Sample {
    /// The node's clock, nanoseconds since the epoch.
    pub time_ns: u64,
    /// By id. Of containers that do not run, only the writable layer.
    pub containers: HashMap<String, Measured>,
    /// Of the pod's network namespace.
    pub interfaces: Vec<InterfaceSample>,
    /// Where writable layers are.
    pub scratch: FileSystemSample,
    /// What the pod costs the node.
    pub cost: Cost,
}

/// A container's part of a sample.
#[derive(Debug, Default)]
pub struct Measured {
    /// As it came.
    pub sample: ContainerSample,
    /// Of the CPU time, how fast it grew since the sample before: nanoseconds a second.
    pub nano_cores: Option<u64>,
}

/// What a pod costs the node.
#[derive(Debug, Default, Clone)]
pub struct Cost {
    /// Of the pod's control group on the node.
    pub usage: Usage,
    /// As with [`Measured`].
    pub nano_cores: Option<u64>,
    /// Of that, nanoseconds that are not its containers': of the guest's kernel and agent, the VMM, the monitor,
    /// podvisor-fs.
    pub overhead_cpu_ns: u64,
    /// As well, bytes.
    pub overhead_memory_bytes: u64,
}

impl Samples {
    /// The newest one. `None`: there is none yet.
    pub fn newest(&self) -> Option<Arc<Sample>> {
        self.lock().clone()
    }

    /// Somebody looks: there shall be a newer one soon. Waits for nothing.
    pub fn want(&self) {
        self.wanted.notify_one();
    }

    /// Takes a pod's answer, which came at `time_ns`, beside what the pod cost then.
    fn take(&self, time_ns: u64, answer: SampleResponse, mut cost: Cost) {
        let mut newest = self.lock();
        let before = newest.as_deref();
        let elapsed_ns = before.map_or(0, |before| time_ns.saturating_sub(before.time_ns));
        cost.nano_cores =
            before.and_then(|before| rate(before.cost.usage.cpu_ns, cost.usage.cpu_ns, elapsed_ns));
        let measured = |sample: ContainerSample| {
            let earlier = before.and_then(|before| before.containers.get(&sample.id));
            let cpu_ns = |sample: &ContainerSample| Some(sample.usage.as_ref()?.cpu_ns);
            let earlier = earlier.and_then(|earlier| cpu_ns(&earlier.sample));
            let nano_cores = earlier
                .zip(cpu_ns(&sample))
                .and_then(|(earlier, now)| rate(earlier, now, elapsed_ns));
            (sample.id.clone(), Measured { sample, nano_cores })
        };
        *newest = Some(Arc::new(Sample {
            time_ns,
            containers: answer.containers.into_iter().map(measured).collect(),
            interfaces: answer.interfaces,
            scratch: answer.scratch.unwrap_or_default(),
            cost,
        }));
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Arc<Sample>>> {
        self.newest.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Growth a second. None without time between; a counter that went back has not grown.
fn rate(before: u64, now: u64, elapsed_ns: u64) -> Option<u64> {
    const SECOND: u128 = 1_000_000_000;
    let grown = u128::from(now.saturating_sub(before)) * SECOND;
    let rate = grown.checked_div(u128::from(elapsed_ns))?;
    Some(u64::try_from(rate).unwrap_or(u64::MAX))
}

/// What the kubelet calls the working set: memory without pages of files that were not used lately.
pub fn working_set(usage: &Usage) -> u64 {
    usage.memory_bytes.saturating_sub(usage.inactive_file_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(cpu_ns: u64) -> SampleResponse {
        let usage = Usage {
            cpu_ns,
            ..Usage::default()
        };
        SampleResponse {
            containers: vec![ContainerSample {
                id: "c".to_owned(),
                usage: Some(usage.into()),
                ..ContainerSample::default()
            }],
            ..SampleResponse::default()
        }
    }

    fn nano_cores(samples: &Samples) -> Option<u64> {
        samples.newest().unwrap().containers["c"].nano_cores
    }

    #[test]
    fn rates_need_two_samples() {
        let samples = Samples::default();
        assert!(samples.newest().is_none());
        samples.take(1_000_000_000, answer(500), Cost::default());
        assert_eq!(nano_cores(&samples), None);
        samples.take(3_000_000_000, answer(700), Cost::default());
        assert_eq!(nano_cores(&samples), Some(100));
        // Guests lie, and clocks are set back.
        samples.take(4_000_000_000, answer(0), Cost::default());
        assert_eq!(nano_cores(&samples), Some(0));
        samples.take(1_000_000_000, answer(u64::MAX), Cost::default());
        assert_eq!(nano_cores(&samples), None);
        samples.take(1_000_000_001, answer(0), Cost::default());
        samples.take(1_000_000_002, answer(u64::MAX), Cost::default());
        assert_eq!(nano_cores(&samples), Some(u64::MAX));
    }

    #[test]
    fn the_working_set_is_never_negative() {
        let usage = Usage {
            memory_bytes: 5,
            inactive_file_bytes: 7,
            ..Usage::default()
        };
        assert_eq!(working_set(&usage), 0);
    }
}
