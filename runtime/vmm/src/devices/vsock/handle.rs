//! The host's end of the device, for the rest of the process.
//!
//! The device runs on a thread of its own. What is asked of it goes through a queue of commands and an eventfd in the
//! device's epoll; answers come back through channels.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::unix::net::{UnixListener, UnixStream as StdUnixStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Connections of the guest to one port that wait to be accepted.
const ACCEPT_BACKLOG: usize = 64;

/// What a host process waits for: its end of the connection.
pub(super) type Answer = oneshot::Sender<io::Result<StdUnixStream>>;

/// What the device is asked to do.
#[derive(Debug)]
pub(super) enum Command {
    /// Dial a port of the guest.
    Connect { id: u64, port: u32, answer: Answer },
    /// Nobody waits for connection `id` any more.
    Cancel { id: u64 },
    /// Serve a socket on which others dial.
    Serve { id: u64, listener: UnixListener },
}

/// What the device and its handles share.
#[derive(Debug)]
pub(super) struct Shared {
    commands: Mutex<Commands>,
    listeners: Mutex<HashMap<u32, mpsc::Sender<StdUnixStream>>>,
    /// Readable when there are commands.
    pub(super) wake: EventFd,
    ids: AtomicU64,
}

#[derive(Debug, Default)]
struct Commands {
    waiting: VecDeque<Command>,
    /// The device is gone.
    closed: bool,
}

impl Shared {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self {
            commands: Mutex::default(),
            listeners: Mutex::default(),
            wake: EventFd::new(EFD_NONBLOCK)?,
            ids: AtomicU64::new(1),
        })
    }

    /// A number that no other connection, listener or handshake of this device has. Never 0.
    pub(super) fn next_id(&self) -> u64 {
        self.ids.fetch_add(1, Ordering::Relaxed)
    }

    pub(super) fn take_commands(&self) -> VecDeque<Command> {
        // Fails only when nothing was written since: then there is nothing to clear.
        let _ = self.wake.read();
        std::mem::take(&mut lock(&self.commands).waiting)
    }

    pub(super) fn submit(&self, command: Command) -> io::Result<()> {
        let mut commands = lock(&self.commands);
        if commands.closed {
            return Err(io::ErrorKind::ConnectionAborted.into());
        }
        commands.waiting.push_back(command);
        drop(commands);
        // Cannot fail: the counter would have to be at 2^64 - 1.
        self.wake.write(1)
    }

    /// Hands a connection of the guest to the listener of `port`. False: nobody listens, or its backlog is full.
    pub(super) fn offer(&self, port: u32, stream: impl FnOnce() -> Option<StdUnixStream>) -> bool {
        let listeners = lock(&self.listeners);
        let Some(Ok(place)) = listeners.get(&port).map(mpsc::Sender::try_reserve) else {
            return false;
        };
        let Some(stream) = stream() else { return false };
        place.send(stream);
        true
    }

    /// The device is gone: everyone who waits is told.
    pub(super) fn close(&self) {
        let mut commands = lock(&self.commands);
        commands.closed = true;
        commands.waiting.clear();
        lock(&self.listeners).clear();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing panics between two changes that belong together.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The host's end of the device: dials and listens. A cheap clone.
#[derive(Debug, Clone)]
pub struct VsockHandle {
    shared: Arc<Shared>,
}

impl VsockHandle {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self { shared }
    }

    /// Connects to a port of the guest. Resolves when the guest has accepted, so not before its driver is up; the
    /// deadline is the caller's: dropping the future takes the request back.
    ///
    /// # Errors
    /// `ConnectionRefused`: nobody listens on the port. `ConnectionAborted`: the device is gone.
    /// `QuotaExceeded`: too many connections.
    ///
    /// # Panics
    /// Outside a tokio runtime with I/O enabled.
    pub async fn connect(&self, port: u32) -> io::Result<UnixStream> {
        let (answer, answered) = oneshot::channel();
        let mut request = Request {
            shared: &self.shared,
            id: self.shared.next_id(),
            answered: false,
        };
        self.shared.submit(Command::Connect {
            id: request.id,
            port,
            answer,
        })?;
        let stream = answered.await;
        request.answered = true;
        UnixStream::from_std(stream.map_err(|_| io::ErrorKind::ConnectionAborted)??)
    }

    /// Accepts the guest's connections to `port` of the host from now on. Replaces an earlier listener of the port.
    pub fn listen(&self, port: u32) -> VsockListener {
        let (sender, incoming) = mpsc::channel(ACCEPT_BACKLOG);
        let commands = lock(&self.shared.commands);
        if !commands.closed {
            lock(&self.shared.listeners).insert(port, sender);
        }
        VsockListener { incoming }
    }

    /// Serves a unix socket on which any local process may dial the guest: it writes `CONNECT port\n`, reads
    /// `OK n\n` (n: the host's port of the connection), and from there on has the connection. A line that is wrong or
    /// takes too long, and a guest that refuses, close it.
    ///
    /// # Errors
    /// The socket cannot be made non-blocking, or the device is gone.
    pub fn serve(&self, listener: UnixListener) -> io::Result<()> {
        listener.set_nonblocking(true)?;
        self.shared.submit(Command::Serve {
            id: self.shared.next_id(),
            listener,
        })
    }
}

/// Takes a request back unless it was answered.
struct Request<'a> {
    shared: &'a Shared,
    id: u64,
    answered: bool,
}

impl Drop for Request<'_> {
    fn drop(&mut self) {
        if !self.answered {
            // An error says that the device is gone, and the request with it.
            let _ = self.shared.submit(Command::Cancel { id: self.id });
        }
    }
}

/// Connections of the guest to one port of the host. Dropping it refuses later ones.
#[derive(Debug)]
pub struct VsockListener {
    incoming: mpsc::Receiver<StdUnixStream>,
}

impl VsockListener {
    /// The next connection if there is one, without a runtime.
    #[cfg(test)]
    pub(super) fn try_accept(&mut self) -> Option<StdUnixStream> {
        self.incoming.try_recv().ok()
    }

    /// The next connection. `None`: the device is gone, or another listener has taken the port.
    ///
    /// # Panics
    /// Outside a tokio runtime with I/O enabled.
    pub async fn accept(&mut self) -> Option<UnixStream> {
        loop {
            // A stream that cannot be registered (no file descriptors left) is closed, which the guest sees.
            if let Ok(stream) = UnixStream::from_std(self.incoming.recv().await?) {
                return Some(stream);
            }
        }
    }
}
