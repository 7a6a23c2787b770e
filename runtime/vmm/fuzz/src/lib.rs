//! What the targets have in common: the drivers of `tests/hostile`, which say how the bytes are read.
//!
//! Each target is a device; the bytes are what its driver does. `vsock_packets` has a driver that keeps the rules of
//! queues, and sends packets that are the bytes.

#[path = "../../tests/hostile/driver.rs"]
pub mod driver;
#[path = "../../tests/hostile/subjects.rs"]
pub mod subjects;
#[path = "../../src/test_queue.rs"]
pub mod test_queue;

/// Lets a driver loose on a new device.
pub fn drive(device: &str, steps: &[u8]) {
    let memory = driver::memory();
    let mut subject = subjects::subject(device);
    driver::Driver::new(&memory, &mut *subject).run(&mut *subject, steps);
}
