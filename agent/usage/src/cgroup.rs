//! Control groups: version 2 (Documentation/admin-guide/cgroup-v2.rst) and version 1
//! (Documentation/admin-guide/cgroup-v1).

use std::fs;
use std::path::{Path, PathBuf};

use podvisor_proto::agent::{DeviceIo, Pressure, Stall, Usage};

/// `USER_HZ`, in which version 1 tells user and system time: 100 on all architectures that matter.
const TICK_NS: u64 = 10_000_000;

/// A group of version 2.
pub fn unified(group: &Path) -> Usage {
    let read = |name: &str| fs::read_to_string(group.join(name)).unwrap_or_default();
    let mut usage = Usage {
        memory_bytes: number(&read("memory.current")),
        peak_bytes: number(&read("memory.peak")),
        swap_bytes: number(&read("memory.swap.current")),
        threads: number(&read("pids.current")),
        threads_limit: number(&read("pids.max")),
        cpu_pressure: pressure(&read("cpu.pressure")),
        memory_pressure: pressure(&read("memory.pressure")),
        io_pressure: pressure(&read("io.pressure")),
        io: io_stat(&read("io.stat")),
        ..Usage::default()
    };
    for (key, value) in counters(&read("cpu.stat")) {
        let us = value.saturating_mul(1000);
        match key {
            "usage_usec" => usage.cpu_ns = us,
            "user_usec" => usage.cpu_user_ns = us,
            "system_usec" => usage.cpu_system_ns = us,
            "nr_periods" => usage.periods = value,
            "nr_throttled" => usage.throttled_periods = value,
            "throttled_usec" => usage.throttled_ns = us,
            _ => {}
        }
    }
    for (key, value) in counters(&read("memory.stat")) {
        match key {
            "anon" => usage.anonymous_bytes = value,
            "file" => usage.file_bytes = value,
            "file_mapped" => usage.mapped_file_bytes = value,
            "inactive_file" => usage.inactive_file_bytes = value,
            "kernel" => usage.kernel_bytes = value,
            "pgfault" => usage.page_faults = value,
            "pgmajfault" => usage.major_page_faults = value,
            _ => {}
        }
    }
    for (key, value) in counters(&read("memory.events")) {
        match key {
            "max" => usage.limit_hits = value,
            "oom_kill" => usage.out_of_memory_kills = value,
            _ => {}
        }
    }
    usage
}

/// A group of version 1: its directories in the hierarchies, in any order. Those below it count as well.
pub fn legacy(groups: &[PathBuf]) -> Usage {
    let read = |name: &str| {
        let mut texts = groups
            .iter()
            .filter_map(|group| fs::read_to_string(group.join(name)).ok());
        texts.next().unwrap_or_default()
    };
    let mut usage = Usage {
        cpu_ns: number(&read("cpuacct.usage")),
        memory_bytes: number(&read("memory.usage_in_bytes")),
        kernel_bytes: number(&read("memory.kmem.usage_in_bytes")),
        peak_bytes: number(&read("memory.max_usage_in_bytes")),
        limit_hits: number(&read("memory.failcnt")),
        threads: number(&read("pids.current")),
        threads_limit: number(&read("pids.max")),
        io: blkio(
            &read("blkio.throttle.io_service_bytes_recursive"),
            &read("blkio.throttle.io_serviced_recursive"),
        ),
        ..Usage::default()
    };
    for (key, value) in counters(&read("cpuacct.stat")) {
        match key {
            "user" => usage.cpu_user_ns = value.saturating_mul(TICK_NS),
            "system" => usage.cpu_system_ns = value.saturating_mul(TICK_NS),
            _ => {}
        }
    }
    for (key, value) in counters(&read("cpu.stat")) {
        match key {
            "nr_periods" => usage.periods = value,
            "nr_throttled" => usage.throttled_periods = value,
            "throttled_time" => usage.throttled_ns = value,
            _ => {}
        }
    }
    for (key, value) in counters(&read("memory.stat")) {
        match key {
            "total_rss" => usage.anonymous_bytes = value,
            "total_cache" => usage.file_bytes = value,
            "total_mapped_file" => usage.mapped_file_bytes = value,
            "total_inactive_file" => usage.inactive_file_bytes = value,
            "total_swap" => usage.swap_bytes = value,
            "total_pgfault" => usage.page_faults = value,
            "total_pgmajfault" => usage.major_page_faults = value,
            _ => {}
        }
    }
    for (key, value) in counters(&read("memory.oom_control")) {
        if key == "oom_kill" {
            usage.out_of_memory_kills = value;
        }
    }
    usage
}

