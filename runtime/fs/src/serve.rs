//! Requests from the socket, answers to it.

use std::fs::File;
use std::io::{self, IoSlice};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use fuse_backend_rs::abi::fuse_abi::{AttrOut, Opcode};
use fuse_backend_rs::api::filesystem::{Context, FileSystem as _};
use fuse_backend_rs::api::server::Server;
use fuse_backend_rs::transport::{FuseBuf, FuseDevWriter, Reader, Writer};
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::socket::{ControlMessage, MsgFlags, recv, send, sendmsg};

use crate::passthrough::Passthrough;

/// Requests that are worked on at a time: one that waits for a disk does not keep the others.
const THREADS: usize = 4;

/// More than they need; what is not used is not there.
const STACK_BYTES: usize = 128 << 10;

/// Longest request and answer: what the device passes on.
const MAX_MESSAGE: usize = (256 + 4) << 12;

/// Room for a request and, behind it, its answer: never are both long.
const BUFFER_BYTES: usize = MAX_MESSAGE + (4 << 10);

/// What a thread keeps of its buffer when there is nothing to do, and how long it keeps more.
const KEPT_BYTES: usize = 16 << 10;
const IDLE: Duration = Duration::from_secs(1);

/// `struct fuse_in_header` and `struct fuse_out_header` (linux/fuse.h).
const IN_HEADER_BYTES: usize = 40;
const OUT_HEADER_BYTES: usize = 16;

const READ: u32 = Opcode::Read as u32;
const WRITE: u32 = Opcode::Write as u32;
const RELEASE: u32 = Opcode::Release as u32;
const RELEASEDIR: u32 = Opcode::Releasedir as u32;

/// These change the directory that they name. The device has the same list (runtime/vmm/src/devices/fs/protocol.rs).
const CHANGES: [u32; 7] = [
    Opcode::Symlink as u32,
    Opcode::Mknod as u32,
    Opcode::Mkdir as u32,
    Opcode::Unlink as u32,
    Opcode::Rmdir as u32,
    Opcode::Link as u32,
    Opcode::Create as u32,
];

/// As the error of a message, which in an answer is never positive: the file beside it is the one that the request
/// `unique` reads or writes (runtime/vmm/src/devices/fs/protocol.rs).
const HANDED_OVER: i32 = 1;

/// Serves until the other end of the socket is closed.
///
/// # Errors
/// No thread could be started, or one cannot serve.
pub fn serve(files: Passthrough, socket: OwnedFd) -> io::Result<()> {
    files.enter_thread()?;
    let requests = Arc::new(Requests::new(socket)?);
    let files = Arc::new(files);
    for _ in 1..THREADS {
        let (files, requests) = (Arc::clone(&files), Arc::clone(&requests));
        thread::Builder::new()
            .stack_size(STACK_BYTES)
            .spawn(move || {
                if files.enter_thread().is_ok() {
                    answer_all(&files, &requests);
                }
            })?;
    }
    answer_all(&files, &requests);
    Ok(())
}

/// Where requests come from.
struct Requests {
    socket: OwnedFd,
    /// Of the threads that wait for it, the kernel wakes the one that has worked last, where the socket itself would
    /// wake each in its turn: a thread that does all the work has its memory in the caches, and the others have none.
    ready: Epoll,
}

/// Wakes one thread, and no other until it says that it has taken the request.
const READY: EpollFlags = EpollFlags::EPOLLIN.union(EpollFlags::EPOLLONESHOT);

impl Requests {
    fn new(socket: OwnedFd) -> io::Result<Self> {
        let ready = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        ready.add(&socket, EpollEvent::new(READY, 0))?;
        Ok(Self { socket, ready })
    }

    /// Waits for the next one. Returns its length, 0 when there will be none, and `None` when there has been none for
    /// as long as `patience`.
    fn next(&self, buffer: &mut [u8], patience: EpollTimeout) -> nix::Result<Option<usize>> {
        loop {
            match self.ready.wait(&mut [EpollEvent::empty()], patience) {
                Ok(0) => return Ok(None),
                Ok(_) => {}
                Err(Errno::EINTR) => continue,
                Err(error) => return Err(error),
            }
            let received = recv(self.socket.as_raw_fd(), buffer, MsgFlags::MSG_DONTWAIT);
            // The next one is another thread's.
            self.ready
                .modify(&self.socket, &mut EpollEvent::new(READY, 0))?;
            match received {
                Err(Errno::EAGAIN | Errno::EINTR) => {}
                result => return result.map(Some),
            }
        }
    }
}

