//! Attach: a caller's streams, connected to a container's own process. What the process writes goes into its log all
//! the same; callers look on.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use podvisor_proto::monitor::AttachRequest;
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

use super::relay::{self, ClientStreams, ProcessEnd};
use super::streams::asynchronous;
use super::{MAX_SESSIONS, Pod, PodError};
use crate::log::taps::{Tapped, TooSlow};

/// A container's standard input, held open between callers.
#[derive(Debug)]
pub struct Input {
    /// None once it is closed.
    end: Mutex<Option<ProcessEnd>>,
    /// Ends with the first caller's (CRI `stdin_once`).
    ends_with_caller: bool,
    closed: CancellationToken,
}

impl Input {
    /// `once`: of the container's configuration. A terminal is only left.
    pub fn new(stream: OwnedFd, once: bool, terminal: bool) -> io::Result<Self> {
        Ok(Self {
            end: Mutex::new(Some(Arc::new(asynchronous(stream)?))),
            ends_with_caller: once && !terminal,
            closed: CancellationToken::new(),
        })
    }

    fn end(&self) -> MutexGuard<'_, Option<ProcessEnd>> {
        // Nothing under the lock panics.
        self.end.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends the process's input, whoever else types.
    fn close(&self) {
        self.end().take();
        self.closed.cancel();
    }
}

/// What a caller sees of a container, and its input.
pub struct Attached {
    /// If the caller wants it and the container has one.
    pub input: Option<Arc<Input>>,
    /// If the caller wants it.
    pub stdout: Option<Tapped>,
    /// If the caller wants it; never of a terminal.
    pub stderr: Option<Tapped>,
}

impl Pod {
    /// Connects a caller to a container's process until one of them ends. `started` is told when it is connected.
    pub async fn attach(
        &self,
        request: AttachRequest,
        started: oneshot::Sender<()>,
        caller_gone: CancellationToken,
    ) -> Result<(), PodError> {
        let Ok(_slot) = self.session_slots.try_acquire() else {
            return Err(PodError::TooManyExecs(MAX_SESSIONS));
        };
        let id = request.container_id;
        let client = ClientStreams::take(&self.fds, &request.streams.unwrap_or_default())?;
        let container = self.running_container(&id)?;
        let wanted = [
            client.stdin.is_some(),
            client.stdout.is_some(),
            client.stderr.is_some(),
        ];
        let attached = container.attach(wanted)?;
        // A caller that is gone already is noticed below.
        let _ = started.send(());
        let outputs = async {
            tokio::try_join!(
                show(attached.stdout, client.stdout),
                show(attached.stderr, client.stderr)
            )
            .map_err(|error| PodError::State(error.to_string()))?;
            // Its input goes on after its outputs.
            self.state.wait_exited(&id).await;
            Ok(())
        };
        let input = async {
            match (client.stdin, attached.input) {
                (Some(client), Some(input)) => type_in(client, input).await,
                _ => std::future::pending().await,
            }
        };
        let session = async {
            tokio::select! {
                ended = outputs => ended,
                () = input => Ok(()),
            }
        };
        tokio::select! {
            ended = session => ended,
            () = caller_gone.cancelled() => Ok(()),
        }
    }
}

/// Gives the caller what comes, to the end of it. A caller that wants no more is no failure.
async fn show(tapped: Option<Tapped>, client: Option<UnixStream>) -> Result<(), TooSlow> {
    let (Some(mut tapped), Some(mut client)) = (tapped, client) else {
        return Ok(());
    };
    while let Some(bytes) = tapped.next().await? {
        if client.write_all(&bytes).await.is_err() {
            break;
        }
    }
    Ok(())
}

/// Gives the process what the caller sends. When that ends, so does the input of a container with `stdin_once`, and the
/// caller looks on; otherwise the caller leaves: this ends.
async fn type_in(mut client: UnixStream, input: Arc<Input>) {
    let end = input.end().clone();
    let typed = async {
        match end {
            Some(end) => relay::copy_input(&mut client, &end).await,
            None => Ok(()),
        }
    };
    let ended = tokio::select! {
        typed = typed => typed.is_ok(),
        () = input.closed.cancelled() => false,
    };
    // podvisord's end, and that of a client without a word, is none of the container's business.
    if ended && !relay::is_gone(&client) {
        if !input.ends_with_caller {
            return;
        }
        input.close();
    }
    std::future::pending::<()>().await;
}
