//! What a caller of this crate implements: it starts processes and dials ports.

use std::future::Future;
use std::pin::Pin;

use serde::Deserialize;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::watch;

/// Which streams a client gets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Streams {
    /// Client to process.
    pub stdin: bool,
    /// Process to client; of a terminal, all output.
    pub stdout: bool,
    /// Process to client; never with a terminal.
    pub stderr: bool,
    /// The process has a terminal, whose size the client sets.
    pub terminal: bool,
}

/// A command to be run in a container.
#[derive(Clone, Debug)]
pub struct Exec {
    /// The container's id.
    pub container_id: String,
    /// The command, not empty.
    pub args: Vec<String>,
    /// Its streams.
    pub streams: Streams,
}

/// A container whose own process is attached to.
#[derive(Clone, Debug)]
pub struct Attach {
    /// The container's id.
    pub container_id: String,
    /// Of its streams.
    pub streams: Streams,
}

/// Ports of a pod that are forwarded to.
#[derive(Clone, Debug)]
pub struct PortForward {
    /// The pod's id.
    pub sandbox_id: String,
    /// For WebSocket clients, which name no ports themselves.
    pub ports: Vec<u16>,
}

/// Size of a terminal, in characters. As clients send it: `{"Width":80,"Height":24}`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Size {
    /// Columns.
    pub width: u16,
    /// Rows.
    pub height: u16,
}

/// A byte stream both ways.
pub trait Duplex: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Duplex for T {}

/// A process that runs, with the streams that were asked for.
pub struct Session {
    /// Shut down at the client's end of file, dropped at the session's.
    pub stdin: Option<Box<dyn AsyncWrite + Send + Unpin>>,
    /// Read to its end before the session ends.
    pub stdout: Option<Box<dyn AsyncRead + Send + Unpin>>,
    /// Read to its end before the session ends.
    pub stderr: Option<Box<dyn AsyncRead + Send + Unpin>>,
    /// Takes the sizes that the client sets; only the last one matters.
    pub resize: watch::Sender<Size>,
    /// The exit code, or why there is none. Dropped early when the client goes away.
    pub ended: Pin<Box<dyn Future<Output = Result<u32, String>> + Send>>,
}

/// Starts what clients ask for. Errors are texts for the client's user. A call that is dropped before it has ended is
/// one whose client went away.
pub trait Backend: Send + Sync + 'static {
    /// Starts a command.
    fn exec(&self, exec: Exec) -> impl Future<Output = Result<Session, String>> + Send;

    /// Connects to a container's process. The exit code of its session is not looked at.
    fn attach(&self, attach: Attach) -> impl Future<Output = Result<Session, String>> + Send;

    /// Connects to a port of the pod's loopback interface.
    fn port_forward(
        &self,
        sandbox_id: &str,
        port: u16,
    ) -> impl Future<Output = Result<Box<dyn Duplex>, String>> + Send;
}
