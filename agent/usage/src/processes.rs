//! Processes of a control group and what they have open, from /proc (proc(5)).

use std::fs;
use std::path::{Path, PathBuf};

use podvisor_proto::agent::ProcessSample;

/// Groups below a container's that are looked at: it may make its own.
const GROUPS: usize = 1024;
/// File descriptors of a container that are looked at: more count as this many.
const DESCRIPTORS: u64 = 65_536;

/// What the processes of the control group at `group`, and of those below it, are and have open. `first`: the container's
/// first process, 0 for one that has ended.
pub fn of_group(group: &Path, first: u32) -> ProcessSample {
    let mut sample = ProcessSample {
        open_files_limit: open_files_limit(first),
        ..ProcessSample::default()
    };
    let mut groups = vec![group.to_owned()];
    let mut next = 0;
    while let Some(group) = groups.get(next).cloned() {
        next += 1;
        let processes = fs::read_to_string(group.join("cgroup.procs")).unwrap_or_default();
        for pid in processes.lines().filter_map(|line| line.parse().ok()) {
            sample.processes += 1;
            add_descriptors(&mut sample, pid);
        }
        let room = GROUPS - groups.len().min(GROUPS);
        groups.extend(directories(&group).take(room));
    }
    sample
}

fn directories(of: &Path) -> impl Iterator<Item = PathBuf> {
    let entries = fs::read_dir(of).into_iter().flatten().flatten();
    entries
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .map(|entry| entry.path())
}

fn add_descriptors(sample: &mut ProcessSample, pid: u32) {
    // A process that has ended meanwhile has nothing open.
    let entries = fs::read_dir(format!("/proc/{pid}/fd"))
        .into_iter()
        .flatten();
    for entry in entries.flatten() {
        if sample.file_descriptors == DESCRIPTORS {
            return;
        }
        sample.file_descriptors += 1;
        let target = fs::read_link(entry.path()).unwrap_or_default();
        let is_socket = target
            .as_os_str()
            .as_encoded_bytes()
            .starts_with(b"socket:");
        sample.sockets += u64::from(is_socket);
    }
}

/// `RLIMIT_NOFILE`, soft: "Max open files            1024                 4096                 files".
fn open_files_limit(pid: u32) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/limits")).unwrap_or_default();
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("Max open files"));
    line.and_then(|line| line.split_whitespace().next()?.parse().ok())
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processes_of_a_group_and_those_below() {
        let group = tempfile::tempdir().unwrap();
        let below = group.path().join("exec");
        fs::create_dir(&below).unwrap();
        // A number that is no process: the highest pid is below it.
        fs::write(group.path().join("cgroup.procs"), "4194305\n").unwrap();
        let own = std::process::id();
        fs::write(below.join("cgroup.procs"), format!("{own}\n")).unwrap();
        let before = of_group(group.path(), own);
        let _socket = std::os::unix::net::UnixDatagram::unbound().unwrap();
        let after = of_group(group.path(), own);
        assert_eq!(before.processes, 2);
        assert!(before.file_descriptors >= 3 && before.open_files_limit >= 3);
        // Other tests of this program open and close descriptors too, but no sockets.
        assert_eq!(after.sockets, before.sockets + 1);
    }
}
