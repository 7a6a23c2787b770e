//! The protocol of one connection (virtio 1.2, 5.10.6), without any I/O.
//!
//! Flow control goes both ways. Each side says in every packet how large its receive buffer is and how many bytes it
//! has taken out of it since the beginning; the difference to what was sent is the credit.

use std::num::Wrapping;

use super::packet::{Header, Op, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND};

/// Bytes that the guest may have on the way to a host that does not take them. Two packets of the largest size, so that
/// the guest fills one while the other is taken: a fifth faster than one. More gains little, and is memory that a
/// guest can claim for each connection whose host side is slow.
pub(super) const WINDOW: u32 = 128 << 10;

/// What a packet from the guest asks the device to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Nothing more.
    Nothing,
    /// The guest accepted the connection that the host asked for.
    Accepted,
    /// The payload goes to the host.
    Deliver,
    /// The guest will send, or take, no more: see [`Connection::guest_sends`] and [`Connection::guest_receives`].
    Shutdown,
    /// The guest is done with the connection and wants that confirmed with a reset.
    Finished,
    /// The guest has refused or reset the connection.
    Gone,
    /// The guest breaks the rules: reset.
    Violation,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// The host asked; the guest has not answered.
    Requested,
    Established,
}

/// A packet to send that carries no payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Control {
    pub op: Op,
    pub flags: u32,
}

/// Packets without payload that are due.
#[derive(Debug, Default)]
struct Pending {
    request: bool,
    response: bool,
    shutdown: bool,
    credit_update: bool,
    credit_request: bool,
}

/// One connection, as the protocol sees it.
#[derive(Debug)]
pub(super) struct Connection {
    phase: Phase,
    pending: Pending,

    /// Payload from the guest: received, taken by the host, and what of that the guest knows.
    received: Wrapping<u32>,
    forwarded: Wrapping<u32>,
    announced: Wrapping<u32>,

    /// Payload to the guest: sent, and what the guest last said of its buffer.
    sent: Wrapping<u32>,
    guest_window: u32,
    guest_forwarded: Wrapping<u32>,
    /// A credit request was sent and the guest's credit is still 0.
    asked_for_credit: bool,

    /// `SHUTDOWN_*` flags that the guest has sent, and that the host's end calls for.
    guest_shutdown: u32,
    host_shutdown: u32,
}

impl Connection {
    /// A connection that the host asks for.
    pub(super) fn outgoing() -> Self {
        Self::new(
            Phase::Requested,
            Pending {
                request: true,
                ..Pending::default()
            },
        )
    }

    /// A connection that the guest asked for with `request`, accepted.
    pub(super) fn incoming(request: &Header) -> Self {
        let mut connection = Self::new(
            Phase::Established,
            Pending {
                response: true,
                ..Pending::default()
            },
        );
        connection.take_credit(request);
        connection
    }

    fn new(phase: Phase, pending: Pending) -> Self {
        Self {
            phase,
            pending,
            received: Wrapping(0),
            forwarded: Wrapping(0),
            announced: Wrapping(0),
            sent: Wrapping(0),
            guest_window: 0,
            guest_forwarded: Wrapping(0),
            asked_for_credit: false,
            guest_shutdown: 0,
            host_shutdown: 0,
        }
    }

    /// Whether the guest has not answered yet.
    pub(super) fn requested(&self) -> bool {
        self.phase == Phase::Requested
    }

    /// Whether the guest cannot know of this connection: its request has not been sent.
    pub(super) fn unknown_to_guest(&self) -> bool {
        self.pending.request
    }

    /// Whether the guest may still send data.
    pub(super) fn guest_sends(&self) -> bool {
        self.guest_shutdown & SHUTDOWN_SEND == 0
    }

    /// Whether the guest still takes data.
    pub(super) fn guest_receives(&self) -> bool {
        self.guest_shutdown & SHUTDOWN_RECEIVE == 0
    }

    /// Whether the host's end is still to be read.
    pub(super) fn host_sends(&self) -> bool {
        self.host_shutdown & SHUTDOWN_SEND == 0
    }

    /// Whether the host's end still takes data.
    pub(super) fn host_receives(&self) -> bool {
        self.host_shutdown & SHUTDOWN_RECEIVE == 0
    }