/// A group of the host: its directories in all hierarchies that are mounted. Where version 2 has the memory controller
/// it has all that count here; elsewhere it only tells pressure, if at all.
pub fn of_host(groups: &[PathBuf]) -> Usage {
    let is_unified = |group: &&PathBuf| group.join("memory.current").exists();
    match groups.iter().find(is_unified) {
        Some(group) => unified(group),
        None => legacy(groups),
    }
}

/// A file with one number. "max", which is no limit, is 0.
fn number(text: &str) -> u64 {
    text.trim().parse().unwrap_or(0)
}

/// Lines of a word and a number.
fn counters(text: &str) -> impl Iterator<Item = (&str, u64)> {
    text.lines().filter_map(|line| {
        let (key, value) = line.split_once(' ')?;
        Some((key, value.trim().parse().ok()?))
    })
}

/// `NAME.pressure`. None where the kernel has no PSI.
fn pressure(text: &str) -> Option<Pressure> {
    let stall = |kind: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(kind))?;
        let mut stall = Stall::default();
        for (key, value) in line.split_whitespace().filter_map(|f| f.split_once('=')) {
            match key {
                "total" => stall.total_us = number(value),
                "avg10" => stall.average_10 = hundredths(value),
                "avg60" => stall.average_60 = hundredths(value),
                "avg300" => stall.average_300 = hundredths(value),
                _ => {}
            }
        }
        Some(stall)
    };
    let (some, full) = (stall("some "), stall("full "));
    some.is_some().then_some(Pressure { some, full })
}

/// "12.34": 1234.
fn hundredths(text: &str) -> u32 {
    let (whole, fraction) = text.split_once('.').unwrap_or((text, "00"));
    let parse = |text: &str| text.parse::<u32>().unwrap_or(0);
    parse(whole)
        .saturating_mul(100)
        .saturating_add(parse(fraction).min(99))
}

