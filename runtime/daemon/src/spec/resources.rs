//! Limits of a container: CRI's resources as OCI's, for the guest's control groups.
//!
//! `cpuset_cpus` and `cpuset_mems` name CPUs and memory of the node, which the guest does not have: they
//! are checked here and obeyed on the node (`crate::cpuset`).

use std::collections::HashMap;

use oci_spec::runtime::{
    LinuxCpuBuilder, LinuxHugepageLimitBuilder, LinuxMemoryBuilder, LinuxResources,
    LinuxResourcesBuilder,
};
use podvisor_proto::cri;

use super::build_error;
use crate::error::{Error, Result};

/// Bytes below which not even a static program starts in the guest: its stack and page tables alone are
/// charged some 200 KiB.
const MIN_MEMORY: i64 = 512 << 10;

/// Microseconds that the kernel takes as a CFS quota or period (kernel/sched/core.c).
const MIN_QUOTA: i64 = 1000;
const MAX_PERIOD: i64 = 1_000_000;

/// What a container may set by name. `cgroup.*` is the agent's, and so are the devices.
const CONTROLLERS: [&str; 6] = ["cpu.", "memory.", "io.", "pids.", "hugetlb.", "misc."];

/// The limits. What is 0 is not limited.
///
/// # Errors
/// INVALID_ARGUMENT: a number that no kernel takes, limits that contradict each other.
pub fn of(asked: &cri::LinuxContainerResources) -> Result<LinuxResources> {
    let mut cpu = LinuxCpuBuilder::default();
    match asked.cpu_shares {
        0 => {}
        shares if shares > 0 => cpu = cpu.shares(shares as u64),
        shares => return Err(invalid("cpu_shares", format!("{shares} is negative"))),
    }
    match asked.cpu_quota {
        0 => {}
        // No limit: what an update takes a limit away with.
        quota if quota < 0 => cpu = cpu.quota(-1),
        quota if quota >= MIN_QUOTA => cpu = cpu.quota(quota),
        quota => {
            let problem = format!("{quota} µs is less than the kernel's least, {MIN_QUOTA}");
            return Err(invalid("cpu_quota", problem));
        }
    }
    match asked.cpu_period {
        0 => {}
        period if (MIN_QUOTA..=MAX_PERIOD).contains(&period) => cpu = cpu.period(period as u64),
        period => {
            let problem = format!("{period} µs is not between {MIN_QUOTA} and {MAX_PERIOD}");
            return Err(invalid("cpu_period", problem));
        }
    }
    for (field, list) in [
        ("cpuset_cpus", &asked.cpuset_cpus),
        ("cpuset_mems", &asked.cpuset_mems),
    ] {
        numbers(list).map_err(|problem| invalid(field, problem))?;
    }
    let mut resources = LinuxResourcesBuilder::default()
        .cpu(cpu.build().map_err(build_error)?)
        .memory(memory(asked)?.build().map_err(build_error)?)
        .hugepage_limits(
            asked
                .hugepage_limits
                .iter()
                .map(hugepage_limit)
                .collect::<Result<Vec<_>>>()?,
        );
    let unified = unified(asked)?;
    // On cgroup v1, an OCI runtime refuses even none.
    if !unified.is_empty() {
        resources = resources.unified(unified);
    }
    if !(-1000..=1000).contains(&asked.oom_score_adj) {
        let problem = format!("{} is not between -1000 and 1000", asked.oom_score_adj);
        return Err(invalid("oom_score_adj", problem));
    }
    resources.build().map_err(build_error)
}

fn invalid(field: &str, problem: String) -> Error {
    Error::Invalid {
        field: "config.linux.resources",
        problem: format!("{field}: {problem}"),
    }
}

fn memory(asked: &cri::LinuxContainerResources) -> Result<LinuxMemoryBuilder> {
    let mut memory = LinuxMemoryBuilder::default();
    let (limit, both) = (
        asked.memory_limit_in_bytes,
        asked.memory_swap_limit_in_bytes,
    );
    match limit {
        0 => {}
        limit if limit < 0 => memory = memory.limit(-1),
        limit if limit >= MIN_MEMORY => memory = memory.limit(limit),
        limit => {
            let problem =
                format!("{limit} bytes: nothing runs in a VM with less than {MIN_MEMORY}");
            return Err(invalid("memory_limit_in_bytes", problem));
        }
    }
    match both {
        0 => {}
        both if both < 0 => memory = memory.swap(-1),
        both if limit == 0 => {
            let problem = format!("{both}, but memory itself is not limited");
            return Err(invalid("memory_swap_limit_in_bytes", problem));
        }
        both if both >= limit => memory = memory.swap(both),
        both => {
            let problem = format!("{both}, memory and swap, is less than memory alone, {limit}");
            return Err(invalid("memory_swap_limit_in_bytes", problem));
        }
    }
    Ok(memory)
}

