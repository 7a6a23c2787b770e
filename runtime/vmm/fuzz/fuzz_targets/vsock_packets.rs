//! Packets of any content, in chains by the rules. Each has one byte before it for what the host does meanwhile and one
//! for the payload's length.

#![no_main]

use podvisor_vmm::DeviceEvent;
use podvisor_vmm_fuzz::driver::{DATA, Driver, MESSAGE, SIZE, WRITE, memory};
use podvisor_vmm_fuzz::subjects::subject;

const HEADER_BYTES: usize = 44;
const RX: usize = 0;
const TX: usize = 1;
const BUFFER: u32 = 1024;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let memory = memory();
    let mut subject = subject("vsock");
    let mut driver = Driver::new(&memory, &mut *subject);
    for index in 0..SIZE {
        post(&mut driver, index);
    }
    let mut rest = bytes;
    while let Some((&[what, payload], packet)) = rest.split_first_chunk() {
        let length = packet.len().min(HEADER_BYTES + usize::from(payload));
        let (packet, after) = packet.split_at(length);
        rest = after;
        // The addresses are always the same.
        let mut packet = packet.to_vec();
        for (at, cid) in [(0, 3), (8, 2)] {
            if let Some(field) = packet.get_mut(at..at + 8) {
                field.fill(0);
                field[0] = cid;
            }
        }
        driver.write(MESSAGE, &packet);
        driver.request(&mut *subject, TX, &[(MESSAGE, length as u32, 0)]);
        subject.host(what);
        driver.process(&mut *subject, DeviceEvent::Wake);
        while let Some((index, written)) = driver.queues[RX].used() {
            assert!((HEADER_BYTES as u32..=BUFFER).contains(&written));
            post(&mut driver, index as u16);
        }
        driver.process(&mut *subject, DeviceEvent::Queue(RX));
    }
    driver.run(&mut *subject, &[]);
});

fn post(driver: &mut Driver<'_>, index: u16) {
    let address = DATA + u64::from(index) * u64::from(BUFFER);
    driver.queues[RX].push_at(index, &[(address, BUFFER, WRITE)]);
}
