//! The VM's life: start, boot with a deadline, end.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use podvisor_proto::monitor::{self, VmSpec};
use podvisor_vmm::qemu::{Accel, QemuConfig, TscMeter};
use podvisor_vmm::{Backend, ExitReason, VmConfig, seccomp};
use tokio::time::{Instant, timeout_at};

use crate::pod::guest::Guest;
use crate::pod::{PHASE_VM_START, Pod};
use crate::state::now_ns;

/// What every guest's kernel is told:
/// - its console, where only warnings go, is the serial port;
/// - a panic ends the VM at once;
/// - the CPU's random numbers will do, for there is no other source;
/// - no checks of hardware that is not there, no switch of code for one CPU and back;
/// - waits for RCU are short: the guest's start has many, and nobody else to disturb;
/// - per-CPU memory is had by the page: by default it comes in units of 2 MiB of addresses a CPU, for each of which the
///   memory controller keeps 4 MiB of accounts as soon as containers need more than the first few KiB;
/// - free memory is reported to the host in pieces of 64 KiB and more, not of 2 MiB: what is free in a huge page of the
///   host's beside a few pages in use is given back too.
const KERNEL_CMDLINE: &str = "console=ttyS0 quiet panic=-1 random.trust_cpu=on \
     no_timer_check noreplace-smp rcupdate.rcu_expedited=1 percpu_alloc=page \
     page_reporting.page_reporting_order=4";

/// The kernel's words when it dies.
const PANIC_MARK: &str = "Kernel panic - not syncing";

