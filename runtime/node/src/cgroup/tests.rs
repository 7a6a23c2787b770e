//! On the machine's own hierarchies, as root.

use std::process::{Child, Command};
use std::sync::atomic::{AtomicUsize, Ordering};

use super::*;

/// A parent of this test alone, removed with all that is in it.
struct Parent {
    path: String,
    sleepers: Vec<Child>,
}

impl Parent {
    /// `None` where groups cannot be made.
    fn new() -> Option<Self> {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = format!("/podvisor-test-{}-{number}", std::process::id());
        if !nix::unistd::geteuid().is_root() {
            eprintln!("skipped: needs root");
            return None;
        }
        Some(Self {
            path,
            sleepers: Vec::new(),
        })
    }

    fn sleeper(&mut self) -> u32 {
        let child = Command::new("sleep").arg("1000").spawn().unwrap();
        let pid = child.id();
        self.sleepers.push(child);
        pid
    }

    fn exists(&self, leaf: &str) -> usize {
        let groups = PodCgroup::at(&self.path, leaf).unwrap().groups;
        groups.iter().filter(|g| g.root.exists()).count()
    }
}

impl Drop for Parent {
    fn drop(&mut self) {
        for sleeper in &mut self.sleepers {
            let _ = sleeper.kill();
            let _ = sleeper.wait();
        }
        let all = PodCgroup::at("/", &self.path[1..]).unwrap();
        all.kill_all().unwrap();
        all.remove(Duration::from_secs(10)).unwrap();
    }
}

#[test]
fn a_group_in_every_hierarchy() {
    let Some(mut parent) = Parent::new() else {
        return;
    };
    let pod = PodCgroup::create(&parent.path, "pod").unwrap();
    assert_eq!(pod, PodCgroup::create(&parent.path, "pod").unwrap());
    assert_eq!(parent.exists("pod"), pod.groups.len());

    let pid = parent.sleeper();
    pod.add(pid).unwrap();
    assert_eq!(pod.processes(), HashSet::from([pid]));
    let memberships = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
    let group = format!("{}/pod", parent.path);
    let member = memberships
        .lines()
        .filter(|line| line.ends_with(&group))
        .count();
    assert_eq!(member, pod.groups.len(), "{memberships}");

    let error = pod.remove(Duration::from_millis(20)).unwrap_err();
    assert!(
        matches!(&error, CgroupError::Busy { pids, .. } if *pids == [pid]),
        "{error}"
    );
    assert!(parent.exists("pod") > 0);

    pod.kill_all().unwrap();
    pod.remove(Duration::from_mins(1)).unwrap();
    assert_eq!(parent.exists("pod"), 0);
    pod.remove(Duration::ZERO).unwrap();
    pod.kill_all().unwrap();
    assert!(pod.add(parent.sleeper()).is_err());
}

#[test]
fn removal_waits_for_the_end_of_processes() {
    let Some(mut parent) = Parent::new() else {
        return;
    };
    let pod = PodCgroup::create(&parent.path, "pod").unwrap();
    let pid = parent.sleeper();
    pod.add(pid).unwrap();
    let remover = {
        let pod = pod.clone();
        thread::spawn(move || pod.remove(Duration::from_mins(1)))
    };
    // It cannot have removed what a process is in.
    thread::sleep(Duration::from_millis(50));
    assert!(!remover.is_finished());
    pod.kill_all().unwrap();
    remover.join().unwrap().unwrap();
    assert_eq!(parent.exists("pod"), 0);
}

#[test]
fn groups_below_go_too() {
    let Some(mut parent) = Parent::new() else {
        return;
    };
    let pod = PodCgroup::create(&parent.path, "pod").unwrap();
    let below = PodCgroup::create(&format!("{}/pod", parent.path), "vcpus").unwrap();
    let pid = parent.sleeper();
    below.add(pid).unwrap();
    assert_eq!(pod.processes(), HashSet::from([pid]));
    pod.kill_all().unwrap();
    pod.remove(Duration::from_mins(1)).unwrap();
    assert_eq!(parent.exists("pod") + parent.exists("pod/vcpus"), 0);
}

#[test]
fn processes_that_start_others_are_all_killed() {
    let Some(parent) = Parent::new() else { return };
    let pod = PodCgroup::create(&parent.path, "pod").unwrap();
    let mut shell = Command::new("sh")
        .args(["-c", "read go; while :; do sleep 1000 & sleep 0.001; done"])
        .stdin(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    pod.add(shell.id()).unwrap();
    drop(shell.stdin.take());
    thread::sleep(Duration::from_millis(50));
    pod.kill_all().unwrap();
    shell.wait().unwrap();
    pod.remove(Duration::from_mins(1)).unwrap();
    assert_eq!(parent.exists("pod"), 0);
}

#[test]
fn parents_that_are_none() {
    assert!(matches!(
        PodCgroup::create("/../x", "pod"),
        Err(CgroupError::Parent(_))
    ));
    assert!(matches!(
        PodCgroup::create("a--b.slice", "pod"),
        Err(CgroupError::Parent(_))
    ));
}
