//! The VM's life: start, boot with a deadline, end.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use podvisor_vmm::qemu::{self, Accel, QemuConfig};
use podvisor_vmm::{ExitReason, VmConfig};
use tokio::time::{Instant, timeout_at};

use crate::pod::{PHASE_VM_START, Pod};
use crate::state::now_ns;

/// What every guest's kernel is told. A panic ends the VM at once (with `-no-reboot` a reset does),
/// and its words go to the serial port, which is the console we keep.
pub const KERNEL_CMDLINE: &str = "console=ttyS0 quiet panic=-1 reboot=t";

/// The kernel's words when it dies.
const PANIC_MARK: &str = "Kernel panic - not syncing";

/// QEMU, as podvisord wants it.
///
/// # Errors
/// The accelerator's name is not known.
pub fn qemu_config(binary: &str, accel: &str) -> io::Result<QemuConfig> {
    let accel = match accel {
        "kvm" => Accel::Kvm,
        "tcg" => Accel::Tcg,
        other => {
            let text = format!("unknown accelerator {other:?}");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
    };
    Ok(QemuConfig {
        binary: PathBuf::from(binary),
        accel,
    })
}

/// Starts the VM, waits for its end, and records why it ended. Has to run on the main thread: the
/// kernel kills QEMU when the thread that started it ends.
pub async fn run(pod: Arc<Pod>, config: VmConfig, qemu: QemuConfig, boot_timeout: Duration) {
    let (reason, message) = live(&pod, config, qemu, boot_timeout).await;
    pod.set_vm_gone(reason, message).await;
}

/// One word and a sentence about the end.
async fn live(
    pod: &Pod,
    config: VmConfig,
    qemu: QemuConfig,
    boot_timeout: Duration,
) -> (&'static str, String) {
    let boot_deadline = Instant::now() + boot_timeout;
    let start_ns = now_ns();
    // Its end is corrected by the guest's own clock, once the agent is there.
    let mut vm = match timeout_at(boot_deadline, qemu::start(config, qemu)).await {
        Ok(Ok(vm)) => vm,
        Ok(Err(error)) => {
            let message = with_console(pod, &format!("the VM did not start: {error}")).await;
            return ("VmmExited", message);
        }
        Err(_) => return ("BootTimeout", boot_timeout_message(boot_timeout)),
    };
    pod.add_phase(PHASE_VM_START, start_ns, now_ns());
    let vmm_pid = vm.pid().unwrap_or_default();
    pod.state().update(|snapshot| snapshot.vmm_pid = vmm_pid);
    tracing::info!(vmm_pid, backend = vm.backend(), "the VM runs");

    let booted = async {
        tokio::select! {
            booted = timeout_at(boot_deadline, pod.agent_ready()) => booted.is_ok(),
            () = pod.vm_kill().cancelled() => true,
        }
    };
    tokio::select! {
        exit = vm.exited() => return exit_reason(pod, exit).await,
        true = booted => {}
        else => {
            vm.kill().await;
            let message = with_console(pod, &boot_timeout_message(boot_timeout)).await;
            return ("BootTimeout", message);
        }
    }
    tokio::select! {
        exit = vm.exited() => exit_reason(pod, exit).await,
        () = pod.vm_kill().cancelled() => {
            vm.kill().await;
            ("Shutdown", String::new())
        }
    }
}

async fn exit_reason(pod: &Pod, exit: ExitReason) -> (&'static str, String) {
    if pod.is_shutting_down() {
        return ("Shutdown", String::new());
    }
    let message = with_console(pod, &exit.to_string()).await;
    let panicked = exit == ExitReason::GuestPanic || message.contains(PANIC_MARK);
    let reason = match exit {
        _ if panicked => "GuestPanic",
        ExitReason::GuestShutdown | ExitReason::GuestReset => "GuestExited",
        _ => "VmmExited",
    };
    (reason, message)
}

fn boot_timeout_message(boot_timeout: Duration) -> String {
    format!("the guest was not ready within {boot_timeout:?}")
}

/// `message` and the guest's last words.
async fn with_console(pod: &Pod, message: &str) -> String {
    let tail = pod.console().tail_at_end().await;
    if tail.is_empty() {
        return format!("{message}; its console is empty");
    }
    format!("{message}; its console ends with:\n{tail}")
}
