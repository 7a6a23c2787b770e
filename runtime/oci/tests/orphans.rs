//! Orphans are reaped. In a process of its own: others' children would be taken for orphans.

use std::fs;
use std::process::{ChildStdin, Command, Stdio};
use std::time::Duration;

use podvisor_oci::children::Children;
use podvisor_oci::process::Process;
use tokio::time::{sleep, timeout};

/// Far longer than anything here takes.
const PATIENCE: Duration = Duration::from_mins(1);

/// A child that its own parent leaves to us: its pid, and what it lives as long as. It must outlive its parent, which
/// might reap it.
fn orphan() -> (u32, ChildStdin) {
    // A shell gives what it leaves in the background another standard input.
    let script = "exec 3<&0; cat <&3 >/dev/null & echo $!";
    let mut shell = Command::new("sh")
        .args(["-c", script])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let life = shell.stdin.take().unwrap();
    let output = shell.wait_with_output().unwrap();
    let pid = String::from_utf8(output.stdout).unwrap();
    (pid.trim().parse().unwrap(), life)
}

async fn until(what: impl Fn() -> bool) {
    let wait = async {
        while !what() {
            sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(PATIENCE, wait).await.unwrap();
}

fn is_zombie(pid: u32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| stat.contains(") Z "))
}

fn is_gone(pid: u32) -> bool {
    !fs::exists(format!("/proc/{pid}")).unwrap()
}

#[tokio::test]
async fn orphans_are_reaped_and_awaited_children_are_not() {
    let children = Children::adopt().unwrap();
    // Reaped by its number.
    #[allow(clippy::zombie_processes)]
    let awaited = Command::new("sh").args(["-c", "exit 5"]).spawn().unwrap();
    let _kept = children.awaited(awaited.id());
    // Nobody listens yet when this one ends.
    let (early, life) = orphan();
    drop(life);
    until(|| is_zombie(early)).await;
    let reaping = tokio::spawn(children.clone().reap_orphans());
    until(|| is_gone(early)).await;
    let (late, life) = orphan();
    assert!(!is_gone(late));
    drop(life);
    until(|| is_gone(late)).await;
    let process = Process::of(awaited.id()).unwrap();
    assert_eq!(process.exited().await.unwrap(), 5);
    reaping.abort();
}
