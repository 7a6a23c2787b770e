//! The connections of a port-forward: each is a pair of streams, one for bytes and one for what went wrong.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use opentelemetry::trace::FutureExt;
use tokio::io::{AsyncRead, AsyncWriteExt};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};
use tracing::debug;

use crate::backend::{Backend, PortForward};
use crate::remote_command::cut;
use crate::spdy::connection::Stream;
use crate::websocket::channels::Channels;
use crate::wire::{Incoming, Outbox, Output};

/// A stream whose other has not come yet.
struct Waiting {
    since: Instant,
    stream: Stream,
}

/// Serves the pairs of streams that a SPDY client opens, until it opens no more.
pub async fn serve_spdy<B: Backend>(
    mut opened: mpsc::Receiver<Stream>,
    forward: PortForward,
    backend: Arc<B>,
    creation_timeout: Duration,
) {
    let mut waiting: HashMap<String, Waiting> = HashMap::new();
    // Dropped with this future: connections end with their client.
    let mut connections = JoinSet::new();
    loop {
        let oldest = waiting.values().map(|waiting| waiting.since).min();
        let too_late = async {
            match oldest {
                Some(since) => sleep_until(since + creation_timeout).await,
                None => std::future::pending().await,
            }
        };
        let stream = tokio::select! {
            stream = opened.recv() => stream,
            () = too_late => {
                let now = Instant::now();
                waiting.retain(|_, waiting| waiting.since + creation_timeout > now);
                continue;
            }
            Some(_) = connections.join_next() => continue,
        };
        let Some(stream) = stream else { break };
        let key = request_id(&stream);
        let Some(Waiting { stream: first, .. }) = waiting.remove(&key) else {
            let since = Instant::now();
            waiting.insert(key, Waiting { since, stream });
            continue;
        };
        match pair(first, stream) {
            Ok((data, error, port)) => {
                let (backend, forward) = (Arc::clone(&backend), forward.clone());
                let connected = async move {
                    let Stream {
                        incoming, output, ..
                    } = data;
                    connect(&*backend, &forward, port, incoming, output, error).await;
                };
                connections.spawn(connected.with_current_context());
            }
            Err(output) => refuse(output).await,
        }
    }
    while connections.join_next().await.is_some() {}
}

/// Streams of one connection have one id. Old clients give none, and open the error stream right before the other.
fn request_id(stream: &Stream) -> String {
    match stream.headers.get("requestid") {
        Some(id) => id.to_owned(),
        None if stream.headers.get("streamtype") == Some("data") => {
            stream.id.saturating_sub(2).to_string()
        }
        None => stream.id.to_string(),
    }
}

/// The stream of bytes, the output of errors, the port. Err: a stream to say on that there are not these.
fn pair(first: Stream, second: Stream) -> Result<(Stream, Output, u16), Output> {
    let kind = |stream: &Stream| stream.headers.get("streamtype").map(str::to_owned);
    let (data, error) = match (kind(&first).as_deref(), kind(&second).as_deref()) {
        (Some("data"), Some("error")) => (first, second),
        (Some("error"), Some("data")) => (second, first),
        _ => return Err(second.output),
    };
    let port = data.headers.get("port").and_then(|port| port.parse().ok());
    match port {
        Some(port @ 1..) => Ok((data, error.output, port)),
        _ => Err(error.output),
    }
}

async fn refuse(output: Output) {
    let _ = output.send(b"not a port to be forwarded to").await;
    output.finish().await;
}

/// Serves a WebSocket client: one connection for each port, at once, two channels each.
pub async fn serve_channels<B: Backend>(
    streams: Vec<(u16, Incoming, Output, Output)>,
    forward: PortForward,
    backend: Arc<B>,
) {
    let mut connections = JoinSet::new();
    for (port, incoming, data, error) in streams {
        let (backend, forward) = (Arc::clone(&backend), forward.clone());
        let connected = async move {
            for output in [&data, &error] {
                if output.send(&port.to_le_bytes()).await.is_err() {
                    return;
                }
            }
            connect(&*backend, &forward, port, incoming, data, error).await;
        };
        connections.spawn(connected.with_current_context());
    }
    while connections.join_next().await.is_some() {}
}

/// The channels of a WebSocket client's ports.
pub fn open_channels(
    channels: &mut Channels,
    ports: &[u16],
    outbox: &Outbox,
) -> Vec<(u16, Incoming, Output, Output)> {
    let numbers = (0..=u8::MAX).step_by(2);
    let open = |(port, number): (&u16, u8)| {
        let incoming = channels.open(number);
        let data = Output::websocket(outbox.clone(), number);
        let error = Output::websocket(outbox.clone(), number + 1);
        (*port, incoming, data, error)
    };
    ports.iter().zip(numbers).map(open).collect()
}

/// One connection, to its end in both directions.
async fn connect<B: Backend>(
    backend: &B,
    forward: &PortForward,
    port: u16,
    mut incoming: Incoming,
    data: Output,
    error: Output,
) {
    let stream = match backend.port_forward(&forward.sandbox_id, port).await {
        Ok(stream) => stream,
        Err(message) => {
            debug!(port, message, "a port is not forwarded");
            let _ = error.send(cut(&message).as_bytes()).await;
            data.finish().await;
            error.finish().await;
            return;
        }
    };
    let (reader, mut writer) = tokio::io::split(stream);
    let upwards = async {
        while let Some(bytes) = incoming.recv().await {
            if writer.write_all(&bytes).await.is_err() {
                return;
            }
        }
        let _ = writer.shutdown().await;
    };
    tokio::join!(upwards, downwards(reader, data));
    error.finish().await;
}

async fn downwards(source: impl AsyncRead + Unpin, data: Output) {
    tokio::select! {
        _ = data.send_all(source) => {}
        // The client wants no more, although nothing comes.
        () = data.reset() => {}
    }
    data.finish().await;
}
