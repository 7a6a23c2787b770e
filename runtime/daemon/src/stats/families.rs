//! The families of CRI's metrics: names, labels and where the values come from, in one table each for containers and pods.
//! Names that begin with `container_` are cAdvisor's, as kubelets, dashboards and critest know them.
//!
//! CRI's values are whole numbers: of a family in seconds, whole seconds.

use podvisor_proto::agent::{
    FileSystemSample, InterfaceCounters, InterfaceSample, ProcessSample, Stall, Usage,
    WritableLayer,
};
use podvisor_proto::cri::{self, MetricType};

use super::{Cost, working_set};

/// Labels of each metric, before its family's own. `container` and `image` are empty for those of a pod.
pub const LABELS: [&str; 6] = ["id", "name", "image", "namespace", "pod", "container"];

const SECOND_NS: u64 = 1_000_000_000;
const SECOND_US: u64 = 1_000_000;

/// Takes a value, with those of the family's own labels.
pub type Emit<'a> = &'a mut dyn FnMut(&[&str], u64);

/// A family of metrics.
#[derive(Debug)]
pub struct Family<V> {
    /// Its name.
    pub name: &'static str,
    /// What it is.
    pub help: &'static str,
    /// Counter or gauge.
    pub kind: MetricType,
    /// Keys of its own labels.
    pub labels: &'static [&'static str],
    /// Emits its values.
    pub values: V,
}

/// Of a container.
pub type ContainerFamily = Family<fn(&ContainerFacts<'_>, Emit<'_>)>;
/// Of a pod.
pub type PodFamily = Family<fn(&PodFacts<'_>, Emit<'_>)>;

/// What metrics of a container are made of.
#[derive(Debug)]
pub struct ContainerFacts<'a> {
    /// Its control group.
    pub usage: &'a Usage,
    /// Its processes.
    pub processes: ProcessSample,
    /// Its writable layer.
    pub layer: WritableLayer,
    /// The file system that is on.
    pub scratch: FileSystemSample,
    /// Its limits.
    pub limits: &'a cri::LinuxContainerResources,
    /// Nanoseconds since the epoch.
    pub started_ns: u64,
    /// When all this was found, too.
    pub time_ns: u64,
}

/// What metrics of a pod are made of.
#[derive(Debug)]
pub struct PodFacts<'a> {
    /// Its interfaces.
    pub interfaces: &'a [InterfaceSample],
    /// What it costs the node.
    pub cost: &'a Cost,
}

impl<V> Family<V> {
    const fn counter(
        name: &'static str,
        labels: &'static [&'static str],
        help: &'static str,
        values: V,
    ) -> Self {
        Self {
            name,
            help,
            kind: MetricType::Counter,
            labels,
            values,
        }
    }

    const fn gauge(
        name: &'static str,
        labels: &'static [&'static str],
        help: &'static str,
        values: V,
    ) -> Self {
        Self {
            name,
            help,
            kind: MetricType::Gauge,
            labels,
            values,
        }
    }

    /// As CRI describes it.
    pub fn descriptor(&self) -> cri::MetricDescriptor {
        let keys = LABELS.iter().chain(self.labels);
        cri::MetricDescriptor {
            name: self.name.to_owned(),
            help: self.help.to_owned(),
            label_keys: keys.map(|key| (*key).to_owned()).collect(),
        }
    }
}

/// Label of families about the place of writable layers.
const DEVICE: &[&str] = &["device"];
/// Its value where it is no device's number.
const SCRATCH: &[&str] = &["scratch"];
/// Label of families about interfaces.
const INTERFACE: &[&str] = &["interface"];

