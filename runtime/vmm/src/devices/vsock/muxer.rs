//! All connections of a device: packets from the guest in, packets for the guest out.
//!
//! Nothing here can be made to grow by the guest: connections are limited, each has a bounded backlog, and while many
//! resets wait to be sent the device takes no more packets ([`Muxer::congested`]).

use std::collections::{HashMap, VecDeque};
use std::io::{self, Write as _};
use std::num::Wrapping;
use std::os::fd::AsRawFd as _;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use tracing::debug;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::connection::{Connection, Verdict};
use super::handle::{Answer, Shared};
use super::link::{Link, Waiter};
use super::packet::{HEADER_BYTES, HOST_CID, Header, MAX_PAYLOAD_BYTES, Op, TYPE_STREAM};
use crate::buffers::GuestSlices;

/// Connections at a time, those included whose data waits for a slow host.
pub(super) const MAX_CONNECTIONS: usize = 1024;

/// Resets that wait to be sent.
const MAX_REPLIES: usize = 256;

/// The host's ports for connections that the host asks for begin here: clear of the ports that it listens on.
const FIRST_EPHEMERAL_PORT: u32 = 1 << 30;

/// The connections of one device.
#[derive(Debug)]
pub(super) struct Muxer {
    guest_cid: u64,
    shared: Arc<Shared>,
    epoll: Arc<Epoll>,
    /// By id, which is also the token in the epoll.
    links: HashMap<u64, Link>,
    /// The id of the connection between a port of the host and one of the guest, while the guest knows it.
    by_ports: HashMap<(u32, u32), u64>,
    /// Connections that have something to send; each gets one packet in turn.
    ready: VecDeque<u64>,
    /// Resets, for connections that are not there (any more).
    replies: VecDeque<Header>,
    next_port: Wrapping<u32>,
}

impl Muxer {
    pub(super) fn new(guest_cid: u64, shared: Arc<Shared>, epoll: Arc<Epoll>) -> Self {
        Self {
            guest_cid,
            shared,
            epoll,
            links: HashMap::new(),
            by_ports: HashMap::new(),
            ready: VecDeque::new(),
            replies: VecDeque::new(),
            next_port: Wrapping(FIRST_EPHEMERAL_PORT),
        }
    }

    // From the guest.

    /// Takes in a packet.
    pub(super) fn packet(&mut self, mut packet: GuestSlices<'_>) {
        let mut header = [0; HEADER_BYTES];
        if !packet.read(&mut header) {
            debug!("a vsock packet without a whole header");
            return;
        }
        let header = Header::from_bytes(&header);
        if header.source_cid != self.guest_cid || header.destination_cid != HOST_CID {
            debug!(?header, "a vsock packet with a wrong address");
            return;
        }
        let honest = header.op != Op::Data
            || header.length as usize <= packet.len() && header.length <= MAX_PAYLOAD_BYTES;
        let Some(&id) = self
            .by_ports
            .get(&(header.destination_port, header.source_port))
        else {
            if header.op == Op::Request && header.kind == TYPE_STREAM {
                self.accept(&header);
            } else if header.op != Op::Reset {
                self.reply_reset(header.destination_port, header.source_port, header.kind);
            }
            return;
        };
        packet.truncate(header.length as usize);
        self.packet_of(id, &header, honest, packet);
    }

    fn packet_of(&mut self, id: u64, header: &Header, honest: bool, mut payload: GuestSlices<'_>) {
        let Some(link) = self.links.get_mut(&id) else {
            return;
        };
        let verdict = if honest && header.kind == TYPE_STREAM {
            link.connection.packet(header)
        } else {
            Verdict::Violation
        };
        match verdict {
            Verdict::Nothing => {}
            Verdict::Deliver => link.deliver(&mut payload),
            Verdict::Shutdown => link.settle(),
            Verdict::Accepted => self.answered(id),
            Verdict::Finished => self.forget(id, true),
            Verdict::Gone => self.forget(id, false),
            Verdict::Violation => {
                debug!(?header, "a vsock packet against the rules");
                self.forget(id, true);
            }
        }
        self.enqueue(id);
    }

    /// The guest asks for a connection to a port of the host.
    fn accept(&mut self, request: &Header) {
        let (host_port, guest_port) = (request.destination_port, request.source_port);
        let id = self.shared.next_id();
        let mut link = Link::new(
            host_port,
            guest_port,
            Connection::incoming(request),
            Waiter::Nobody,
        );
        let full = self.links.len() >= MAX_CONNECTIONS;
        let epoll = &self.epoll;
        let accepted = !full
            && self.shared.offer(host_port, || {
                let (ours, theirs) = stream_pair()
                    .inspect_err(|error| debug!(%error, "no socket for vsock"))
                    .ok()?;
                watch(epoll, ControlOperation::Add, id, &ours).ok()?;
                link.set_host(ours);
                Some(theirs)
            });
        if !accepted {
            self.reply_reset(host_port, guest_port, TYPE_STREAM);
            return;
        }
        self.insert(id, link);
    }

