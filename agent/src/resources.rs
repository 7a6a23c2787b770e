//! Limits of a container: the spec's `linux.resources` as files of its control group
//! (Documentation/admin-guide/cgroup-v2.rst). Devices are the [`device_filter`](crate::device_filter)'s.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::BorrowedFd;

use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};

use crate::cgroup::Cgroup;
use crate::oci::{Cpu, Memory, Resources};

/// Shares (version 1) and weight (version 2) of the CPU: smallest and largest.
const SHARES: (u64, u64) = (2, 262_144);
const WEIGHT: (u64, u64) = (1, 10_000);

/// Why limits are not set.
#[derive(Debug, thiserror::Error)]
pub enum ResourcesError {
    /// They contradict each other.
    #[error("{0}")]
    Inconsistent(&'static str),
    /// No such file.
    #[error("control groups have no {0}")]
    NoFile(String),
    /// A new limit that processes are above already.
    #[error("{used} bytes are in use, more than the new limit of {limit}")]
    InUse {
        /// Bytes.
        limit: u64,
        /// Bytes, without the cache of files.
        used: u64,
    },
    /// The kernel refused.
    #[error("cannot set {file} to {value}: {source}")]
    Set {
        /// Of the control group.
        file: String,
        /// What was to be written.
        value: String,
        /// The kernel's reason.
        source: io::Error,
    },
}

/// One file and what is to be written.
type Setting = (String, String);

/// Writes the limits into the control group whose directory is `group`.
pub fn apply(resources: &Resources, group: BorrowedFd<'_>) -> Result<(), ResourcesError> {
    for (file, value) in settings(resources)? {
        set(group, &file, &value)?;
    }
    Ok(())
}

/// Changes the limits of processes that run: all, or none when this fails.
pub fn update(resources: &Resources, group: BorrowedFd<'_>) -> Result<(), ResourcesError> {
    let settings = settings(resources)?;
    check_memory(resources, group)?;
    let mut before: Vec<Setting> = Vec::with_capacity(settings.len());
    for (file, value) in settings {
        let old = read(group, &file).unwrap_or_default();
        if let Err(error) = set(group, &file, &value) {
            for (file, value) in before.into_iter().rev() {
                // What was in force a moment ago can be again.
                let _ = write(group, &file, &value);
            }
            return Err(error);
        }
        before.push((file, old));
    }
    Ok(())
}

/// Looks at limits that are not to be applied yet.
pub fn check(resources: &Resources) -> Result<(), ResourcesError> {
    settings(resources)?;
    match resources
        .unified
        .keys()
        .find(|file| !Cgroup::all_containers().file(file).exists())
    {
        Some(file) => Err(ResourcesError::NoFile(file.clone())),
        None => Ok(()),
    }
}

/// The kernel kills processes until a new limit holds: that is not what a change is for.
fn check_memory(resources: &Resources, group: BorrowedFd<'_>) -> Result<(), ResourcesError> {
    let Some(limit) = resources
        .memory
        .limit
        .and_then(|limit| u64::try_from(limit).ok())
    else {
        return Ok(());
    };
    let current = read(group, "memory.current").ok();
    let current = current
        .and_then(|text| text.parse::<u64>().ok())
        .unwrap_or(0);
    let statistics = read(group, "memory.stat").unwrap_or_default();
    // The cache of files goes when memory gets short.
    let file = statistics
        .lines()
        .find_map(|line| line.strip_prefix("file "))
        .and_then(|number| number.parse::<u64>().ok())
        .unwrap_or(0);
    let used = current.saturating_sub(file);
    if limit == 0 || used <= limit {
        Ok(())
    } else {
        Err(ResourcesError::InUse { limit, used })
    }
}

fn set(group: BorrowedFd<'_>, file: &str, value: &str) -> Result<(), ResourcesError> {
    match write(group, file, value) {
        // Kubelets limit pages of all sizes that the node has, to nothing if need be: so it is when the
        // guest has no such pages.
        Err(error)
            if error.kind() == io::ErrorKind::NotFound
                && file.starts_with("hugetlb.")
                && value == "0" =>
        {
            Ok(())
        }
        result => result.map_err(|source| ResourcesError::Set {
            file: file.to_owned(),
            value: value.to_owned(),
            source,
        }),
    }
}

fn write(group: BorrowedFd<'_>, file: &str, value: &str) -> io::Result<()> {
    open(group, file, OFlag::O_WRONLY)?.write_all(value.as_bytes())
}

fn read(group: BorrowedFd<'_>, file: &str) -> io::Result<String> {
    let mut text = String::new();
    open(group, file, OFlag::O_RDONLY)?.read_to_string(&mut text)?;
    Ok(text.trim_end().to_owned())
}

/// A name in the spec is one of this group's files and nothing else.
fn open(group: BorrowedFd<'_>, file: &str, access: OFlag) -> io::Result<File> {
    let how = OpenHow::new()
        .flags(access | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_BENEATH);
    if file.contains('/') {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    Ok(File::from(openat2(group, file, how)?))
}

fn settings(resources: &Resources) -> Result<Vec<Setting>, ResourcesError> {
    let mut settings = cpu_settings(&resources.cpu);
    settings.extend(memory_settings(&resources.memory)?);
    if let Some(pids) = &resources.pids {
        settings.push(("pids.max".to_owned(), number_or_max(pids.limit)));
    }
    for limit in &resources.hugepage_limits {
        settings.push((
            format!("hugetlb.{}.max", limit.page_size),
            if limit.limit < 0 {
                "max".to_owned()
            } else {
                limit.limit.to_string()
            },
        ));
    }
    // Last: who names a file knows best.
    for (file, value) in &resources.unified {
        settings.push((file.clone(), value.clone()));
    }
    Ok(settings)
}

fn cpu_settings(cpu: &Cpu) -> Vec<Setting> {
    let mut settings = Vec::new();
    let mut set = |file: &str, value: String| settings.push((file.to_owned(), value));
    if let Some(shares) = cpu.shares.filter(|shares| *shares != 0) {
        set("cpu.weight", weight(shares).to_string());
    }
    match (cpu.quota, cpu.period) {
        (None, None) => {}
        (quota, None) => set("cpu.max", number_or_max(quota.unwrap_or(-1))),
        (quota, Some(period)) => {
            let quota = number_or_max(quota.unwrap_or(-1));
            set("cpu.max", format!("{quota} {period}"));
        }
    }
    if let Some(burst) = cpu.burst {
        set("cpu.max.burst", burst.to_string());
    }
    if let Some(idle) = cpu.idle {
        set("cpu.idle", idle.to_string());
    }
    if let Some(cpus) = &cpu.cpus {
        set("cpuset.cpus", cpus.clone());
    }
    if let Some(mems) = &cpu.mems {
        set("cpuset.mems", mems.clone());
    }
    settings
}

fn memory_settings(memory: &Memory) -> Result<Vec<Setting>, ResourcesError> {
    let mut settings = Vec::new();
    let limit = memory.limit.filter(|limit| *limit != 0);
    // In version 1's words, which the spec uses, "swap" is memory and swap together.
    let swap = match (limit, memory.swap.filter(|swap| *swap != 0)) {
        (_, None) => None,
        (None, Some(_)) => {
            return Err(ResourcesError::Inconsistent(
                "swap is limited, memory is not",
            ));
        }
        (Some(-1), Some(_)) | (_, Some(-1)) => Some(-1),
        (Some(limit), Some(both)) => {
            Some(both.checked_sub(limit).filter(|swap| *swap >= 0).ok_or(
                ResourcesError::Inconsistent(
                    "the limit of memory and swap is below that of memory",
                ),
            )?)
        }
    };
    for (file, value) in [
        ("memory.swap.max", swap),
        ("memory.max", limit),
        ("memory.low", memory.reservation.filter(|low| *low != 0)),
    ] {
        if let Some(value) = value {
            settings.push((
                file.to_owned(),
                if value < 0 {
                    "max".to_owned()
                } else {
                    value.to_string()
                },
            ));
        }
    }
    Ok(settings)
}

/// Zero and less mean "no limit" in the spec.
fn number_or_max(number: i64) -> String {
    if number > 0 {
        number.to_string()
    } else {
        "max".to_owned()
    }
}

/// The weight of so many shares, by runc's formula: smallest, default (1024: 100) and largest meet.
fn weight(shares: u64) -> u64 {
    if shares <= SHARES.0 {
        return WEIGHT.0;
    }
    if shares >= SHARES.1 {
        return WEIGHT.1;
    }
    let log = (shares as f64).log2();
    let exponent = (log * log + 125.0 * log) / 612.0 - 7.0 / 34.0;
    (10_f64.powf(exponent).ceil() as u64).clamp(WEIGHT.0, WEIGHT.1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn parse(value: Value) -> Result<Vec<(String, String)>, String> {
        let resources: Resources = serde_json::from_value(value).unwrap();
        settings(&resources).map_err(|error| error.to_string())
    }

    fn expect(value: Value, expected: &[(&str, &str)]) {
        let expected = expected
            .iter()
            .map(|(file, value)| ((*file).to_owned(), (*value).to_owned()))
            .collect();
        assert_eq!(parse(value), Ok(expected));
    }

    #[test]
    fn limits_become_files() {
        expect(json!({ "cpu": {}, "memory": {} }), &[]);
        expect(
            json!({
                "cpu": { "shares": 1024, "quota": 50_000, "period": 100_000, "cpus": "0-1" },
                "memory": { "limit": 64, "reservation": 32 },
                "pids": { "limit": 10 },
                "unified": { "memory.high": "60" },
            }),
            &[
                ("cpu.weight", "100"),
                ("cpu.max", "50000 100000"),
                ("cpuset.cpus", "0-1"),
                ("memory.max", "64"),
                ("memory.low", "32"),
                ("pids.max", "10"),
                ("memory.high", "60"),
            ],
        );
        expect(
            json!({ "cpu": { "quota": -1, "period": 1000 }, "pids": { "limit": -1 } }),
            &[("cpu.max", "max 1000"), ("pids.max", "max")],
        );
    }

    #[test]
    fn swap_is_what_is_above_memory() {
        expect(
            json!({ "memory": { "limit": 100, "swap": 150 } }),
            &[("memory.swap.max", "50"), ("memory.max", "100")],
        );
        expect(
            json!({ "memory": { "limit": 100, "swap": -1 } }),
            &[("memory.swap.max", "max"), ("memory.max", "100")],
        );
        assert!(parse(json!({ "memory": { "limit": 100, "swap": 50 } })).is_err());
        assert!(parse(json!({ "memory": { "swap": 50 } })).is_err());
    }

    #[test]
    fn weights_are_those_of_runc() {
        for (shares, expected) in [
            (1, 1),
            (2, 1),
            (1024, 100),
            (262_144, 10_000),
            (22_000, 1204),
        ] {
            assert_eq!(weight(shares), expected, "{shares}");
        }
    }
}
