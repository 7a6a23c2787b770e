//! Requests on their way: which chain an answer belongs to.

use std::collections::HashMap;

use crate::buffers::Room;

/// Requests that wait for their answers; more stay in their queues until then. Linux has fewer, of readahead mostly.
pub(super) const MAX_REQUESTS: usize = 128;

/// A request whose answer has not come.
#[derive(Debug)]
pub(super) struct Request {
    /// Where the answer goes.
    pub(super) room: Room,
    /// The number by which the guest knows it.
    pub(super) unique: u64,
    /// Tells it from one that had the same chain before.
    serial: u32,
}

/// All of them, by queue and the head of their chain.
#[derive(Debug, Default)]
pub(super) struct Requests {
    waiting: HashMap<(u16, u16), Request>,
    next_serial: u32,
}

impl Requests {
    /// Whether there are as many as there may be.
    pub(super) fn is_full(&self) -> bool {
        self.waiting.len() >= MAX_REQUESTS
    }

    /// Adds a request. Returns the number that stands for the guest's own in its message. `None`: the driver has given
    /// a chain that is on its way already.
    pub(super) fn add(&mut self, queue: u16, head: u16, unique: u64, room: Room) -> Option<u64> {
        if self.waiting.contains_key(&(queue, head)) {
            return None;
        }
        let serial = self.next_serial;
        self.next_serial = serial.wrapping_add(1);
        let request = Request {
            room,
            unique,
            serial,
        };
        self.waiting.insert((queue, head), request);
        Some(u64::from(serial) << 32 | u64::from(queue) << 16 | u64::from(head))
    }

    /// Takes out the request that an answer's number stands for: its queue, its chain's head. `None`: there is no such
    /// request any more.
    pub(super) fn take(&mut self, number: u64) -> Option<(u16, u16, Request)> {
        let (queue, head) = ((number >> 16) as u16, number as u16);
        let request = self.waiting.get(&(queue, head))?;
        if request.serial != (number >> 32) as u32 {
            return None;
        }
        let request = self.waiting.remove(&(queue, head))?;
        Some((queue, head, request))
    }

    /// Takes all out.
    pub(super) fn take_all(&mut self) -> impl Iterator<Item = (u16, u16, Request)> {
        std::mem::take(&mut self.waiting)
            .into_iter()
            .map(|((queue, head), request)| (queue, head, request))
    }

    /// Forgets all. Answers that come later belong to nothing.
    pub(super) fn clear(&mut self) {
        self.waiting.clear();
    }
}
