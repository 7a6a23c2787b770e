//! Exits and other news for the host, numbered from 1, kept until they are acknowledged.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use futures_util::Stream;
use podvisor_proto::agent::{Event, Exit, OutOfMemory, event::Kind};
use tokio::sync::watch;

use crate::reaper;

/// Events kept. Within one connection nobody acknowledges (the stream delivers them), so the oldest go
/// when this is reached; a host that was away missed at most what ran when it left, which is less.
const LIMIT: usize = 4096;

/// The numbered log. Cheap to clone.
#[derive(Clone)]
pub struct Events(Arc<Shared>);

struct Shared {
    log: Mutex<Log>,
    last: watch::Sender<u64>,
}

#[derive(Default)]
struct Log {
    events: VecDeque<Event>,
    last: u64,
}

impl Default for Events {
    fn default() -> Self {
        Self(Arc::new(Shared {
            log: Mutex::default(),
            last: watch::Sender::new(0),
        }))
    }
}

impl Events {
    /// A process ended. `exec_id` is empty for a container's first process.
    pub fn exited(&self, container_id: &str, exec_id: &str, exit: reaper::Exit) {
        self.push(Kind::Exit(Exit {
            container_id: container_id.to_owned(),
            exec_id: exec_id.to_owned(),
            code: exit.code,
            time_ns: nanoseconds(exit.time),
        }));
    }

    /// The kernel killed a process of the container for want of memory.
    pub fn out_of_memory(&self, container_id: &str) {
        self.push(Kind::OutOfMemory(OutOfMemory {
            container_id: container_id.to_owned(),
        }));
    }

    /// All events after number `after`, past and future. Forgets those up to it.
    pub fn subscribe(&self, after: u64) -> impl Stream<Item = Event> + Send + use<> {
        let mut log = self.lock();
        while log
            .events
            .front()
            .is_some_and(|event| event.sequence <= after)
        {
            log.events.pop_front();
        }
        drop(log);
        let position = (self.clone(), self.0.last.subscribe(), after);
        futures_util::stream::unfold(position, |(events, mut last, after)| async move {
            loop {
                // Marks the number as seen before looking, so that none is slept through.
                last.borrow_and_update();
                if let Some(event) = events.next_after(after) {
                    let after = event.sequence;
                    return Some((event, (events, last, after)));
                }
                last.changed().await.ok()?;
            }
        })
    }

    fn push(&self, kind: Kind) {
        let mut log = self.lock();
        log.last += 1;
        let sequence = log.last;
        if log.events.len() == LIMIT {
            log.events.pop_front();
        }
        log.events.push_back(Event {
            sequence,
            kind: Some(kind),
        });
        drop(log);
        self.0.last.send_replace(sequence);
    }

    fn next_after(&self, after: u64) -> Option<Event> {
        let log = self.lock();
        let index = log.events.partition_point(|event| event.sequence <= after);
        log.events.get(index).cloned()
    }

    fn lock(&self) -> MutexGuard<'_, Log> {
        self.0.log.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn nanoseconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_nanos() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::{FutureExt, StreamExt};

    fn exit(events: &Events, id: &str) {
        let exit = reaper::Exit {
            code: 1,
            time: UNIX_EPOCH,
        };
        events.exited(id, "", exit);
    }

    #[test]
    fn a_subscriber_sees_past_and_future_in_order() {
        let events = Events::default();
        exit(&events, "a");
        let mut stream = Box::pin(events.subscribe(0));
        let next = |stream: &mut std::pin::Pin<Box<_>>| {
            StreamExt::next(stream)
                .now_or_never()
                .map(|event: Option<Event>| event.unwrap().sequence)
        };
        assert_eq!(next(&mut stream), Some(1));
        assert_eq!(next(&mut stream), None);
        exit(&events, "b");
        exit(&events, "c");
        assert_eq!(next(&mut stream), Some(2));
        assert_eq!(next(&mut stream), Some(3));
        assert_eq!(next(&mut stream), None);
    }

    #[test]
    fn acknowledged_events_are_forgotten_and_others_come_again() {
        let events = Events::default();
        for id in ["a", "b", "c"] {
            exit(&events, id);
        }
        let mut stream = Box::pin(events.subscribe(2));
        assert_eq!(stream.next().now_or_never().unwrap().unwrap().sequence, 3);
        assert_eq!(events.lock().events.len(), 1);
        let mut again = Box::pin(events.subscribe(0));
        assert_eq!(again.next().now_or_never().unwrap().unwrap().sequence, 3);
    }

    #[test]
    fn the_log_is_bounded() {
        let events = Events::default();
        for _ in 0..LIMIT + 5 {
            exit(&events, "a");
        }
        assert_eq!(events.lock().events.len(), LIMIT);
        let mut stream = Box::pin(events.subscribe(0));
        assert_eq!(stream.next().now_or_never().unwrap().unwrap().sequence, 6);
    }
}
