//! The report: as JSON to keep, as tables beside what is promised, and against an earlier one.

use std::fs;

use serde::{Deserialize, Serialize};

use super::pods::{AGAINST, BOOT, HOST_MEMORY, MEMORY, SERIAL, VOLUMES};
use super::pull;
use super::stats::{Metric, Samples};
use crate::text::Table;

/// All results of a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// What it was measured on.
    pub machine: Machine,
    /// What the VMs ran on.
    #[serde(default)]
    pub backend: String,
    /// Pods one after the other, and in parallel.
    pub pods: usize,
    /// How many of them at a time.
    pub parallel: usize,
    /// In the order of the tables.
    pub metrics: Vec<Metric>,
}

/// The machine and the versions, for whoever reads the numbers elsewhere.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Machine {
    /// Model of the first CPU.
    pub cpu: String,
    /// CPUs that may be used.
    pub cpus: usize,
    /// Memory, MiB.
    pub memory_mib: u64,
    /// Kernel release.
    pub kernel: String,
    /// podvisord's version.
    pub podvisor: String,
}

impl Machine {
    /// This machine.
    pub fn here(podvisor: String) -> Self {
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let memory = field(&read("/proc/meminfo"), "MemTotal");
        let kib: u64 = memory
            .split_whitespace()
            .next()
            .and_then(|kib| kib.parse().ok())
            .unwrap_or(0);
        Self {
            cpu: field(&read("/proc/cpuinfo"), "model name"),
            cpus: std::thread::available_parallelism().map_or(1, usize::from),
            memory_mib: kib / 1024,
            kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
            podvisor,
        }
    }
}

/// The value of the first line `key : value`.
fn field(text: &str, key: &str) -> String {
    text.lines()
        .find_map(|line| line.strip_prefix(key)?.trim_start().strip_prefix(':'))
        .map(|value| value.trim().to_owned())
        .unwrap_or_default()
}

/// A number of docs/performance.md: the median of a metric is at most this.
struct Promise {
    what: &'static str,
    metric: String,
    limit: Limit,
}

enum Limit {
    /// In the metric's unit.
    Value(f64),
    /// That share of the median of another metric of the same run.
    Share(f64, String),
}

/// What is promised of pods on `backend`: on QEMU in software emulation, on KVM in the nested host, which is a machine
/// in software emulation itself, with `cpus`.
fn promises(backend: &str, cpus: usize) -> Vec<Promise> {
    match backend {
        "kvm" => promises_on_kvm(cpus),
        _ => promises_on_qemu(),
    }
}

fn promises_on_kvm(cpus: usize) -> Vec<Promise> {
    let value = |what, metric, limit| Promise {
        what,
        metric,
        limit: Limit::Value(limit),
    };
    let share = |what, of: &str, share| Promise {
        what,
        metric: format!("{SERIAL}/{of}"),
        limit: Limit::Share(share, format!("{AGAINST}/{of}")),
    };
    let mut promises = vec![
        share("VMM's start to agent ready, of QEMU's", BOOT, 0.75),
        share(
            "the VMM's own part, of QEMU's",
            "RunPodSandbox: vm start",
            0.25,
        ),
        value(
            "Create + Start, image there",
            format!("{SERIAL}/Create + Start"),
            600.0,
        ),
        value(
            "the monitor with the VMM in it, PSS",
            format!("{MEMORY}/podvisor's own: PSS"),
            4.0,
        ),
        value(
            "the same with 8 containers",
            format!("{MEMORY}/podvisor's own with 8 containers: PSS"),
            5.0,
        ),
        value("podvisor-fs, idle, PSS", format!("{MEMORY}/{VOLUMES}"), 1.5),
        // 40 MB.
        value(
            "MemAvailable that a pod takes",
            format!("{MEMORY}/{HOST_MEMORY}"),
            40e6 / 1_048_576.0,
        ),
        value(
            "guest memory resident on the host",
            format!("{MEMORY}/guest RAM on the host"),
            30.0,
        ),
    ];
    // The VM boots while the CNI plugins run.
    if cpus > 1 {
        let run = format!("{SERIAL}/RunPodSandbox");
        promises.push(value("RunPodSandbox, on two CPUs", run, 2200.0));
    }
    promises
}

