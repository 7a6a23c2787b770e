//! Which accelerator QEMU gets, decided once at start.

use crate::config::{Accel, Config};

/// "kvm" or "tcg". `auto` takes KVM only when the monitor's probe guest ran on it: a /dev/kvm that
/// opens is no proof (design, "The VM"). What was found goes to `warnings`.
pub async fn choose(config: &Config, warnings: &mut Vec<String>) -> &'static str {
    match config.qemu.accel {
        Accel::Kvm => "kvm",
        Accel::Tcg => "tcg",
        Accel::Auto => match probe(config).await {
            Ok(()) => "kvm",
            Err(reason) => {
                warnings.push(format!(
                    "KVM cannot be used ({reason}): VMs run in software, slowly"
                ));
                "tcg"
            }
        },
    }
}

/// Runs `podvisor-monitor probe-kvm` in a process of its own: whatever a broken KVM does to it, does
/// not happen to podvisord.
async fn probe(config: &Config) -> Result<(), String> {
    const DEADLINE: std::time::Duration = std::time::Duration::from_secs(5);
    let monitor = config.monitor_path().map_err(|error| error.to_string())?;
    let output = tokio::process::Command::new(&monitor)
        .arg("probe-kvm")
        .stdin(std::process::Stdio::null())
        .kill_on_drop(true)
        .output();
    match tokio::time::timeout(DEADLINE, output).await {
        Err(_) => Err("the probe guest did not end".into()),
        Ok(Err(error)) => Err(format!("{}: {error}", monitor.display())),
        Ok(Ok(output)) if output.status.success() => Ok(()),
        Ok(Ok(output)) => Err(String::from_utf8_lossy(&output.stderr).trim().to_owned()),
    }
}