/// Kubelets name every size that the node has, with limit 0 where the pod wants none.
fn hugepage_limit(asked: &cri::HugepageLimit) -> Result<oci_spec::runtime::LinuxHugepageLimit> {
    let size = &asked.page_size;
    let digits = size.trim_end_matches(['K', 'M', 'G', 'B']);
    let unit = &size[digits.len()..];
    if digits.parse::<u32>().is_err() || !matches!(unit, "KB" | "MB" | "GB") {
        return Err(invalid(
            "hugepage_limits",
            format!("{size:?} is no size of a page"),
        ));
    }
    let limit = i64::try_from(asked.limit)
        .map_err(|_| invalid("hugepage_limits", format!("{} bytes", asked.limit)))?;
    LinuxHugepageLimitBuilder::default()
        .page_size(size.clone())
        .limit(limit)
        .build()
        .map_err(build_error)
}

fn unified(asked: &cri::LinuxContainerResources) -> Result<HashMap<String, String>> {
    let file = |name: &str| {
        CONTROLLERS.iter().any(|prefix| name.starts_with(prefix)) && !name.contains(['/', '\0'])
    };
    match asked.unified.keys().find(|name| !file(name)) {
        Some(name) => {
            let problem = format!("{name:?} is no file that limits a container");
            Err(invalid("unified", problem))
        }
        None => Ok(asked.unified.clone().into_iter().collect()),
    }
}

/// The numbers of a list like "0-2,7" (cpuset(7), "List format"), in order.
///
/// # Errors
/// In words: what is wrong with it.
pub fn numbers(list: &str) -> Result<Vec<usize>, String> {
    /// More than any machine has, and little enough to count up to.
    const LIMIT: usize = 1 << 16;
    let mut numbers = Vec::new();
    let parts = list.split(',').filter(|_| !list.is_empty());
    for part in parts {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let number = |text: &str| text.trim().parse::<usize>().ok().filter(|n| *n < LIMIT);
        match (number(first), number(last)) {
            (Some(first), Some(last)) if first <= last => numbers.extend(first..=last),
            _ => return Err(format!("{list:?} is no list of numbers")),
        }
        if numbers.len() > LIMIT {
            return Err(format!("{list:?} is no list of numbers"));
        }
    }
    numbers.sort_unstable();
    numbers.dedup();
    Ok(numbers)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn limits_of_the_cri_become_ocis() {
        let asked = cri::LinuxContainerResources {
            cpu_shares: 512,
            cpu_quota: 20_000,
            cpu_period: 100_000,
            memory_limit_in_bytes: 64 << 20,
            memory_swap_limit_in_bytes: 64 << 20,
            hugepage_limits: vec![cri::HugepageLimit {
                page_size: "2MB".into(),
                limit: 0,
            }],
            unified: [("memory.high".to_owned(), "1000000".to_owned())].into(),
            cpuset_cpus: "0".into(),
            ..Default::default()
        };
        let limits = serde_json::to_value(of(&asked).unwrap()).unwrap();
        assert_eq!(
            limits["cpu"],
            json!({ "shares": 512, "quota": 20_000, "period": 100_000 })
        );
        assert_eq!(
            limits["memory"],
            json!({ "limit": 64 << 20, "swap": 64 << 20 })
        );
        assert_eq!(
            limits["hugepageLimits"],
            json!([{ "pageSize": "2MB", "limit": 0 }])
        );
        assert_eq!(limits["unified"], json!({ "memory.high": "1000000" }));
        let none =
            serde_json::to_value(of(&cri::LinuxContainerResources::default()).unwrap()).unwrap();
        assert_eq!((&none["cpu"], &none["memory"]), (&json!({}), &json!({})));
    }

    #[test]
    fn what_no_kernel_takes_is_named() {
        let problem = |change: fn(&mut cri::LinuxContainerResources)| {
            let mut asked = cri::LinuxContainerResources::default();
            change(&mut asked);
            of(&asked).unwrap_err().to_string()
        };
        for (problem, field) in [
            (problem(|r| r.cpu_shares = -1), "cpu_shares"),
            (problem(|r| r.cpu_quota = 999), "cpu_quota"),
            (problem(|r| r.cpu_period = 1), "cpu_period"),
            (problem(|r| r.cpuset_cpus = "1-0".into()), "cpuset_cpus"),
            (problem(|r| r.cpuset_mems = "x".into()), "cpuset_mems"),
            (
                problem(|r| r.memory_limit_in_bytes = 4096),
                "memory_limit_in_bytes",
            ),
            (
                problem(|r| r.memory_swap_limit_in_bytes = 1 << 30),
                "memory_swap_limit_in_bytes",
            ),
            (problem(|r| r.oom_score_adj = 1001), "oom_score_adj"),
            (
                problem(|r| drop(r.unified.insert("cgroup.procs".into(), "1".into()))),
                "unified",
            ),
            (
                problem(|r| drop(r.unified.insert("memory./../x".into(), "1".into()))),
                "unified",
            ),
            (
                problem(|r| {
                    r.hugepage_limits.push(cri::HugepageLimit {
                        page_size: "2".into(),
                        limit: 1,
                    });
                }),
                "hugepage_limits",
            ),
        ] {
            assert!(problem.contains(field), "{field}: {problem}");
        }
    }

    #[test]
    fn lists_of_numbers() {
        assert_eq!(numbers("").unwrap(), Vec::<usize>::new());
        assert_eq!(numbers("3,0-2,2").unwrap(), [0, 1, 2, 3]);
        for bad in [",", "1-", "-1", "2-1", "a", "0-99999999"] {
            assert!(numbers(bad).is_err(), "{bad}");
        }
    }
}
