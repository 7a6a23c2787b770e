//! QEMU's control protocol: one JSON object a line (QEMU's documentation, docs/interop/qmp-spec.rst), on an inherited
//! socket.
//!
//! A task reads what QEMU says until it closes the socket; the end of the VM is in there.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tracing::{debug, warn};

/// QEMU answers at once, unless it is stuck.
const DEADLINE: Duration = Duration::from_secs(10);

/// Longest line taken: QEMU's answers to our commands are short.
const MAX_LINE_BYTES: u64 = 64 << 10;

/// QEMU's side of the control socket.
#[derive(Debug)]
pub(super) struct Qmp {
    writer: OwnedWriteHalf,
    state: Arc<Mutex<State>>,
    reader: JoinHandle<()>,
}

#[derive(Debug, Default)]
struct State {
    /// Why the VM shut down, in QEMU's words ("guest-reset"), once it has.
    shutdown: Option<String>,
    /// Who waits for the answer to the one command under way.
    waiting: Option<oneshot::Sender<Value>>,
}

impl Qmp {
    /// Waits for QEMU's greeting and begins to listen.
    ///
    /// # Errors
    /// QEMU closed the socket, or did not answer.
    pub(super) async fn connect(socket: UnixStream) -> io::Result<Self> {
        let (reader, writer) = socket.into_split();
        let mut lines = BufReader::new(reader);
        let greeting = timeout(DEADLINE, read_message(&mut lines)).await??;
        if greeting
            .as_ref()
            .is_none_or(|greeting| greeting.get("QMP").is_none())
        {
            return Err(io::Error::other("no greeting"));
        }
        let state = Arc::new(Mutex::new(State::default()));
        let reader = tokio::spawn(listen(lines, state.clone()));
        let mut qmp = Self {
            writer,
            state,
            reader,
        };
        qmp.execute("qmp_capabilities").await?;
        Ok(qmp)
    }

    /// Executes a command without arguments and returns its answer.
    ///
    /// # Errors
    /// QEMU closed the socket, did not answer in time, or refused.
    pub(super) async fn execute(&mut self, command: &str) -> io::Result<Value> {
        let (answer, answered) = oneshot::channel();
        lock(&self.state).waiting = Some(answer);
        let line = format!("{}\n", json!({ "execute": command }));
        let exchange = async {
            self.writer.write_all(line.as_bytes()).await?;
            answered
                .await
                .map_err(|_| io::Error::from(io::ErrorKind::ConnectionAborted))
        };
        let answer = timeout(DEADLINE, exchange).await??;
        if let Some(error) = answer.get("error") {
            let reason = error
                .get("desc")
                .and_then(Value::as_str)
                .unwrap_or("no reason given");
            return Err(io::Error::other(format!("{command}: {reason}")));
        }
        Ok(answer.get("return").cloned().unwrap_or_default())
    }

    /// Waits until QEMU has closed the socket and returns why the VM shut down, if QEMU said so.
    pub(super) async fn ended(&mut self) -> Option<String> {
        if !self.reader.is_finished() {
            // It neither panics nor is cancelled.
            let _ = (&mut self.reader).await;
        }
        lock(&self.state).shutdown.clone()
    }
}

async fn listen(mut lines: BufReader<OwnedReadHalf>, state: Arc<Mutex<State>>) {
    loop {
        match read_message(&mut lines).await {
            Ok(Some(message)) => take_in(message, &state),
            Ok(None) => break,
            Err(error) => {
                warn!(%error, "QEMU's control socket");
                break;
            }
        }
    }
    // Whoever waits for an answer learns that there will be none.
    lock(&state).waiting = None;
}

fn take_in(message: Value, state: &Mutex<State>) {
    match message.get("event").and_then(Value::as_str) {
        Some("SHUTDOWN") => {
            let reason = message
                .pointer("/data/reason")
                .and_then(Value::as_str)
                .unwrap_or_default();
            debug!(reason, "the VM shuts down");
            lock(state).shutdown = Some(reason.to_owned());
        }
        Some(event) => debug!(event, "QEMU"),
        None => {
            if let Some(waiting) = lock(state).waiting.take() {
                // An error says that the caller has given up.
                let _ = waiting.send(message);
            }
        }
    }
}

/// The next message. `None`: QEMU closed the socket.
async fn read_message(lines: &mut BufReader<OwnedReadHalf>) -> io::Result<Option<Value>> {
    let mut line = Vec::new();
    (&mut *lines)
        .take(MAX_LINE_BYTES)
        .read_until(b'\n', &mut line)
        .await?;
    if line.is_empty() {
        return Ok(None);
    }
    Ok(Some(serde_json::from_slice(&line)?))
}

fn lock(state: &Mutex<State>) -> std::sync::MutexGuard<'_, State> {
    // Nothing panics while it is held.
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Speaks as QEMU: sends `script` line by line, and reads a command after each line that ends in a question mark.
    async fn qemu(socket: UnixStream, script: &[&str]) {
        let (reader, mut writer) = socket.into_split();
        let mut reader = BufReader::new(reader);
        for line in script {
            writer
                .write_all(line.trim_end_matches('?').as_bytes())
                .await
                .unwrap();
            writer.write_all(b"\n").await.unwrap();
            if line.ends_with('?') {
                reader.read_line(&mut String::new()).await.unwrap();
            }
        }
    }

    #[tokio::test]
    async fn greets_executes_and_hears_the_end() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let script = [
            r#"{"QMP": {"version": {}, "capabilities": []}}?"#,
            r#"{"return": {}}?"#,
            r#"{"event": "RESUME", "timestamp": {}}"#,
            r#"{"return": {"status": "running"}}?"#,
            r#"{"error": {"class": "CommandNotFound", "desc": "no such command"}}"#,
            r#"{"event": "SHUTDOWN", "data": {"guest": true, "reason": "guest-reset"}}"#,
        ];
        let (connected, ()) = tokio::join!(
            async {
                let mut qmp = Qmp::connect(ours).await.unwrap();
                let status = qmp.execute("query-status").await.unwrap();
                let error = qmp.execute("nonsense").await.unwrap_err();
                (status, error.to_string(), qmp.ended().await)
            },
            qemu(theirs, &script)
        );
        let (status, error, reason) = connected;
        assert_eq!(status, json!({ "status": "running" }));
        assert_eq!(error, "nonsense: no such command");
        assert_eq!(reason.as_deref(), Some("guest-reset"));
    }

    #[tokio::test]
    async fn no_qemu_is_an_error() {
        for script in [&[][..], &["not json"], &[r#"{"QMP": {}}?"#]] {
            let (ours, theirs) = UnixStream::pair().unwrap();
            let (connected, ()) = tokio::join!(Qmp::connect(ours), qemu(theirs, script));
            assert!(connected.is_err(), "{script:?}");
        }
    }
}
