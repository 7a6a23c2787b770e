//! The agent in the guest: its RPCs, each with a deadline, and the link that keeps its connection.
//!
//! The agent dials us ([`CONTROL_PORT`]); that the connection exists means it is ready. What it
//! answers is the guest's word: messages are bounded in size, texts are cut, and nobody waits for it
//! without a deadline.

use std::future::Future;
use std::io;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::{FusedStream, Stream};
use hyper_util::rt::TokioIo;
use podvisor_monitor::agent_calls;
use podvisor_proto::agent::agent_client::AgentClient;
use podvisor_proto::agent::{
    AddMemoryRequest, AddMemoryResponse, ConfigureNetworkRequest, ConfigureSandboxRequest,
    CreateContainerRequest, CreateContainerResponse, Event, EventsRequest, ExecRequest,
    HelloRequest, HelloResponse, PortForwardRequest, RemoveContainerRequest,
    RemoveContainerResponse, ResizeRequest, SampleRequest, SampleResponse, ShutdownRequest,
    SignalRequest, StartContainerRequest, StartContainerResponse, UpdateContainerRequest,
};
use podvisor_proto::monitor::AgentCall;
use thiserror::Error;
use tokio::net::UnixStream;
use tokio::time::timeout;
use tonic::codec::Streaming;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Response, Status};
use tracing::{info, warn};

use crate::state::now_ns;
use crate::text;

/// Port of the host that the agent dials.
pub const CONTROL_PORT: u32 = 1024;

/// Port of the guest that takes byte streams.
pub const STREAM_PORT: u32 = 1025;

/// Version of the protocol that we speak.
const VERSION: u32 = 1;

/// Largest answer taken, bytes.
const MAX_MESSAGE: usize = 1024 * 1024;

/// Largest sample taken, bytes: of as many containers as the agent has. Decoded, one can be a hundred times as large.
const MAX_SAMPLE: usize = 256 * 1024;

/// What the guest may send before we read it, bytes: of one stream and in all.
const STREAM_WINDOW: u32 = 64 * 1024;
const CONNECTION_WINDOW: u32 = 256 * 1024;

/// The agent forgets events when it is asked for later ones: ask anew after this many.
const EVENTS_PER_REQUEST: usize = 64;

/// Longest text of the guest that is passed on, bytes.
const MAX_TEXT: usize = 2048;

/// Deadlines. Generous: a guest on a busy host without KVM is slow, and nothing but the caller's
/// patience is lost by waiting.
mod deadline {
    use std::time::Duration;

    pub const HELLO: Duration = Duration::from_secs(10);
    pub const CONFIGURE: Duration = Duration::from_secs(20);
    pub const CREATE: Duration = Duration::from_mins(1);
    pub const START: Duration = Duration::from_secs(30);
    pub const EXEC: Duration = Duration::from_secs(20);
    pub const UPDATE: Duration = Duration::from_secs(20);
    pub const ADD_MEMORY: Duration = Duration::from_secs(40);
    pub const REMOVE: Duration = Duration::from_secs(30);
    pub const SIGNAL: Duration = Duration::from_secs(5);
    pub const SAMPLE: Duration = Duration::from_secs(5);
    pub const SHUTDOWN: Duration = Duration::from_secs(5);
}