fn promises_on_qemu() -> Vec<Promise> {
    let at_most = |what, metric, limit| Promise {
        what,
        metric,
        limit: Limit::Value(limit),
    };
    vec![
        at_most(
            "VMM's start to agent ready",
            format!("{SERIAL}/{BOOT}"),
            600.0,
        ),
        at_most("RunPodSandbox", format!("{SERIAL}/RunPodSandbox"), 1000.0),
        at_most(
            "Create + Start, image there",
            format!("{SERIAL}/Create + Start"),
            200.0,
        ),
        at_most("ExecSync true", format!("{SERIAL}/ExecSync true"), 80.0),
        at_most(
            "podvisor's own processes of a pod, PSS",
            format!("{MEMORY}/podvisor's own: PSS"),
            6.0,
        ),
        at_most("podvisor-fs, idle, PSS", format!("{MEMORY}/{VOLUMES}"), 1.5),
        // 40 MB.
        at_most(
            "guest memory used at idle",
            format!("{MEMORY}/guest: used at idle"),
            40e6 / 1_048_576.0,
        ),
        Promise {
            what: "pull and unpack, as containerd",
            metric: pull::metric(pull::PODVISOR),
            limit: Limit::Share(1.0, pull::metric(pull::OTHER)),
        },
    ]
}

impl Report {
    /// Of all samples of a run.
    pub fn new(
        machine: Machine,
        backend: String,
        pods: usize,
        parallel: usize,
        samples: &Samples,
    ) -> Self {
        Self {
            machine,
            backend,
            pods,
            parallel,
            metrics: samples.metrics(),
        }
    }

    fn metric(&self, name: &str) -> Option<&Metric> {
        self.metrics.iter().find(|metric| metric.name == name)
    }

    /// The machine, a table for each group of metrics, and the promises.
    pub fn render(&self) -> String {
        let machine = &self.machine;
        let mut parts = vec![format!(
            "podvisor {}; {} × {}, {} MiB; Linux {}\n",
            machine.podvisor, machine.cpus, machine.cpu, machine.memory_mib, machine.kernel
        )];
        for metrics in self.metrics.chunk_by(|a, b| group(a) == group(b)) {
            let title = metrics.first().map_or("", group);
            let mut table = Table::new(&[title, ">p50", ">p90", ">min", ">max", "", ">n"]);
            for metric in metrics {
                table.row([
                    label(metric).to_owned(),
                    number(metric.p50),
                    number(metric.p90),
                    number(metric.min),
                    number(metric.max),
                    metric.unit.symbol().to_owned(),
                    metric.count.to_string(),
                ]);
            }
            parts.push(table.render());
        }
        parts.push(self.render_promises());
        parts.join("\n")
    }

    /// Promises whose metric was not measured are left out.
    fn render_promises(&self) -> String {
        let mut table = Table::new(&["promised", ">at most", ">p50", "", ""]);
        for promise in promises(&self.backend, self.machine.cpus) {
            let limit = match promise.limit {
                Limit::Value(limit) => Some(limit),
                Limit::Share(share, name) => self.metric(&name).map(|metric| share * metric.p50),
            };
            let (Some(limit), Some(metric)) = (limit, self.metric(&promise.metric)) else {
                continue;
            };
            let kept = if metric.p50 <= limit {
                "kept"
            } else {
                "NOT KEPT"
            };
            table.row([
                promise.what.to_owned(),
                number(limit),
                number(metric.p50),
                metric.unit.symbol().to_owned(),
                kept.to_owned(),
            ]);
        }
        table.render()
    }

