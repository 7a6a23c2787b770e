//! The thread of a group of devices: it owns them, and waits for everything they may have to do.

use std::io;
use std::os::fd::{AsRawFd as _, RawFd};
use std::sync::Arc;
use std::sync::mpsc;
use std::thread;

use tracing::{debug, error, warn};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::{Queue, QueueT as _};
use vm_memory::{GuestAddress, GuestAddressSpace as _, GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use super::virtio_mmio::{Command, QueueSetup, Shared};
use crate::device::{CONFIG_CHANGED, DeviceError, DeviceEvent};
use crate::seccomp;
use crate::served::Served;

/// Enough for the devices; what is not used is not there.
const STACK_BYTES: usize = 256 << 10;

/// What wakes the thread: device and source, packed into epoll's token.
const SOURCE_BITS: u32 = 8;
const DOORBELL: u64 = 0xff;
const WAKE: u64 = 0xfe;
/// The VM ends.
const STOP: u64 = u64::MAX;

/// A device with its ends of what the registers and KVM hold the other ends of.
pub struct Attached {
    /// For log lines.
    pub name: &'static str,
    /// The device.
    pub served: Served,
    /// What the driver wants.
    pub commands: mpsc::Receiver<Command>,
    /// There is a command.
    pub doorbell: EventFd,
    /// One for each queue: the driver has made buffers available.
    pub kicks: Vec<EventFd>,
    /// The registers' part.
    pub shared: Arc<Shared>,
    /// The driver broke a ring, or the host failed: nothing is served until a reset.
    pub broken: bool,
}

/// Starts the thread. It ends when `stop` becomes readable.
pub fn start(
    name: &str,
    devices: Vec<Attached>,
    memory: GuestMemoryAtomic<GuestMemoryMmap>,
    stop: EventFd,
) -> io::Result<()> {
    let epoll = Epoll::new()?;
    add(&epoll, stop.as_raw_fd(), STOP)?;
    for (index, device) in devices.iter().enumerate() {
        let token = |source| (index as u64) << SOURCE_BITS | source;
        add(&epoll, device.doorbell.as_raw_fd(), token(DOORBELL))?;
        for (queue, kick) in device.kicks.iter().enumerate() {
            add(&epoll, kick.as_raw_fd(), token(queue as u64))?;
        }
        if let Some(wake) = device.served.device.wake_fd() {
            add(&epoll, wake, token(WAKE))?;
        }
    }
    let group = Group {
        epoll,
        devices,
        memory,
        _stop: stop,
    };
    thread::Builder::new()
        .name(name.to_owned())
        .stack_size(STACK_BYTES)
        .spawn(move || group.run())
        .map(drop)
}

fn add(epoll: &Epoll, fd: RawFd, token: u64) -> io::Result<()> {
    epoll.ctl(
        ControlOperation::Add,
        fd,
        EpollEvent::new(EventSet::IN, token),
    )
}

struct Group {
    epoll: Epoll,
    devices: Vec<Attached>,
    memory: GuestMemoryAtomic<GuestMemoryMmap>,
    /// Kept open while it is waited for.
    _stop: EventFd,
}

impl Group {
    fn run(mut self) {
        if let Err(error) = seccomp::confine(seccomp::Thread::Device) {
            error!(%error, "a device thread without its filter serves nothing");
            return;
        }
        let mut events = [EpollEvent::default(); 16];
        loop {
            let count = match self.epoll.wait(-1, &mut events) {
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => {
                    error!(%error, "a device thread cannot wait");
                    return;
                }
            };
            for event in &events[..count] {
                if event.data() == STOP {
                    return;
                }
                let index = (event.data() >> SOURCE_BITS) as usize;
                let source = event.data() & ((1 << SOURCE_BITS) - 1);
                self.handle(index, source);
            }
        }
    }

    fn handle(&mut self, index: usize, source: u64) {
        let device = &mut self.devices[index];
        match source {
            DOORBELL => {
                let _ = device.doorbell.read();
                while let Ok(command) = self.devices[index].commands.try_recv() {
                    self.obey(index, command);
                }
            }
            WAKE => self.process(index, DeviceEvent::Wake),
            queue => {
                let queue = queue as usize;
                // The count does not matter.
                let _ = device.kicks[queue].read();
                self.process(index, DeviceEvent::Queue(queue));
            }
        }
    }

    fn obey(&mut self, index: usize, command: Command) {
        let device = &mut self.devices[index];
        match command {
            Command::Activate { features, queues } => {
                match set_up(&mut device.served.queues, &queues, features) {
                    Ok(()) => {
                        let offered = device.served.device.features();
                        device.served.device.activate(features & offered);
                    }
                    Err(error) => return self.stop_serving(index, &error.into()),
                }
                debug!(device = device.name, "the driver is ready");
                // It may have kicked before.
                for queue in 0..queues.len() {
                    self.process(index, DeviceEvent::Queue(queue));
                }
            }
            Command::WriteConfig {
                offset,
                bytes,
                length,
            } => {
                device.served.device.write_config(offset, &bytes[..length]);
                device.shared.config_written(device.served.device.as_ref());
            }
            Command::Reset(done) => {
                for queue in &mut device.served.queues {
                    queue.reset();
                }
                device.served.device.reset();
                if std::mem::take(&mut device.broken)
                    && let Some(wake) = device.served.device.wake_fd()
                {
                    let token = (index as u64) << SOURCE_BITS | WAKE;
                    if let Err(error) = add(&self.epoll, wake, token) {
                        warn!(device = device.name, %error, "cannot wait for the device");
                    }
                }
                // The vCPU waits.
                let _ = done.send(());
            }
        }
    }

    /// Lets the device work, and tells the driver of what it has done.
    fn process(&mut self, index: usize, event: DeviceEvent) {
        let device = &mut self.devices[index];
        if device.broken {
            return;
        }
        match device.served.process(&self.memory.memory(), event) {
            Ok(0) => {}
            Ok(wanted) => {
                if wanted & !CONFIG_CHANGED != 0 {
                    device.shared.buffers_used();
                }
                if wanted & CONFIG_CHANGED != 0 {
                    device.shared.config_changed(device.served.device.as_ref());
                }
            }
            Err(error) => self.stop_serving(index, &error),
        }
    }

    /// Waits for nothing but a reset any more.
    fn stop_serving(&mut self, index: usize, error: &DeviceError) {
        let device = &mut self.devices[index];
        warn!(device = device.name, %error, "the device stops");
        device.broken = true;
        for queue in &mut device.served.queues {
            queue.set_ready(false);
        }
        if let Some(wake) = device.served.device.wake_fd() {
            let nothing = EpollEvent::default();
            let _ = self.epoll.ctl(ControlOperation::Delete, wake, nothing);
        }
        device.shared.needs_reset();
    }
}

/// Makes the driver's set-up the queues'.
fn set_up(
    queues: &mut [Queue],
    setups: &[QueueSetup],
    features: u64,
) -> Result<(), virtio_queue::Error> {
    for (queue, setup) in queues.iter_mut().zip(setups) {
        queue.reset();
        if !setup.ready {
            continue;
        }
        queue.try_set_size(setup.size)?;
        queue.try_set_desc_table_address(GuestAddress(setup.descriptors))?;
        queue.try_set_avail_ring_address(GuestAddress(setup.available))?;
        queue.try_set_used_ring_address(GuestAddress(setup.used))?;
        queue.set_event_idx(features & 1 << VIRTIO_RING_F_EVENT_IDX != 0);
        queue.set_ready(true);
    }
    Ok(())
}
