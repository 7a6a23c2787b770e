//! The virtio device (virtio 1.2, 5.1).

use std::io;
use std::os::fd::{AsRawFd as _, RawFd};
use std::sync::atomic::Ordering;

use tracing::{debug, warn};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::{VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::receiver::{Pause, Receiver};
use super::tap::{MAX_FRAME_BYTES, Tap};
use crate::buffers::{ChainBuffers, GuestSlices};
use crate::device::{Counter, DeviceError, DeviceEvent, QueueRef, VirtioDevice, read_config_space};

/// To the guest, from the guest.
const QUEUE_SIZES: &[u16] = &[256, 256];
const RX: usize = 0;
const TX: usize = 1;

/// Frames sent before others have their turn.
const MAX_BATCH: usize = 64;

/// `struct virtio_net_config` up to and with the MTU.
const CONFIG_BYTES: usize = 12;

/// The virtio-net device.
#[derive(Debug)]
pub struct NetDevice {
    tap: Tap,
    config: [u8; CONFIG_BYTES],
    features: u64,
    /// What the device waits for: the tap, while there are buffers for its frames, and `more`.
    epoll: Epoll,
    tap_watched: bool,
    /// The tap's interface is gone, and the network with it, for good.
    tap_gone: bool,
    /// Says that `held_up` is so.
    more: EventFd,
    /// Frames of the guest wait until others had their turn.
    held_up: bool,
    receiver: Receiver,
    buffers: ChainBuffers,
    /// Frames of the guest that were no frames, or that the tap did not take.
    dropped: Counter,
}

impl NetDevice {
    /// A device with the address `mac` on a tap. With an `mtu` the driver learns it, otherwise it takes Ethernet's.
    ///
    /// # Errors
    /// The process has no file descriptors left.
    pub fn new(tap: Tap, mac: [u8; 6], mtu: Option<u16>) -> io::Result<Self> {
        let mut features = 1 << VIRTIO_F_VERSION_1
            | 1 << VIRTIO_NET_F_MAC
            | 1 << VIRTIO_NET_F_MRG_RXBUF
            | tap.features();
        let mut config = [0; CONFIG_BYTES];
        config[..6].copy_from_slice(&mac);
        if let Some(mtu) = mtu {
            features |= 1 << VIRTIO_NET_F_MTU;
            config[10..].copy_from_slice(&mtu.to_le_bytes());
        }
        let epoll = Epoll::new()?;
        let more = EventFd::new(EFD_NONBLOCK)?;
        epoll.ctl(
            ControlOperation::Add,
            more.as_raw_fd(),
            EpollEvent::new(EventSet::IN, 0),
        )?;
        Ok(Self {
            tap,
            config,
            features,
            epoll,
            tap_watched: false,
            tap_gone: false,
            more,
            held_up: false,
            receiver: Receiver::new(),
            buffers: ChainBuffers::default(),
            dropped: Counter::default(),
        })
    }

    /// Receives frames for the guest. True: buffers were used.
    fn receive(
        &mut self,
        memory: &GuestMemoryMmap,
        queue: &mut QueueRef<'_>,
    ) -> Result<bool, DeviceError> {
        if self.tap_gone {
            return Ok(false);
        }
        let (used, pause) = self.receiver.receive(memory, queue, &self.tap)?;
        self.tap_gone = pause == Pause::Gone;
        self.watch_tap(pause == Pause::UntilTap)?;
        Ok(used)
    }

    /// Waits for the tap's frames, or no longer. The tap is taken out of the epoll altogether, as one whose interface
    /// is gone is always ready (`EPOLLERR`).
    fn watch_tap(&mut self, watch: bool) -> io::Result<()> {
        if watch != self.tap_watched {
            let operation = if watch {
                ControlOperation::Add
            } else {
                ControlOperation::Delete
            };
            let tap = self.tap.as_fd().as_raw_fd();
            self.epoll
                .ctl(operation, tap, EpollEvent::new(EventSet::IN, 0))?;
            self.tap_watched = watch;
        }
        Ok(())
    }

    /// Whether frames of the guest had to wait. They do no longer.
    fn go_on(&mut self) -> bool {
        let held_up = std::mem::take(&mut self.held_up);
        if held_up {
            // It was written to, so that this cannot fail.
            let _ = self.more.read();
        }
        held_up
    }

    /// Sends frames of the guest. True: buffers were used.
    fn send(
        &mut self,
        memory: &GuestMemoryMmap,
        queue: &mut QueueRef<'_>,
    ) -> Result<bool, DeviceError> {
        let mut frames = 0;
        loop {
            queue.disable_notification(memory)?;
            while let Some(chain) = queue.pop(memory)? {
                if frames == MAX_BATCH {
                    queue.unpop();
                    self.held_up = true;
                    self.more.write(1)?;
                    return Ok(true);
                }
                let head = chain.head_index();
                let sent = match self.buffers.collect(memory, chain) {
                    Ok((frame, _)) => send_frame(&self.tap, frame),
                    Err(error) => {
                        debug!(%error, "a malformed frame");
                        false
                    }
                };
                if !sent {
                    self.dropped.fetch_add(1, Ordering::Relaxed);
                }
                queue.add_used(memory, head, 0)?;
                frames += 1;
            }
            if !queue.enable_notification(memory)? {
                return Ok(frames > 0);
            }
        }
    }
}

/// Sends a frame with its header, which the tap checks. False: it is no frame, or the tap does not take it.
fn send_frame(tap: &Tap, mut frame: GuestSlices<'_>) -> bool {
    if frame.len() > MAX_FRAME_BYTES {
        debug!(length = frame.len(), "a frame that is too long");
        return false;
    }
    frame
        .write_to(tap.as_fd())
        .inspect_err(|error| debug!(%error, "a frame that the tap does not take"))
        .is_ok()
}

impl VirtioDevice for NetDevice {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_NET
    }

    fn queue_sizes(&self) -> &'static [u16] {
        QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn activate(&mut self, features: u64) {
        self.tap.set_features(features);
        self.receiver
            .start(features & 1 << VIRTIO_NET_F_MRG_RXBUF != 0);
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_space(&self.config, offset, data);
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
        let go_on = event == DeviceEvent::Wake && self.go_on();
        if !(queues[RX].ready() && queues[TX].ready()) {
            self.watch_tap(false)?;
            return Ok(0);
        }
        let mut interrupts = 0;
        if (go_on || event == DeviceEvent::Queue(TX)) && self.send(memory, &mut queues[TX])? {
            interrupts |= 1 << TX;
        }
        if event != DeviceEvent::Queue(TX) && self.receive(memory, &mut queues[RX])? {
            interrupts |= 1 << RX;
        }
        Ok(interrupts)
    }

    /// Frames that came for the last driver are thrown away: they may need offloads that the next one does not know.
    fn reset(&mut self) {
        if let Err(error) = self.watch_tap(false) {
            warn!(%error, "the tap is still waited for");
        }
        self.go_on();
        self.tap.set_features(0);
        self.tap.clear();
    }

    fn counters(&self) -> Vec<(&'static str, Counter)> {
        vec![
            ("rx_dropped", self.receiver.dropped.clone()),
            ("tx_dropped", self.dropped.clone()),
        ]
    }
}

#[cfg(test)]
mod tests;
