//! The rig of the end-to-end tests: a podvisord of one's own, real clients, real and lying registries.
//!
//! | module            | what it holds                                                              |
//! |-------------------|----------------------------------------------------------------------------|
//! | [`machine`]       | the VMM that the tests are for, and how long they wait                     |
//! | [`daemon`]        | [`daemon::Daemon`]: one podvisord with its own directories and network     |
//! | [`host`]          | what an instance has on the host, seen without asking podvisor             |
//! | [`crictl`]        | the real crictl, and the pod and container configurations it is given      |
//! | [`cri`]           | a gRPC client, for what crictl cannot say                                  |
//! | [`oci`]           | images made for a test: layers, manifests, indexes                         |
//! | [`certificates`]  | a certificate authority                                                    |
//! | [`registry`]      | Debian's docker-registry                                                   |
//! | [`collector`]     | an OpenTelemetry collector                                                 |
//! | [`fake_registry`] | a registry that asks for tokens, hangs, fails or lies                      |
//! | [`logs`]          | CRI log files                                                              |
//! | [`guest`]         | guest images that do not work                                              |
//! | [`http`]          | as much of HTTP/1.1 as the registries need                                 |
//!
//! Every test has a daemon of its own: what a test breaks breaks no other, and what it leaves behind
//! is found when its daemon is dropped, by the test that left it.
//!
//! The tests run what `make build` left in target/release and target/guest, or what the directories
//! `PODVISOR_BIN_DIR` and `PODVISOR_GUEST_DIR` hold, as root. `PODVISOR_VMM` says on which VMM, and
//! `PODVISOR_SLOWNESS` how many times longer than usual they have to wait.

#![allow(clippy::format_push_string)] // Tests: what reads best.

pub mod certificates;
pub mod collector;
pub mod cri;
pub mod crictl;
pub mod daemon;
pub mod fake_registry;
pub mod guest;
pub mod host;
pub mod http;
pub mod logs;
pub mod machine;
pub mod oci;
pub mod registry;

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use machine::patience;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// The repository.
pub fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("tests/ is in the repository")
        .into()
}

/// A directory of binaries: `variable`, or `path` below target/.
pub(crate) fn built(variable: &str, path: &str) -> PathBuf {
    std::env::var_os(variable).map_or_else(|| repository().join("target").join(path), Into::into)
}

/// A command of tests/rig.
pub fn rig(script: &str) -> Command {
    Command::new(repository().join("tests/rig").join(script))
}

/// Standard output of a command that must succeed.
pub fn output_of(command: &mut Command) -> String {
    let output = command
        .output()
        .unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(
        output.status.success(),
        "{command:?}: {}\n{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).expect("UTF-8 from our own scripts")
}

/// Runs a program that must end, whatever its result; a hanging one is a failure of the test.
pub fn finished(command: &mut Command) -> Output {
    let child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("{command:?}: {error}"));
    output_in_time(child)
}

/// The end of a program that must end, and what it wrote to pipes until then.
pub fn output_in_time(child: Child) -> Output {
    let pid = Pid::from_raw(child.id() as i32);
    let (ended, output) = mpsc::channel();
    thread::spawn(move || ended.send(child.wait_with_output()));
    let Ok(output) = output.recv_timeout(patience()) else {
        let command = std::fs::read_to_string(format!("/proc/{pid}/cmdline"));
        let _ = kill(pid, Signal::SIGKILL);
        panic!("it does not end: {command:?}");
    };
    output.expect("our own child, and its pipes")
}

/// Asks `probe` until it has an answer. For state that has no event a client could wait for. Looking
/// takes no more than half of the time: a slow machine has better things to do.
pub fn eventually<T>(what: &str, probe: impl FnMut() -> Option<T>) -> T {
    eventually_within(patience(), what, probe)
}

/// [`eventually`], with its own limit.
pub fn eventually_within<T>(
    limit: Duration,
    what: &str,
    mut probe: impl FnMut() -> Option<T>,
) -> T {
    let deadline = Instant::now() + limit;
    loop {
        let begun = Instant::now();
        if let Some(answer) = probe() {
            return answer;
        }
        assert!(Instant::now() < deadline, "not within {limit:?}: {what}");
        thread::sleep(begun.elapsed().max(Duration::from_millis(20)));
    }
}
