//! The requests of `rigs`, each by itself, for valgrind to count the instructions of [`measured`]: that is the device
//! alone, without driver, host and kernel (`scripts/instructions`).
//!
//! Without arguments it lists the requests; with the number of one it carries that out [`TIMES`] times.

mod rigs;

use rigs::Rig;

/// Requests that are counted.
const TIMES: usize = 1000;

/// What is not counted: until nothing grows or happens for the first time any more.
const BEFORE: usize = 100;

#[inline(never)]
fn measured(rig: &mut dyn Rig) {
    rig.process();
}

fn main() {
    let cases = rigs::cases();
    // Cargo's own argument is `--bench`.
    let number = std::env::args().find_map(|argument| argument.parse::<usize>().ok());
    let Some(number) = number else {
        for (number, case) in cases.iter().enumerate() {
            println!(
                "{number}\t{} {}\t{}\t{TIMES}",
                case.group, case.name, case.bytes
            );
        }
        return;
    };
    let case = &cases[number];
    let mut rig = (case.rig)(case.bytes);
    for _ in 0..BEFORE {
        rig.before();
        rig.process();
        rig.after();
    }
    for _ in 0..TIMES {
        rig.before();
        measured(&mut *rig);
        rig.after();
    }
}
