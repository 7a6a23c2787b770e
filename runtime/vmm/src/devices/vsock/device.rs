//! The virtio device (virtio 1.2, 5.10).

use std::io;
use std::os::fd::{AsRawFd as _, RawFd};
use std::sync::Arc;

use tracing::debug;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::dialers::Dialers;
use super::handle::{Command, Shared, VsockHandle};
use super::link::Waiter;
use super::muxer::Muxer;
use crate::buffers::ChainBuffers;
use crate::device::{DeviceError, DeviceEvent, QueueRef, VirtioDevice, read_config_space};

/// To the guest, from the guest, events.
const QUEUE_SIZES: &[u16] = &[256, 256, 64];
const RX: usize = 0;
const TX: usize = 1;

/// Tokens in the device's epoll. Connections have the ids of [`Shared::next_id`], which count up from 1.
const COMMANDS: u64 = 0;
const TIMER: u64 = u64::MAX;

/// Events of the host taken in at once; more stay in the epoll.
const MAX_EVENTS: usize = 64;

/// The virtio-vsock device.
#[derive(Debug)]
pub struct VsockDevice {
    guest_cid: u64,
    shared: Arc<Shared>,
    epoll: Arc<Epoll>,
    muxer: Muxer,
    dialers: Dialers,
    buffers: ChainBuffers,
    /// Packets of the guest wait because too many replies do.
    held_up: bool,
}

impl VsockDevice {
    /// A device for the guest with address `guest_cid`, and the handle to dial through it.
    ///
    /// # Errors
    /// The process has no file descriptors left.
    pub fn new(guest_cid: u64) -> io::Result<(Self, VsockHandle)> {
        let shared = Arc::new(Shared::new()?);
        let epoll = Arc::new(Epoll::new()?);
        epoll.ctl(
            ControlOperation::Add,
            shared.wake.as_raw_fd(),
            EpollEvent::new(EventSet::IN, COMMANDS),
        )?;
        let device = Self {
            guest_cid,
            muxer: Muxer::new(guest_cid, shared.clone(), epoll.clone()),
            dialers: Dialers::new(shared.clone(), epoll.clone(), TIMER)?,
            buffers: ChainBuffers::default(),
            held_up: false,
            shared: shared.clone(),
            epoll,
        };
        Ok((device, VsockHandle::new(shared)))
    }

    /// Takes in what happened on the host.
    fn host_events(&mut self) -> io::Result<()> {
        let mut events = [EpollEvent::default(); MAX_EVENTS];
        let count = match self.epoll.wait(0, &mut events) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            count => count?,
        };
        for event in &events[..count] {
            match event.data() {
                COMMANDS => self.commands(),
                TIMER => self.dialers.expire(&mut self.muxer),
                id => {
                    if !self
                        .muxer
                        .host_event(id, EventSet::from_bits_truncate(event.events()))
                    {
                        self.dialers.event(id, &mut self.muxer);
                    }
                }
            }
        }
        Ok(())
    }

    fn commands(&mut self) {
        for command in self.shared.take_commands() {
            match command {
                Command::Connect { id, port, answer } => {
                    self.muxer.connect(id, port, Waiter::Caller(answer));
                }
                Command::Cancel { id } => self.muxer.cancel(id),
                Command::Serve { id, listener } => self.dialers.serve(id, listener),
            }
        }
    }

    /// Takes packets from the guest until there are none or their replies do not go out. True: buffers were used.
    fn take(
        &mut self,
        memory: &GuestMemoryMmap,
        queue: &mut QueueRef<'_>,
    ) -> Result<bool, DeviceError> {
        let mut used = false;
        self.held_up = false;
        loop {
            queue.disable_notification(memory)?;
            loop {
                if self.muxer.congested() {
                    self.held_up = true;
                    return Ok(used);
                }
                let Some(chain) = queue.pop(memory)? else {
                    break;
                };
                let head = chain.head_index();
                match self.buffers.collect(memory, chain) {
                    Ok((packet, _)) => self.muxer.packet(packet),
                    Err(error) => debug!(%error, "a malformed vsock packet"),
                }
                queue.add_used(memory, head, 0)?;
                used = true;
            }
            if !queue.enable_notification(memory)? {
                return Ok(used);
            }
        }
    }

    /// Gives packets to the guest until there are none or it has no buffers. True: buffers were used.
    fn give(
        &mut self,
        memory: &GuestMemoryMmap,
        queue: &mut QueueRef<'_>,
    ) -> Result<bool, DeviceError> {
        let mut used = false;
        if self.muxer.has_packets() {
            queue.disable_notification(memory)?;
        }
        while self.muxer.has_packets() {
            let Some(chain) = queue.pop(memory)? else {
                // Only now are new buffers of interest.
                if queue.enable_notification(memory)? {
                    continue;
                }
                break;
            };
            let head = chain.head_index();
            let written = match self.buffers.collect(memory, chain) {
                Ok((_, room)) => self.muxer.next_packet(room),
                Err(error) => {
                    debug!(%error, "a malformed vsock buffer");
                    Some(0)
                }
            };
            let Some(written) = written else {
                queue.unpop();
                break;
            };
            queue.add_used(memory, head, written)?;
            used = true;
        }
        Ok(used)
    }
}

impl VirtioDevice for VsockDevice {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_VSOCK
    }

    fn queue_sizes(&self) -> &'static [u16] {
        QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1
    }

    fn activate(&mut self, _features: u64) {}

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_space(&self.guest_cid.to_le_bytes(), offset, data);
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
        if event == DeviceEvent::Wake {
            self.host_events()?;
        }
        if !(queues[RX].ready() && queues[TX].ready()) {
            return Ok(0);
        }
        let mut interrupts = 0;
        let mut take = event == DeviceEvent::Queue(TX) || self.held_up;
        loop {
            if take && self.take(memory, &mut queues[TX])? {
                interrupts |= 1 << TX;
            }
            if self.give(memory, &mut queues[RX])? {
                interrupts |= 1 << RX;
            }
            take = self.held_up && !self.muxer.congested();
            if !take {
                return Ok(interrupts);
            }
        }
    }

    fn reset(&mut self) {
        self.muxer.reset();
        self.held_up = false;
    }
}

impl Drop for VsockDevice {
    fn drop(&mut self) {
        self.shared.close();
    }
}

#[cfg(test)]
mod tests;
