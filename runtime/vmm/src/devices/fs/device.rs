//! The virtio device (virtio 1.2, 5.11).

use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recv};
use tracing::{debug, warn};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_FS;
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::directory::Directory;
use super::files::Files;
use super::handle::{FsHandle, Shared};
use super::protocol::{
    ATTRIBUTES_BYTES, BATCH_FORGET, CHANGES, DESTROY, FORGET, Front, GETATTR, HANDED_OVER, Handle,
    IN_HEADER_BYTES, INIT, INTERRUPT, OUT_HEADER_BYTES, READ, RELEASE, RELEASEDIR, SETATTR, WRITE,
    out_header, u32_at, u64_at,
};
use super::requests::{Request, Requests};
use crate::buffers::{ChainBuffers, GuestSlices, Room};
use crate::device::{
    Chain, Counter, DeviceError, DeviceEvent, QueueRef, VirtioDevice, read_config_space,
};

/// What the guest mounts.
pub const TAG: &str = "volumes";

/// Requests of high priority, which are those to forget, and all others. Linux sends as many pages at once as a queue
/// has descriptors, however they are given: half a mebibyte, which the caches of both CPUs still hold when it is copied.
pub(crate) const QUEUE_SIZES: &[u16] = &[32, 128];

/// `struct virtio_fs_config`: the tag, filled up with NUL, and the number of request queues.
const TAG_BYTES: usize = 36;

/// Nobody answers these, or the guest need not wait for it: where it does, the device answers.
const UNANSWERED: [u32; 6] = [
    FORGET,
    RELEASE,
    RELEASEDIR,
    INTERRUPT,
    DESTROY,
    BATCH_FORGET,
];

/// Longest request and answer, bytes: the most pages that podvisor-fs agrees to (`FUSE_MAX_PAGES`), and what goes with
/// them.
const MAX_MESSAGE: usize = (256 + 4) << 12;

/// Tokens in the device's epoll.
const CHANGED: u64 = 0;
const SOCKET: u64 = 1;

/// The virtio-fs device.
#[derive(Debug)]
pub struct FsDevice {
    shared: Arc<Shared>,
    /// What wakes the device: a new socket, an answer, room for a request.
    epoll: Epoll,
    socket: Option<OwnedFd>,
    /// The socket has no room: it is waited for, and the queues' requests with it.
    blocked: bool,
    requests: Requests,
    files: Files,
    directory: Directory,
    buffers: ChainBuffers,
    failed: Counter,
    direct: Counter,
}

impl FsDevice {
    /// A device without a socket, and the handle to give it one.
    ///
    /// # Errors
    /// The process has no file descriptors left.
    pub fn new() -> io::Result<(Self, FsHandle)> {
        let (handle, shared) = FsHandle::new()?;
        let epoll = Epoll::new()?;
        epoll.ctl(
            ControlOperation::Add,
            shared.changed.as_raw_fd(),
            EpollEvent::new(EventSet::IN, CHANGED),
        )?;
        let device = Self {
            shared,
            epoll,
            socket: None,
            blocked: false,
            requests: Requests::default(),
            files: Files::default(),
            directory: Directory::default(),
            buffers: ChainBuffers::default(),
            failed: Counter::default(),
            direct: Counter::default(),
        };
        Ok((device, handle))
    }

    /// Takes requests from a queue until there are none, or the socket has no room for the next.
    fn forward(
        &mut self,
        memory: &GuestMemoryMmap,
        queue: &mut QueueRef<'_>,
        index: u16,
    ) -> Result<bool, DeviceError> {
        let mut used = false;
        loop {
            queue.disable_notification(memory)?;
            loop {
                // An answer makes room.
                if self.blocked || self.requests.is_full() {
                    return Ok(used);
                }
                let Some(chain) = queue.pop(memory)? else {
                    break;
                };
                let head = chain.head_index();
                match self.send(memory, chain, index)? {
                    Sent::Waiting => {}
                    Sent::Done(written) => {
                        queue.add_used(memory, head, written)?;
                        used = true;
                    }
                    Sent::NoRoom => queue.unpop(),
                }
            }
            if !queue.enable_notification(memory)? {
                return Ok(used);
            }
        }
    }