    /// Takes in a packet from the guest, whose payload is `header.length` bytes, really.
    pub(super) fn packet(&mut self, header: &Header) -> Verdict {
        self.take_credit(header);
        match (self.phase, header.op) {
            (_, Op::Reset) => Verdict::Gone,
            (Phase::Requested, Op::Response) => {
                self.phase = Phase::Established;
                Verdict::Accepted
            }
            (Phase::Established, Op::Data) => self.data(header.length),
            (Phase::Established, Op::CreditUpdate) => Verdict::Nothing,
            (Phase::Established, Op::CreditRequest) => {
                self.pending.credit_update = true;
                Verdict::Nothing
            }
            (Phase::Established, Op::Shutdown) => {
                self.guest_shutdown |= header.flags & SHUTDOWN_BOTH;
                if self.guest_shutdown == SHUTDOWN_BOTH {
                    Verdict::Finished
                } else {
                    Verdict::Shutdown
                }
            }
            _ => Verdict::Violation,
        }
    }

    fn take_credit(&mut self, header: &Header) {
        self.guest_window = header.buffer;
        self.guest_forwarded = Wrapping(header.forwarded);
        if self.credit() > 0 {
            self.asked_for_credit = false;
        }
    }

    fn data(&mut self, length: u32) -> Verdict {
        let waiting = (self.received - self.forwarded).0;
        if !self.guest_sends() || length > WINDOW - waiting {
            return Verdict::Violation;
        }
        self.received += length;
        if self.host_receives() {
            return Verdict::Deliver;
        }
        self.forwarded = self.received;
        Verdict::Nothing
    }

    /// The host took `count` bytes of payload.
    pub(super) fn forwarded(&mut self, count: usize) {
        self.forwarded += count as u32;
        // Said early enough that the guest need not stop, not so often that it costs a packet for each packet.
        if (self.forwarded - self.announced).0 >= WINDOW / 4 {
            self.pending.credit_update = true;
        }
    }

    /// The host's end takes no more data: what waits is gone.
    pub(super) fn host_stops_receiving(&mut self) {
        self.forwarded = self.received;
        self.shut_host(SHUTDOWN_RECEIVE);
    }

    /// The host's end has no more data.
    pub(super) fn host_stops_sending(&mut self) {
        self.shut_host(SHUTDOWN_SEND);
    }

    fn shut_host(&mut self, flag: u32) {
        if self.host_shutdown & flag == 0 {
            self.host_shutdown |= flag;
            self.pending.shutdown = true;
        }
    }

    /// Payload bytes that may be sent now.
    pub(super) fn credit(&self) -> u32 {
        self.guest_window
            .saturating_sub((self.sent - self.guest_forwarded).0)
    }

    /// Whether there is something to send, given whether the host's end has data.
    pub(super) fn wants_to_send(&self, host_has_data: bool) -> bool {
        let Pending {
            request,
            response,
            shutdown,
            credit_update,
            credit_request,
        } = self.pending;
        request
            || response
            || shutdown
            || credit_update
            || credit_request
            || self.may_send_data(host_has_data) && (self.credit() > 0 || !self.asked_for_credit)
    }

    fn may_send_data(&self, host_has_data: bool) -> bool {
        host_has_data
            && self.phase == Phase::Established
            && self.guest_receives()
            && self.host_sends()
    }

    /// The next packet to send that has no payload. `None`: send data, if there is some and credit for it.
    pub(super) fn next_control(&mut self, host_has_data: bool) -> Option<Control> {
        if self.may_send_data(host_has_data) && self.credit() == 0 && !self.asked_for_credit {
            self.pending.credit_request = true;
        }
        let pending = &mut self.pending;
        let take = |flag: &mut bool| std::mem::take(flag);
        let (op, flags) = if take(&mut pending.request) {
            (Op::Request, 0)
        } else if take(&mut pending.response) {
            (Op::Response, 0)
        } else if take(&mut pending.shutdown) {
            (Op::Shutdown, self.host_shutdown)
        } else if take(&mut pending.credit_request) {
            self.asked_for_credit = true;
            (Op::CreditRequest, 0)
        } else if take(&mut pending.credit_update) {
            (Op::CreditUpdate, 0)
        } else {
            return None;
        };
        Some(Control { op, flags })
    }

    /// Bytes of payload that the next data packet may hold, given whether the host's end has data.
    pub(super) fn data_budget(&self, host_has_data: bool) -> u32 {
        if self.may_send_data(host_has_data) {
            self.credit()
        } else {
            0
        }
    }

    /// A packet with `payload` bytes goes to the guest now: what it must say of our buffer.
    pub(super) fn stamp(&mut self, payload: u32) -> (u32, u32) {
        self.sent += payload;
        self.announced = self.forwarded;
        self.pending.credit_update = false;
        (WINDOW, self.forwarded.0)
    }
}

#[cfg(test)]
mod tests;
