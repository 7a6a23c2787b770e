//! The listener: an HTTP/1.1 request for a token's URL becomes a SPDY or WebSocket connection.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use http::header::{CONNECTION, HeaderValue};
use http::{Method, Request, Response, StatusCode};
use hyper::body::Incoming as Body;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::upgrade::{OnUpgrade, Upgraded};
use hyper_util::rt::{TokioIo, TokioTimer};
use opentelemetry::Context;
use opentelemetry::trace::FutureExt;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsAcceptor;
use tracing::{debug, warn};

use crate::backend::{Attach, Backend, Exec, PortForward, Session, Streams};
use crate::negotiate::{Protocol, negotiate};
use crate::port_forward;
use crate::remote_command::{self, Client, Version};
use crate::spdy::connection::Connection;
use crate::spdy::frame::{GoAway, goaway};
use crate::tokens::{Tokens, TooMany};
use crate::websocket::channels::{Channels, number};
use crate::websocket::frame::{NORMAL, PROTOCOL_ERROR, close};
use crate::websocket::messages::Messages;
use crate::websocket::tunnel::tunnel;
use crate::wire::{Idle, Outbox, Output, outbox, write_frames};

/// Connections at a time.
const MAX_CONNECTIONS: usize = 4096;

/// How long a client may take to send the head of its request.
const REQUEST_DEADLINE: Duration = Duration::from_secs(10);

/// Longest head of a request, bytes, and how many headers it may have.
const MAX_HEAD: usize = 16 * 1024;
const MAX_HEADERS: usize = 64;

/// How long a client may take for the last frames, and then to end the connection.
const LAST_FRAMES_DEADLINE: Duration = Duration::from_mins(1);
const LINGER: Duration = Duration::from_secs(5);

/// Streams that a client has opened and nobody has looked at.
const OPENED_STREAMS: usize = 8;

/// Between failures of `accept`: out of descriptors, the next one would fail as well.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Deadlines of clients, and how they connect.
#[derive(Clone, Debug)]
pub struct Config {
    /// A connection on which nothing was moved for so long ends.
    pub idle_timeout: Duration,
    /// How long a client may take to open its streams.
    pub creation_timeout: Duration,
    /// For TLS; `None`: without.
    pub tls: Option<Arc<rustls::ServerConfig>>,
}

impl Default for Config {
    /// Those of the kubelet's own server, without TLS.
    fn default() -> Self {
        Self {
            idle_timeout: Duration::from_hours(4),
            creation_timeout: Duration::from_secs(30),
            tls: None,
        }
    }
}

/// What a token stands for.
#[derive(Clone, Debug)]
enum Ticket {
    Exec(Exec),
    Attach(Attach),
    PortForward(PortForward),
}

/// The server. Cheap to clone.
#[derive(Debug)]
pub struct Server<B> {
    shared: Arc<Shared<B>>,
}

#[derive(Debug)]
struct Shared<B> {
    /// With the trace that the call for it is a part of.
    tokens: Tokens<(Ticket, Context)>,
    backend: Arc<B>,
    config: Config,
    /// Scheme and host of URLs.
    base: String,
}

impl<B> Clone for Server<B> {
    fn clone(&self) -> Self {
        let shared = Arc::clone(&self.shared);
        Self { shared }
    }
}

impl<B: Backend> Server<B> {
    /// A server whose clients reach it at `address`.
    pub fn new(backend: B, address: SocketAddr, config: Config) -> Self {
        let scheme = if config.tls.is_some() {
            "https"
        } else {
            "http"
        };
        let shared = Shared {
            tokens: Tokens::default(),
            backend: Arc::new(backend),
            config,
            base: format!("{scheme}://{address}"),
        };
        Self {
            shared: Arc::new(shared),
        }
    }

    /// The URL of a command.
    ///
    /// # Errors
    /// Too many URLs are waiting for their client.
    pub fn exec(&self, exec: Exec) -> Result<String, TooMany> {
        self.url("exec", Ticket::Exec(exec))
    }

    /// The URL of a container's process.
    ///
    /// # Errors
    /// Too many URLs are waiting for their client.
    pub fn attach(&self, attach: Attach) -> Result<String, TooMany> {
        self.url("attach", Ticket::Attach(attach))
    }

    /// The URL of a pod's ports.
    ///
    /// # Errors
    /// Too many URLs are waiting for their client.
    pub fn port_forward(&self, forward: PortForward) -> Result<String, TooMany> {
        self.url("portforward", Ticket::PortForward(forward))
    }

    fn url(&self, endpoint: &str, ticket: Ticket) -> Result<String, TooMany> {
        let token = self.shared.tokens.issue((ticket, Context::current()))?;
        Ok(format!("{}/{endpoint}/{token}", self.shared.base))
    }

