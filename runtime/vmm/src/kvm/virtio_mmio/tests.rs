//! A driver's view of a device on the bus, with the device's thread behind it.

use std::os::fd::RawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use virtio_queue::{Queue, QueueT as _};
use vm_memory::{GuestAddress, GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::eventfd::EFD_NONBLOCK;

use super::*;
use crate::device::{DeviceError, DeviceEvent, QueueRef};
use crate::kvm::device_thread::{self, Attached};
use crate::served::Served;

const STATUS: u64 = VIRTIO_MMIO_STATUS as u64;
const FEATURES_OK: u32 = VIRTIO_CONFIG_S_FEATURES_OK;
const DRIVER_OK: u32 = VIRTIO_CONFIG_S_DRIVER_OK;
const MEMORY_BYTES: usize = 1 << 20;

/// Returns every chain, and keeps the first byte of configuration space.
struct Echo {
    config: u8,
}

impl VirtioDevice for Echo {
    fn device_type(&self) -> u32 {
        42
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[16, 8]
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1 | 1 << 3
    }

    fn activate(&mut self, features: u64) {
        assert_eq!(features & !self.features(), 0, "not offered");
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        crate::device::read_config_space(&[self.config, 2, 3, 4], offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if let (0, Some(byte)) = (offset, data.first()) {
            self.config = *byte;
        }
    }

    fn wake_fd(&self) -> Option<RawFd> {
        None
    }

    fn process(
        &mut self,
        memory: &GuestMemoryMmap,
        queues: &mut [QueueRef<'_>],
        event: DeviceEvent,
    ) -> Result<u32, DeviceError> {
        let DeviceEvent::Queue(index) = event else {
            return Ok(0);
        };
        let queue = &mut queues[index];
        if !queue.ready() {
            return Ok(0);
        }
        let mut used = 0;
        while let Some(chain) = queue.pop(memory)? {
            queue.add_used(memory, chain.head_index(), 0)?;
            used = 1 << index;
        }
        Ok(used)
    }

    fn reset(&mut self) {}
}

/// The device on its bus.
struct Rig {
    registers: VirtioMmio,
    kicks: Vec<EventFd>,
    interrupt: EventFd,
    stop: EventFd,
    memory: GuestMemoryMmap,
}

impl Rig {
    fn new() -> Self {
        let eventfd = || EventFd::new(EFD_NONBLOCK).unwrap();
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY_BYTES)]).unwrap();
        let device: Box<dyn VirtioDevice> = Box::new(Echo { config: 1 });
        let (commands, received) = mpsc::sync_channel(4);
        let (doorbell, interrupt, stop) = (eventfd(), eventfd(), eventfd());
        let kicks = [eventfd(), eventfd()];
        let link = DeviceLink {
            commands,
            doorbell: doorbell.try_clone().unwrap(),
        };
        let shared = Arc::new(Shared::new(device.as_ref(), interrupt.try_clone().unwrap()));
        let registers = VirtioMmio::new(device.as_ref(), Arc::clone(&shared), link);
        let queues = [16, 8].map(|size| Queue::new(size).unwrap());
        let attached = Attached {
            name: "echo",
            served: Served::new("echo", device, queues.into()),
            commands: received,
            doorbell,
            kicks: kicks.iter().map(|kick| kick.try_clone().unwrap()).collect(),
            shared,
            broken: false,
        };
        let ends = stop.try_clone().unwrap();
        let shared = GuestMemoryAtomic::new(memory.clone());
        device_thread::start("echo", vec![attached], shared, ends).unwrap();
        Self {
            registers,
            kicks: kicks.into(),
            interrupt,
            stop,
            memory,
        }
    }

    fn get(&self, offset: u32) -> u32 {
        let mut data = [0; 4];
        self.registers.read(offset.into(), &mut data);
        u32::from_le_bytes(data)
    }

    fn set(&self, offset: u32, value: u32) {
        self.registers.write(offset.into(), &value.to_le_bytes());
    }

    fn negotiate(&self, features: u64) -> u32 {
        self.set(VIRTIO_MMIO_STATUS, 0);
        self.set(VIRTIO_MMIO_STATUS, 3);
        for (select, half) in [(0, features as u32), (1, (features >> 32) as u32)] {
            self.set(VIRTIO_MMIO_DRIVER_FEATURES_SEL, select);
            self.set(VIRTIO_MMIO_DRIVER_FEATURES, half);
        }
        self.set(VIRTIO_MMIO_STATUS, 3 | FEATURES_OK);
        self.get(VIRTIO_MMIO_STATUS)
    }

    /// A queue with its three parts at `base`, 4 KiB apart.
    fn set_up_queue(&self, index: u32, size: u32, base: u32) {
        self.set(VIRTIO_MMIO_QUEUE_SEL, index);
        self.set(VIRTIO_MMIO_QUEUE_NUM, size);
        self.set(VIRTIO_MMIO_QUEUE_DESC_LOW, base);
        self.set(VIRTIO_MMIO_QUEUE_AVAIL_LOW, base + 0x1000);
        self.set(VIRTIO_MMIO_QUEUE_USED_LOW, base + 0x2000);
        self.set(VIRTIO_MMIO_QUEUE_READY, 1);
    }

    fn driver_ok(&self) {
        self.set(VIRTIO_MMIO_STATUS, 3 | FEATURES_OK | DRIVER_OK);
    }

    /// Makes the one descriptor of a queue available, and waits for its interrupt.
    fn push(&self, base: u64) {
        use vm_memory::Bytes as _;
        let memory = &self.memory;
        let at = |offset: u64| GuestAddress(base + offset);
        memory.write_slice(&[0; 16], at(0)).unwrap();
        let index: u16 = memory.read_obj(at(0x1002)).unwrap();
        memory.write_obj(index.wrapping_add(1), at(0x1002)).unwrap();
        self.kicks[0].write(1).unwrap();
        self.wait_for_interrupt();
        let used: u16 = memory.read_obj(at(0x2002)).unwrap();
        assert_eq!(used, index.wrapping_add(1));
    }

    fn wait_for_interrupt(&self) {
        use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
        use std::os::fd::{AsRawFd as _, BorrowedFd};
        // SAFETY: open as long as `self`.
        let fd = unsafe { BorrowedFd::borrow_raw(self.interrupt.as_raw_fd()) };
        let mut fds = [PollFd::new(fd, PollFlags::POLLIN)];
        assert_eq!(
            poll(&mut fds, PollTimeout::from(60_000_u16)),
            Ok(1),
            "no interrupt"
        );
        self.interrupt.read().unwrap();
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.stop.write(1).unwrap();
    }
}

