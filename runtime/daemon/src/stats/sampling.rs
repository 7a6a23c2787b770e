//! How samples come in: podvisord asks each pod's monitor, and that the guest, every [`INTERVAL`], when a container has
//! started, and when somebody has looked at the last sample.
//!
//! The host asks and the guest does not push: so a guest is heard as often as the host wants, and nothing is measured
//! while nobody is there to keep it.

use std::sync::{Arc, Weak};
use std::time::Duration;

use futures_util::FutureExt;
use podvisor_node::cgroup::PodCgroup;
use podvisor_proto::agent::{SampleRequest, SampleResponse};
use tokio::time::{Instant, sleep_until, timeout_at};
use tracing::debug;

use super::{Cost, Samples};
use crate::daemon::{Daemon, now_ns, within};
use crate::monitor::Monitor;
use crate::pod::Pod;

/// From one sample to the next when nobody looks: the kubelet's own period.
const INTERVAL: Duration = Duration::from_secs(10);

/// From one sample to the next when somebody does. crictl looks twice, a second apart, and wants two samples.
const SHORTEST: Duration = Duration::from_millis(500);

/// Longer than the monitor's deadline for a guest.
const CALL: Duration = Duration::from_secs(6);

impl Daemon {
    /// Takes samples of a pod until it is forgotten. A pod that does not answer keeps its last one.
    pub async fn keep_sampling(&self, monitor: &Monitor, pod: &Weak<Pod>) {
        let Some((samples, group)) = pod.upgrade().map(|pod| self.subject(&pod)) else {
            return;
        };
        let mut client = monitor.client();
        while pod.strong_count() > 0 {
            let begin = Instant::now();
            match within(CALL, "Sample", client.sample(SampleRequest {})).await {
                Ok(answer) => {
                    let group = group.clone();
                    let cost = tokio::task::spawn_blocking(move || (cost(&group, &answer), answer));
                    let Ok((cost, answer)) = cost.await else {
                        return;
                    };
                    samples.take(now_ns(), answer, cost);
                }
                // Before the guest has booted, and after a pod was stopped, that is not unusual.
                Err(error) => debug!(%error, "no sample"),
            }
            sleep_until(begin + SHORTEST).await;
            // Who looks looks again soon: the connection is kept for that, and for nothing else.
            if samples.wanted.notified().now_or_never().is_none() {
                drop(client);
                let _ = timeout_at(begin + INTERVAL, samples.wanted.notified()).await;
                client = monitor.client();
            }
        }
    }

    fn subject(&self, pod: &Pod) -> (Arc<Samples>, Group) {
        let record = pod.record();
        let whole = self.pod_cgroup(&record).ok();
        let group = Group {
            whole,
            is_on_host: Self::is_on_host(&record),
        };
        (Arc::clone(&pod.samples), group)
    }
}

/// Where a pod's cost is read.
#[derive(Clone)]
struct Group {
    /// None: there are no control groups.
    whole: Option<PodCgroup>,
    /// Its containers have groups beside that of its monitor.
    is_on_host: bool,
}

/// What the pod costs now. Blocks.
fn cost(group: &Group, answer: &SampleResponse) -> Cost {
    let Some(whole) = &group.whole else {
        return Cost::default();
    };
    let usage = whole.usage("");
    let (overhead_cpu_ns, overhead_memory_bytes) = if group.is_on_host {
        let monitor = whole.usage("monitor");
        (monitor.cpu_ns, monitor.memory_bytes)
    } else {
        let inside = answer.total.clone().unwrap_or_default();
        (
            usage.cpu_ns.saturating_sub(inside.cpu_ns),
            usage.memory_bytes.saturating_sub(inside.memory_bytes),
        )
    };
    Cost {
        usage,
        nano_cores: None,
        overhead_cpu_ns,
        overhead_memory_bytes,
    }
}