    /// Accepts clients for ever.
    pub async fn serve(self, listener: TcpListener) {
        let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        while let Ok(place) = Arc::clone(&places).acquire_owned().await {
            match listener.accept().await {
                Ok((stream, _)) => {
                    let server = self.clone();
                    let _ = stream.set_nodelay(true);
                    tokio::spawn(server.client(stream, place));
                }
                Err(error) => {
                    warn!(%error, "a streaming client cannot be accepted");
                    sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }

    /// One client; with TLS, its handshake first.
    async fn client(self, stream: TcpStream, place: OwnedSemaphorePermit) {
        let Some(tls) = self.shared.config.tls.clone() else {
            return self.connection(stream, place).await;
        };
        let handshake = timeout(REQUEST_DEADLINE, TlsAcceptor::from(tls).accept(stream));
        match handshake.await {
            Ok(Ok(stream)) => self.connection(stream, place).await,
            Ok(Err(error)) => debug!(%error, "a streaming client's TLS"),
            Err(_) => debug!("a streaming client does not end its TLS handshake"),
        }
    }

    /// One request of a client; its upgraded connection is a task of its own, which keeps `place`.
    async fn connection<T>(self, stream: T, place: OwnedSemaphorePermit)
    where
        T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let place = Arc::new(place);
        let service = service_fn(|request| {
            let (server, place) = (self.clone(), Arc::clone(&place));
            async move { Ok::<_, Infallible>(server.answer(request, place)) }
        });
        let served = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(REQUEST_DEADLINE)
            .max_buf_size(MAX_HEAD)
            .max_headers(MAX_HEADERS)
            .serve_connection(TokioIo::new(stream), service)
            .with_upgrades()
            .await;
        if let Err(error) = served {
            debug!(%error, "a streaming client's request");
        }
    }

    fn answer(
        &self,
        mut request: Request<Body>,
        place: Arc<OwnedSemaphorePermit>,
    ) -> Response<String> {
        if !matches!(*request.method(), Method::GET | Method::POST) {
            return text(StatusCode::METHOD_NOT_ALLOWED, "GET or POST");
        }
        let Some((ticket, caller)) = self.redeem(request.uri().path()) else {
            return text(StatusCode::NOT_FOUND, "unknown, used or expired");
        };
        let is_command = !matches!(ticket, Ticket::PortForward(_));
        let (protocol, response) = match negotiate(request.headers(), is_command) {
            Ok(negotiated) => negotiated,
            Err(refusal) => return refusal.into(),
        };
        let upgrade = hyper::upgrade::on(&mut request);
        let server = self.clone();
        tokio::spawn(async move {
            let session = server.upgraded(upgrade, ticket, protocol);
            session.with_context(caller).await;
            drop(place);
        });
        response
    }

    /// The endpoint has to be the token's.
    fn redeem(&self, path: &str) -> Option<(Ticket, Context)> {
        let (endpoint, token) = path.strip_prefix('/')?.split_once('/')?;
        let (ticket, caller) = self.shared.tokens.redeem(token)?;
        let own = match &ticket {
            Ticket::Exec(_) => "exec",
            Ticket::Attach(_) => "attach",
            Ticket::PortForward(_) => "portforward",
        };
        (endpoint == own).then_some((ticket, caller))
    }

    async fn upgraded(&self, upgrade: OnUpgrade, ticket: Ticket, protocol: Protocol) {
        let io = match timeout(REQUEST_DEADLINE, upgrade).await {
            Ok(Ok(io)) => TokioIo::<Upgraded>::new(io),
            Ok(Err(error)) => return debug!(%error, "a streaming client's upgrade"),
            Err(_) => return,
        };
        let idle = Arc::new(Idle::new(self.shared.config.idle_timeout));
        let expired = Arc::clone(&idle);
        let served = async {
            match protocol {
                Protocol::Spdy(version) => self.spdy(io, ticket, version, idle).await,
                Protocol::Channels(version) => self.channels(io, ticket, version, idle).await,
                Protocol::Tunnel => {
                    let (inside, work) = tunnel(io, Arc::clone(&idle));
                    tokio::join!(self.spdy(inside, ticket, Version::V4, idle), work);
                }
            }
        };
        tokio::select! {
            () = served => {}
            () = expired.expired() => debug!("a streaming client was idle for too long"),
        }
    }

    async fn spdy<T>(&self, io: T, ticket: Ticket, version: Version, idle: Arc<Idle>)
    where
        T: AsyncRead + AsyncWrite,
    {
        let (reader, writer) = tokio::io::split(io);
        let (outbox, frames) = outbox();
        let (opened, mut streams) = mpsc::channel(OPENED_STREAMS);
        let connection = Connection::new(reader, outbox.clone(), opened, Arc::clone(&idle));
        let session = async {
            match ticket {
                Ticket::PortForward(forward) => {
                    let backend = Arc::clone(&self.shared.backend);
                    let creation_timeout = self.shared.config.creation_timeout;
                    port_forward::serve_spdy(streams, forward, backend, creation_timeout).await;
                }
                Ticket::Exec(Exec {
                    streams: wanted, ..
                })
                | Ticket::Attach(Attach {
                    streams: wanted, ..
                }) => {
                    let creation_timeout = self.shared.config.creation_timeout;
                    let client =
                        remote_command::accept(&mut streams, wanted, version, creation_timeout);
                    match client.await {
                        Ok(client) => self.command(client, &ticket, version).await,
                        Err(reason) => debug!(reason, "a session has not begun"),
                    }
                }
            }
            let _ = outbox.frame(goaway(0, GoAway::Ok)).await;
            outbox.end().await;
        };
        let reader = async {
            if let Err(error) = connection.run().await {
                debug!(%error, "a SPDY client");
            }
        };
        finish(
            &outbox,
            session,
            reader,
            write_frames(writer, frames, &idle),
        )
        .await;
    }

    async fn channels<T>(&self, io: T, ticket: Ticket, version: Version, idle: Arc<Idle>)
    where
        T: AsyncRead + AsyncWrite,
    {
        let (reader, writer) = tokio::io::split(io);
        let (outbox, frames) = outbox();
        let mut channels = Channels::new(version == Version::V5);
        let mut messages = Messages::new(reader, outbox.clone(), Arc::clone(&idle));
        let session: std::pin::Pin<Box<dyn Future<Output = ()> + Send>> = match ticket {
            Ticket::PortForward(forward) => {
                let streams = port_forward::open_channels(&mut channels, &forward.ports, &outbox);
                let backend = Arc::clone(&self.shared.backend);
                Box::pin(port_forward::serve_channels(streams, forward, backend))
            }
            Ticket::Exec(Exec { streams, .. }) | Ticket::Attach(Attach { streams, .. }) => {
                let client = channel_client(&mut channels, streams, &outbox);
                Box::pin(async move {
                    // Says that the session is open (as the kubelet's own server does).
                    let first = client.stdout.as_ref().or(client.stderr.as_ref());
                    let _ = first.unwrap_or(&client.error).send(&[]).await;
                    self.command(client, &ticket, version).await;
                })
            }
        };
        let session = async {
            session.await;
            let _ = outbox.frame(close(NORMAL)).await;
            outbox.end().await;
        };
        let reader = async {
            let code = match channels.run(&mut messages).await {
                Ok(()) => NORMAL,
                Err(error) => {
                    debug!(%error, "a WebSocket client");
                    PROTOCOL_ERROR
                }
            };
            let _ = timeout(LINGER, outbox.frame(close(code))).await;
        };
        finish(
            &outbox,
            session,
            reader,
            write_frames(writer, frames, &idle),
        )
        .await;
    }

    async fn command(&self, client: Client, ticket: &Ticket, version: Version) {
        let backend = &self.shared.backend;
        let session: Result<Session, String> = match ticket {
            Ticket::Exec(exec) => backend.exec(exec.clone()).await,
            Ticket::Attach(attach) => backend.attach(attach.clone()).await,
            Ticket::PortForward(_) => Err("not a command".to_owned()),
        };
        remote_command::run(client, session, version).await;
    }
}

/// Runs a session until it has ended or its client has, and then for as long as the client needs to take what is left.
async fn finish(
    outbox: &Outbox,
    session: impl Future<Output = ()>,
    reader: impl Future<Output = ()>,
    writer: impl Future<Output = std::io::Result<()>>,
) {
    let mut reader = std::pin::pin!(reader);
    let mut writer = std::pin::pin!(writer);
    let reader_ended = {
        let mut session = std::pin::pin!(session);
        tokio::select! {
            () = &mut session => false,
            // The client is gone: so is, with this, what was done for it.
            () = &mut reader => true,
            written = &mut writer => return debug!(?written, "a streaming client takes no more"),
        }
    };
    if reader_ended {
        // It may want to know why.
        let last_words = async { tokio::join!(outbox.end(), writer).1 };
        let _ = timeout(LINGER, last_words).await;
        return;
    }
    // Read on meanwhile: bytes that were never read would make the end of the connection a reset, which takes the last
    // frames away from the client.
    let last_frames = async {
        tokio::select! {
            written = &mut writer => written.is_ok(),
            () = &mut reader => false,
        }
    };
    if matches!(timeout(LAST_FRAMES_DEADLINE, last_frames).await, Ok(true)) {
        let _ = timeout(LINGER, reader).await;
    }
}

fn channel_client(channels: &mut Channels, streams: Streams, outbox: &Outbox) -> Client {
    let output = |number| Output::websocket(outbox.clone(), number);
    let stdin = streams
        .stdin
        .then(|| (channels.open(number::STDIN), output(number::STDIN)));
    let resize = streams
        .terminal
        .then(|| (channels.open(number::RESIZE), output(number::RESIZE)));
    Client {
        error: output(number::ERROR),
        stdin,
        stdout: streams.stdout.then(|| output(number::STDOUT)),
        stderr: streams.stderr.then(|| output(number::STDERR)),
        resize,
    }
}

pub(crate) fn text(status: StatusCode, message: &str) -> Response<String> {
    let mut response = Response::new(message.to_owned());
    *response.status_mut() = status;
    // One request each; an upgrade has its own word here.
    let close = HeaderValue::from_static("close");
    response.headers_mut().insert(CONNECTION, close);
    response
}
