//! Whether the kernel has killed a process of a control group for want of memory.

use std::fs;
use std::path::Path;

/// Files that count kills, below the hierarchies' usual places (cgroups(7)), with the word before the count.
const FILES: [(&str, &str); 3] = [
    ("/sys/fs/cgroup", "memory.events"),
    ("/sys/fs/cgroup/unified", "memory.events"),
    ("/sys/fs/cgroup/memory", "memory.oom_control"),
];
const COUNT: &str = "oom_kill ";

/// `cgroup`: below the hierarchies' roots.
pub fn happened(cgroup: &Path) -> bool {
    let below = cgroup.strip_prefix("/").unwrap_or(cgroup);
    FILES.iter().any(|(root, file)| {
        let text = fs::read_to_string(Path::new(root).join(below).join(file));
        text.is_ok_and(|text| count(&text) > 0)
    })
}

fn count(text: &str) -> u64 {
    let lines = text.lines();
    let counts = lines.filter_map(|line| line.strip_prefix(COUNT)?.trim().parse::<u64>().ok());
    counts.sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kills_are_counted() {
        assert_eq!(count("low 0\noom 3\noom_kill 2\noom_group_kill 1\n"), 2);
        assert_eq!(count("oom_kill_disable 0\nunder_oom 0\noom_kill 1\n"), 1);
        assert_eq!(count(""), 0);
    }
}