/// Every family of a container.
pub static CONTAINER: &[ContainerFamily] = &[
    Family::counter(
        "container_cpu_usage_seconds_total",
        &["cpu"],
        "CPU time",
        |c, emit| {
            emit(&["total"], c.usage.cpu_ns / SECOND_NS);
        },
    ),
    Family::counter(
        "container_cpu_user_seconds_total",
        &[],
        "CPU time in user mode",
        |c, emit| {
            emit(&[], c.usage.cpu_user_ns / SECOND_NS);
        },
    ),
    Family::counter(
        "container_cpu_system_seconds_total",
        &[],
        "CPU time in the kernel",
        |c, emit| {
            emit(&[], c.usage.cpu_system_ns / SECOND_NS);
        },
    ),
    Family::counter(
        "container_cpu_cfs_periods_total",
        &[],
        "Periods of the CPU quota",
        |c, emit| {
            emit(&[], c.usage.periods);
        },
    ),
    Family::counter(
        "container_cpu_cfs_throttled_periods_total",
        &[],
        "Periods in which the CPU quota was used up",
        |c, emit| emit(&[], c.usage.throttled_periods),
    ),
    Family::counter(
        "container_cpu_cfs_throttled_seconds_total",
        &[],
        "Time without CPU because the quota was used up",
        |c, emit| emit(&[], c.usage.throttled_ns / SECOND_NS),
    ),
    Family::gauge(
        "container_memory_usage_bytes",
        &[],
        "Memory, page cache included",
        |c, emit| {
            emit(&[], c.usage.memory_bytes);
        },
    ),
    Family::gauge(
        "container_memory_working_set_bytes",
        &[],
        "Memory without pages of files that were not used lately",
        |c, emit| emit(&[], working_set(c.usage)),
    ),
    Family::gauge(
        "container_memory_rss",
        &[],
        "Anonymous memory",
        |c, emit| {
            emit(&[], c.usage.anonymous_bytes);
        },
    ),
    Family::gauge("container_memory_cache", &[], "Page cache", |c, emit| {
        emit(&[], c.usage.file_bytes);
    }),
    Family::gauge(
        "container_memory_mapped_file",
        &[],
        "Page cache that is mapped",
        |c, emit| {
            emit(&[], c.usage.mapped_file_bytes);
        },
    ),
    Family::gauge(
        "container_memory_kernel_usage",
        &[],
        "Memory of the kernel's",
        |c, emit| {
            emit(&[], c.usage.kernel_bytes);
        },
    ),
    Family::gauge(
        "container_memory_max_usage_bytes",
        &[],
        "The most memory so far",
        |c, emit| {
            emit(&[], c.usage.peak_bytes);
        },
    ),
    Family::gauge(
        "container_memory_swap",
        &[],
        "Memory that is swapped out",
        |c, emit| {
            emit(&[], c.usage.swap_bytes);
        },
    ),
    Family::counter(
        "container_memory_failcnt",
        &[],
        "How often memory was at its limit",
        |c, emit| {
            emit(&[], c.usage.limit_hits);
        },
    ),
    Family::counter(
        "container_memory_failures_total",
        &["failure_type", "scope"],
        "Page faults",
        |c, emit| {
            // The container's group and those below it count as one.
            for scope in ["container", "hierarchy"] {
                emit(&["pgfault", scope], c.usage.page_faults);
                emit(&["pgmajfault", scope], c.usage.major_page_faults);
            }
        },
    ),
    Family::counter(
        "container_oom_events_total",
        &[],
        "Processes that the kernel killed for want of memory",
        |c, emit| emit(&[], c.usage.out_of_memory_kills),
    ),
    Family::counter(
        "container_pressure_cpu_waiting_seconds_total",
        &[],
        "Time in which some task waited for CPU",
        |c, emit| emit(&[], stalled(c.usage.cpu_pressure.and_then(|cpu| cpu.some))),
    ),
    Family::counter(
        "container_pressure_cpu_stalled_seconds_total",
        &[],
        "Time in which all tasks waited for CPU",
        |c, emit| emit(&[], stalled(c.usage.cpu_pressure.and_then(|cpu| cpu.full))),
    ),
    Family::counter(
        "container_pressure_memory_waiting_seconds_total",
        &[],
        "Time in which some task waited for memory",
        |c, emit| {
            emit(
                &[],
                stalled(c.usage.memory_pressure.and_then(|memory| memory.some)),
            );
        },
    ),
    Family::counter(
        "container_pressure_memory_stalled_seconds_total",
        &[],
        "Time in which all tasks waited for memory",
        |c, emit| {
            emit(
                &[],
                stalled(c.usage.memory_pressure.and_then(|memory| memory.full)),
            );
        },
    ),
    Family::counter(
        "container_pressure_io_waiting_seconds_total",
        &[],
        "Time in which some task waited for I/O",
        |c, emit| emit(&[], stalled(c.usage.io_pressure.and_then(|io| io.some))),
    ),
    Family::counter(
        "container_pressure_io_stalled_seconds_total",
        &[],
        "Time in which all tasks waited for I/O",
        |c, emit| emit(&[], stalled(c.usage.io_pressure.and_then(|io| io.full))),
    ),
    Family::counter(
        "container_fs_reads_total",
        DEVICE,
        "Reads from a device",
        |c, emit| {
            devices(c, emit, |io| io.reads);
        },
    ),
    Family::counter(
        "container_fs_reads_bytes_total",
        DEVICE,
        "Bytes read from a device",
        |c, emit| {
            devices(c, emit, |io| io.read_bytes);
        },
    ),
    Family::counter(
        "container_fs_writes_total",
        DEVICE,
        "Writes to a device",
        |c, emit| {
            devices(c, emit, |io| io.writes);
        },
    ),
    Family::counter(
        "container_fs_writes_bytes_total",
        DEVICE,
        "Bytes written to a device",
        |c, emit| {
            devices(c, emit, |io| io.written_bytes);
        },
    ),
    Family::counter(
        "container_blkio_device_usage_total",
        &["device", "major", "minor", "operation"],
        "Bytes read from and written to a device",
        |c, emit| {
            for io in &c.usage.io {
                let (major, minor) = (io.major.to_string(), io.minor.to_string());
                let device = format!("{major}:{minor}");
                emit(&[&device, &major, &minor, "Read"], io.read_bytes);
                emit(&[&device, &major, &minor, "Write"], io.written_bytes);
            }
        },
    ),
    Family::gauge(
        "container_fs_usage_bytes",
        DEVICE,
        "The writable layer",
        |c, emit| {
            emit(SCRATCH, c.layer.used_bytes);
        },
    ),
    Family::gauge(
        "container_fs_limit_bytes",
        DEVICE,
        "Size of the file system of the writable layer",
        |c, emit| emit(SCRATCH, c.scratch.total_bytes),
    ),
    Family::gauge(
        "container_fs_inodes_total",
        DEVICE,
        "Inodes of the file system of the writable layer",
        |c, emit| emit(SCRATCH, c.scratch.total_inodes),
    ),
    Family::gauge(
        "container_fs_inodes_free",
        DEVICE,
        "Of those, free ones",
        |c, emit| {
            emit(SCRATCH, c.scratch.free_inodes);
        },
    ),
    Family::gauge("container_processes", &[], "Processes", |c, emit| {
        emit(&[], c.processes.processes);
    }),
    Family::gauge("container_threads", &[], "Threads", |c, emit| {
        emit(&[], c.usage.threads);
    }),
    Family::gauge(
        "container_threads_max",
        &[],
        "The most threads; 0: no limit",
        |c, emit| {
            emit(&[], c.usage.threads_limit);
        },
    ),
    Family::gauge(
        "container_file_descriptors",
        &[],
        "Open file descriptors",
        |c, emit| {
            emit(&[], c.processes.file_descriptors);
        },
    ),
    Family::gauge("container_sockets", &[], "Open sockets", |c, emit| {
        emit(&[], c.processes.sockets);
    }),
    Family::gauge(
        "container_ulimits_soft",
        &["ulimit"],
        "Soft limits of the first process",
        |c, emit| emit(&["max_open_files"], c.processes.open_files_limit),
    ),
    Family::gauge(
        "container_start_time_seconds",
        &[],
        "When it was started",
        |c, emit| {
            emit(&[], c.started_ns / SECOND_NS);
        },
    ),
    Family::gauge(
        "container_last_seen",
        &[],
        "When all this was found",
        |c, emit| {
            emit(&[], c.time_ns / SECOND_NS);
        },
    ),
    Family::gauge(
        "container_spec_cpu_period",
        &[],
        "Period of the CPU quota, microseconds",
        |c, emit| {
            emit(&[], limit(c.limits.cpu_period));
        },
    ),
    Family::gauge(
        "container_spec_cpu_quota",
        &[],
        "CPU quota, microseconds",
        |c, emit| {
            // As with cAdvisor, none without one.
            if c.limits.cpu_quota > 0 {
                emit(&[], limit(c.limits.cpu_quota));
            }
        },
    ),
    Family::gauge(
        "container_spec_cpu_shares",
        &[],
        "Share of the CPU",
        |c, emit| {
            emit(&[], limit(c.limits.cpu_shares));
        },
    ),
    Family::gauge(
        "container_spec_memory_limit_bytes",
        &[],
        "Limit of memory; 0: none",
        |c, emit| {
            emit(&[], limit(c.limits.memory_limit_in_bytes));
        },
    ),
    Family::gauge(
        "container_spec_memory_swap_limit_bytes",
        &[],
        "Limit of memory and swap; 0: none",
        |c, emit| emit(&[], limit(c.limits.memory_swap_limit_in_bytes)),
    ),
    Family::gauge(
        "container_spec_memory_reservation_limit_bytes",
        &[],
        "Memory that is not taken away from it (memory.low)",
        |c, emit| {
            let low = c.limits.unified.get("memory.low");
            emit(&[], low.and_then(|low| low.parse().ok()).unwrap_or(0));
        },
    ),
];

