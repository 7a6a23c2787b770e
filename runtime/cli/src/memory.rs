//! What the processes of a pod take of the host's memory, by proc(5).

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use podvisor_proto::monitor::AddressRange;

/// Names of QEMU's guest RAM in `smaps`: a memfd, which the monitor maps as well.
const GUEST_RAM: &str = "/memfd:";
/// Such mappings below this are shared for other reasons than guest RAM (vhost-user's in-flight region).
const GUEST_RAM_MIN_BYTES: u64 = 32 << 20;

/// Memory of one process, bytes.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Usage {
    /// Proportional share of all pages but guest RAM's.
    pub pss: u64,
    /// Pages that nobody else maps, guest RAM's not counted.
    pub private: u64,
    /// Proportional share of guest RAM: what of it is resident, divided by who maps it.
    pub guest_ram_pss: u64,
}

/// A process, with its memory.
#[derive(Debug)]
pub struct Process {
    /// Its id.
    pub pid: u32,
    /// File name of its binary.
    pub name: String,
    /// Its memory.
    pub usage: Usage,
}

/// The processes of a pod: the monitor and all its descendants. Those that end meanwhile are left
/// out. `guest_memory` is where the monitor itself has guest RAM.
pub fn of_pod(monitor_pid: u32, guest_memory: &[AddressRange]) -> io::Result<Vec<Process>> {
    let children = children_by_parent()?;
    let mut pids = vec![monitor_pid];
    let mut next = 0;
    while let Some(&pid) = pids.get(next) {
        pids.extend(children.get(&pid).into_iter().flatten());
        next += 1;
    }
    Ok(pids
        .into_iter()
        .filter_map(|pid| {
            let own = if pid == monitor_pid {
                guest_memory
            } else {
                &[]
            };
            process(pid, own).ok()
        })
        .collect())
}

/// One process, which has guest RAM in `guest_memory`.
pub fn process(pid: u32, guest_memory: &[AddressRange]) -> io::Result<Process> {
    let binary = fs::read_link(format!("/proc/{pid}/exe"))?;
    let smaps = fs::read_to_string(format!("/proc/{pid}/smaps"))?;
    Ok(Process {
        pid,
        name: binary
            .file_name()
            .map(|name| name.to_string_lossy().into_owned())
            .unwrap_or_default(),
        usage: usage(&smaps, guest_memory),
    })
}

/// The podvisor-fs of the pod whose folder is `sandbox`; `None`: no container has had volumes. podvisord is its parent, not
/// the monitor: it is found by the folder that it serves.
pub fn volume_server(sandbox: &Path) -> io::Result<Option<Process>> {
    let shares = sandbox.join("shares");
    for pid in pids()? {
        let command = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        if command.split(|byte| *byte == 0).nth(1) == Some(shares.as_os_str().as_bytes()) {
            return process(pid, &[]).map(Some);
        }
    }
    Ok(None)
}

/// `MemAvailable` of a /proc/meminfo, in bytes.
pub fn available(meminfo: &str) -> Option<u64> {
    let line = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

fn pids() -> io::Result<impl Iterator<Item = u32>> {
    let entries = fs::read_dir("/proc")?;
    Ok(entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()))
}

fn children_by_parent() -> io::Result<BTreeMap<u32, Vec<u32>>> {
    let mut children: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
    for pid in pids()? {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        if let Some(parent) = parent(&stat) {
            children.entry(parent).or_default().push(pid);
        }
    }
    Ok(children)
}

/// The fourth field of /proc/PID/stat. The second, the name, may itself hold spaces and brackets.
fn parent(stat: &str) -> Option<u32> {
    let (_, rest) = stat.rsplit_once(')')?;
    rest.split_whitespace().nth(1)?.parse().ok()
}