/// Why a call to the agent failed.
#[derive(Debug, Error)]
pub enum AgentError {
    /// No connection could be made of the stream.
    #[error("connecting to the agent: {0}")]
    Connect(#[from] tonic::transport::Error),
    /// No answer in time.
    #[error("the agent did not answer {rpc} within {after:?}")]
    Deadline {
        /// The call.
        rpc: &'static str,
        /// The deadline.
        after: Duration,
    },
    /// The agent's own answer, or that of a broken connection.
    #[error("{message}")]
    Failed {
        /// Its code.
        code: Code,
        /// Its text, cut.
        message: String,
    },
    /// The agent speaks another protocol.
    #[error("the agent speaks version {0} of the protocol, not {VERSION}")]
    Version(u32),
}

/// A connection to the agent. A cheap handle.
#[derive(Clone, Debug)]
pub struct Agent {
    client: AgentClient<Channel>,
}

impl Agent {
    /// Speaks to the agent over `stream`.
    async fn connect(stream: UnixStream) -> Result<Self, AgentError> {
        let mut stream = Some(TokioIo::new(stream));
        // Called once now; again only when the connection has broken, and then the agent dials.
        let connector = tower::service_fn(move |_| {
            let stream = stream.take();
            std::future::ready(stream.ok_or(io::Error::from(io::ErrorKind::NotConnected)))
        });
        // The name is only the HTTP/2 authority.
        let endpoint = Endpoint::from_static("http://agent")
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .buffer_size(64_usize);
        let channel = endpoint.connect_with_connector(connector).await?;
        let client = AgentClient::new(channel).max_decoding_message_size(MAX_MESSAGE);
        Ok(Self { client })
    }

    /// Each call has a client of its own: a cheap handle of the same connection.
    fn client(&self) -> AgentClient<Channel> {
        self.client.clone()
    }

    async fn hello(&self) -> Result<HelloResponse, AgentError> {
        let request = HelloRequest { version: VERSION };
        let mut hello = call("Hello", deadline::HELLO, self.client().hello(request)).await?;
        if hello.version != VERSION {
            return Err(AgentError::Version(hello.version));
        }
        hello.agent_version = text::from_guest(&hello.agent_version, 64);
        hello.kernel_release = text::from_guest(&hello.kernel_release, 128);
        Ok(hello)
    }

    async fn events(&self, after: u64) -> Result<Streaming<Event>, AgentError> {
        let request = EventsRequest { after };
        call("Events", deadline::HELLO, self.client().events(request)).await
    }

    /// This and the other calls: see agent.proto.
    pub async fn configure_sandbox(
        &self,
        request: ConfigureSandboxRequest,
    ) -> Result<(), AgentError> {
        let mut client = self.client();
        let answer = client.configure_sandbox(request);
        call("ConfigureSandbox", deadline::CONFIGURE, answer).await?;
        Ok(())
    }

    pub async fn configure_network(
        &self,
        request: ConfigureNetworkRequest,
    ) -> Result<(), AgentError> {
        let mut client = self.client();
        let answer = client.configure_network(request);
        call("ConfigureNetwork", deadline::CONFIGURE, answer).await?;
        Ok(())
    }

    pub async fn create_container(
        &self,
        request: CreateContainerRequest,
    ) -> Result<CreateContainerResponse, AgentError> {
        let mut client = self.client();
        let answer = client.create_container(request);
        call("CreateContainer", deadline::CREATE, answer).await
    }

    pub async fn start_container(
        &self,
        request: StartContainerRequest,
    ) -> Result<StartContainerResponse, AgentError> {
        let mut client = self.client();
        let answer = client.start_container(request);
        call("StartContainer", deadline::START, answer).await
    }

    pub async fn update_container(
        &self,
        request: UpdateContainerRequest,
    ) -> Result<(), AgentError> {
        let mut client = self.client();
        let answer = client.update_container(request);
        call("UpdateContainer", deadline::UPDATE, answer).await?;
        Ok(())
    }

    pub async fn remove_container(&self, id: &str) -> Result<RemoveContainerResponse, AgentError> {
        let request = RemoveContainerRequest { id: id.to_owned() };
        let mut client = self.client();
        let answer = client.remove_container(request);
        call("RemoveContainer", deadline::REMOVE, answer).await
    }

    pub async fn exec(&self, request: ExecRequest) -> Result<(), AgentError> {
        call("Exec", deadline::EXEC, self.client().exec(request)).await?;
        Ok(())
    }

    pub async fn add_memory(
        &self,
        request: AddMemoryRequest,
    ) -> Result<AddMemoryResponse, AgentError> {
        let mut client = self.client();
        let answer = client.add_memory(request);
        call("AddMemory", deadline::ADD_MEMORY, answer).await
    }

