//! Every device against drivers that do anything: broken rings, looped chains, descriptors outside memory, tables of
//! nonsense, lengths of nothing and of 4 GiB, resets in between. A device answers, or gives up until it is reset; it
//! does not panic, does not go on for ever, keeps no more memory than its own, and works for the next driver.
//!
//! - `driver`: what a driver does, and how it is encoded
//! - `subjects`: the devices
//! - `counting`: how much memory is in use
//! - `regressions/DEVICE/*`: what fuzzing has found (`runtime/vmm/fuzz` drives the same drivers)

mod counting;
mod driver;
mod subjects;
#[path = "../../src/test_queue.rs"]
#[allow(dead_code, reason = "shared with other tests")]
mod test_queue;

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use driver::{Driver, INDIRECT, NEXT, RECORD, SIZE, Subject, WRITE};
use podvisor_vmm::DeviceEvent;
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::test_runner::TestRunner;
use subjects::subject;
use vm_memory::{Bytes as _, GuestAddress};

/// Memory that a device may take beside what it has from the beginning, in bytes: for the slices of a few chains. The
/// tests' own frames are in it too.
const FIXED: usize = 160 << 10;

/// A vsock device has connections as well. Each costs no more than its window, and in these tests there are few.
const FIXED_VSOCK: usize = 4 << 20;

/// Lets a driver loose on a new device, and checks what that took of memory.
fn drive(name: &str, act: impl FnOnce(Driver<'_>, &mut dyn Subject)) {
    let memory = driver::memory();
    let mut subject = subject(name);
    let driver = Driver::new(&memory, &mut *subject);
    let before = counting::in_use();
    counting::forget_peak();
    act(driver, &mut *subject);
    let taken = counting::peak() - before;
    let allowed = if name == "vsock" { FIXED_VSOCK } else { FIXED };
    assert!(taken <= allowed, "{taken} bytes");
}

fn survives_any_driver(name: &str) {
    let mut runner = TestRunner::new(ProptestConfig {
        cases: 400,
        failure_persistence: None,
        ..ProptestConfig::default()
    });
    let steps = vec(any::<[u8; RECORD]>(), 0..200);
    runner
        .run(&steps, |steps| {
            drive(name, |driver, subject| driver.run(subject, &steps.concat()));
            Ok(())
        })
        .unwrap();
    let found = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/hostile/regressions")
        .join(name);
    for file in std::fs::read_dir(found).into_iter().flatten() {
        let steps = std::fs::read(file.unwrap().path()).unwrap();
        drive(name, |driver, subject| driver.run(subject, &steps));
    }
}

/// Each chain is a table of 11264 descriptors, far more than a queue has.
fn survives_long_tables(name: &str) {
    const ENTRIES: u16 = 11264;
    let tables = [
        (0, 0),
        (1, 0),
        (1, WRITE),
        (16, WRITE),
        (0, WRITE),
        (u32::MAX, 0),
    ];
    for (length, flags) in tables {
        drive(name, |mut driver, subject| {
            for entry in 0..ENTRIES {
                let descriptor = [
                    driver::MESSAGE,
                    u64::from(length) | u64::from(NEXT | flags) << 32 | u64::from(entry + 1) << 48,
                ];
                let at = GuestAddress(driver::DATA + 16 * u64::from(entry));
                driver.memory.write_obj(descriptor, at).unwrap();
            }
            for queue in 0..driver.queues.len() {
                for head in 0..SIZE {
                    let table = [(driver::DATA, 16 * u32::from(ENTRIES), INDIRECT)];
                    driver.queues[queue].push_at(head, &table);
                }
                driver.process(subject, DeviceEvent::Queue(queue));
                subject.host(0x91);
                driver.process(subject, DeviceEvent::Wake);
            }
            driver.run(subject, &[]);
        });
    }
}

/// Another thread writes to the queues and to what they are about while the device works.
fn survives_a_restless_driver(name: &str) {
    let memory = driver::memory();
    let mut subject = subject(name);
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            let mut random = 1_u64;
            while !done.load(Ordering::Relaxed) {
                // Of a multiplicative generator (L'Ecuyer 1999), whose upper bits are the better ones.
                random = random.wrapping_mul(0x27bb_2ee6_87b0_b0fd).wrapping_add(1);
                let at = GuestAddress((random >> 32) % 0x1_1000);
                memory.write_obj((random >> 48) as u8, at).unwrap();
            }
        });
        let mut driver = Driver::new(&memory, &mut *subject);
        for round in 0..3000_u16 {
            driver.restart(&mut *subject);
            for queue in 0..driver.queues.len() {
                let message = subject.message(&[round as u8; RECORD]);
                driver.write(driver::MESSAGE, &message);
                for chain in 0..8 {
                    let first = chain * 4 % SIZE;
                    let length = message.len() as u32;
                    let parts = [(driver::MESSAGE, length, 0), (driver::DATA, 1500, WRITE)];
                    driver.queues[queue].push_at(first, &parts[usize::from(round % 2)..]);
                }
                driver.process(&mut *subject, DeviceEvent::Queue(queue));
            }
            subject.host(round as u8);
            driver.process(&mut *subject, DeviceEvent::Wake);
        }
        done.store(true, Ordering::Relaxed);
    });
    let mut driver = Driver::new(&memory, &mut *subject);
    subject.check(&mut driver);
}

macro_rules! hostile {
    ($($device:ident)*) => {
        $(
            mod $device {
                #[test]
                fn survives_any_driver() {
                    super::survives_any_driver(stringify!($device));
                }

                #[test]
                fn survives_long_tables() {
                    super::survives_long_tables(stringify!($device));
                }

                #[test]
                fn survives_a_restless_driver() {
                    super::survives_a_restless_driver(stringify!($device));
                }
            }
        )*
    };
}

hostile!(disk vsock net rng balloon fs);
