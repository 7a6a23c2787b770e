//! What QEMU's messages set up: features, guest memory, rings (the vhost-user protocol of QEMU's documentation,
//! docs/interop/vhost-user.rst).

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsRawFd as _, RawFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use tracing::warn;
use vhost::VhostUserMemoryRegionBase;
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserLog, VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig,
    VhostUserSharedMsg, VhostUserSingleMemoryRegion, VhostUserVirtioFeatures,
    VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{Error, GpuBackend, Result, VhostUserBackendReqHandlerMut};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::{Queue, QueueT as _};
use vm_memory::{GuestAddress, GuestMemoryMmap, GuestRegionMmap};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::WAKE;
use crate::device::{DeviceEvent, VirtioDevice};
use crate::served::{DeviceCounters, Served};

/// Features of the ring, which the transport offers for every device.
const RING_FEATURES: u64 = 1 << VIRTIO_RING_F_INDIRECT_DESC | 1 << VIRTIO_RING_F_EVENT_IDX;

/// QEMU's virtio-mmio tells drivers that queues may have this size, whatever the device says.
const QEMU_MAX_QUEUE_SIZE: u16 = 1024;

/// A device, as QEMU has set it up.
pub(super) struct Session {
    name: &'static str,
    served: Served,
    epoll: Arc<Epoll>,
    memory: GuestMemoryMmap,
    regions: Vec<Region>,
    rings: Vec<Ring>,
    acked_features: u64,
    /// The driver broke a ring or the host failed: nothing is served until a reset.
    broken: bool,
}

/// Where guest memory is in QEMU's address space, in which it gives the rings' addresses.
struct Region {
    qemu_address: u64,
    guest_address: u64,
    length: u64,
}

/// What a queue has beside [`Served::queues`].
#[derive(Default)]
struct Ring {
    /// The driver has made buffers available. Set while the ring is started.
    kick: Option<File>,
    /// The driver wants to know of used buffers.
    call: Option<File>,
    enabled: bool,
}

impl Session {
    pub(super) fn new(
        name: &'static str,
        device: Box<dyn VirtioDevice>,
        epoll: Arc<Epoll>,
    ) -> io::Result<Self> {
        let queues = device
            .queue_sizes()
            .iter()
            .map(|size| Queue::new(QEMU_MAX_QUEUE_SIZE.max(*size)).map_err(io::Error::other))
            .collect::<io::Result<Vec<_>>>()?;
        Ok(Self {
            name,
            rings: queues.iter().map(|_| Ring::default()).collect(),
            served: Served::new(name, device, queues),
            epoll,
            memory: GuestMemoryMmap::default(),
            regions: Vec::new(),
            acked_features: 0,
            broken: false,
        })
    }

    pub(super) fn counters(&self) -> Arc<DeviceCounters> {
        self.served.counters()
    }

    /// The driver kicked a queue.
    pub(super) fn kicked(&mut self, index: usize) {
        let Some(mut kick) = self.rings.get(index).and_then(|ring| ring.kick.as_ref()) else {
            return;
        };
        // The count does not matter, and an error only says that it was read already.
        let _ = kick.read(&mut [0; 8]);
        self.process(DeviceEvent::Queue(index));
    }

    /// Lets the device work, and tells the driver of what it has done.
    pub(super) fn process(&mut self, event: DeviceEvent) {
        if self.broken {
            return;
        }
        match self.served.process(&self.memory, event) {
            Ok(wanted) => self.interrupt(wanted),
            Err(error) => {
                warn!(device = self.name, %error, "the device stops");
                self.stop_serving();
            }
        }
    }

    fn interrupt(&self, wanted: u32) {
        for (index, ring) in self.rings.iter().enumerate() {
            if let (true, Some(mut call)) = (wanted & 1 << index != 0, ring.call.as_ref()) {
                // An eventfd of QEMU's: an error says that QEMU is going away, which the socket tells as well.
                let _ = call.write(&1_u64.to_ne_bytes());
            }
        }
    }

    /// Waits for nothing but QEMU's messages any more.
    fn stop_serving(&mut self) {
        self.broken = true;
        for index in 0..self.rings.len() {
            self.rings[index].enabled = false;
            self.update(index, false);
        }
        if let Some(wake) = self.served.device.wake_fd() {
            self.unwatch(wake);
        }
    }

