//! The connection to the host, and the API on it. The guest dials: that the connection is there means
//! "ready". When it breaks, the agent dials again.

use std::io;
use std::time::Duration;

use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::service::TowerToHyperService;
use podvisor_proto::agent::agent_server::AgentServer;
use tokio::time::{Instant, sleep, timeout};

use crate::kmsg;
use crate::service::Service;
use crate::socket::{Listener, Socket};

/// Port of the host that the agent dials.
pub const CONTROL_PORT: u32 = 1024;
/// Port of the guest where the host dials streams.
pub const STREAM_PORT: u32 = 1025;
/// One request: a spec and its layers.
const REQUEST_LIMIT: usize = 4 * 1024 * 1024;
/// Calls at one time; each exec that starts is one, and the event stream.
const CALL_LIMIT: u32 = 256;
const DIAL_DEADLINE: Duration = Duration::from_secs(5);
const FIRST_PAUSE: Duration = Duration::from_millis(10);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// Dials the host and serves the API, for ever. `first` is a connection that is being made already.
pub async fn dial(service: Service, first: impl Future<Output = io::Result<Socket>>) {
    let mut connection = timeout(DIAL_DEADLINE, first).await;
    let mut pause = FIRST_PAUSE;
    loop {
        let begin = Instant::now();
        match connection {
            Ok(Ok(socket)) => serve(&service, socket).await,
            Ok(Err(error)) => kmsg::error!("cannot dial the host: {error}"),
            Err(_) => kmsg::error!("the host did not answer"),
        }
        // A connection that held was no failure: then the host is dialled again soon.
        if begin.elapsed() > LONGEST_PAUSE {
            pause = FIRST_PAUSE;
        }
        sleep(pause).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
        connection = timeout(DIAL_DEADLINE, Socket::connect_to_host(CONTROL_PORT)).await;
    }
}

/// Development: serves the API to whoever connects.
pub async fn listen(service: Service, listener: Listener) -> io::Result<()> {
    loop {
        let socket = listener.accept().await?;
        let service = service.clone();
        tokio::spawn(async move { serve(&service, socket).await });
    }
}

/// Serves the API until the connection ends.
async fn serve(service: &Service, socket: Socket) {
    let api = AgentServer::new(service.clone()).max_decoding_message_size(REQUEST_LIMIT);
    let served = hyper::server::conn::http2::Builder::new(TokioExecutor::new())
        .max_concurrent_streams(CALL_LIMIT)
        .serve_connection(TokioIo::new(socket), TowerToHyperService::new(api))
        .await;
    match served {
        Ok(()) => kmsg::info!("the host has hung up"),
        Err(error) => kmsg::error!("the connection to the host broke: {error}"),
    }
}
