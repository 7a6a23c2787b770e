//! What only our own VMM promises. What both backends do is in vm.rs.

mod common;

use std::fs;
use std::time::{Duration, Instant};

use common::{Guest, PATIENCE, file_of};
use podvisor_vmm::kvm::{self, KvmError};
use podvisor_vmm::{Backend, ExitReason, VmConfig, VmCounters};
use tokio::time::timeout;

/// The tests that boot a guest need a KVM that can: the nested host has it. Says so where it is not asked for.
fn on_kvm() -> bool {
    let asked = matches!(common::backend(), Backend::Kvm);
    if !asked {
        println!("SKIPPED: PODVISOR_VMM is not kvm");
    }
    asked
}

/// Why a VM that `change` has changed cannot be.
fn refusal(change: impl FnOnce(&mut VmConfig)) -> Option<String> {
    let kernel = common::prerequisites()?;
    let (mut config, ..) = common::config(&kernel);
    change(&mut config);
    match kvm::start(config) {
        Err(KvmError::Config(text)) => Some(text),
        // Without a /dev/kvm nothing is looked at.
        Err(error @ KvmError::Call { .. }) => {
            println!("SKIPPED: {error}");
            None
        }
        Err(error) => panic!("{error}"),
        Ok(_) => panic!("it starts"),
    }
}

/// Before there is a VM: on any machine with a /dev/kvm, also one that cannot run a guest.
#[tokio::test]
async fn what_cannot_be_says_why() {
    let kernel = common::prerequisites().and_then(|path| fs::read(path).ok());
    let Some(kernel) = kernel else { return };
    let with_kernel = |content: &[u8]| refusal(|config| config.kernel = file_of(content).into());
    let contains = |refusal: Option<String>, part: &str| {
        if let Some(text) = refusal {
            assert!(text.contains(part), "{part:?} is not in {text:?}");
        }
    };
    contains(with_kernel(b""), "the kernel is empty");
    contains(with_kernel(&vec![7; 100_000]), "Invalid Elf magic number");
    contains(with_kernel(&kernel[..20]), "Unable to read elf header");
    contains(with_kernel(&kernel[..kernel.len() / 2]), "Unable to read");
    contains(
        refusal(|config| config.initramfs = file_of(b"").into()),
        "the initramfs is empty",
    );
    let large = tempfile::tempfile().unwrap();
    large.set_len(200 << 20).unwrap();
    contains(
        refusal(|config| config.initramfs = large.into()),
        "128 MiB of memory are too little for this kernel",
    );
    contains(
        refusal(|config| config.memory_bytes = 32 << 20),
        "33554432 bytes of memory: at least",
    );
    contains(
        refusal(|config| config.vcpus = 0),
        "0 virtual CPUs: from 1 to",
    );
    contains(
        refusal(|config| config.vcpus = 100_000),
        "100000 virtual CPUs: from 1 to",
    );
    contains(
        refusal(|config| config.cmdline = "x".repeat(4000)),
        "bytes: less than 2048 are possible",
    );
}

#[tokio::test]
async fn several_cpus() {
    if !on_kvm() {
        return;
    }
    let booted = Guest::boot_with(|config| config.vcpus = 3).await;
    let mut guest = booted.expect("the nested host has all prerequisites");
    assert_eq!(guest.command("cpus").await, "3");
    assert!(exits(&guest.vmm.counters()) > 0);
    guest.tell("reboot").await;
    let ended = timeout(PATIENCE, guest.vmm.exited()).await;
    assert_eq!(ended.unwrap(), ExitReason::GuestReset);
}

fn exits(counters: &VmCounters) -> u64 {
    counters.read().exits.iter().map(|(_, count)| count).sum()
}

#[tokio::test]
async fn a_paused_guest_does_nothing_until_it_is_resumed() {
    if !on_kvm() {
        return;
    }
    let mut guest = Guest::boot().await.expect("prerequisites");
    // A guest that has not yet heard that its connection was taken gives it up after two seconds.
    assert_eq!(guest.command("cpus").await, "1");
    guest.vmm.pause().await.unwrap();
    guest.vmm.pause().await.unwrap();
    let answered = timeout(Duration::from_secs(3), guest.command("cpus")).await;
    assert!(answered.is_err(), "a paused guest answered");
    guest.vmm.resume().await.unwrap();
    // The answer to the question that was asked while it was paused.
    assert_eq!(guest.command("cpus").await, "1");

    guest.vmm.pause().await.unwrap();
    timeout(PATIENCE, guest.vmm.kill())
        .await
        .expect("a paused guest can be ended");
    assert_eq!(guest.vmm.exited().await, ExitReason::Killed);
}

/// Resident bytes of guest memory, by proc(5)'s smaps.
fn resident(counters: &VmCounters) -> u64 {
    let ranges = counters.read().guest_memory;
    let smaps = fs::read_to_string("/proc/self/smaps").unwrap();
    let mut in_guest_memory = false;
    let mut kib = 0;
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        let first = words.next().unwrap_or_default();
        let bounds = first.split_once('-').and_then(|(start, end)| {
            let hex = |text| u64::from_str_radix(text, 16).ok();
            Some((hex(start)?, hex(end)?))
        });
        if let Some((start, end)) = bounds {
            in_guest_memory = ranges
                .iter()
                .any(|(from, length)| start >= *from && end <= from + length);
        } else if in_guest_memory && first == "Rss:" {
            kib += words.next().unwrap().parse::<u64>().unwrap();
        }
    }
    kib << 10
}

#[tokio::test]
async fn memory_that_the_guest_freed_comes_back() {
    if !on_kvm() {
        return;
    }
    let growing = |config: &mut VmConfig| config.max_memory_bytes = 256 << 20;
    let mut guest = Guest::boot_with(growing).await.expect("prerequisites");
    assert_eq!(guest.vmm.counters().read().guest_memory.len(), 1);
    touched_memory_comes_back(&mut guest, 48 << 20).await;
    // More than it booted with.
    guest.grow(256 << 20).await;
    assert_eq!(guest.vmm.counters().read().guest_memory.len(), 2);
    touched_memory_comes_back(&mut guest, 160 << 20).await;
}

async fn touched_memory_comes_back(guest: &mut Guest, touched: u64) {
    let counters = guest.vmm.counters();
    let released = || {
        let stats = counters.read();
        let balloon = stats.devices.iter().find(|device| device.name == "balloon");
        balloon.expect("a balloon").own[0].1
    };
    let (idle, before) = (resident(&counters), released());
    assert!(idle > 0 && idle < 100 << 20, "{idle} bytes");
    assert_eq!(guest.command(&format!("touch {touched}")).await, "ok");
    // The guest's kernel reports free pages some seconds later. It never comes back in full: page tables, free pages
    // in small pieces.
    let begin = Instant::now();
    loop {
        let now = resident(&counters);
        let released = released() - before;
        if released >= touched / 4 * 3 && now < idle + touched / 4 {
            return;
        }
        assert!(
            begin.elapsed() < PATIENCE,
            "{now} bytes are resident, {idle} were before; {released} were released"
        );
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
}