/// Sums the mappings of /proc/PID/smaps, guest RAM apart.
fn usage(smaps: &str, guest_memory: &[AddressRange]) -> Usage {
    let mut total = Usage::default();
    let mut is_guest_ram = false;
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        let (Some(key), Some(value)) = (words.next(), words.next()) else {
            continue;
        };
        if let Some((start, end)) = address_range(key) {
            // Address, permissions, offset, device, inode, path.
            let path = line.split_whitespace().nth(5).unwrap_or_default();
            let size = end - start;
            is_guest_ram = path.starts_with(GUEST_RAM) && size >= GUEST_RAM_MIN_BYTES
                || guest_memory
                    .iter()
                    .any(|range| start >= range.start && end <= range.start + range.length);
            continue;
        }
        let bytes = value.parse::<u64>().unwrap_or(0) * 1024;
        match (key, is_guest_ram) {
            ("Pss:", true) => total.guest_ram_pss += bytes,
            ("Pss:", false) => total.pss += bytes,
            ("Private_Clean:" | "Private_Dirty:", false) => total.private += bytes,
            _ => {}
        }
    }
    total
}

fn address_range(word: &str) -> Option<(u64, u64)> {
    let (start, end) = word.split_once('-')?;
    Some((
        u64::from_str_radix(start, 16).ok()?,
        u64::from_str_radix(end, 16).ok()?,
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_ram_is_counted_apart() {
        let smaps = "\
55d0c0000000-55d0c0010000 r-xp 00000000 fe:00 1234                       /usr/bin/qemu
Size:                 64 kB
Pss:                  10 kB
Pss_Dirty:             1 kB
Private_Clean:         4 kB
Private_Dirty:         2 kB
7f0000000000-7f0010000000 rw-s 00000000 00:01 99                         /memfd:memory-backend-memfd (deleted)
Size:             262144 kB
Pss:               30000 kB
Private_Dirty:     29000 kB
VmFlags: rd wr sh
7f0010000000-7f0020000000 rw-s 00000000 00:01 99                         /memfd:memory-backend-memfd (deleted)
Pss:                   0 kB
7f0020000000-7f0020001000 rw-s 00000000 00:01 100                        /memfd:vhost-inflight (deleted)
Pss:                   4 kB
Private_Dirty:         4 kB
7fe000000000-7fe000001000 rw-p 00000000 fe:00 77                         /usr/lib/podvisor/vmlinux
Pss:                   3 kB
7fe000001000-7fe002000000 rw-p 00000000 00:00 0
Pss:                 100 kB
Private_Dirty:       100 kB
7ffc00000000-7ffc00021000 rw-p 00000000 00:00 0                          [stack]
Pss:                   8 kB
Private_Dirty:         8 kB
";
        // In QEMU's process; and in a monitor's own, kernel's file and all.
        let own = AddressRange {
            start: 0x7fe0_0000_0000,
            length: 0x200_0000,
        };
        assert_eq!(
            usage(smaps, &[own]),
            Usage {
                pss: 22 << 10,
                private: 18 << 10,
                guest_ram_pss: 30_103 << 10,
            }
        );
    }

    #[test]
    fn available_memory_is_read() {
        let meminfo = "MemTotal:         500000 kB\nMemAvailable:     123 kB\n";
        assert_eq!(available(meminfo), Some(123 << 10));
        assert_eq!(available("MemAvailable: much\n"), None);
    }

    #[test]
    fn the_parent_is_found_behind_odd_names() {
        assert_eq!(parent("12 (a) b) (c) S 7 12 12 0 -1"), Some(7));
        assert_eq!(parent(""), None);
    }

    #[test]
    fn children_are_found_from_their_ancestor() {
        let mut child = std::process::Command::new("sleep")
            .arg("60")
            .spawn()
            .unwrap();
        let processes = of_pod(std::process::id(), &[]).unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(processes.iter().any(|process| process.pid == child.id()));
        assert!(processes[0].usage.pss > 0 && processes[0].usage.private > 0);
    }
}