    fn reset(&mut self) {
        for index in 0..self.rings.len() {
            let was_running = self.running(index);
            self.rings[index].enabled = false;
            self.update(index, was_running);
        }
        self.served.device.reset();
        if std::mem::take(&mut self.broken)
            && let Some(wake) = self.served.device.wake_fd()
        {
            self.watch(wake, WAKE);
        }
    }

    fn ring(&mut self, index: usize) -> Result<&mut Ring> {
        self.rings.get_mut(index).ok_or(Error::InvalidParam)
    }

    fn queue(&mut self, index: u32) -> Result<&mut Queue> {
        let queue = self.served.queues.get_mut(index as usize);
        queue.ok_or(Error::InvalidParam)
    }

    /// A ring is served while QEMU has started it (it has a kick) and enabled it.
    fn running(&self, index: usize) -> bool {
        let ring = &self.rings[index];
        ring.enabled && ring.kick.is_some()
    }

    /// Follows a change of a ring from `was_running`.
    fn update(&mut self, index: usize, was_running: bool) {
        let running = self.running(index) && !self.broken;
        self.served.queues[index].set_ready(running);
        if running == was_running {
            return;
        }
        let Some(kick) = self.rings[index].kick.as_ref().map(File::as_raw_fd) else {
            return;
        };
        if running {
            self.watch(kick, index as u64);
            // The driver may have kicked before.
            self.process(DeviceEvent::Queue(index));
        } else {
            self.unwatch(kick);
        }
    }

    fn watch(&self, fd: RawFd, token: u64) {
        if let Err(error) = self.epoll.ctl(
            ControlOperation::Add,
            fd,
            EpollEvent::new(EventSet::IN, token),
        ) {
            warn!(device = self.name, %error, "cannot wait for a queue");
        }
    }

    fn unwatch(&self, fd: RawFd) {
        // An error says that it was not watched.
        let _ = self
            .epoll
            .ctl(ControlOperation::Delete, fd, EpollEvent::default());
    }

    fn guest_address(&self, qemu_address: u64) -> Result<GuestAddress> {
        self.regions
            .iter()
            .find_map(|region| {
                let offset = qemu_address.checked_sub(region.qemu_address)?;
                (offset < region.length).then(|| GuestAddress(region.guest_address + offset))
            })
            .ok_or(Error::InvalidParam)
    }
}

/// Maps a region of guest memory. A file shorter than the region would end us with SIGBUS.
fn map(region: &VhostUserMemoryRegion, file: File) -> Result<GuestRegionMmap> {
    let end = region
        .mmap_offset
        .checked_add(region.memory_size)
        .ok_or(Error::InvalidParam)?;
    if file.metadata().map_err(Error::ReqHandlerError)?.len() < end {
        return Err(Error::InvalidParam);
    }
    GuestRegionMmap::new(
        region.mmap_region(file)?,
        GuestAddress(region.guest_phys_addr),
    )
    .ok_or(Error::InvalidParam)
}

fn unsupported<T>() -> Result<T> {
    Err(Error::InvalidOperation("not supported"))
}

impl VhostUserBackendReqHandlerMut for Session {
    fn set_owner(&mut self) -> Result<()> {
        Ok(())
    }

    fn reset_owner(&mut self) -> Result<()> {
        self.reset();
        Ok(())
    }

    fn reset_device(&mut self) -> Result<()> {
        self.reset();
        Ok(())
    }

    fn get_features(&mut self) -> Result<u64> {
        Ok(self.served.device.features()
            | RING_FEATURES
            | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits())
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        if features & !self.get_features()? != 0 {
            return Err(Error::InvalidParam);
        }
        self.acked_features = features;
        let event_idx = features & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
        for queue in &mut self.served.queues {
            queue.set_event_idx(event_idx);
        }
        let device = &mut self.served.device;
        device.activate(features & device.features());
        // Without protocol features there is no message to enable a ring.
        if features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() == 0 {
            for index in 0..self.rings.len() {
                self.set_vring_enable(index as u32, true)?;
            }
        }
        Ok(())
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy_listening: Option<bool>,
    ) -> Result<Option<Vec<VhostUserMemoryRegionBase>>> {
        let mapped = regions
            .iter()
            .zip(files)
            .map(|(region, file)| map(region, file))
            .collect::<Result<Vec<_>>>()?;
        self.memory = GuestMemoryMmap::from_regions(mapped).map_err(|_| Error::InvalidParam)?;
        self.regions = regions
            .iter()
            .map(|region| Region {
                qemu_address: region.user_addr,
                guest_address: region.guest_phys_addr,
                length: region.memory_size,
            })
            .collect();
        Ok(None)
    }