    /// The guest accepted what the host asked for: whoever waits gets the connection.
    fn answered(&mut self, id: u64) {
        let Some(link) = self.links.get_mut(&id) else {
            return;
        };
        let handed_over = match std::mem::replace(&mut link.waiter, Waiter::Nobody) {
            Waiter::Nobody => Ok(()),
            Waiter::Caller(answer) => hand_over(&self.epoll, id, link, answer),
            Waiter::Process(mut stream) => {
                // 20 bytes into an empty socket: this does not block, or the process is gone.
                let line = format!("OK {}\n", link.host_port);
                let written = stream.write_all(line.as_bytes());
                // Watched since it dialled, but only now for everything.
                written
                    .and_then(|()| watch(&self.epoll, ControlOperation::Modify, id, &stream))
                    .map(|()| link.set_host(stream))
            }
        };
        if let Err(error) = handed_over {
            debug!(%error, "nobody takes a vsock connection that the guest accepted");
            self.forget(id, true);
        }
    }

    /// Ends a connection towards the guest; with a reset, if the guest is to be told. What the guest sent before still
    /// goes to the host.
    fn forget(&mut self, id: u64, tell_guest: bool) {
        let Some(mut link) = self.links.remove(&id) else {
            return;
        };
        self.by_ports.remove(&(link.host_port, link.guest_port));
        if tell_guest {
            self.reply_reset(link.host_port, link.guest_port, TYPE_STREAM);
        }
        if let Waiter::Caller(answer) = std::mem::replace(&mut link.waiter, Waiter::Nobody) {
            // An error says that the caller has gone away.
            let _ = answer.send(Err(io::ErrorKind::ConnectionRefused.into()));
        }
        link.orphan();
        if !link.finished() {
            self.links.insert(id, link);
        }
    }

    fn reply_reset(&mut self, host_port: u32, guest_port: u32, kind: u16) {
        self.replies
            .push_back(self.header(host_port, guest_port, kind, Op::Reset));
    }

    fn header(&self, host_port: u32, guest_port: u32, kind: u16, op: Op) -> Header {
        Header {
            source_cid: HOST_CID,
            destination_cid: self.guest_cid,
            source_port: host_port,
            destination_port: guest_port,
            length: 0,
            kind,
            op,
            flags: 0,
            buffer: 0,
            forwarded: 0,
        }
    }

    /// Whether no packet may be taken in until some have gone out.
    pub(super) fn congested(&self) -> bool {
        self.replies.len() >= MAX_REPLIES
    }

    // From the host.

    /// Dials a port of the guest. With too many connections the waiter is told so.
    pub(super) fn connect(&mut self, id: u64, guest_port: u32, waiter: Waiter) {
        if self.links.len() < MAX_CONNECTIONS {
            let host_port = self.free_port(guest_port);
            self.insert(
                id,
                Link::new(host_port, guest_port, Connection::outgoing(), waiter),
            );
        } else if let Waiter::Caller(answer) = waiter {
            // An error says that the caller has gone away.
            let _ = answer.send(Err(io::ErrorKind::QuotaExceeded.into()));
        }
    }

    /// A port of the host that has no connection to `guest_port`. There is one: connections are few.
    fn free_port(&mut self, guest_port: u32) -> u32 {
        loop {
            let port = self.next_port.0.max(FIRST_EPHEMERAL_PORT);
            self.next_port = Wrapping(port) + Wrapping(1);
            if !self.by_ports.contains_key(&(port, guest_port)) {
                return port;
            }
        }
    }

    /// Takes a request back that the guest has not answered.
    pub(super) fn cancel(&mut self, id: u64) {
        if let Some(link) = self
            .links
            .get(&id)
            .filter(|link| link.connection.requested())
        {
            let tell_guest = !link.connection.unknown_to_guest();
            self.forget(id, tell_guest);
        }
    }

    /// The host side of connection `id` is ready, as `events` says. False: there is no such connection.
    pub(super) fn host_event(&mut self, id: u64, events: EventSet) -> bool {
        let Some(link) = self.links.get_mut(&id) else {
            return false;
        };
        let hung_up = events.intersects(EventSet::HANG_UP | EventSet::ERROR);
        if hung_up && link.connection.requested() {
            self.cancel(id);
            return true;
        }
        let readable = events.intersects(EventSet::IN | EventSet::READ_HANG_UP);
        link.host_event(readable, events.contains(EventSet::OUT), hung_up);
        if link.finished() {
            self.links.remove(&id);
        }
        self.enqueue(id);
        true
    }

