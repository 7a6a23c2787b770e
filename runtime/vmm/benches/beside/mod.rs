//! What benches share that measure ours beside QEMU's own, by turns.

use std::fs::{File, Permissions};
use std::io::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use crate::common::QEMU;

/// A program in `dir` that is QEMU with these arguments more.
pub fn qemu_with(dir: &Path, arguments: &str) -> PathBuf {
    let path = dir.join("qemu");
    let mut script = File::create(&path).unwrap();
    writeln!(script, "#!/bin/sh\nexec {QEMU} \"$@\" {arguments}").unwrap();
    script
        .set_permissions(Permissions::from_mode(0o755))
        .unwrap();
    path
}

/// Prints medians of what was measured, ours and theirs, and whether ours are as many times theirs as is promised; all
/// in a `unit` of which more is better.
pub fn print<const N: usize>(
    unit: &str,
    names: [&str; N],
    other: &str,
    ours: &[[f64; N]],
    theirs: &[[f64; N]],
    promised: f64,
) {
    let unit = format!("{unit}, median");
    println!(
        "{unit:28} {:>12} {other:>12} {:>7}  at least {promised:.1}x",
        "podvisor", "ratio"
    );
    for (i, name) in names.iter().enumerate() {
        let (ours, theirs) = (median(ours, i), median(theirs, i));
        let ratio = ours / theirs;
        let kept = if ratio >= promised {
            "kept"
        } else {
            "NOT KEPT"
        };
        println!("{name:28} {ours:>12.1} {theirs:>12.1} {ratio:>6.2}x  {kept}");
    }
}

fn median<const N: usize>(rates: &[[f64; N]], of: usize) -> f64 {
    let mut values: Vec<f64> = rates.iter().map(|rates| rates[of]).collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
