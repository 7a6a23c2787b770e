//! An exec or attach session: a process's streams and a client's, whatever the protocol between.

use std::time::Duration;

use serde_json::json;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, timeout_at};
use tracing::debug;

use crate::backend::{Session, Size, Streams};
use crate::spdy::connection::Stream;
use crate::wire::{Incoming, Output};

/// Longest size of a terminal that a client sends, bytes.
const SIZE_LIMIT: usize = 256;

/// Longest text of an error, bytes.
const MESSAGE_LIMIT: usize = 4 * 1024;

/// Version of the client's protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Version {
    /// `channel.k8s.io`: errors are text; no sizes.
    V1,
    /// `v2.channel.k8s.io`: the same.
    V2,
    /// `v3.channel.k8s.io`: with sizes.
    V3,
    /// `v4.channel.k8s.io`: the error stream is a Status.
    V4,
    /// `v5.channel.k8s.io`, over WebSocket only: the client can end its stdin.
    V5,
}

/// The client's side of a session.
pub struct Client {
    /// How it ended.
    pub error: Output,
    /// The other direction of stdin ends when nothing more is read.
    pub stdin: Option<(Incoming, Output)>,
    /// To the client.
    pub stdout: Option<Output>,
    /// To the client.
    pub stderr: Option<Output>,
    /// JSON objects, see [`Size`].
    pub resize: Option<(Incoming, Output)>,
}

/// Waits for the streams that a SPDY client opens for a session.
///
/// # Errors
/// They are not all there in time.
pub async fn accept(
    opened: &mut mpsc::Receiver<Stream>,
    streams: Streams,
    version: Version,
    creation_timeout: Duration,
) -> Result<Client, &'static str> {
    let resizes = streams.terminal && version >= Version::V3;
    let deadline = Instant::now() + creation_timeout;
    let (mut error, mut stdin, mut stdout, mut stderr, mut resize) = (None, None, None, None, None);
    while error.is_none()
        || streams.stdin && stdin.is_none()
        || streams.stdout && stdout.is_none()
        || streams.stderr && stderr.is_none()
        || resizes && resize.is_none()
    {
        let stream = match timeout_at(deadline, opened.recv()).await {
            Ok(Some(stream)) => stream,
            Ok(None) => return Err("the client has gone"),
            Err(_) => return Err("the client has not opened all streams in time"),
        };
        let slot = match stream.headers.get("streamtype") {
            Some("error") => &mut error,
            Some("stdin") => &mut stdin,
            Some("stdout") => &mut stdout,
            Some("stderr") => &mut stderr,
            Some("resize") => &mut resize,
            _ => return Err("the client has opened a stream of a kind that is not known"),
        };
        if slot.replace(stream).is_some() {
            return Err("the client has opened a stream twice");
        }
    }
    let both = |stream: Stream| (stream.incoming, stream.output);
    let output = |stream: Stream| stream.output;
    Ok(Client {
        // Was waited for.
        error: error.map(output).ok_or("no error stream")?,
        stdin: stdin.map(both),
        stdout: stdout.map(output),
        stderr: stderr.map(output),
        resize: resize.map(both),
    })
}

/// Moves bytes until the process has ended and the client has all its output, then says how it ended.
pub async fn run(client: Client, session: Result<Session, String>, version: Version) {
    let Client {
        error,
        stdin,
        stdout,
        stderr,
        resize,
    } = client;
    let (mut end_stdin, mut end_resize) = (None, None);
    let ended = match session {
        Ok(session) => {
            // Open to the end of the session: a process tells its client's end of file from a client that is gone.
            let mut process_stdin = session.stdin;
            let input = async {
                if let (Some((incoming, output)), Some(process)) = (stdin, &mut process_stdin) {
                    end_stdin = Some(output);
                    carry(incoming, process).await;
                }
            };
            let sizes = async {
                if let Some((incoming, output)) = resize {
                    end_resize = Some(output);
                    set_sizes(incoming, &session.resize).await;
                }
            };
            let outputs = async {
                tokio::join!(drain(session.stdout, stdout), drain(session.stderr, stderr));
            };
            let inputs = async {
                tokio::join!(input, sizes);
                std::future::pending().await
            };
            let end = async { tokio::join!(session.ended, outputs).0 };
            tokio::select! {
                ended = end => ended,
                ended = inputs => ended,
            }
        }
        Err(message) => {
            for output in [stdout, stderr].into_iter().flatten() {
                output.finish().await;
            }
            end_stdin = stdin.map(|(_, output)| output);
            end_resize = resize.map(|(_, output)| output);
            Err(message)
        }
    };
    debug!(?ended, "a session has ended");
    let text = if version >= Version::V4 {
        Some(status(&ended))
    } else {
        plain_error(&ended)
    };
    if let Some(text) = text {
        // A client that is gone needs no answer.
        let _ = error.send(text.as_bytes()).await;
    }
    error.finish().await;
    for output in [end_stdin, end_resize].into_iter().flatten() {
        output.finish().await;
    }
}