    // To the guest.

    /// Whether there may be packets to send.
    pub(super) fn has_packets(&self) -> bool {
        !self.replies.is_empty() || !self.ready.is_empty()
    }

    /// Writes the next packet into `room`. Returns its length. `None`: there is none, `room` is untouched.
    pub(super) fn next_packet(&mut self, mut room: GuestSlices<'_>) -> Option<u32> {
        let Some(front) = room.take_front(HEADER_BYTES) else {
            // A buffer that holds no packet is the driver's mistake; it gets it back.
            debug!("a vsock buffer without room for a header");
            return Some(0);
        };
        if let Some(reply) = self.replies.pop_front() {
            front.write(&reply.to_bytes());
            return Some(HEADER_BYTES as u32);
        }
        while let Some(id) = self.ready.pop_front() {
            let Some(link) = self.links.get_mut(&id) else {
                continue;
            };
            link.queued = false;
            if !link.wants_to_send() {
                continue;
            }
            let Some((op, flags, payload)) = next_of(link, &mut room) else {
                continue;
            };
            let (buffer, forwarded) = link.connection.stamp(payload);
            let (host_port, guest_port) = (link.host_port, link.guest_port);
            self.enqueue(id);
            let header = self.header(host_port, guest_port, TYPE_STREAM, op);
            front.write(
                &Header {
                    length: payload,
                    flags,
                    buffer,
                    forwarded,
                    ..header
                }
                .to_bytes(),
            );
            return Some(HEADER_BYTES as u32 + payload);
        }
        None
    }

    /// Forgets everything that the driver knew. Requests that it has not seen yet stay.
    pub(super) fn reset(&mut self) {
        self.links
            .retain(|_, link| link.connection.unknown_to_guest());
        self.by_ports.retain(|_, id| self.links.contains_key(id));
        self.replies.clear();
    }

    /// Connections, those included whose data waits for the host.
    #[cfg(test)]
    pub(super) fn connections(&self) -> usize {
        self.links.len()
    }

    /// Bytes that wait for the host.
    #[cfg(test)]
    pub(super) fn waiting(&self) -> usize {
        self.links.values().map(Link::waiting).sum()
    }

    fn insert(&mut self, id: u64, link: Link) {
        self.by_ports.insert((link.host_port, link.guest_port), id);
        self.links.insert(id, link);
        self.enqueue(id);
    }

    /// Puts a connection in the queue of those that send, if it has something.
    fn enqueue(&mut self, id: u64) {
        if let Some(link) = self.links.get_mut(&id)
            && !link.queued
            && link.wants_to_send()
        {
            link.queued = true;
            self.ready.push_back(id);
        }
    }
}

/// The next packet of a connection: op, flags and the length of the payload, which is in `room`.
fn next_of(link: &mut Link, room: &mut GuestSlices<'_>) -> Option<(Op, u32, u32)> {
    if let Some(control) = link.connection.next_control(link.readable()) {
        return Some((control.op, control.flags, 0));
    }
    let budget = link
        .connection
        .data_budget(link.readable())
        .min(MAX_PAYLOAD_BYTES);
    if budget > 0 {
        let payload = link.receive(room, budget as usize);
        if payload > 0 {
            return Some((Op::Data, 0, payload as u32));
        }
    }
    // Reading may have found the end of the stream, which is a packet as well.
    let control = link.connection.next_control(link.readable())?;
    Some((control.op, control.flags, 0))
}

fn hand_over(epoll: &Epoll, id: u64, link: &mut Link, answer: Answer) -> io::Result<()> {
    let (ours, theirs) = match stream_pair() {
        Ok(pair) => pair,
        Err(error) => {
            let kind = error.kind();
            // An error says that the caller has gone away.
            let _ = answer.send(Err(error));
            return Err(kind.into());
        }
    };
    watch(epoll, ControlOperation::Add, id, &ours)?;
    answer
        .send(Ok(theirs))
        .map_err(|_| io::ErrorKind::ConnectionAborted)?;
    link.set_host(ours);
    Ok(())
}

fn stream_pair() -> io::Result<(UnixStream, UnixStream)> {
    let (ours, theirs) = UnixStream::pair()?;
    ours.set_nonblocking(true)?;
    theirs.set_nonblocking(true)?;
    Ok((ours, theirs))
}

/// Has the host side of a connection watched; the events begin with what is so already. Closing the stream takes it out again.
fn watch(
    epoll: &Epoll,
    operation: ControlOperation,
    id: u64,
    stream: &UnixStream,
) -> io::Result<()> {
    let events = EventSet::IN | EventSet::OUT | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
    epoll.ctl(operation, stream.as_raw_fd(), EpollEvent::new(events, id))
}
