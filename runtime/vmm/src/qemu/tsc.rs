//! What a guest under TCG must be told of the host's clock.
//!
//! Under TCG the guest's TSC runs at the host's rate, but the microvm machine gives the guest nothing to calibrate it
//! against: without being told, it has no high resolution timers. The rate is not in /proc/cpuinfo on a host that is a
//! virtual machine itself, so it is measured.

use std::arch::x86_64::_rdtsc;
use std::time::{Duration, Instant};

/// Shortest measurement: reading both clocks is good to some 20 ns, so that this is good to a few parts per million.
const SHORTEST: Duration = Duration::from_millis(10);

/// A measurement of the TSC's rate that has begun. The longer ago that was, the better it gets.
#[derive(Debug, Clone, Copy)]
pub struct TscMeter {
    began: (Instant, u64),
}

impl TscMeter {
    /// Begins to measure.
    pub fn start() -> Self {
        Self {
            began: read_clocks(),
        }
    }

    /// The TSC's rate in kHz. Blocks for as long as the measurement is younger than 10 ms.
    pub fn khz(&self) -> u64 {
        let (began, first) = self.began;
        std::thread::sleep(SHORTEST.saturating_sub(began.elapsed()));
        let (now, last) = read_clocks();
        let ticks = u128::from(last.wrapping_sub(first));
        u64::try_from(ticks * 1_000_000 / now.duration_since(began).as_nanos().max(1))
            .unwrap_or(u64::MAX)
    }

    /// What a guest under TCG needs on its kernel's command line. Not for KVM, whose guests have better clocks.
    pub fn tcg_cmdline(&self) -> String {
        // QEMU's APIC timer runs at 1 GHz; `lapic_timer_khz` is an option of our kernel.
        format!(
            "tsc_early_khz={} tsc=reliable lapic_timer_khz=1000000",
            self.khz()
        )
    }
}

/// Both clocks at one time: the best of a few tries, by how little the TSC moved meanwhile.
fn read_clocks() -> (Instant, u64) {
    let read = || {
        // SAFETY: every x86-64 processor has it.
        let before = unsafe { _rdtsc() };
        let now = Instant::now();
        // SAFETY: as above.
        let after = unsafe { _rdtsc() };
        (now, before, after.wrapping_sub(before))
    };
    let best = [read(), read(), read(), read()]
        .into_iter()
        .min_by_key(|(_, _, took)| *took);
    // There are four of them.
    let (now, before, took) = best.unwrap_or_else(read);
    (now, before.wrapping_add(took / 2))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn measurements_agree() {
        let meter = TscMeter::start();
        let first = meter.khz();
        let second = TscMeter::start().khz();
        // The load of the machine decides how good they are; a wrong unit or formula is off by far more.
        assert!(
            first.abs_diff(second) < first / 100,
            "{first} and {second} kHz"
        );
        assert!((100_000..100_000_000).contains(&first), "{first} kHz");
        assert!(meter.tcg_cmdline().starts_with("tsc_early_khz="));
    }
}
