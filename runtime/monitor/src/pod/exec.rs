//! ExecSync: a command in a running container, with its output.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use podvisor_monitor::fd_socket::Token;
use podvisor_oci::stdio::{Streams, Wanted};
use podvisor_proto::agent::Exit;
use podvisor_proto::monitor::{ContainerState, ExecSyncRequest, ExecSyncResponse};
use tokio::sync::oneshot;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use super::guest::kill_all;
use super::runner::Runner;
use super::streams::capture;
use super::{Pod, PodError};
use crate::agent::AgentError;

/// Most output kept of each stream, bytes, whatever the caller asks for (CRI: "cap at 16 MB").
const MAX_OUTPUT: u64 = 16 * 1024 * 1024;

/// How long output may come after the command's end: a process it left in the background may hold
/// its streams for ever.
const DRAIN_GRACE: Duration = Duration::from_secs(2);

/// How long a command may take to end after SIGKILL, or after its container.
const KILL_DEADLINE: Duration = Duration::from_secs(5);

/// Commands that run, by exec id.
#[derive(Default)]
pub struct Execs {
    running: Mutex<HashMap<String, Running>>,
}

struct Running {
    container_id: String,
    exit: oneshot::Sender<u32>,
}

impl Execs {
    /// The agent says that a command has ended.
    pub fn on_exit(&self, exit: &Exit) {
        let mut running = self.lock();
        // The guest may name any id and code.
        let known = running.get(&exit.exec_id);
        if known.is_some_and(|exec| exec.container_id == exit.container_id)
            && let Some(exec) = running.remove(&exit.exec_id)
        {
            // Nobody waits any more: fine.
            let _ = exec.exit.send(exit.code.min(255));
        }
    }

    /// No exits will come any more: everyone who waits is told.
    pub fn clear(&self) {
        self.lock().clear();
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Running>> {
        // Whole entries are inserted and removed: a panic elsewhere leaves the map sound.
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A command: its entry in [`Execs`] goes with it.
struct Exec<'a> {
    pod: &'a Pod,
    runner: &'a Runner,
    container_id: &'a str,
    id: String,
    exit: oneshot::Receiver<u32>,
}

impl Drop for Exec<'_> {
    fn drop(&mut self) {
        self.pod.execs.lock().remove(&self.id);
    }
}

impl Pod {
    /// Runs a command and returns its output and exit code. When the timeout passes or `caller_gone`
    /// is cancelled, all processes of the command are killed.
    pub async fn exec_sync(
        &self,
        request: ExecSyncRequest,
        caller_gone: CancellationToken,
    ) -> Result<ExecSyncResponse, PodError> {
        let begin = Instant::now();
        let runner = self.ready_runner()?;
        let container_id = request.container_id.as_str();
        self.container(container_id)?;
        if self.state.container_state(container_id) != Some(ContainerState::Running) {
            return Err(PodError::State(format!(
                "container {container_id} is not running"
            )));
        }
        if request.args.is_empty() {
            return Err(PodError::Invalid("no command".to_owned()));
        }
        let Ok(_slot) = self.exec_slots.try_acquire() else {
            return Err(PodError::TooManyExecs);
        };

        let mut exec = self.register(runner, container_id);
        let streams = exec.start(&request.args).await?;
        let limit = request.output_limit.min(MAX_OUTPUT) as usize;
        let too_late = async {
            match request.timeout_ms {
                0 => std::future::pending().await,
                timeout => {
                    sleep(Duration::from_millis(timeout).saturating_sub(begin.elapsed())).await;
                }
            }
        };
        let failed = tokio::select! {
            done = exec.run(streams, limit) => return done,
            () = too_late => {
                let timeout = Duration::from_millis(request.timeout_ms);
                PodError::Deadline(format!("the command did not end within {timeout:?}"))
            }
            () = caller_gone.cancelled() => PodError::Cancelled,
        };
        exec.kill().await;
        Err(failed)
    }

    fn register<'a>(&'a self, runner: &'a Runner, container_id: &'a str) -> Exec<'a> {
        let id = format!("{:?}", Token::random());
        let (sender, exit) = oneshot::channel();
        let running = Running {
            container_id: container_id.to_owned(),
            exit: sender,
        };
        self.execs.lock().insert(id.clone(), running);
        Exec {
            pod: self,
            runner,
            container_id,
            id,
            exit,
        }
    }
}

impl Exec<'_> {
    /// Starts the command. Not to be dropped halfway: nobody would know whether the process runs.
    async fn start(&mut self, args: &[String]) -> Result<Streams, PodError> {
        let wanted = Wanted {
            stdin: false,
            terminal: false,
        };
        let started = self.runner.exec(self.container_id, &self.id, args, wanted);
        let result = started.await;
        match &result {
            // A refusal leaves no process; anything else may have.
            Ok(_) | Err(PodError::Agent(AgentError::Failed { .. }) | PodError::Host(_)) => {}
            Err(_) => self.kill().await,
        }
        result
    }

    /// Reads the output and waits for the end.
    async fn run(&mut self, streams: Streams, limit: usize) -> Result<ExecSyncResponse, PodError> {
        let ended = CancellationToken::new();
        let stdout = capture(streams.stdout, limit, DRAIN_GRACE, ended.clone());
        let stderr = capture(streams.stderr, limit, DRAIN_GRACE, ended.clone());
        let exit = async {
            let exit_code = self.exited().await;
            ended.cancel();
            exit_code
        };
        let (exit_code, stdout, stderr) = tokio::join!(exit, stdout, stderr);
        let exit_code = exit_code?;
        Ok(ExecSyncResponse {
            stdout,
            stderr,
            exit_code,
        })
    }

    /// Waits for the exit code. The command's end is pushed by the agent; should it keep that to
    /// itself, the container's end is the end of this.
    async fn exited(&mut self) -> Result<u32, PodError> {
        let state = &self.pod.state;
        let container_gone = async {
            state.wait_exited(self.container_id).await;
            sleep(KILL_DEADLINE).await;
        };
        let lost = || PodError::State("the container ended".to_owned());
        tokio::select! {
            code = &mut self.exit => code.map_err(|_| lost()),
            () = container_gone => Err(lost()),
        }
    }

    /// Kills the command and all it started, and waits for its end.
    async fn kill(&mut self) {
        debug!(
            container = self.container_id,
            exec = self.id,
            "killing a command"
        );
        let request = kill_all(self.container_id, &self.id);
        if let Err(error) = self.runner.signal(request).await {
            warn!(container = self.container_id, %error, "a command cannot be killed");
            return;
        }
        if timeout(KILL_DEADLINE, &mut self.exit).await.is_err() {
            warn!(
                container = self.container_id,
                "a killed command does not end"
            );
        }
    }
}