/// The backend that podvisord wants.
///
/// # Errors
/// The accelerator's name is not known.
pub fn backend(spec: &VmSpec) -> io::Result<Backend> {
    if spec.backend() == monitor::Backend::Kvm {
        return Ok(Backend::Kvm);
    }
    let accel = match spec.accel.as_str() {
        "kvm" => Accel::Kvm,
        "tcg" => Accel::Tcg,
        other => {
            let text = format!("unknown accelerator {other:?}");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
    };
    Ok(Backend::Qemu(QemuConfig {
        binary: PathBuf::from(&spec.qemu),
        accel,
    }))
}

/// The kernel's command line: ours, what `backend` needs, and `more`, which wins.
pub fn kernel_cmdline(backend: &Backend, tsc: TscMeter, more: &str) -> String {
    // podvisord may have measured the clock's rate once for all.
    let measured = more.contains("tsc_early_khz=");
    let clock = match backend {
        Backend::Qemu(qemu) if qemu.accel == Accel::Tcg && !measured => tsc.tcg_cmdline(),
        Backend::Qemu(_) | Backend::Kvm => String::new(),
    };
    [KERNEL_CMDLINE, &clock, more]
        .join(" ")
        .trim_end()
        .to_owned()
}

/// Starts the VM, waits for its end, and records why it ended. Has to run on the main thread: the
/// kernel kills QEMU when the thread that started it ends.
pub async fn run(pod: Arc<Pod>, config: VmConfig, backend: Backend, boot_timeout: Duration) {
    let Some(guest) = pod.guest() else { return };
    let (reason, message) = live(&pod, guest, config, backend, boot_timeout).await;
    pod.set_gone(reason, message).await;
}

/// One word and a sentence about the end.
async fn live(
    pod: &Pod,
    guest: &Guest,
    config: VmConfig,
    backend: Backend,
    boot_timeout: Duration,
) -> (&'static str, String) {
    let boot_deadline = Instant::now() + boot_timeout;
    let start_ns = now_ns();
    // Its end is corrected by the guest's own clock, once the agent is there.
    let started = tokio::select! {
        started = timeout_at(boot_deadline, podvisor_vmm::start(config, backend)) => started,
        () = guest.kill().cancelled() => return ("Shutdown", String::new()),
    };
    let mut vm = match started {
        Ok(Ok(vm)) => vm,
        Ok(Err(error)) => {
            let message = with_console(guest, &format!("the VM did not start: {error}")).await;
            return ("VmmExited", message);
        }
        Err(_) => return ("BootTimeout", boot_timeout_message(boot_timeout)),
    };
    // Not before: QEMU would inherit it.
    if let Err(error) = seccomp::confine(seccomp::Thread::Main) {
        vm.kill().await;
        return ("VmmExited", format!("no system call filter: {error}"));
    }
    pod.add_phase(PHASE_VM_START, start_ns, now_ns());
    let vmm_pid = vm.pid().unwrap_or_default();
    pod.state().update(|snapshot| snapshot.vmm_pid = vmm_pid);
    guest.set_running(vm.as_ref());
    tracing::info!(vmm_pid, backend = vm.backend(), "the VM runs");

    let booted = async {
        tokio::select! {
            booted = timeout_at(boot_deadline, guest.agent_ready()) => booted.is_ok(),
            () = guest.kill().cancelled() => true,
        }
    };
    tokio::select! {
        exit = vm.exited() => return exit_reason(pod, guest, exit).await,
        booted = booted => if !booted {
            vm.kill().await;
            let message = with_console(guest, &boot_timeout_message(boot_timeout)).await;
            return ("BootTimeout", message);
        }
    }
    if let Err(error) = vm.booted() {
        // The pod works, and keeps memory that it has no use for.
        tracing::warn!(%error, "what the boot needed stays");
    }
    tokio::select! {
        exit = vm.exited() => exit_reason(pod, guest, exit).await,
        () = guest.kill().cancelled() => {
            vm.kill().await;
            ("Shutdown", String::new())
        }
    }
}

async fn exit_reason(pod: &Pod, guest: &Guest, exit: ExitReason) -> (&'static str, String) {
    if pod.is_shutting_down() {
        return ("Shutdown", String::new());
    }
    let message = with_console(guest, &exit.to_string()).await;
    let panicked = exit == ExitReason::GuestPanic || message.contains(PANIC_MARK);
    let reason = match exit {
        _ if panicked => "GuestPanic",
        ExitReason::GuestShutdown | ExitReason::GuestReset => "GuestExited",
        ExitReason::TripleFault => "TripleFault",
        ExitReason::VcpuFailed(_) => "VcpuFailed",
        _ => "VmmExited",
    };
    (reason, message)
}

fn boot_timeout_message(boot_timeout: Duration) -> String {
    format!("the guest was not ready within {boot_timeout:?}")
}

/// `message` and the guest's last words.
async fn with_console(guest: &Guest, message: &str) -> String {
    let tail = guest.console().tail_at_end().await;
    if tail.is_empty() {
        return format!("{message}; its console is empty");
    }
    format!("{message}; its console ends with:\n{tail}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn qemu(accel: &str) -> VmSpec {
        VmSpec {
            qemu: "/q".to_owned(),
            accel: accel.to_owned(),
            ..VmSpec::default()
        }
    }

    #[test]
    fn the_command_line() {
        let tcg = backend(&qemu("tcg")).expect("known");
        let line = |backend, more| kernel_cmdline(backend, TscMeter::start(), more);
        assert_eq!(line(&Backend::Kvm, ""), KERNEL_CMDLINE);
        assert!(line(&tcg, "loglevel=7").contains(" tsc_early_khz="));
        assert!(line(&tcg, "loglevel=7").ends_with(" loglevel=7"));
        let measured = line(&tcg, "tsc_early_khz=1");
        assert_eq!(measured.matches("tsc_early_khz").count(), 1);
    }

    #[test]
    fn backends() {
        let Ok(Backend::Qemu(config)) = backend(&qemu("kvm")) else {
            panic!("not QEMU")
        };
        assert_eq!(config.accel, Accel::Kvm);
        assert!(backend(&qemu("hax")).is_err());
    }
}
