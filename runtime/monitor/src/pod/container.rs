//! What the monitor keeps of one container besides its public record, and how it ends.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use podvisor_proto::agent::Exit;
use podvisor_proto::monitor::{self, ContainerState};
use tracing::{debug, info};

use super::attach::{Attached, Input};
use super::{Pod, PodError};
use crate::log::format::Stream;
use crate::log::{LogSink, Pump};
use crate::state::now_ns;

/// Exit code of what SIGKILL ended.
pub const KILLED: u32 = 128 + libc::SIGKILL as u32;

/// Exit code of a container whose process could not be started, as containerd reports it.
pub const START_ERROR: u32 = 128;

/// One container.
pub struct Container {
    /// Its id.
    pub id: String,
    /// Tells a repeated request from another one of the same id.
    pub fingerprint: u64,
    /// Whether its standard input stays open for an attach.
    pub stdin: bool,
    /// Whether that ends with the first client's.
    pub stdin_once: bool,
    /// Whether it has a terminal.
    pub terminal: bool,
    /// Layers it uses.
    pub diff_ids: Vec<String>,
    /// Where its output goes.
    pub log: Arc<LogSink>,
    /// One of create, start and remove at a time.
    pub operation: tokio::sync::Mutex<()>,
    run: Mutex<Run>,
}

/// The container's process.
#[derive(Default)]
struct Run {
    phase: Phase,
    /// Moves its output into the log.
    pump: Option<Pump>,
    /// Held open for attach.
    stdin: Option<Arc<Input>>,
    out_of_memory: bool,
    /// The last signal that StopContainer sent.
    stop_signal: Option<u32>,
}

#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum Phase {
    #[default]
    NotStarted,
    /// The agent has been asked. An exit may come before its answer.
    Starting {
        exit_code: Option<u32>,
    },
    Running,
    Ended {
        exit_code: Option<u32>,
    },
}

impl Container {
    /// A container that has not been started.
    pub fn new(request: &monitor::CreateContainerRequest, log: LogSink, fingerprint: u64) -> Self {
        let diff_ids = super::create::all_layers(request);
        Self {
            id: request.id.clone(),
            fingerprint,
            stdin: request.stdin,
            stdin_once: request.stdin_once,
            terminal: request.terminal,
            diff_ids: diff_ids.map(|layer| layer.diff_id.clone()).collect(),
            log: Arc::new(log),
            operation: tokio::sync::Mutex::default(),
            run: Mutex::default(),
        }
    }

    /// The agent is about to be asked to start it.
    pub fn set_starting(&self) {
        self.run().phase = Phase::Starting { exit_code: None };
    }

    /// Keeps the streams of its process.
    pub fn set_streams(&self, pump: Pump, stdin: Option<Input>) {
        let mut run = self.run();
        run.pump = Some(pump);
        run.stdin = stdin.map(Arc::new);
    }

    /// What a caller sees of those of stdin, stdout and stderr that it wants, from now on.
    pub fn attach(&self, [stdin, stdout, stderr]: [bool; 3]) -> Result<Attached, PodError> {
        let run = self.run();
        let state = |problem: &str| PodError::State(format!("container {} {problem}", self.id));
        let taps = run
            .pump
            .as_ref()
            .ok_or_else(|| state("is not running"))?
            .taps();
        let tap = |wanted: bool, stream| {
            let tapped = wanted.then(|| {
                taps.tap(stream)
                    .ok_or_else(|| state("has too many onlookers"))
            });
            tapped.transpose()
        };
        Ok(Attached {
            input: run.stdin.clone().filter(|_| stdin),
            stdout: tap(stdout, Stream::Stdout)?,
            stderr: tap(stderr, Stream::Stderr)?,
        })
    }

    /// The agent has started it. True when it has already ended.
    pub fn set_started(&self) -> bool {
        let mut run = self.run();
        run.phase = match run.phase {
            Phase::Starting { exit_code: None } => Phase::Running,
            Phase::Starting { exit_code } => Phase::Ended { exit_code },
            other => other,
        };
        matches!(run.phase, Phase::Ended { .. })
    }

