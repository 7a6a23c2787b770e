//! Requests from the socket, answers to it.

use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::sync::Arc;
use std::thread;

use fuse_backend_rs::api::server::Server;
use fuse_backend_rs::transport::{FuseBuf, FuseDevWriter, Reader, Writer};
use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recv, send};

use crate::passthrough::Passthrough;

/// Requests that are worked on at a time: one that waits for a disk does not keep the others.
const THREADS: usize = 4;

/// More than they need; what is not used is not there.
const STACK_BYTES: usize = 128 << 10;

/// Longest request and answer: what the device passes on.
const MAX_MESSAGE: usize = (32 + 4) << 12;

/// `struct fuse_in_header` and `struct fuse_out_header` (linux/fuse.h).
const IN_HEADER_BYTES: usize = 40;
const OUT_HEADER_BYTES: usize = 16;

/// Serves until the other end of the socket is closed.
///
/// # Errors
/// No thread could be started, or one cannot serve.
pub fn serve(files: Passthrough, socket: OwnedFd) -> io::Result<()> {
    files.enter_thread()?;
    let server = Arc::new(files);
    let socket = Arc::new(socket);
    for _ in 1..THREADS {
        let (files, socket) = (Arc::clone(&server), Arc::clone(&socket));
        thread::Builder::new()
            .stack_size(STACK_BYTES)
            .spawn(move || {
                if files.enter_thread().is_ok() {
                    answer_all(&Server::new(files), &socket);
                }
            })?;
    }
    answer_all(&Server::new(server), &socket);
    Ok(())
}

/// Answers requests until the other end is closed, which ends the process.
fn answer_all(server: &Server<Arc<Passthrough>>, socket: &OwnedFd) {
    let mut request = vec![0; MAX_MESSAGE];
    let mut answer = vec![0; MAX_MESSAGE];
    loop {
        let length = match recv(socket.as_raw_fd(), &mut request, MsgFlags::empty()) {
            Ok(0) => std::process::exit(0),
            Ok(length) => length,
            Err(Errno::EINTR) => continue,
            Err(error) => {
                eprintln!("receiving a request: {error}");
                std::process::exit(1);
            }
        };
        if length < IN_HEADER_BYTES {
            continue;
        }
        let mut unique = [0; 8];
        unique.copy_from_slice(&request[8..16]);
        let reader = Reader::<()>::from_fuse_buffer(FuseBuf::new(&mut request[..length]));
        let writer = FuseDevWriter::<()>::new(socket.as_raw_fd(), &mut answer);
        let (Ok(reader), Ok(writer)) = (reader, writer) else {
            // Neither has a reason to.
            continue;
        };
        let answered = server.handle_message(reader, Writer::FuseDev(writer), None, None);
        if answered.is_err() {
            refuse(socket, unique);
        }
    }
}

/// Answers a request that could not be understood. If it was answered before, the device drops this.
fn refuse(socket: &OwnedFd, unique: [u8; 8]) {
    let mut header = [0; OUT_HEADER_BYTES];
    header[..4].copy_from_slice(&(OUT_HEADER_BYTES as u32).to_ne_bytes());
    header[4..8].copy_from_slice(&(-libc::EIO).to_ne_bytes());
    header[8..].copy_from_slice(&unique);
    // When the other end is closed, the next receive says so.
    let _ = send(socket.as_raw_fd(), &header, MsgFlags::MSG_NOSIGNAL);
}
