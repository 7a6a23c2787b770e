//! Commands in a running container: ExecSync, with its output in the answer, and Exec, with streams of the caller's.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use podvisor_monitor::fd_socket::Token;
use podvisor_oci::stdio::{Streams, Wanted};
use podvisor_proto::agent::{self, Exit};
use podvisor_proto::monitor::{ExecRequest, ExecSyncRequest, ExecSyncResponse, ResizeRequest};
use tokio::sync::oneshot;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use super::guest::kill_all;
use super::relay::{self, ClientStreams};
use super::runner::Runner;
use super::streams::capture;
use super::{MAX_EXECS, MAX_SESSIONS, Pod, PodError};
use crate::agent::AgentError;

/// Most output kept of each stream, bytes, whatever the caller asks for (CRI: "cap at 16 MB").
const MAX_OUTPUT: u64 = 16 * 1024 * 1024;

/// Longest name of a command, bytes.
const MAX_EXEC_ID: usize = 64;

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
        let Ok(_slot) = self.exec_slots.try_acquire() else {
            return Err(PodError::TooManyExecs(MAX_EXECS));
        };
        let id = format!("{:?}", Token::random());
        let mut exec = self.register(&request.container_id, id, &request.args)?;
        let wanted = Wanted {
            stdin: false,
            terminal: false,
        };
        let streams = exec.start(&request.args, wanted).await?;
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

    /// Runs a command whose streams are the caller's; returns its exit code. `started` is told when it runs. When
    /// `caller_gone` is cancelled, all processes of the command are killed.
    pub async fn exec(
        &self,
        request: ExecRequest,
        started: oneshot::Sender<()>,
        caller_gone: CancellationToken,
    ) -> Result<u32, PodError> {
        let Ok(_slot) = self.session_slots.try_acquire() else {
            return Err(PodError::TooManyExecs(MAX_SESSIONS));
        };
        let client = ClientStreams::take(&self.fds, &request.streams.unwrap_or_default())?;
        let mut exec = self.register(&request.container_id, request.exec_id, &request.args)?;
        let wanted = Wanted {
            stdin: client.stdin.is_some(),
            terminal: request.terminal,
        };
        let streams = exec.start(&request.args, wanted).await?;
        // A caller that is gone already is noticed below.
        let _ = started.send(());
        let failed = tokio::select! {
            ended = exec.carry(streams, client, wanted) => match ended {
                // It runs, and nobody can reach it.
                Err(error @ PodError::Stream(_)) => error,
                ended => return ended,
            },
            () = caller_gone.cancelled() => PodError::Cancelled,
        };
        exec.kill().await;
        Err(failed)
    }

    /// Sets the size of a terminal.
    pub async fn resize(&self, request: ResizeRequest) -> Result<(), PodError> {
        let runner = self.ready_runner()?;
        self.container(&request.container_id)?;
        let ResizeRequest {
            container_id,
            exec_id,
            columns,
            rows,
        } = request;
        let request = agent::ResizeRequest {
            container_id,
            exec_id,
            columns,
            rows,
        };
        runner.resize(request).await
    }

    /// A command that is about to be started.
    fn register<'a>(
        &'a self,
        container_id: &'a str,
        id: String,
        args: &[String],
    ) -> Result<Exec<'a>, PodError> {
        let runner = self.ready_runner()?;
        self.running_container(container_id)?;
        if args.is_empty() {
            return Err(PodError::Invalid("no command".to_owned()));
        }
        // It becomes part of names of files.
        let is_id = id.len() <= MAX_EXEC_ID && id.bytes().all(|byte| byte.is_ascii_hexdigit());
        if id.is_empty() || !is_id {
            return Err(PodError::Invalid(format!("{id:?} is no exec id")));
        }
        let (sender, exit) = oneshot::channel();
        let running = Running {
            container_id: container_id.to_owned(),
            exit: sender,
        };
        match self.execs.lock().entry(id.clone()) {
            Entry::Occupied(_) => return Err(PodError::Invalid(format!("exec {id} runs"))),
            Entry::Vacant(place) => place.insert(running),
        };
        Ok(Exec {
            pod: self,
            runner,
            container_id,
            id,
            exit,
        })
    }
}

impl Exec<'_> {
    /// Starts the command. Not to be dropped halfway: nobody would know whether the process runs.
    async fn start(&mut self, args: &[String], wanted: Wanted) -> Result<Streams, PodError> {
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

    /// Moves bytes between the command and the caller until the command has ended, and all its output has been taken.
    async fn carry(
        &mut self,
        streams: Streams,
        client: ClientStreams,
        wanted: Wanted,
    ) -> Result<u32, PodError> {
        let process = |stream| relay::process_end(stream).map_err(PodError::Stream);
        let (stdout, stderr) = (process(streams.stdout)?, process(streams.stderr)?);
        let ended = CancellationToken::new();
        let input = async {
            if wanted.terminal {
                relay::input(client.stdin, stdout.as_deref()).await;
            } else {
                relay::input(client.stdin, process(streams.stdin)?).await;
            }
            std::future::pending().await
        };
        let outputs = async {
            tokio::join!(
                relay::output(stdout.clone(), client.stdout, DRAIN_GRACE, &ended),
                relay::output(stderr, client.stderr, DRAIN_GRACE, &ended),
            );
        };
        let exit = async {
            let exit_code = self.exited().await;
            ended.cancel();
            exit_code
        };
        let end = async { tokio::join!(exit, outputs).0 };
        tokio::select! {
            exit_code = end => exit_code,
            failed = input => failed,
        }
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