    /// It could not be started.
    pub fn set_start_failed(&self) {
        let mut run = self.run();
        run.phase = Phase::Ended { exit_code: None };
        run.stdin = None;
    }

    /// Its process has ended. True when this is news that has to be acted on now.
    fn set_ended(&self, code: u32) -> bool {
        let mut run = self.run();
        let exit_code = Some(code);
        match run.phase {
            Phase::Running => {
                run.phase = Phase::Ended { exit_code };
                true
            }
            Phase::Starting { exit_code: None } => {
                // Acted on when the agent's answer is there.
                run.phase = Phase::Starting { exit_code };
                false
            }
            Phase::NotStarted | Phase::Starting { .. } | Phase::Ended { .. } => false,
        }
    }

    /// The exit code of a process that ran and has ended.
    pub fn exit_code(&self) -> Option<u32> {
        match self.run().phase {
            Phase::Starting { exit_code } | Phase::Ended { exit_code } => exit_code,
            Phase::NotStarted | Phase::Running => None,
        }
    }

    /// The pump, for who ends the container.
    pub fn take_pump(&self) -> Option<Pump> {
        let mut run = self.run();
        run.stdin = None;
        run.pump.take()
    }

    /// The kernel killed one of its processes for want of memory.
    pub fn set_out_of_memory(&self) {
        self.run().out_of_memory = true;
    }

    /// Whether `signal` differs from the last one that was sent to stop it, and notes it.
    pub fn note_stop_signal(&self, signal: u32) -> bool {
        self.run().stop_signal.replace(signal) != Some(signal)
    }

    fn was_out_of_memory(&self) -> bool {
        self.run().out_of_memory
    }

    fn run(&self) -> MutexGuard<'_, Run> {
        // Nothing under the lock panics.
        self.run.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The agent says that a container's process has ended.
pub fn on_exit(pod: &Arc<Pod>, exit: &Exit) {
    // The guest may name any id and code.
    let Ok(container) = pod.container(&exit.container_id) else {
        debug!("an exit of a container that is not known here");
        return;
    };
    if container.set_ended(exit.code.min(255)) {
        tokio::spawn(finish(Arc::clone(pod), container));
    }
}

/// Waits for the output of a container whose process has ended, then records the end.
pub async fn finish(pod: Arc<Pod>, container: Arc<Container>) {
    if let Some(pump) = container.take_pump() {
        pump.drain().await;
    }
    let code = container.exit_code().unwrap_or(KILLED);
    let out_of_memory = code == KILLED && container.was_out_of_memory();
    info!(container = container.id, code, "exited");
    pod.state.update_container(&container.id, |entry| {
        if entry.state() == ContainerState::Exited {
            return false; // With the VM.
        }
        set_exited(entry, code, now_ns());
        if out_of_memory {
            "OOMKilled".clone_into(&mut entry.reason);
        }
        true
    });
}

/// Records that the process ended with `code`.
pub fn set_exited(entry: &mut monitor::Container, code: u32, finished_ns: u64) {
    entry.set_state(ContainerState::Exited);
    entry.exit_code = code;
    entry.finished_ns = finished_ns;
    let reason = if code == 0 { "Completed" } else { "Error" };
    reason.clone_into(&mut entry.reason);
}

/// Records that the container ended with its VM.
pub fn set_killed(entry: &mut monitor::Container, sandbox_reason: &str, finished_ns: u64) {
    set_exited(entry, KILLED, finished_ns);
    entry.message = format!("ended with the sandbox's VM ({sandbox_reason})");
}

/// Records that the process could not be started.
pub fn set_start_error(entry: &mut monitor::Container, message: String) {
    entry.set_state(ContainerState::Exited);
    entry.exit_code = START_ERROR;
    // Kubelets want a time for both.
    entry.started_ns = now_ns();
    entry.finished_ns = entry.started_ns;
    "StartError".clone_into(&mut entry.reason);
    entry.message = message;
}