/// Answers requests until the other end is closed, which ends the process.
fn answer_all(files: &Arc<Passthrough>, requests: &Requests) {
    let server = Server::new(Arc::clone(files));
    let socket = requests.socket.as_raw_fd();
    let mut buffer = vec![0; BUFFER_BYTES];
    let mut patience = EpollTimeout::NONE;
    loop {
        let length = match requests.next(&mut buffer[..MAX_MESSAGE], patience) {
            Ok(Some(0)) => std::process::exit(0),
            Ok(Some(length)) => length,
            Ok(None) => {
                give_back(&mut buffer[KEPT_BYTES..]);
                patience = EpollTimeout::NONE;
                continue;
            }
            Err(error) => {
                eprintln!("receiving a request: {error}");
                std::process::exit(1);
            }
        };
        if length < IN_HEADER_BYTES {
            continue;
        }
        let (request, answer) = buffer.split_at_mut(length);
        let mut unique = [0; 8];
        unique.copy_from_slice(&request[8..16]);
        let handle = u64_at(request, IN_HEADER_BYTES);
        match u32_at(request, 4) {
            // The device has answered it, so that the guest need not wait.
            RELEASE | RELEASEDIR => {
                files.close(handle);
                continue;
            }
            READ | WRITE => {
                if let Some(open) = files.to_hand_over(u64_at(request, 16), handle) {
                    hand_over(&requests.socket, unique, &open.file);
                }
            }
            _ => {}
        }
        let changes = CHANGES.contains(&u32_at(request, 4));
        let directory = u64_at(request, 16);
        let reader = Reader::<()>::from_fuse_buffer(FuseBuf::new(request));
        let writer = FuseDevWriter::<()>::new(socket, &mut *answer).and_then(|mut writer| {
            // What has been split off is not sent, unless it is an error.
            if changes {
                writer.split_at(0)
            } else {
                Ok(writer)
            }
        });
        let (Ok(reader), Ok(writer)) = (reader, writer) else {
            // Neither has a reason to.
            continue;
        };
        match server.handle_message(reader, Writer::FuseDev(writer), None, None) {
            Ok(answered) if changes => {
                let is_sent = answered < OUT_HEADER_BYTES || u32_at(answer, 4) != 0;
                if !is_sent {
                    answer_change(files, &requests.socket, directory, &answer[..answered]);
                }
            }
            Ok(answered) if length + answered <= KEPT_BYTES => {}
            Ok(_) => patience = EpollTimeout::try_from(IDLE).unwrap_or(EpollTimeout::NONE),
            Err(_) => refuse(&requests.socket, unique),
        }
    }
}

/// Answers a request that has changed a directory. Between the answer's header and its rest are the directory's attributes,
/// for which the guest asks next.
fn answer_change(files: &Passthrough, socket: &OwnedFd, directory: u64, answer: &[u8]) {
    let attributes = match files.getattr(&Context::default(), directory, None) {
        Ok((attributes, valid)) => AttrOut {
            attr_valid: valid.as_secs(),
            attr_valid_nsec: valid.subsec_nanos(),
            dummy: 0,
            attr: attributes.into(),
        },
        // It is gone meanwhile. These are valid for no time.
        Err(_) => AttrOut::default(),
    };
    // SAFETY: it is all numbers, without padding.
    let attributes =
        unsafe { std::slice::from_raw_parts((&raw const attributes).cast(), size_of::<AttrOut>()) };
    let (header, rest) = answer.split_at(OUT_HEADER_BYTES);
    let parts = [header, attributes, rest].map(IoSlice::new);
    let flags = MsgFlags::MSG_NOSIGNAL;
    // When the other end is closed, the next receive says so.
    let _ = sendmsg::<()>(socket.as_raw_fd(), &parts, &[], flags, None);
}

/// Gives the device the file that a request names, before its answer. When that fails, the device goes on without.
fn hand_over(socket: &OwnedFd, unique: [u8; 8], file: &File) {
    let header = out_header(HANDED_OVER, unique);
    let _ = sendmsg::<()>(
        socket.as_raw_fd(),
        &[IoSlice::new(&header)],
        &[ControlMessage::ScmRights(&[file.as_raw_fd()])],
        MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT,
        None,
    );
}

/// Gives the whole pages of a buffer back to the kernel: they are zeroes when they are used again.
fn give_back(buffer: &mut [u8]) {
    const PAGE_BYTES: usize = 4 << 10;
    let start = buffer.as_ptr().align_offset(PAGE_BYTES).min(buffer.len());
    let pages = &mut buffer[start..];
    let length = pages.len() / PAGE_BYTES * PAGE_BYTES;
    // SAFETY: whole pages of `buffer`, which is borrowed mutably, and whose bytes may be any.
    // A failure keeps them, which is no harm.
    let _ = unsafe { libc::madvise(pages.as_mut_ptr().cast(), length, libc::MADV_DONTNEED) };
}

/// Answers a request that could not be understood. If it was answered before, the device drops this.
fn refuse(socket: &OwnedFd, unique: [u8; 8]) {
    let header = out_header(-libc::EIO, unique);
    // When the other end is closed, the next receive says so.
    let _ = send(socket.as_raw_fd(), &header, MsgFlags::MSG_NOSIGNAL);
}

/// A message that is nothing but its header.
fn out_header(error: i32, unique: [u8; 8]) -> [u8; OUT_HEADER_BYTES] {
    let mut header = [0; OUT_HEADER_BYTES];
    header[..4].copy_from_slice(&(OUT_HEADER_BYTES as u32).to_ne_bytes());
    header[4..8].copy_from_slice(&error.to_ne_bytes());
    header[8..].copy_from_slice(&unique);
    header
}

/// A number at an offset of a message; 0 where it ends before.
fn u32_at(message: &[u8], at: usize) -> u32 {
    let bytes = message.get(at..at + 4).and_then(|b| b.try_into().ok());
    bytes.map_or(0, u32::from_ne_bytes)
}

fn u64_at(message: &[u8], at: usize) -> u64 {
    let bytes = message.get(at..at + 8).and_then(|b| b.try_into().ok());
    bytes.map_or(0, u64::from_ne_bytes)
}