    /// Answers the request in a chain if that can be done here: it is about the contents of a file, or a directory's
    /// attributes, that are known. `None`: it cannot.
    fn answer(&mut self, memory: &GuestMemoryMmap, chain: Chain<'_>) -> Option<u32> {
        if self.files.is_empty() && !self.directory.is_known() {
            return None;
        }
        let (mut request, answer) = self.buffers.collect(memory, chain).ok()?;
        if request.len() > MAX_MESSAGE || answer.len() > MAX_MESSAGE {
            return None;
        }
        let front = front(&mut request)?;
        let (transfer, unique) = (front.transfer(), front.unique());
        let written = match front.opcode() {
            READ => self.files.read(transfer, unique, answer),
            WRITE => self.files.write(transfer, unique, request, answer),
            GETATTR => self.directory.answer(front.node(), unique, answer),
            _ => None,
        }?;
        self.direct.fetch_add(1, Ordering::Relaxed);
        Some(written)
    }

    /// Sends the request in a chain.
    fn send(
        &mut self,
        memory: &GuestMemoryMmap,
        chain: Chain<'_>,
        queue: u16,
    ) -> Result<Sent, DeviceError> {
        if let Some(written) = self.answer(memory, chain.clone()) {
            return Ok(Sent::Done(written));
        }
        let head = chain.head_index();
        let room = Room::of(chain.clone());
        let (Ok(room), Ok((mut request, mut answer))) = (room, self.buffers.collect(memory, chain))
        else {
            return Ok(Sent::Done(0));
        };
        let length = request.len();
        let Some(mut front) = front(&mut request) else {
            return Ok(Sent::Done(0));
        };
        let opcode = front.opcode();
        let unique = front.unique();
        let answered = !UNANSWERED.contains(&opcode);
        if answered && answer.is_empty() {
            return Ok(Sent::Done(0));
        }
        let Some(socket) = &self.socket else {
            self.failed.fetch_add(1, Ordering::Relaxed);
            return Ok(Sent::Done(refuse(&mut answer, libc::ENOTCONN, unique)));
        };
        if length > MAX_MESSAGE || room.len() > MAX_MESSAGE {
            self.failed.fetch_add(1, Ordering::Relaxed);
            return Ok(Sent::Done(refuse(&mut answer, libc::E2BIG, unique)));
        }
        give_up(&mut self.files, &mut self.requests, &front);
        let mut number = 0;
        if answered {
            let handle = is_transfer(&front).then(|| front.handle());
            let directory = CHANGES.contains(&opcode).then(|| front.node());
            let is_alone = self.requests.is_empty();
            // A chain that is given a second time while the first answer is awaited.
            number = self
                .requests
                .add(queue, head, unique, (handle, directory), room)
                .ok_or(virtio_queue::Error::InvalidChain)?;
            self.directory.sent(opcode, is_alone.then_some(number));
        }
        // What the guest says of its length is not what counts.
        front.bytes[..4].copy_from_slice(&(length as u32).to_ne_bytes());
        front.bytes[8..16].copy_from_slice(&number.to_ne_bytes());
        let header = &front.bytes[..length.min(front.bytes.len())];
        let error = match request.send_message(socket.as_fd(), header) {
            Ok(()) if answered => return Ok(Sent::Waiting),
            // FUSE_DESTROY's caller wants to see a header.
            Ok(()) if answer.len() >= OUT_HEADER_BYTES => 0,
            Ok(()) => return Ok(Sent::Done(0)),
            Err(error) => {
                self.requests.remove(number);
                if error.kind() == io::ErrorKind::WouldBlock {
                    self.wait_for_room(true)?;
                    return Ok(Sent::NoRoom);
                }
                // The other end is closed, which the socket tells as well; or the host has no memory for it now.
                self.failed.fetch_add(1, Ordering::Relaxed);
                error.raw_os_error().unwrap_or(libc::EIO)
            }
        };
        Ok(Sent::Done(refuse(&mut answer, error, unique)))
    }

