//! Local processes that dial the guest through the pod's unix socket.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tracing::debug;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::timerfd::TimerFd;

use super::handle::Shared;
use super::handshake;
use super::link::Waiter;
use super::muxer::Muxer;

/// From accepting a process to the guest's answer.
const DEADLINE: Duration = Duration::from_secs(10);

/// Processes that have not said yet where they want to go.
const MAX_HANDSHAKES: usize = 64;

/// Listening sockets and those who have dialled on them.
#[derive(Debug)]
pub(super) struct Dialers {
    shared: Arc<Shared>,
    epoll: Arc<Epoll>,
    listeners: HashMap<u64, UnixListener>,
    /// By the id that the connection will have.
    handshakes: HashMap<u64, UnixStream>,
    /// Earliest first, because all have the same time. Who is done in time stays until then.
    deadlines: VecDeque<(Instant, u64)>,
    timer: TimerFd,
}

impl Dialers {
    /// The token of the timer is `timer_token`.
    pub(super) fn new(
        shared: Arc<Shared>,
        epoll: Arc<Epoll>,
        timer_token: u64,
    ) -> io::Result<Self> {
        let timer = TimerFd::new()?;
        epoll.ctl(
            ControlOperation::Add,
            timer.as_raw_fd(),
            EpollEvent::new(EventSet::IN, timer_token),
        )?;
        Ok(Self {
            shared,
            epoll,
            listeners: HashMap::new(),
            handshakes: HashMap::new(),
            deadlines: VecDeque::new(),
            timer,
        })
    }

    /// Serves a non-blocking listener as `id`.
    pub(super) fn serve(&mut self, id: u64, listener: UnixListener) {
        match watch(&self.epoll, listener.as_raw_fd(), id) {
            Ok(()) => drop(self.listeners.insert(id, listener)),
            Err(error) => debug!(%error, "cannot serve a vsock socket"),
        }
    }

    /// Listener or handshake `id` is ready. Others are none of ours.
    pub(super) fn event(&mut self, id: u64, muxer: &mut Muxer) {
        if self.listeners.contains_key(&id) {
            self.accept();
        } else if let Some(stream) = self.handshakes.get(&id) {
            match handshake::read_port(stream) {
                Ok(None) => return,
                Ok(Some(port)) => {
                    if let Some(stream) = self.handshakes.remove(&id) {
                        muxer.connect(id, port, Waiter::Process(stream));
                    }
                }
                Err(error) => {
                    debug!(%error, "a process dialled wrongly");
                    self.handshakes.remove(&id);
                }
            }
            // There is room again for those whom the limit kept out.
            self.accept();
        }
    }

    fn accept(&mut self) {
        for listener in self.listeners.values() {
            while self.handshakes.len() < MAX_HANDSHAKES {
                let stream = match listener.accept() {
                    Ok((stream, _)) => stream,
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                    Err(error) => {
                        debug!(%error, "cannot accept on a vsock socket");
                        break;
                    }
                };
                let id = self.shared.next_id();
                if stream
                    .set_nonblocking(true)
                    .and_then(|()| watch(&self.epoll, stream.as_raw_fd(), id))
                    .is_ok()
                {
                    self.handshakes.insert(id, stream);
                    self.deadlines.push_back((Instant::now() + DEADLINE, id));
                }
            }
        }
        self.set_timer();
    }

    /// The timer has fired: who is not done by now is given up.
    pub(super) fn expire(&mut self, muxer: &mut Muxer) {
        // It is readable, so this does not block.
        let _ = self.timer.wait();
        let now = Instant::now();
        while let Some((_, id)) = self
            .deadlines
            .pop_front_if(|(deadline, _)| *deadline <= now)
        {
            self.handshakes.remove(&id);
            muxer.cancel(id);
        }
        self.accept();
    }

    /// Sets the timer to the earliest deadline, unless it is set.
    fn set_timer(&mut self) {
        let Some((deadline, _)) = self.deadlines.front() else {
            return;
        };
        if self.timer.is_armed().unwrap_or(false) {
            return;
        }
        // A timer of 0 would be none.
        let left = deadline
            .saturating_duration_since(Instant::now())
            .max(Duration::from_millis(1));
        if let Err(error) = self.timer.reset(left, None) {
            debug!(%error, "no deadline for vsock handshakes");
        }
    }
}

fn watch(epoll: &Epoll, fd: i32, id: u64) -> io::Result<()> {
    let events = EventSet::IN | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
    epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(events, id))
}
