//! One connection with its host side: a non-blocking unix stream.

use std::io::{self, Read as _};
use std::net::Shutdown;
use std::os::fd::AsFd as _;
use std::os::unix::net::UnixStream;

use super::backlog::Backlog;
use super::connection::{Connection, WINDOW};
use super::handle::Answer;
use crate::buffers::GuestSlices;

/// Who waits for the guest's answer to a request, and gets the host's end.
#[derive(Debug)]
pub(super) enum Waiter {
    /// Nobody: the guest has answered, or asked itself.
    Nobody,
    /// A caller of `VsockHandle::connect`.
    Caller(Answer),
    /// A process that dialled on the pod's socket and waits for the line `OK n`.
    Process(UnixStream),
}

/// What the host's end has been told.
#[derive(Debug, Default)]
struct Told {
    unread: bool,
    end: bool,
}

/// A connection and its host side.
///
/// Readiness is edge-triggered: the flags remember it until a call says that it is over.
#[derive(Debug)]
pub(super) struct Link {
    pub host_port: u32,
    pub guest_port: u32,
    pub connection: Connection,
    pub waiter: Waiter,
    /// `None` until the guest has accepted, and after the host's end is closed.
    host: Option<UnixStream>,
    /// Payload from the guest that the host has not taken.
    backlog: Backlog,
    readable: bool,
    writable: bool,
    /// The host's end is closed for both directions.
    hung_up: bool,
    /// It has been told that nothing more is read of it, and that nothing more comes. Once each: epoll tells of a
    /// shutdown as of any other event, and telling again for that would never end.
    told: Told,
    /// The guest has forgotten the connection; what it sent is still on its way to the host.
    orphaned: bool,
    /// In the muxer's queue of those that want to send.
    pub queued: bool,
}

impl Link {
    pub(super) fn new(
        host_port: u32,
        guest_port: u32,
        connection: Connection,
        waiter: Waiter,
    ) -> Self {
        Self {
            host_port,
            guest_port,
            connection,
            waiter,
            host: None,
            backlog: Backlog::new(WINDOW as usize),
            readable: false,
            writable: false,
            hung_up: false,
            told: Told::default(),
            orphaned: false,
            queued: false,
        }
    }

    /// Sets the host side, which is registered for events. It takes data already; the events say when it has some.
    pub(super) fn set_host(&mut self, stream: UnixStream) {
        self.writable = true;
        self.host = Some(stream);
    }

    /// The guest has forgotten the connection: nothing more comes from it or goes to it.
    pub(super) fn orphan(&mut self) {
        self.orphaned = true;
        self.settle();
    }

    /// Whether nothing is left to do for a connection that the guest has forgotten.
    pub(super) fn finished(&self) -> bool {
        self.orphaned && (self.host.is_none() || self.backlog.is_empty())
    }

    /// Takes in what epoll says of the host side.
    pub(super) fn host_event(&mut self, readable: bool, writable: bool, hung_up: bool) {
        self.readable |= readable || hung_up;
        self.writable |= writable || hung_up;
        self.hung_up |= hung_up;
        self.flush();
    }

    /// Whether the guest is to be sent something.
    pub(super) fn wants_to_send(&self) -> bool {
        !self.orphaned && self.connection.wants_to_send(self.readable)
    }

    /// Whether the host's end has data, as far as is known.
    pub(super) fn readable(&self) -> bool {
        self.readable
    }

    /// Passes payload from the guest on, directly if nothing waits before it. The connection has checked the credit,
    /// which is what bounds the backlog.
    pub(super) fn deliver(&mut self, payload: &mut GuestSlices<'_>) {
        while self.backlog.is_empty() && self.writable && !payload.is_empty() {
            let Some(host) = &self.host else { break };
            let sent = payload.send(host.as_fd());
            self.account(sent);
        }
        if self.connection.host_receives() && !self.backlog.push(payload) {
            debug_assert!(false, "credit is not larger than the backlog");
        }
    }

    /// Sends what waits, as far as the host takes it.
    fn flush(&mut self) {
        while !self.backlog.is_empty() && self.writable {
            let Some(host) = &self.host else { break };
            let sent = self.backlog.send(host.as_fd());
            self.account(sent);
        }
        self.settle();
    }

    /// Takes in the outcome of a send to the host.
    fn account(&mut self, sent: io::Result<usize>) {
        match sent {
            Ok(count) => self.connection.forwarded(count),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.writable = false,
            // The host's end takes no more. What the guest sent for it is lost, as with any closed socket.
            Err(_) => {
                self.writable = false;
                self.backlog.clear();
                self.connection.host_stops_receiving();
            }
        }
    }

    /// Passes on to each side what the other has closed; the end of the guest's data once all of it is out.
    pub(super) fn settle(&mut self) {
        let Some(host) = &self.host else { return };
        // Errors of shutdown say that the host's end is gone, of which its own event tells as well.
        let host_heard = self.orphaned || !self.connection.guest_receives();
        if host_heard && !self.told.unread {
            self.told.unread = true;
            let _ = host.shutdown(Shutdown::Read);
        }
        let guest_said_all = self.orphaned || !self.connection.guest_sends();
        if guest_said_all && self.backlog.is_empty() && !self.told.end {
            self.told.end = true;
            let _ = host.shutdown(Shutdown::Write);
        }
        // Until then what the host's end has sent before it closed is still read.
        if self.hung_up && (host_heard || !self.connection.host_sends()) {
            self.close_host();
        }
    }

    /// Reads payload for the guest into `room`, at most `limit` bytes. Returns the bytes read; 0: nothing now.
    pub(super) fn receive(&mut self, room: &mut GuestSlices<'_>, limit: usize) -> usize {
        let Some(host) = &self.host else { return 0 };
        match room.receive(host.as_fd(), limit) {
            Ok(0) => self.connection.host_stops_sending(),
            Ok(count) => return count,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(_) => self.connection.host_stops_sending(),
        }
        self.readable = false;
        self.settle();
        0
    }

    /// Bytes that wait for the host.
    #[cfg(test)]
    pub(super) fn waiting(&self) -> usize {
        self.backlog.len()
    }

    /// Nobody is left at the host's end.
    fn close_host(&mut self) {
        self.backlog.clear();
        self.connection.host_stops_sending();
        self.connection.host_stops_receiving();
        self.host = None;
    }
}

impl Drop for Link {
    /// A unix socket closed with data in it ends the other side's reading with ECONNRESET instead of the end of the
    /// stream, although that side has done nothing wrong: so what nobody will read is thrown away first.
    fn drop(&mut self) {
        let Some(host) = &mut self.host else { return };
        // Nothing comes after this, so that the loop ends.
        if host.shutdown(Shutdown::Read).is_ok() {
            let mut nowhere = [0; 4096];
            while host.read(&mut nowhere).is_ok_and(|count| count > 0) {}
        }
    }
}
