//! What VMs run on, decided once at start.

use std::process::Stdio;
use std::time::Duration;

use podvisor_proto::monitor::Backend;
use tokio::process::Command;
use tokio::time::timeout;

use crate::config::{Accel, Config, Vmm};

/// What VMs run on.
#[derive(Debug, Clone)]
pub struct Choice {
    /// Our own VMM, or QEMU.
    pub backend: Backend,
    /// What QEMU executes the guest's instructions by, if it is QEMU: "kvm" or "tcg".
    pub accel: &'static str,
    /// Why KVM cannot be used here. `None`: it can, or nobody asked.
    pub kvm_problem: Option<String>,
}

impl Choice {
    /// The backend as the configuration file names it.
    pub fn name(&self) -> &'static str {
        match self.backend {
            Backend::Kvm => "kvm",
            Backend::Qemu => "qemu",
        }
    }

    /// As `config` says. Where it leaves the choice, KVM is taken only when the monitor's probe guest ran on it: a
    /// /dev/kvm that opens is no proof (design, "The VM").
    pub async fn make(config: &Config) -> Self {
        let asks = config.vmm != Vmm::Qemu || config.qemu.accel == Accel::Auto;
        let kvm_problem = if asks {
            probe(config).await.err()
        } else {
            None
        };
        Self::from_probe(config, kvm_problem)
    }

    fn from_probe(config: &Config, kvm_problem: Option<String>) -> Self {
        let works = kvm_problem.is_none();
        let backend = match config.vmm {
            Vmm::Kvm => Backend::Kvm,
            Vmm::Auto if works => Backend::Kvm,
            Vmm::Auto | Vmm::Qemu => Backend::Qemu,
        };
        let accel = match config.qemu.accel {
            Accel::Kvm => "kvm",
            Accel::Auto if works => "kvm",
            Accel::Auto | Accel::Tcg => "tcg",
        };
        Self {
            backend,
            accel,
            kvm_problem,
        }
    }

    /// Why no VM can start: KVM is demanded and cannot be used.
    pub fn problem(&self) -> Option<&str> {
        match self.backend {
            Backend::Kvm => self.kvm_problem.as_deref(),
            Backend::Qemu => None,
        }
    }

    /// What an operator should know, though VMs start.
    pub fn warning(&self) -> Option<String> {
        match (self.backend, &self.kvm_problem) {
            (Backend::Qemu, Some(problem)) if self.accel == "tcg" => Some(format!(
                "KVM cannot be used, so VMs run in QEMU's software emulation, slowly: {problem}"
            )),
            _ => None,
        }
    }
}

/// Runs `podvisor-monitor probe-kvm` in a process of its own: whatever a broken KVM does to it, does
/// not happen to podvisord.
async fn probe(config: &Config) -> Result<(), String> {
    const DEADLINE: Duration = Duration::from_secs(5);
    let monitor = config.monitor_path().map_err(|error| error.to_string())?;
    let output = Command::new(&monitor)
        .arg("probe-kvm")
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output();
    match timeout(DEADLINE, output).await {
        Err(_) => Err("the probe guest did not end: its timer does not interrupt it".into()),
        Ok(Err(error)) => Err(format!("{}: {error}", monitor.display())),
        Ok(Ok(output)) if output.status.success() => Ok(()),
        Ok(Ok(output)) => Err(String::from_utf8_lossy(&output.stderr).trim().to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn choice(vmm: Vmm, accel: Accel, problem: Option<&str>) -> Choice {
        let mut config = Config {
            vmm,
            ..Config::default()
        };
        config.qemu.accel = accel;
        Choice::from_probe(&config, problem.map(str::to_owned))
    }

    #[test]
    fn auto_follows_the_probe() {
        let works = choice(Vmm::Auto, Accel::Auto, None);
        assert_eq!(works.backend, Backend::Kvm);
        assert_eq!((works.problem(), works.warning()), (None, None));

        let falls_back = choice(Vmm::Auto, Accel::Auto, Some("no /dev/kvm"));
        assert_eq!(falls_back.backend, Backend::Qemu);
        assert_eq!(falls_back.accel, "tcg");
        assert_eq!(falls_back.problem(), None);
        let warning = falls_back.warning().expect("a warning");
        assert!(warning.ends_with("slowly: no /dev/kvm"), "{warning}");
    }

    #[test]
    fn what_is_demanded_is_not_replaced() {
        let kvm = choice(Vmm::Kvm, Accel::Auto, Some("no /dev/kvm"));
        assert_eq!(kvm.backend, Backend::Kvm);
        assert_eq!(kvm.problem(), Some("no /dev/kvm"));
        let qemu = choice(Vmm::Qemu, Accel::Auto, None);
        assert_eq!((qemu.backend, qemu.accel), (Backend::Qemu, "kvm"));
        let tcg = choice(Vmm::Qemu, Accel::Tcg, None);
        assert_eq!((tcg.accel, tcg.warning()), ("tcg", None));
    }
}
