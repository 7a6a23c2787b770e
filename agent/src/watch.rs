//! News from control groups, by inotify(7) on their event files: a process was killed for want of
//! memory, an exec's group became empty.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, WatchDescriptor};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::cgroup::Cgroup;
use crate::events::Events;
use crate::fd::register;
use crate::kmsg;

/// Watches control groups. Cheap to clone.
#[derive(Clone)]
pub struct Watch(Arc<Shared>);

struct Shared {
    inotify: Inotify,
    /// The same, to wait for.
    readable: AsyncFd<OwnedFd>,
    subjects: Mutex<HashMap<WatchDescriptor, Subject>>,
    events: Events,
}

#[derive(Clone)]
enum Subject {
    Memory(Arc<MemoryWatch>),
    /// An exec's group, to be removed when it is empty.
    Leftover(Cgroup),
}

/// Reports each kill for want of memory in one container, once.
pub struct MemoryWatch {
    /// None when there is nothing to watch.
    descriptor: Option<WatchDescriptor>,
    container_id: String,
    cgroup: Cgroup,
    reported: Mutex<u64>,
    events: Events,
}

impl MemoryWatch {
    /// Pushes an event when there were kills since the last look. Called for each notification, and
    /// before a container's exit is reported, so that the cause comes before the effect.
    pub fn look(&self) {
        let mut reported = self.reported.lock().unwrap_or_else(PoisonError::into_inner);
        let kills = self.cgroup.out_of_memory_kills();
        if kills > *reported {
            *reported = kills;
            self.events.out_of_memory(&self.container_id);
        }
    }
}

impl Watch {
    /// Starts watching, on the current runtime.
    pub fn start(events: Events) -> io::Result<Self> {
        let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?;
        let watch = Self(Arc::new(Shared {
            readable: register(inotify.as_fd().try_clone_to_owned()?, Interest::READABLE)?,
            inotify,
            subjects: Mutex::default(),
            events,
        }));
        tokio::spawn(watch.clone().run());
        Ok(watch)
    }

    /// Watches a container's memory until [`Self::forget`].
    pub fn memory(&self, container_id: &str, cgroup: &Cgroup) -> Arc<MemoryWatch> {
        let descriptor = self.add(cgroup, "memory.events");
        let memory = Arc::new(MemoryWatch {
            descriptor,
            container_id: container_id.to_owned(),
            cgroup: cgroup.clone(),
            reported: Mutex::new(0),
            events: self.0.events.clone(),
        });
        if let Some(descriptor) = descriptor {
            let subject = Subject::Memory(Arc::clone(&memory));
            self.subjects().insert(descriptor, subject);
        }
        memory
    }

    /// Ends all watches of a container. The kernel keeps them otherwise, group or not.
    pub fn forget(&self, memory: &MemoryWatch) {
        let leftovers: Vec<WatchDescriptor> = self
            .subjects()
            .iter()
            .filter(|(_, subject)| match subject {
                Subject::Leftover(cgroup) => memory.cgroup.is_above(cgroup),
                Subject::Memory(_) => false,
            })
            .map(|(descriptor, _)| *descriptor)
            .collect();
        for descriptor in leftovers.into_iter().chain(memory.descriptor) {
            self.end(descriptor);
        }
    }

    /// Removes an exec's group as soon as it is empty.
    pub fn remove_when_empty(&self, cgroup: Cgroup) {
        if cgroup.remove().is_ok() {
            return;
        }
        let Some(descriptor) = self.add(&cgroup, "cgroup.events") else {
            return;
        };
        // It may have become empty before the watch was there.
        if !cgroup.is_populated() && cgroup.remove().is_ok() {
            let _ = self.0.inotify.rm_watch(descriptor);
        } else {
            self.subjects()
                .insert(descriptor, Subject::Leftover(cgroup));
        }
    }

    fn add(&self, cgroup: &Cgroup, file: &str) -> Option<WatchDescriptor> {
        let path = cgroup.file(file);
        match self.0.inotify.add_watch(&path, AddWatchFlags::IN_MODIFY) {
            Ok(descriptor) => Some(descriptor),
            // The group is gone, or its kernel has no memory controller (in development).
            Err(Errno::ENOENT) => None,
            Err(error) => {
                kmsg::error!("cannot watch {}: {error}", path.display());
                None
            }
        }
    }

    fn end(&self, descriptor: WatchDescriptor) {
        self.subjects().remove(&descriptor);
        // It may have ended by itself, with its file.
        let _ = self.0.inotify.rm_watch(descriptor);
    }

    async fn run(self) {
        loop {
            let read = self
                .0
                .readable
                .async_io(Interest::READABLE, |_| Ok(self.0.inotify.read_events()?))
                .await;
            let events = match read {
                Ok(events) => events,
                Err(error) => {
                    kmsg::error!("cannot read news of control groups: {error}");
                    return;
                }
            };
            for event in events {
                self.look(event.wd);
            }
        }
    }

    fn look(&self, descriptor: WatchDescriptor) {
        let subject = self.subjects().get(&descriptor).cloned();
        match subject {
            Some(Subject::Memory(memory)) => memory.look(),
            Some(Subject::Leftover(cgroup))
                if !cgroup.is_populated() && cgroup.remove().is_ok() =>
            {
                self.end(descriptor);
            }
            Some(Subject::Leftover(_)) | None => {}
        }
    }

    fn subjects(&self) -> MutexGuard<'_, HashMap<WatchDescriptor, Subject>> {
        self.0
            .subjects
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}
