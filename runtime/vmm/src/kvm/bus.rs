//! What a vCPU's accesses reach: the virtio-mmio devices, the serial port, the reset line. All else reads as ones, as
//! on a bus where nobody answers, and takes writes without effect.

use std::fs::File;
use std::io;
use std::sync::{Mutex, PoisonError};

use vm_superio::{Serial, Trigger, serial::NoEvents};
use vmm_sys_util::eventfd::EventFd;

use super::layout;
use super::virtio_mmio::VirtioMmio;

/// The guest asked for the VM's end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// By the reset line.
    Reset,
}

/// The devices of a VM.
#[derive(Debug)]
pub struct Bus {
    devices: Vec<VirtioMmio>,
    serial: Mutex<SerialPort>,
}

/// The port through which the kernel's console comes; what the guest should read is not sent.
type SerialPort = Serial<Interrupt, NoEvents, File>;

/// The serial port's interrupt.
#[derive(Debug)]
pub struct Interrupt(pub EventFd);

impl Trigger for Interrupt {
    type E = io::Error;

    fn trigger(&self) -> Result<(), Self::E> {
        self.0.write(1)
    }
}

impl Bus {
    /// `devices` in the order of their addresses; `console` gets what the guest writes to the serial port, and must
    /// not block.
    pub fn new(devices: Vec<VirtioMmio>, console: File, serial_interrupt: EventFd) -> Self {
        Self {
            devices,
            serial: Mutex::new(Serial::new(Interrupt(serial_interrupt), console)),
        }
    }

    fn device(&self, address: u64) -> Option<(&VirtioMmio, u64)> {
        let offset = address.checked_sub(layout::VIRTIO_MMIO)?;
        let device = self
            .devices
            .get((offset / layout::VIRTIO_MMIO_BYTES) as usize)?;
        Some((device, offset % layout::VIRTIO_MMIO_BYTES))
    }

    /// Reads at a physical address.
    pub fn mmio_read(&self, address: u64, data: &mut [u8]) {
        match self.device(address) {
            Some((device, offset)) => device.read(offset, data),
            None => data.fill(0xff),
        }
    }

    /// Writes at a physical address.
    pub fn mmio_write(&self, address: u64, data: &[u8]) {
        if let Some((device, offset)) = self.device(address) {
            device.write(offset, data);
        }
    }

    /// Reads a port.
    pub fn port_read(&self, port: u16, data: &mut [u8]) {
        data.fill(0xff);
        match (serial_register(port), port, data) {
            (Some(register), _, [byte]) => *byte = self.serial().read(register),
            // The controller is ready for a command, always.
            (None, layout::RESET_PORT, data) => data.fill(0),
            _ => {}
        }
    }

    /// Writes a port. Something, when the guest asked for the VM's end.
    pub fn port_write(&self, port: u16, data: &[u8]) -> Option<Stop> {
        match (serial_register(port), port, data) {
            (Some(register), _, [byte]) => {
                // Fails when the console's reader is slower than the guest: the guest does not wait for it.
                let _ = self.serial().write(register, *byte);
                None
            }
            (None, layout::RESET_PORT, [layout::RESET_COMMAND]) => Some(Stop::Reset),
            _ => None,
        }
    }

    fn serial(&self) -> std::sync::MutexGuard<'_, SerialPort> {
        self.serial.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn serial_register(port: u16) -> Option<u8> {
    let register = port.checked_sub(layout::SERIAL_PORT)?;
    (register < layout::SERIAL_PORTS).then_some(register as u8)
}