    /// Moves answers from the socket to their chains until there are none. Returns the queues that got some (bit i is
    /// queue i).
    fn receive(
        &mut self,
        memory: &GuestMemoryMmap,
        queues: &mut [QueueRef<'_>],
    ) -> Result<u32, DeviceError> {
        let mut used = 0;
        while let Some(socket) = &self.socket {
            // Where there is one request, it need not be asked whose answer comes.
            let received = match self.requests.only() {
                Some(number) => Ok(number),
                None => next_number(socket),
            }
            .and_then(|number| {
                let request = self.requests.get(number);
                let room =
                    request.and_then(|request| request.room.slices(&mut self.buffers, memory).ok());
                Ok((number, receive(socket, room, request)?))
            });
            match received {
                Ok((number, answer)) if answer.number == number => {
                    let request = self.requests.get(number);
                    if let Some(file) = answer.file {
                        if let Some(handle) = request.and_then(|request| request.handle) {
                            self.files.add(handle, file);
                        }
                        continue;
                    }
                    let directory = request.and_then(|request| request.directory);
                    if let (Some(node), Some(attributes)) = (directory, answer.attributes) {
                        self.directory.received(number, node, attributes);
                    }
                    let Some((queue, head)) = self.requests.remove(number) else {
                        debug!("an answer to nothing");
                        continue;
                    };
                    used |= give_back(memory, queues, queue, head, answer.written)?;
                    // The next one wakes us.
                    if self.requests.is_empty() {
                        break;
                    }
                }
                // What is in the room is the guest's to see: it is no answer until it is given back.
                Ok(_) => debug!("an answer to an earlier guest"),
                Err(Errno::EAGAIN) => break,
                Err(Errno::EINTR) => {}
                // The end, an error, or what is no message.
                Err(_) => {
                    warn!("what answered for the volumes is gone");
                    return Ok(used | self.disconnect(memory, queues)?);
                }
            }
        }
        Ok(used)
    }

    /// Answers what waits, and does without a socket.
    fn disconnect(
        &mut self,
        memory: &GuestMemoryMmap,
        queues: &mut [QueueRef<'_>],
    ) -> Result<u32, DeviceError> {
        // Closed, it leaves the epoll.
        self.socket = None;
        self.blocked = false;
        self.files.give_up(|_| true);
        self.directory.clear();
        let mut used = 0;
        for (queue, head, request) in self.requests.take_all() {
            self.failed.fetch_add(1, Ordering::Relaxed);
            let written = match request.room.slices(&mut self.buffers, memory) {
                Ok(mut room) => refuse(&mut room, libc::ENOTCONN, request.unique),
                Err(_) => 0,
            };
            used |= give_back(memory, queues, queue, head, written)?;
        }
        Ok(used)
    }

    /// Takes over a socket that has come.
    fn connect(
        &mut self,
        memory: &GuestMemoryMmap,
        queues: &mut [QueueRef<'_>],
    ) -> Result<u32, DeviceError> {
        let Some(socket) = self.shared.take() else {
            return Ok(0);
        };
        let used = self.disconnect(memory, queues)?;
        let event = EpollEvent::new(EventSet::IN, SOCKET);
        self.epoll
            .ctl(ControlOperation::Add, socket.as_raw_fd(), event)?;
        self.socket = Some(socket);
        Ok(used)
    }

    /// Waits for room in the socket too, or no more.
    fn wait_for_room(&mut self, wait: bool) -> io::Result<()> {
        let (Some(socket), true) = (&self.socket, self.blocked != wait) else {
            return Ok(());
        };
        let mut events = EventSet::IN;
        if wait {
            events |= EventSet::OUT;
        }
        self.epoll.ctl(
            ControlOperation::Modify,
            socket.as_raw_fd(),
            EpollEvent::new(events, SOCKET),
        )?;
        self.blocked = wait;
        Ok(())
    }
}

/// What became of a request.
enum Sent {
    /// It is on its way; the chain stays until the answer is there.
    Waiting,
    /// The chain goes back with so many bytes.
    Done(u32),
    /// The socket has no room.
    NoRoom,
}

impl VirtioDevice for FsDevice {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_FS
    }

    fn queue_sizes(&self) -> &'static [u16] {
        QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1
    }

    fn activate(&mut self, _features: u64) {}

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut config = [0; TAG_BYTES + 4];
        config[..TAG.len()].copy_from_slice(TAG.as_bytes());
        config[TAG_BYTES] = QUEUE_SIZES.len() as u8 - 1;
        read_config_space(&config, offset, data);
    }

