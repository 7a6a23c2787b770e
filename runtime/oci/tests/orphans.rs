//! Orphans are reaped. In a process of its own: others' children would be taken for orphans.

use std::fs;
use std::process::Command;
use std::time::Duration;

use podvisor_oci::children::Children;
use podvisor_oci::process::Process;

/// A child that its own parent leaves to us. Returns its pid.
fn orphan(command: &str) -> u32 {
    let script = format!("{command} >/dev/null & echo $!");
    let output = Command::new("sh").args(["-c", &script]).output().unwrap();
    let pid = String::from_utf8(output.stdout).unwrap();
    pid.trim().parse().unwrap()
}

fn is_zombie(pid: u32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| stat.contains(") Z "))
}

#[tokio::test]
async fn orphans_are_reaped_and_awaited_children_are_not() {
    let children = Children::adopt().unwrap();
    // Reaped by its number.
    #[allow(clippy::zombie_processes)]
    let awaited = Command::new("sh").args(["-c", "exit 5"]).spawn().unwrap();
    let _kept = children.awaited(awaited.id());
    let early = orphan("true");
    while !is_zombie(early) {
        std::thread::sleep(Duration::from_millis(10));
    }
    // Nobody listened when that one ended.
    let reaping = tokio::spawn(children.clone().reap_orphans());
    let late = orphan("sleep 0.3");
    for orphan in [early, late] {
        while fs::exists(format!("/proc/{orphan}")).unwrap() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
    let process = Process::of(awaited.id()).unwrap();
    assert_eq!(process.exited().await.unwrap(), 5);
    reaping.abort();
}