fn device(text: &str) -> Option<(u32, u32)> {
    let (major, minor) = text.split_once(':')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// `io.stat`: "254:0 rbytes=1 wbytes=2 rios=3 wios=4 …".
fn io_stat(text: &str) -> Vec<DeviceIo> {
    let parse = |line: &str| {
        let mut fields = line.split_whitespace();
        let (major, minor) = device(fields.next()?)?;
        let mut io = DeviceIo {
            major,
            minor,
            ..DeviceIo::default()
        };
        for (key, value) in fields.filter_map(|field| field.split_once('=')) {
            match key {
                "rbytes" => io.read_bytes = number(value),
                "wbytes" => io.written_bytes = number(value),
                "rios" => io.reads = number(value),
                "wios" => io.writes = number(value),
                _ => {}
            }
        }
        Some(io)
    };
    text.lines().filter_map(parse).collect()
}

/// Two files of lines "8:0 Read 123".
fn blkio(bytes: &str, operations: &str) -> Vec<DeviceIo> {
    let mut devices: Vec<DeviceIo> = Vec::new();
    let lines = |text| str::lines(text).map(|line| line.split_whitespace());
    let bytes = lines(bytes).map(|line| (line, true));
    let operations = lines(operations).map(|line| (line, false));
    for (mut fields, is_bytes) in bytes.chain(operations) {
        let (Some(name), Some(kind), Some(value)) = (fields.next(), fields.next(), fields.next())
        else {
            continue;
        };
        let Some((major, minor)) = device(name) else {
            continue;
        };
        let known = devices
            .iter()
            .position(|io| (io.major, io.minor) == (major, minor));
        let index = known.unwrap_or_else(|| {
            devices.push(DeviceIo {
                major,
                minor,
                ..DeviceIo::default()
            });
            devices.len() - 1
        });
        let io = &mut devices[index];
        match (kind, is_bytes) {
            ("Read", true) => io.read_bytes = number(value),
            ("Write", true) => io.written_bytes = number(value),
            ("Read", false) => io.reads = number(value),
            ("Write", false) => io.writes = number(value),
            _ => {}
        }
    }
    devices
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn group(files: &[(&str, &str)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in files {
            fs::write(dir.path().join(name), text).unwrap();
        }
        dir
    }

    #[test]
    fn version_2() {
        let dir = group(&[
            (
                "cpu.stat",
                "usage_usec 30\nuser_usec 20\nsystem_usec 10\nnr_periods 4\nnr_throttled 3\nthrottled_usec 2\n",
            ),
            ("memory.current", "4096\n"),
            (
                "memory.stat",
                "anon 1\nfile 2\nkernel 3\nfile_mapped 4\ninactive_file 5\npgfault 6\npgmajfault 7\n",
            ),
            (
                "memory.events",
                "low 0\nhigh 0\nmax 8\noom 9\noom_kill 10\n",
            ),
            ("pids.current", "11\n"),
            ("pids.max", "max\n"),
            (
                "io.stat",
                "254:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=0 dios=0\n",
            ),
            (
                "cpu.pressure",
                "some avg10=1.50 avg60=0.07 avg300=100.00 total=99\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=1\n",
            ),
        ]);
        let usage = unified(dir.path());
        assert_eq!(
            (usage.cpu_ns, usage.cpu_user_ns, usage.cpu_system_ns),
            (30_000, 20_000, 10_000)
        );
        assert_eq!(
            (usage.periods, usage.throttled_periods, usage.throttled_ns),
            (4, 3, 2000)
        );
        assert_eq!((usage.memory_bytes, usage.inactive_file_bytes), (4096, 5));
        assert_eq!((usage.limit_hits, usage.out_of_memory_kills), (8, 10));
        assert_eq!((usage.threads, usage.threads_limit), (11, 0));
        assert_eq!((usage.io[0].major, usage.io[0].writes), (254, 4));
        let some = usage.cpu_pressure.unwrap().some.unwrap();
        assert_eq!(
            (some.average_10, some.average_60, some.average_300),
            (150, 7, 10_000)
        );
        assert_eq!(some.total_us, 99);
        assert_eq!(usage.io_pressure, None);
    }

    #[test]
    fn version_1_in_several_hierarchies() {
        let memory = group(&[
            ("memory.usage_in_bytes", "4096\n"),
            ("memory.stat", "rss 1\ntotal_rss 2\ntotal_inactive_file 3\n"),
            (
                "memory.oom_control",
                "oom_kill_disable 0\nunder_oom 0\noom_kill 1\n",
            ),
        ]);
        let cpu = group(&[
            ("cpuacct.usage", "77\n"),
            ("cpuacct.stat", "user 2\nsystem 1\n"),
            (
                "blkio.throttle.io_service_bytes_recursive",
                "8:0 Read 5\n8:0 Write 6\n8:0 Total 11\nTotal 11\n",
            ),
            (
                "blkio.throttle.io_serviced_recursive",
                "8:0 Read 1\n8:16 Write 2\n",
            ),
        ]);
        let groups = [cpu.path().to_owned(), memory.path().to_owned()];
        let usage = of_host(&groups);
        assert_eq!((usage.cpu_ns, usage.cpu_user_ns), (77, 20_000_000));
        assert_eq!((usage.memory_bytes, usage.anonymous_bytes), (4096, 2));
        assert_eq!(usage.out_of_memory_kills, 1);
        assert_eq!(usage.io.len(), 2);
        assert_eq!((usage.io[0].written_bytes, usage.io[0].reads), (6, 1));
    }

    #[test]
    fn version_2_wins_where_it_has_the_controllers() {
        let old = group(&[("cpuacct.usage", "77\n")]);
        let new = group(&[("cpu.stat", "usage_usec 1\n"), ("memory.current", "0\n")]);
        let groups = [old.path().to_owned(), new.path().to_owned()];
        assert_eq!(of_host(&groups).cpu_ns, 1000);
        fs::remove_file(new.path().join("memory.current")).unwrap();
        assert_eq!(of_host(&groups).cpu_ns, 77);
    }

    proptest! {
        #[test]
        fn any_text_is_read(text: String) {
            let _ = (pressure(&text), io_stat(&text), blkio(&text, &text), hundredths(&text));
            let _ = counters(&text).count();
        }
    }
}
