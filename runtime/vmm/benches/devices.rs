//! What a device costs per request, without a VM: driver and host are played here (`rigs`), and are in the time.

#![allow(missing_docs, reason = "criterion's macros")]

mod rigs;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};

fn devices(criterion: &mut Criterion) {
    for case in rigs::cases() {
        let mut group = criterion.benchmark_group(case.group);
        let mut rig = (case.rig)(case.bytes);
        group.throughput(Throughput::Bytes(case.bytes.into()));
        group.bench_function(format!("{} {}", case.name, case.bytes), |bencher| {
            bencher.iter(|| {
                rig.before();
                rig.process();
                rig.after();
            });
        });
    }
}

criterion_group!(benches, devices);
criterion_main!(benches);
