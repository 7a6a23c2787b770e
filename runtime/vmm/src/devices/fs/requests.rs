//! Requests on their way: which chain an answer belongs to.

use std::collections::HashMap;

use super::protocol::Handle;
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
    /// The open file that it reads or writes, as long as that may be handed over.
    pub(super) handle: Option<Handle>,
    /// The directory that it changes.
    pub(super) directory: Option<u64>,
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
    /// Whether there are none.
    pub(super) fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// Whether there are as many as there may be.
    pub(super) fn is_full(&self) -> bool {
        self.waiting.len() >= MAX_REQUESTS
    }

    /// Adds a request. Returns the number that stands for the guest's own in its message. `None`: the driver has given
    /// a chain that is on its way already.
    pub(super) fn add(
        &mut self,
        queue: u16,
        head: u16,
        unique: u64,
        (handle, directory): (Option<Handle>, Option<u64>),
        room: Room,
    ) -> Option<u64> {
        if self.waiting.contains_key(&(queue, head)) {
            return None;
        }
        let serial = self.next_serial;
        self.next_serial = serial.wrapping_add(1);
        let request = Request {
            room,
            unique,
            handle,
            directory,
            serial,
        };
        self.waiting.insert((queue, head), request);
        Some(number((queue, head), serial))
    }

    /// The number of the only request there is.
    pub(super) fn only(&self) -> Option<u64> {
        let mut waiting = self.waiting.iter();
        let (place, request) = waiting.next()?;
        waiting
            .next()
            .is_none()
            .then(|| number(*place, request.serial))
    }

    /// The request that an answer's number stands for. `None`: there is no such request any more.
    pub(super) fn get(&self, number: u64) -> Option<&Request> {
        let request = self.waiting.get(&place(number))?;
        (request.serial == serial(number)).then_some(request)
    }

    /// Takes a request out. Returns its queue and its chain's head.
    pub(super) fn remove(&mut self, number: u64) -> Option<(u16, u16)> {
        self.get(number)?;
        self.waiting.remove(&place(number))?;
        Some(place(number))
    }

    /// Those open files of theirs that are `unwanted` are not to be handed over.
    pub(super) fn give_up(&mut self, unwanted: impl Fn(Handle) -> bool) {
        for request in self.waiting.values_mut() {
            request.handle.take_if(|handle| unwanted(*handle));
        }
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

/// What stands for a request in its message.
fn number((queue, head): (u16, u16), serial: u32) -> u64 {
    u64::from(serial) << 32 | u64::from(queue) << 16 | u64::from(head)
}

fn place(number: u64) -> (u16, u16) {
    ((number >> 16) as u16, number as u16)
}

fn serial(number: u64) -> u32 {
    (number >> 32) as u32
}