/// Gives the process what the client sends. Then, or when the process takes no more, hears the client to its end:
/// its other streams come after these bytes.
async fn carry(mut incoming: Incoming, process: &mut (dyn AsyncWrite + Send + Unpin)) {
    while let Some(bytes) = incoming.recv().await {
        if process.write_all(&bytes).await.is_err() {
            return;
        }
    }
    let _ = process.shutdown().await;
}

async fn drain(source: Option<Box<dyn AsyncRead + Send + Unpin>>, output: Option<Output>) {
    let Some(output) = output else { return };
    if let Some(source) = source {
        let _ = output.send_all(source).await;
    }
    output.finish().await;
}

/// Tells of each size that the client sends; what is no size ends that.
async fn set_sizes(mut incoming: Incoming, sizes: &watch::Sender<Size>) {
    let mut text = Vec::new();
    while let Some(bytes) = incoming.recv().await {
        text.extend_from_slice(&bytes);
        let Some(used) = last_size(&text, sizes) else {
            return;
        };
        text.drain(..used);
        if text.len() > SIZE_LIMIT {
            return;
        }
    }
}

/// Takes whole objects from `text`; returns how many bytes they had, None if it is something else.
fn last_size(text: &[u8], sizes: &watch::Sender<Size>) -> Option<usize> {
    let mut objects = serde_json::Deserializer::from_slice(text).into_iter::<Size>();
    let mut used = 0;
    loop {
        match objects.next() {
            Some(Ok(size)) => {
                used = objects.byte_offset();
                sizes.send_replace(size);
            }
            Some(Err(error)) if error.is_eof() => return Some(used),
            Some(Err(_)) => return None,
            // Spaces at the end.
            None => return Some(text.len()),
        }
    }
}

/// A `Status` (metav1), as clients of version 4 expect it.
fn status(ended: &Result<u32, String>) -> String {
    let status = match ended {
        Ok(0) => json!({"metadata": {}, "status": "Success"}),
        Ok(code) => json!({
            "metadata": {},
            "status": "Failure",
            "message": format!("command terminated with non-zero exit code: exit status {code}"),
            "reason": "NonZeroExitCode",
            "details": {"causes": [{"reason": "ExitCode", "message": code.to_string()}]},
        }),
        Err(message) => {
            let message = cut(message);
            json!({
                "metadata": {},
                "status": "Failure",
                "message": message,
                "reason": "InternalError",
                "details": {"causes": [{"message": message}]},
                "code": 500,
            })
        }
    };
    status.to_string()
}

/// What clients before version 4 expect: nothing, or a text.
fn plain_error(ended: &Result<u32, String>) -> Option<String> {
    match ended {
        Ok(0) => None,
        Ok(code) => Some(format!(
            "command terminated with non-zero exit code: exit status {code}"
        )),
        Err(message) => Some(cut(message).to_owned()),
    }
}

/// Some of a text, within one frame.
pub fn cut(message: &str) -> &str {
    &message[..message.floor_char_boundary(MESSAGE_LIMIT)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_come_in_any_pieces() {
        let sizes = watch::Sender::new(Size::default());
        let text = b"{\"Width\":80,\"Height\":24}\n{\"Width\":81,\"Height\":25}\n{\"Wid";
        let used = last_size(text, &sizes).unwrap();
        assert_eq!(&text[used..], b"\n{\"Wid");
        assert_eq!((sizes.borrow().width, sizes.borrow().height), (81, 25));
        assert_eq!(last_size(b"{\"Width\":99999,\"Height\":1}", &sizes), None);
        assert_eq!(last_size(b"x", &sizes), None);
    }

    #[test]
    fn a_status_has_the_code_where_clients_look() {
        let status: serde_json::Value = serde_json::from_str(&status(&Ok(3))).unwrap();
        assert_eq!(status["reason"], "NonZeroExitCode");
        assert_eq!(status["details"]["causes"][0]["reason"], "ExitCode");
        assert_eq!(status["details"]["causes"][0]["message"], "3");
        assert_eq!(plain_error(&Ok(0)), None);
    }
}