const MODERN: u64 = 1 << VIRTIO_F_VERSION_1;

#[test]
fn a_driver_sets_the_device_up_and_resets_it() {
    let rig = Rig::new();
    assert_eq!(rig.get(VIRTIO_MMIO_MAGIC_VALUE).to_le_bytes(), *b"virt");
    assert_eq!(
        (rig.get(VIRTIO_MMIO_VERSION), rig.get(VIRTIO_MMIO_DEVICE_ID)),
        (2, 42)
    );
    for round in 1..4 {
        assert_eq!(rig.negotiate(MODERN | 1 << 3), 3 | FEATURES_OK);
        rig.set(VIRTIO_MMIO_QUEUE_SEL, 0);
        assert_eq!(rig.get(VIRTIO_MMIO_QUEUE_NUM_MAX), 16);
        rig.set(VIRTIO_MMIO_QUEUE_SEL, 2);
        assert_eq!(
            rig.get(VIRTIO_MMIO_QUEUE_NUM_MAX),
            0,
            "there is no third queue"
        );
        // Each round in memory of its own, whose rings are still empty.
        let base = round * 0x1_0000;
        rig.set_up_queue(0, 16, base);
        assert_eq!(rig.get(VIRTIO_MMIO_QUEUE_READY), 1);
        rig.driver_ok();
        rig.push(base.into());
        rig.push(base.into());
        assert_eq!(rig.get(VIRTIO_MMIO_INTERRUPT_STATUS), VIRTIO_MMIO_INT_VRING);
        rig.set(VIRTIO_MMIO_INTERRUPT_ACK, VIRTIO_MMIO_INT_VRING);
        assert_eq!(rig.get(VIRTIO_MMIO_INTERRUPT_STATUS), 0);
        rig.set(VIRTIO_MMIO_STATUS, 0);
        assert_eq!(rig.get(VIRTIO_MMIO_STATUS), 0);
        assert_eq!(rig.get(VIRTIO_MMIO_QUEUE_READY), 0);
    }
}

