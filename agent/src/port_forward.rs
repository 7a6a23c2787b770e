//! Connections to ports of the pod's loopback interface, for clients of the host's.

use std::fs::File;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Duration;

use nix::sched::{CloneFlags, setns};
use nix::sys::socket::{Shutdown, shutdown};
use tokio::io::unix::AsyncFd;
use tokio::io::{Interest, Ready};
use tokio::net::TcpSocket;
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::timeout;

use crate::fd::register;
use crate::relay;
use crate::socket::Socket;

/// Connections at a time.
pub const LIMIT: usize = 512;

/// How long a port may take to accept. Loopback refuses at once; a listener whose queue is full does not answer.
const CONNECT_DEADLINE: Duration = Duration::from_secs(10);

/// Connects to `port` of 127.0.0.1, or else of ::1, in this network namespace, or the guest's own.
///
/// # Errors
/// What 127.0.0.1 said, when neither accepts.
pub async fn dial(port: u16, namespace: Option<File>) -> io::Result<AsyncFd<OwnedFd>> {
    let namespace = namespace.as_ref();
    let v4 = dial_one((Ipv4Addr::LOCALHOST, port).into(), namespace).await;
    let Err(error) = v4 else { return v4 };
    let v6 = dial_one((Ipv6Addr::LOCALHOST, port).into(), namespace).await;
    v6.map_err(|_| error)
}

async fn dial_one(address: SocketAddr, namespace: Option<&File>) -> io::Result<AsyncFd<OwnedFd>> {
    let socket = match namespace {
        Some(namespace) => socket_in(namespace, address)?,
        None => new_socket(address)?,
    };
    match timeout(CONNECT_DEADLINE, socket.connect(address)).await {
        Ok(connected) => register(
            connected?.into_std()?.into(),
            Interest::READABLE | Interest::WRITABLE,
        ),
        Err(_) => Err(io::ErrorKind::TimedOut.into()),
    }
}

/// A socket is of the namespace that its maker was in, for ever.
fn socket_in(namespace: &File, address: SocketAddr) -> io::Result<TcpSocket> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().spawn_scoped(scope, || {
            setns(namespace, CloneFlags::CLONE_NEWNET)?;
            new_socket(address)
        })?;
        let made = thread.join();
        made.unwrap_or_else(|_| Err(io::Error::other("a thread of the agent's died")))
    })
}

fn new_socket(address: SocketAddr) -> io::Result<TcpSocket> {
    match address {
        SocketAddr::V4(_) => TcpSocket::new_v4(),
        SocketAddr::V6(_) => TcpSocket::new_v6(),
    }
}

/// Moves bytes both ways until both have ended, or the host has closed its stream. Keeps `place` so long.
pub fn forward(port: AsyncFd<OwnedFd>, host: Socket, place: OwnedSemaphorePermit) {
    tokio::spawn(async move {
        let down = async {
            let _ = relay::sockets(&port, host.as_async_fd()).await;
            host.close_write();
        };
        let up = async {
            let _ = relay::sockets(host.as_async_fd(), &port).await;
            let _ = shutdown(port.as_raw_fd(), Shutdown::Write);
        };
        let (mut down, mut up) = (std::pin::pin!(down), std::pin::pin!(up));
        tokio::select! {
            () = &mut down => up.await,
            () = &mut up => tokio::select! {
                () = down => {}
                // Nobody takes what may still come.
                () = closed(host.as_async_fd()) => {}
            },
        }
        drop(place);
    });
}

/// Ends when the other side has closed both directions.
async fn closed(socket: &AsyncFd<OwnedFd>) {
    // An error of epoll's would be an end as well.
    while let Ok(mut ready) = socket.ready(Interest::WRITABLE).await {
        if ready.ready().is_write_closed() {
            return;
        }
        ready.clear_ready_matching(Ready::WRITABLE);
    }
}
