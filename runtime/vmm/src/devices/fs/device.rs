//! The virtio device (virtio 1.2, 5.11), and as much of FUSE as it takes to move its messages (linux/fuse.h).

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

use super::handle::{FsHandle, Shared};
use super::requests::Requests;
use crate::buffers::{ChainBuffers, GuestSlices, Room};
use crate::device::{
    Chain, Counter, DeviceError, DeviceEvent, QueueRef, VirtioDevice, read_config_space,
};

/// What the guest mounts.
pub const TAG: &str = "volumes";

/// Requests of high priority, which are those to forget, and all others. Linux sends as many pages at once as a queue
/// has descriptors, however they are given.
pub(crate) const QUEUE_SIZES: &[u16] = &[32, 512];

/// `struct virtio_fs_config`: the tag, filled up with NUL, and the number of request queues.
const TAG_BYTES: usize = 36;

/// `struct fuse_in_header`, of which `len`, `opcode` and `unique` matter here.
const IN_HEADER_BYTES: usize = 40;
/// `struct fuse_out_header`: `len`, `error`, `unique`.
const OUT_HEADER_BYTES: usize = 16;
/// `enum fuse_opcode`: FORGET, INTERRUPT, DESTROY, BATCH_FORGET. Nobody answers these; for DESTROY the device does.
const UNANSWERED: [u32; 4] = [2, 36, 38, 42];

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
    buffers: ChainBuffers,
    failed: Counter,
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
            buffers: ChainBuffers::default(),
            failed: Counter::default(),
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

    /// Sends the request in a chain.
    fn send(
        &mut self,
        memory: &GuestMemoryMmap,
        chain: Chain<'_>,
        queue: u16,
    ) -> Result<Sent, DeviceError> {
        let head = chain.head_index();
        let room = Room::of(chain.clone());
        let (Ok(room), Ok((mut request, mut answer))) = (room, self.buffers.collect(memory, chain))
        else {
            return Ok(Sent::Done(0));
        };
        let length = request.len();
        let mut header = [0; IN_HEADER_BYTES];
        if !request.read(&mut header) {
            return Ok(Sent::Done(0));
        }
        let opcode = u32_at(&header, 4);
        let unique = u64_at(&header, 8);
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
        let mut number = 0;
        if answered {
            // A chain that is given a second time while the first answer is awaited.
            number = self
                .requests
                .add(queue, head, unique, room)
                .ok_or(virtio_queue::Error::InvalidChain)?;
        }
        // What the guest says of its length is not what counts.
        header[..4].copy_from_slice(&(length as u32).to_ne_bytes());
        header[8..16].copy_from_slice(&number.to_ne_bytes());
        let error = match request.send_message(socket.as_fd(), &header) {
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
                Ok((number, receive(socket, room, request.map(|r| r.unique))?))
            });
            match received {
                Ok((number, answer)) if answer.number == number => {
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
    }

    fn counters(&self) -> Vec<(&'static str, Counter)> {
        vec![("failed_requests", self.failed.clone())]
    }
}

/// An answer that has been received.
struct Answer {
    /// The number that it says it is for.
    number: u64,
    /// Bytes that are in the room for it.
    written: u32,
}

/// The number of the socket's next message.
fn next_number(socket: &OwnedFd) -> nix::Result<u64> {
    let mut header = [0; OUT_HEADER_BYTES];
    match receive_bytes(socket, &mut header, MsgFlags::MSG_PEEK)? {
        OUT_HEADER_BYTES => Ok(u64_at(&header, 8)),
        _ => Err(Errno::EPIPE),
    }
}

/// Receives the next message of the socket into a room, if there is one, and otherwise drops it. The guest finds
/// `unique` as its number.
fn receive(
    socket: &OwnedFd,
    room: Option<GuestSlices<'_>>,
    unique: Option<u64>,
) -> nix::Result<Answer> {
    let mut header = [0; OUT_HEADER_BYTES];
    let room = room.and_then(|mut room| Some((room.take_front(OUT_HEADER_BYTES)?, room)));
    let Some((front, mut room)) = room else {
        // What is not received of a message is dropped.
        return match receive_bytes(socket, &mut header, MsgFlags::empty())? {
            0 => Err(Errno::EPIPE),
            _ => Ok(Answer {
                number: u64_at(&header, 8),
                written: 0,
            }),
        };
    };
    let length = match room.receive_message(socket.as_fd(), &mut header) {
        Ok(length @ OUT_HEADER_BYTES..) => Some(length),
        // Longer than the room: the rest is lost.
        Err(error) if error.raw_os_error() == Some(libc::EMSGSIZE) => None,
        Err(error) => return Err(Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO))),
        Ok(_) => return Err(Errno::EPIPE),
    };
    let number = u64_at(&header, 8);
    let length = length.filter(|length| *length == u32_at(&header, 0) as usize);
    let unique = unique.unwrap_or_default();
    let written = if let Some(length) = length {
        header[8..].copy_from_slice(&unique.to_ne_bytes());
        front.write(&header);
        length
    } else {
        debug!("an answer that cannot be");
        front.write(&out_header(libc::EIO, unique));
        OUT_HEADER_BYTES
    };
    Ok(Answer {
        number,
        written: written as u32,
    })
}

/// Answers a request with an error. Returns the bytes written.
fn refuse(answer: &mut GuestSlices<'_>, error: i32, unique: u64) -> u32 {
    if answer.write(&out_header(error, unique)) {
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

/// `struct fuse_out_header` of a message that is nothing else.
fn out_header(error: i32, unique: u64) -> [u8; OUT_HEADER_BYTES] {
    let mut header = [0; OUT_HEADER_BYTES];
    header[..4].copy_from_slice(&(OUT_HEADER_BYTES as u32).to_ne_bytes());
    header[4..8].copy_from_slice(&(-error).to_ne_bytes());
    header[8..].copy_from_slice(&unique.to_ne_bytes());
    header
}

fn receive_bytes(socket: &OwnedFd, buffer: &mut [u8], flags: MsgFlags) -> nix::Result<usize> {
    recv(socket.as_raw_fd(), buffer, flags | MsgFlags::MSG_DONTWAIT)
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let mut word = [0; 4];
    word.copy_from_slice(&bytes[at..at + 4]);
    u32::from_ne_bytes(word)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[at..at + 8]);
    u64::from_ne_bytes(word)
}

#[cfg(test)]
mod tests;