#[test]
fn what_was_not_offered_is_not_agreed() {
    let rig = Rig::new();
    assert_eq!(rig.negotiate(1 << 3), 3, "a legacy driver");
    assert_eq!(rig.negotiate(MODERN | 1 << 60), 3);
    // Going on all the same changes nothing.
    rig.driver_ok();
    assert_eq!(rig.get(VIRTIO_MMIO_STATUS) & DRIVER_OK, 0);
    assert_eq!(rig.negotiate(MODERN), 3 | FEATURES_OK);
}

#[test]
fn a_broken_queue_needs_a_reset_and_recovers_by_it() {
    let rig = Rig::new();
    let beyond_memory = MEMORY_BYTES as u32;
    for (size, base) in [
        (0, 0x1000),
        (17, 0x1000),
        (3, 0x1000),
        (16, 0x1008),
        (16, beyond_memory),
    ] {
        rig.negotiate(MODERN);
        rig.set_up_queue(0, size, base + u32::from(base == 0x1008));
        rig.driver_ok();
        rig.kicks[0].write(1).unwrap();
        rig.wait_for_interrupt();
        let status = rig.get(VIRTIO_MMIO_STATUS);
        assert_ne!(
            status & VIRTIO_CONFIG_S_NEEDS_RESET,
            0,
            "size {size} at {base:#x}"
        );
        assert_eq!(
            rig.get(VIRTIO_MMIO_INTERRUPT_STATUS),
            VIRTIO_MMIO_INT_CONFIG
        );
        rig.set(VIRTIO_MMIO_STATUS, 0);
        assert_eq!(rig.get(VIRTIO_MMIO_STATUS), 0);
        assert_eq!(rig.get(VIRTIO_MMIO_INTERRUPT_STATUS), 0);
    }
    rig.negotiate(MODERN);
    rig.set_up_queue(0, 16, 0x8000);
    rig.driver_ok();
    rig.push(0x8000);
}

#[test]
fn configuration_space_is_the_devices() {
    let rig = Rig::new();
    let offset = u64::from(VIRTIO_MMIO_CONFIG);
    let read = |at: u64, length: usize| {
        let mut data = vec![0xff; length];
        rig.registers.read(at, &mut data);
        data
    };
    assert_eq!(read(offset, 4), [1, 2, 3, 4]);
    assert_eq!(read(offset + 3, 2), [4, 0]);
    assert_eq!(read(u64::MAX, 8), [0; 8]);
    rig.registers.write(offset, &[9]);
    // The write goes to the device's thread.
    let begin = Instant::now();
    while read(offset, 1) != [9] {
        assert!(begin.elapsed() < Duration::from_mins(1), "not written");
        std::thread::yield_now();
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever a guest does to the registers: no panic, no hang, and a driver that behaves is served afterwards.
    #[test]
    fn hostile_register_accesses(
        accesses in prop::collection::vec(
            (any::<bool>(), 0_u64..0x140, prop_oneof![Just(1_usize), Just(2), Just(4), Just(8)], any::<u64>(), 0_usize..3),
            0..200,
        )
    ) {
        let rig = Rig::new();
        for (write, offset, length, value, kick) in accesses {
            // Steps of a driver are more likely than by chance.
            let value = if offset == STATUS { value % 0x100 } else { value };
            let mut data = value.to_le_bytes();
            if write {
                rig.registers.write(offset & !3, &data[..length]);
            } else {
                rig.registers.read(offset, &mut data[..length]);
            }
            if let Some(kick) = rig.kicks.get(kick) {
                kick.write(1).unwrap();
            }
        }
        rig.set(VIRTIO_MMIO_STATUS, 0);
        while rig.interrupt.read().is_ok() {}
        rig.negotiate(MODERN);
        // Nobody wrote to memory, so the rings are empty.
        rig.set_up_queue(0, 16, 0x8000);
        rig.driver_ok();
        rig.push(0x8000);
    }
}