/// Every family of a pod.
pub static POD: &[PodFamily] = &[
    Family::counter(
        "container_network_receive_bytes_total",
        INTERFACE,
        "Bytes received",
        |p, emit| {
            interfaces(p, emit, RECEIVED, |counters| counters.bytes);
        },
    ),
    Family::counter(
        "container_network_receive_packets_total",
        INTERFACE,
        "Packets received",
        |p, emit| interfaces(p, emit, RECEIVED, |counters| counters.packets),
    ),
    Family::counter(
        "container_network_receive_packets_dropped_total",
        INTERFACE,
        "Packets received and dropped",
        |p, emit| interfaces(p, emit, RECEIVED, |counters| counters.dropped),
    ),
    Family::counter(
        "container_network_receive_errors_total",
        INTERFACE,
        "Errors while receiving",
        |p, emit| interfaces(p, emit, RECEIVED, |counters| counters.errors),
    ),
    Family::counter(
        "container_network_transmit_bytes_total",
        INTERFACE,
        "Bytes sent",
        |p, emit| {
            interfaces(p, emit, SENT, |counters| counters.bytes);
        },
    ),
    Family::counter(
        "container_network_transmit_packets_total",
        INTERFACE,
        "Packets sent",
        |p, emit| interfaces(p, emit, SENT, |counters| counters.packets),
    ),
    Family::counter(
        "container_network_transmit_packets_dropped_total",
        INTERFACE,
        "Packets to be sent and dropped",
        |p, emit| interfaces(p, emit, SENT, |counters| counters.dropped),
    ),
    Family::counter(
        "container_network_transmit_errors_total",
        INTERFACE,
        "Errors while sending",
        |p, emit| interfaces(p, emit, SENT, |counters| counters.errors),
    ),
    Family::counter(
        "podvisor_pod_cpu_seconds_total",
        &[],
        "CPU time that the pod cost the node: its VM with all containers, monitor, podvisor-fs",
        |p, emit| emit(&[], p.cost.usage.cpu_ns / SECOND_NS),
    ),
    Family::gauge(
        "podvisor_pod_memory_usage_bytes",
        &[],
        "Memory that the pod costs the node, page cache included",
        |p, emit| emit(&[], p.cost.usage.memory_bytes),
    ),
    Family::gauge(
        "podvisor_pod_memory_working_set_bytes",
        &[],
        "Of that, without pages of files that were not used lately",
        |p, emit| emit(&[], working_set(&p.cost.usage)),
    ),
    Family::counter(
        "podvisor_pod_overhead_cpu_seconds_total",
        &[],
        "Of the pod's CPU time, what its containers did not use themselves",
        |p, emit| emit(&[], p.cost.overhead_cpu_ns / SECOND_NS),
    ),
    Family::gauge(
        "podvisor_pod_overhead_memory_bytes",
        &[],
        "Of the pod's memory, what is not its containers'",
        |p, emit| emit(&[], p.cost.overhead_memory_bytes),
    ),
];

fn stalled(stall: Option<Stall>) -> u64 {
    stall.unwrap_or_default().total_us / SECOND_US
}

/// CRI's limits are signed; none of less than 0 is one.
fn limit(limit: i64) -> u64 {
    limit.max(0) as u64
}

fn devices(
    container: &ContainerFacts<'_>,
    emit: Emit<'_>,
    value: fn(&podvisor_proto::agent::DeviceIo) -> u64,
) {
    for io in &container.usage.io {
        emit(&[&format!("{}:{}", io.major, io.minor)], value(io));
    }
}

type Direction = fn(&InterfaceSample) -> Option<InterfaceCounters>;
const RECEIVED: Direction = |interface| interface.received;
const SENT: Direction = |interface| interface.sent;

fn interfaces(
    pod: &PodFacts<'_>,
    emit: Emit<'_>,
    direction: Direction,
    value: fn(InterfaceCounters) -> u64,
) {
    for interface in pod.interfaces {
        let counters = direction(interface).unwrap_or_default();
        emit(&[&interface.name], value(counters));
    }
}