    pub async fn signal(&self, request: SignalRequest) -> Result<(), AgentError> {
        call("Signal", deadline::SIGNAL, self.client().signal(request)).await?;
        Ok(())
    }

    pub async fn resize(&self, request: ResizeRequest) -> Result<(), AgentError> {
        call("Resize", deadline::SIGNAL, self.client().resize(request)).await?;
        Ok(())
    }

    pub async fn port_forward(&self, request: PortForwardRequest) -> Result<(), AgentError> {
        let mut client = self.client();
        let answer = client.port_forward(request);
        call("PortForward", deadline::EXEC, answer).await?;
        Ok(())
    }

    pub async fn sample(&self) -> Result<SampleResponse, AgentError> {
        let mut client = self.client().max_decoding_message_size(MAX_SAMPLE);
        let answer = client.sample(SampleRequest {});
        call("Sample", deadline::SAMPLE, answer).await
    }

    pub async fn shutdown(&self) -> Result<(), AgentError> {
        let mut client = self.client();
        let answer = client.shutdown(ShutdownRequest {});
        call("Shutdown", deadline::SHUTDOWN, answer).await?;
        Ok(())
    }
}

/// One call with its deadline.
async fn call<T>(
    rpc: &'static str,
    after: Duration,
    answer: impl Future<Output = Result<Response<T>, Status>>,
) -> Result<T, AgentError> {
    let start_ns = now_ns();
    let answer = timeout(after, answer).await;
    agent_calls::record(AgentCall {
        rpc: rpc.to_owned(),
        start_ns,
        end_ns: now_ns(),
    });
    match answer {
        Ok(Ok(response)) => Ok(response.into_inner()),
        Ok(Err(status)) => Err(failed(&status)),
        Err(_) => Err(AgentError::Deadline { rpc, after }),
    }
}

/// What the link tells of the agent.
pub trait Observer {
    /// The agent, which dialled at `dialled_ns` (nanoseconds since the epoch), has said hello, for
    /// the first time or on a new connection.
    fn connected(&self, agent: Agent, hello: &HelloResponse, dialled_ns: u64);
    /// The connection broke.
    fn disconnected(&self);
    /// Each event once, in order.
    fn event(&self, event: Event);
}

/// Keeps the connection to the agent: the first of `incoming`, and after it breaks the next. While
/// one lives, others are turned away: any process in the guest can dial.
pub async fn keep_link(incoming: impl Stream<Item = UnixStream> + Unpin, observer: &impl Observer) {
    let mut incoming = incoming.fuse();
    let mut last_event = 0;
    while let Some(stream) = incoming.next().await {
        let end = serve_link(stream, &mut incoming, &mut last_event, observer).await;
        observer.disconnected();
        match end {
            Ok(()) => info!("the agent closed its connection"),
            Err(error) => warn!(%error, "the connection to the agent broke"),
        }
    }
}

async fn serve_link(
    stream: UnixStream,
    others: &mut (impl FusedStream<Item = UnixStream> + Unpin),
    last_event: &mut u64,
    observer: &impl Observer,
) -> Result<(), AgentError> {
    let dialled_ns = now_ns();
    let agent = Agent::connect(stream).await?;
    let hello = agent.hello().await?;
    observer.connected(agent.clone(), &hello, dialled_ns);
    loop {
        // This acknowledges all events so far.
        let mut events = agent.events(*last_event).await?;
        let mut count = 0;
        while count < EVENTS_PER_REQUEST {
            tokio::select! {
                event = events.message() => {
                    let Some(event) = event.map_err(|status| failed(&status))? else { return Ok(()) };
                    count += 1;
                    if event.sequence > *last_event {
                        *last_event = event.sequence;
                        observer.event(event);
                    }
                }
                Some(other) = others.next() => drop(other),
            }
        }
    }
}

fn failed(status: &Status) -> AgentError {
    AgentError::Failed {
        code: status.code(),
        message: text::from_guest(status.message(), MAX_TEXT),
    }
}