    fn wake_fd(&self) -> Option<RawFd> {
        Some(self.epoll.as_raw_fd())
    }

    fn process(
        &mut self,
        memory: &GuestMemoryMmap,
        queues: &mut [QueueRef<'_>],
        event: DeviceEvent,
    ) -> Result<u32, DeviceError> {
        let mut used = 0;
        let mut work = [false; QUEUE_SIZES.len()];
        match event {
            DeviceEvent::Queue(index) => work[index] = true,
            DeviceEvent::Wake => {
                // What is awaited is most often what has come; if there is more, it wakes us again.
                if !self.requests.is_empty() {
                    used |= self.receive(memory, queues)?;
                }
                let mut events = [EpollEvent::default(); 2];
                let count = if used == 0 {
                    self.epoll.wait(0, &mut events)?
                } else {
                    0
                };
                for event in &events[..count] {
                    if event.data() == CHANGED {
                        used |= self.connect(memory, queues)?;
                    } else {
                        if event.event_set().contains(EventSet::OUT) {
                            self.wait_for_room(false)?;
                        }
                        used |= self.receive(memory, queues)?;
                    }
                }
                // Requests may have stayed in their queues for want of room.
                work = [true; QUEUE_SIZES.len()];
            }
        }
        for (index, queue) in queues.iter_mut().enumerate() {
            if work[index] && queue.ready() {
                used |= u32::from(self.forward(memory, queue, index as u16)?) << index;
            }
        }
        Ok(used)
    }

    /// The socket stays. Whoever answers hears of a new guest by its first request.
    fn reset(&mut self) {
        self.requests.clear();
        self.files.give_up(|_| true);
        self.directory.clear();
    }

    fn counters(&self) -> Vec<(&'static str, Counter)> {
        vec![
            ("failed_requests", self.failed.clone()),
            ("direct_answers", self.direct.clone()),
        ]
    }
}

/// The front of a request, which is consumed. `None`: it has not even a header.
fn front(request: &mut GuestSlices<'_>) -> Option<Front> {
    let mut front = Front::default();
    let length = request.len().min(front.bytes.len());
    (length >= IN_HEADER_BYTES && request.read(&mut front.bytes[..length])).then_some(front)
}

/// Whether a request is about the contents of a file that may be handed over.
fn is_transfer(front: &Front) -> bool {
    match front.opcode() {
        READ => true,
        WRITE => !front.transfer().appends,
        _ => false,
    }
}

/// Leaves files to podvisor-fs alone that a request closes, or of which it says that they are to be written to otherwise.
fn give_up(files: &mut Files, requests: &mut Requests, front: &Front) {
    let (node, handle) = (front.node(), front.handle());
    let unwanted: &dyn Fn(Handle) -> bool = match front.opcode() {
        RELEASE => &|file| file == handle,
        WRITE if front.transfer().appends => &|file| file == handle,
        SETATTR if front.sets_mode() => &|file| file.node == node,
        INIT | DESTROY => &|_| true,
        _ => return,
    };
    files.give_up(unwanted);
    requests.give_up(unwanted);
}

/// A message that has been received.
#[derive(Default)]
struct Answer {
    /// The number that it says it is for.
    number: u64,
    /// Bytes that are in the room for it.
    written: u32,
    /// What the request has changed is this now.
    attributes: Option<[u8; ATTRIBUTES_BYTES]>,
    /// It is no answer yet: the request's open file is handed over.
    file: Option<OwnedFd>,
}

/// The number of the socket's next message.
fn next_number(socket: &OwnedFd) -> nix::Result<u64> {
    let mut header = [0; OUT_HEADER_BYTES];
    match receive_bytes(socket, &mut header, MsgFlags::MSG_PEEK)? {
        OUT_HEADER_BYTES => Ok(u64_at(&header, 8)),
        _ => Err(Errno::EPIPE),
    }
}

/// Receives the next message of the socket into a request's room, if there is one, and otherwise drops it. The guest finds
/// its own number in it.
fn receive(
    socket: &OwnedFd,
    room: Option<GuestSlices<'_>>,
    request: Option<&Request>,
) -> nix::Result<Answer> {
    let mut bytes = [0; OUT_HEADER_BYTES + ATTRIBUTES_BYTES];
    let room = room.and_then(|mut room| Some((room.take_front(OUT_HEADER_BYTES)?, room)));
    let (Some((front, mut room)), Some(request)) = (room, request) else {
        // What is not received of a message is dropped.
        return match receive_bytes(socket, &mut bytes[..OUT_HEADER_BYTES], MsgFlags::empty())? {
            0 => Err(Errno::EPIPE),
            _ => Ok(Answer {
                number: u64_at(&bytes, 8),
                ..Answer::default()
            }),
        };
    };
    // What is not the guest's.
    let more = request.directory.map_or(0, |_| ATTRIBUTES_BYTES);
    let received = room.receive_message(socket.as_fd(), &mut bytes[..OUT_HEADER_BYTES + more]);
    let (header, attributes) = bytes.split_at_mut(OUT_HEADER_BYTES);
    let answer = Answer {
        number: u64_at(header, 8),
        ..Answer::default()
    };
    let length = match received {
        Ok((_, file @ Some(_))) if u32_at(header, 4) as i32 == HANDED_OVER => {
            return Ok(Answer { file, ..answer });
        }
        // An error has no more.
        Ok((OUT_HEADER_BYTES, _)) => Some(OUT_HEADER_BYTES),
        Ok((length @ OUT_HEADER_BYTES.., _)) => length.checked_sub(more),
        // Longer than the room: the rest is lost.
        Err(error) if error.raw_os_error() == Some(libc::EMSGSIZE) => None,
        Err(error) => return Err(Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO))),
        Ok(_) => return Err(Errno::EPIPE),
    };
    let unique = request.unique;
    let Some(length) = length.filter(|length| *length == u32_at(header, 0) as usize) else {
        debug!("an answer that cannot be");
        front.write(&out_header(OUT_HEADER_BYTES, libc::EIO, unique));
        return Ok(Answer {
            written: OUT_HEADER_BYTES as u32,
            ..answer
        });
    };
    header[8..].copy_from_slice(&unique.to_ne_bytes());
    front.write(header);
    let is_error = header[4..8] != [0; 4];
    Ok(Answer {
        written: length as u32,
        attributes: (more > 0 && !is_error)
            .then(|| attributes.try_into().ok())
            .flatten(),
        ..answer
    })
}

/// Answers a request with an error. Returns the bytes written.
fn refuse(answer: &mut GuestSlices<'_>, error: i32, unique: u64) -> u32 {
    if answer.write(&out_header(OUT_HEADER_BYTES, error, unique)) {
        OUT_HEADER_BYTES as u32
    } else {
        0
    }
}

/// Gives a chain back to its queue; there may be none of that name since a reset. Returns the queue's bit.
fn give_back(
    memory: &GuestMemoryMmap,
    queues: &mut [QueueRef<'_>],
    queue: u16,
    head: u16,
    written: u32,
) -> Result<u32, DeviceError> {
    let Some(place) = queues.get_mut(usize::from(queue)).filter(|q| q.ready()) else {
        return Ok(0);
    };
    place.add_used(memory, head, written)?;
    Ok(1 << queue)
}

fn receive_bytes(socket: &OwnedFd, buffer: &mut [u8], flags: MsgFlags) -> nix::Result<usize> {
    recv(socket.as_raw_fd(), buffer, flags | MsgFlags::MSG_DONTWAIT)
}

#[cfg(test)]
mod tests;