    fn set_vring_num(&mut self, index: u32, size: u32) -> Result<()> {
        let size = u16::try_from(size).map_err(|_| Error::InvalidParam)?;
        self.queue(index)?
            .try_set_size(size)
            .map_err(|_| Error::InvalidParam)
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        _flags: VhostUserVringAddrFlags,
        descriptors: u64,
        used: u64,
        available: u64,
        _log: u64,
    ) -> Result<()> {
        let descriptors = self.guest_address(descriptors)?;
        let available = self.guest_address(available)?;
        let used = self.guest_address(used)?;
        let queue = self.served.queues.get_mut(index as usize);
        let queue = queue.ok_or(Error::InvalidParam)?;
        queue
            .try_set_desc_table_address(descriptors)
            .map_err(|_| Error::InvalidParam)?;
        queue
            .try_set_avail_ring_address(available)
            .map_err(|_| Error::InvalidParam)?;
        queue
            .try_set_used_ring_address(used)
            .map_err(|_| Error::InvalidParam)?;
        // SET_VRING_BASE is about the available ring alone; the used ring goes on where it is.
        let next_used = queue
            .used_idx(&self.memory, Ordering::Acquire)
            .map_err(|_| Error::InvalidParam)?;
        queue.set_next_used(next_used.0);
        Ok(())
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        self.queue(index)?.set_next_avail(base as u16);
        Ok(())
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        let at = index as usize;
        let next = u32::from(self.queue(index)?.next_avail());
        // Stops the ring.
        self.set_vring_kick(index as u8, None)?;
        self.rings[at].call = None;
        Ok(VhostUserVringState::new(index, next))
    }

    fn set_vring_kick(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let at = usize::from(index);
        self.ring(at)?;
        if self.running(at)
            && let Some(kick) = &self.rings[at].kick
        {
            self.unwatch(kick.as_raw_fd());
        }
        self.rings[at].kick = fd;
        self.update(at, false);
        Ok(())
    }

    fn set_vring_call(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        self.ring(usize::from(index))?.call = fd;
        Ok(())
    }

    fn set_vring_err(&mut self, index: u8, _fd: Option<File>) -> Result<()> {
        self.ring(usize::from(index)).map(drop)
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        Ok(VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK)
    }

    fn set_protocol_features(&mut self, _features: u64) -> Result<()> {
        Ok(())
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(self.rings.len() as u64)
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        let index = index as usize;
        self.ring(index)?;
        let was_running = self.running(index);
        self.rings[index].enabled = enable;
        self.update(index, was_running);
        Ok(())
    }

    fn get_config(
        &mut self,
        offset: u32,
        size: u32,
        _flags: VhostUserConfigFlags,
    ) -> Result<Vec<u8>> {
        // The protocol limits the size to 256.
        let mut config = vec![0; size as usize];
        self.served
            .device
            .read_config(u64::from(offset), &mut config);
        Ok(config)
    }

    fn set_config(&mut self, offset: u32, data: &[u8], _flags: VhostUserConfigFlags) -> Result<()> {
        self.served.device.write_config(u64::from(offset), data);
        Ok(())
    }

    fn set_gpu_socket(&mut self, _backend: GpuBackend) -> Result<()> {
        unsupported()
    }

    fn get_shared_object(&mut self, _uuid: VhostUserSharedMsg) -> Result<File> {
        unsupported()
    }

    fn get_inflight_fd(
        &mut self,
        _inflight: &VhostUserInflight,
    ) -> Result<(VhostUserInflight, File)> {
        unsupported()
    }

    fn set_inflight_fd(&mut self, _inflight: &VhostUserInflight, _file: File) -> Result<()> {
        unsupported()
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        unsupported()
    }

    fn add_mem_region(
        &mut self,
        _region: &VhostUserSingleMemoryRegion,
        _file: File,
        _postcopy_listening: Option<bool>,
    ) -> Result<Option<VhostUserMemoryRegionBase>> {
        unsupported()
    }

    fn remove_mem_region(&mut self, _region: &VhostUserSingleMemoryRegion) -> Result<()> {
        unsupported()
    }

    fn set_device_state_fd(
        &mut self,
        _direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        _file: File,
    ) -> Result<Option<File>> {
        unsupported()
    }

    fn check_device_state(&mut self) -> Result<()> {
        unsupported()
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        unsupported()
    }

    fn set_log_base(&mut self, _log: &VhostUserLog, _file: File) -> Result<()> {
        unsupported()
    }
}