    /// Each metric that both have, and this one's share of the earlier one's. Below 1 is better.
    pub fn compare(&self, earlier: &Self) -> String {
        let mut table = Table::new(&[
            "against the earlier run",
            ">p50 then",
            ">p50 now",
            ">ratio",
            ">p90 then",
            ">p90 now",
            ">ratio",
            "",
        ]);
        for now in &self.metrics {
            let Some(then) = earlier.metric(&now.name) else {
                continue;
            };
            table.row([
                now.name.clone(),
                number(then.p50),
                number(now.p50),
                ratio(now.p50, then.p50),
                number(then.p90),
                number(now.p90),
                ratio(now.p90, then.p90),
                now.unit.symbol().to_owned(),
            ]);
        }
        let mut text = table.render();
        if earlier.machine != self.machine {
            text += "the earlier run was on another machine or version\n";
        }
        text
    }
}

fn group(metric: &Metric) -> &str {
    metric.name.split_once('/').map_or("", |(group, _)| group)
}

fn label(metric: &Metric) -> &str {
    metric
        .name
        .split_once('/')
        .map_or(&metric.name, |(_, label)| label)
}

/// Three digits that count.
fn number(value: f64) -> String {
    match value.abs() {
        0.0..10.0 => format!("{value:.2}"),
        10.0..100.0 => format!("{value:.1}"),
        _ => format!("{value:.0}"),
    }
}

fn ratio(now: f64, then: f64) -> String {
    if then > 0.0 {
        format!("{:.2}", now / then)
    } else {
        String::new()
    }
}

#[cfg(test)]
mod tests {
    use super::super::stats::Unit;
    use super::*;

    fn report(run: f64, exec: f64) -> Report {
        let mut samples = Samples::default();
        samples.add(format!("{SERIAL}/RunPodSandbox"), Unit::Milliseconds, run);
        samples.add(format!("{SERIAL}/ExecSync true"), Unit::Milliseconds, exec);
        samples.add(pull::metric(pull::PODVISOR), Unit::Milliseconds, 90.0);
        samples.add(pull::metric(pull::OTHER), Unit::Milliseconds, 100.0);
        let machine = Machine::here("0.1.0".into());
        Report::new(machine, "qemu".into(), 10, 4, &samples)
    }

    #[test]
    fn promises_are_judged_and_what_was_not_measured_is_left_out() {
        let text = report(900.0, 81.0).render();
        let line = |start: &str| {
            let promised = text.split("promised").nth(1).unwrap();
            promised
                .lines()
                .find(|line| line.starts_with(start))
                .map(str::to_owned)
        };
        assert!(line("RunPodSandbox").unwrap().ends_with("kept"));
        assert!(line("ExecSync true").unwrap().ends_with("NOT KEPT"));
        assert!(line("pull and unpack").unwrap().ends_with("kept"));
        assert_eq!(line("guest memory"), None);
    }

    #[test]
    fn a_report_survives_json() {
        let report = report(900.0, 81.0);
        let json = serde_json::to_string(&report).unwrap();
        assert_eq!(serde_json::from_str::<Report>(&json).unwrap(), report);
    }

    #[test]
    fn ratios_are_of_what_both_have() {
        let then = report(1000.0, 50.0);
        let mut now = report(500.0, 75.0);
        now.metrics
            .retain(|metric| !metric.name.starts_with("pull"));
        let text = now.compare(&then);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 3, "{text}");
        assert!(
            lines[1].contains("0.50") && lines[2].contains("1.50"),
            "{text}"
        );
    }

    #[test]
    fn the_machine_is_read_from_proc() {
        let machine = Machine::here(String::new());
        assert!(machine.cpus > 0 && machine.memory_mib > 0 && !machine.kernel.is_empty());
        assert_eq!(field("a : 1\nmodel name\t: X y\n", "model name"), "X y");
    }
}
