//! Serves a [`VirtioDevice`] to QEMU over vhost-user.
//!
//! One thread per device waits for everything the device may have to do: a message of QEMU's, a kick of the driver's,
//! an event of the device's own. So no part of a device or of this module is used by two threads at once. (The daemon
//! of the vhost-user-backend crate has two threads per device and takes no connected socket.)
//!
//! - `session`: the state that QEMU's messages set up, and the rings
//! - here: the thread

mod session;

use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use tracing::{debug, error};
use vhost::vhost_user::{BackendReqHandler, Error};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use crate::device::{DeviceEvent, VirtioDevice};
use crate::seccomp;
use crate::served::DeviceCounters;
use session::Session;

/// Tokens in the thread's epoll. A queue has its index.
const REQUESTS: u64 = u64::MAX;
const WAKE: u64 = u64::MAX - 1;

/// Enough for the devices and for messages of vhost-user; threads' stacks are not touched beyond what they use.
const STACK_BYTES: usize = 256 << 10;

/// Starts the thread that serves `device` on a connected socket. It ends when the other end is closed. Returns
/// what it counts.
///
/// # Errors
/// No thread or no file descriptor is left.
pub(crate) fn serve(
    name: &'static str,
    device: Box<dyn VirtioDevice>,
    socket: UnixStream,
) -> io::Result<Arc<DeviceCounters>> {
    let epoll = Arc::new(Epoll::new()?);
    epoll.ctl(
        ControlOperation::Add,
        socket.as_raw_fd(),
        EpollEvent::new(EventSet::IN, REQUESTS),
    )?;
    if let Some(wake) = device.wake_fd() {
        epoll.ctl(
            ControlOperation::Add,
            wake,
            EpollEvent::new(EventSet::IN, WAKE),
        )?;
    }
    let session = Session::new(name, device, epoll.clone())?;
    let counters = session.counters();
    let session = Arc::new(Mutex::new(session));
    thread::Builder::new()
        .name(name.to_owned())
        .stack_size(STACK_BYTES)
        .spawn(move || run(&epoll, &session, socket))?;
    Ok(counters)
}

fn run(epoll: &Epoll, session: &Arc<Mutex<Session>>, socket: UnixStream) {
    if let Err(error) = seccomp::confine(seccomp::Thread::Device) {
        error!(%error, "a device thread without its filter serves nothing");
        return;
    }
    let mut requests = BackendReqHandler::from_stream(socket, session.clone());
    let mut events = [EpollEvent::default(); 8];
    loop {
        let count = match epoll.wait(-1, &mut events) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => {
                error!(%error, "a device thread cannot wait");
                return;
            }
        };
        for event in &events[..count] {
            match event.data() {
                REQUESTS => match requests.handle_request() {
                    Ok(()) => {}
                    // QEMU is gone. A message cut short is what the end of its process looks like as well.
                    Err(Error::Disconnected | Error::PartialMessage | Error::SocketBroken(_)) => {
                        debug!("vhost-user disconnected");
                        return;
                    }
                    Err(error) => {
                        error!(%error, "vhost-user");
                        return;
                    }
                },
                WAKE => lock(session).process(DeviceEvent::Wake),
                queue => lock(session).kicked(queue as usize),
            }
        }
    }
}

/// The handler of the vhost crate wants a mutex; only this thread locks it.
fn lock(session: &Mutex<Session>) -> MutexGuard<'_, Session> {
    session.lock().unwrap_or_else(PoisonError::into_inner)
}
