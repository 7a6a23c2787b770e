//! The programs and files podvisor needs, and podvisord itself.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use indicatif::HumanBytes;
use podvisor_network::{Cni, CniConfig};
use podvisor_node::config::Config;
use podvisor_node::handlers;
use podvisor_proto::cri;

use super::Finding;
use crate::Context;
use crate::client::{self, Daemon};

/// What `qemu --version` and podvisord's answers may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// First bytes of an ELF file.
const ELF: &[u8] = b"\x7fELF";
/// First bytes of a cpio archive in the kernel's format (initramfs-buffer-format, "newc").
const CPIO_NEWC: &[u8] = b"070701";

/// Everything podvisor is made of.
pub async fn check(context: &Context) -> Vec<Finding> {
    let config = &context.config;
    vec![
        qemu(&config.qemu.binary).await,
        guest_file("guest kernel", &config.kernel_path(), ELF),
        guest_file("guest initramfs", &config.initramfs_path(), CPIO_NEWC),
        monitor(config),
        cni(config).await,
        oci_runtimes(config),
        podvisord(&context.socket).await,
    ]
}

async fn qemu(binary: &Path) -> Finding {
    const NAME: &str = "QEMU";
    const WHY: &str = "running the virtual machines";
    const REMEDY: &str = "apt-get install qemu-system-x86, or set qemu.binary in the configuration";
    let version = tokio::process::Command::new(binary)
        .arg("--version")
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output();
    match tokio::time::timeout(PATIENCE, version).await {
        Ok(Ok(output)) if output.status.success() => {
            let text = String::from_utf8_lossy(&output.stdout);
            let first = text.lines().next().unwrap_or_default();
            Finding::ok(NAME, WHY, format!("{}: {first}", binary.display()))
        }
        Ok(Ok(output)) => Finding::missing(
            NAME,
            WHY,
            format!("{} --version: {}", binary.display(), output.status),
            REMEDY,
        ),
        Ok(Err(error)) => {
            Finding::missing(NAME, WHY, format!("{}: {error}", binary.display()), REMEDY)
        }
        Err(_) => Finding::missing(
            NAME,
            WHY,
            format!("{} does not answer", binary.display()),
            REMEDY,
        ),
    }
}

fn guest_file(name: &'static str, path: &Path, magic: &[u8]) -> Finding {
    const WHY: &str = "what runs in the virtual machine";
    const REMEDY: &str =
        "`make image` builds it; vm.guest_dir in the configuration says where it is";
    let read = || {
        let mut file = File::open(path)?;
        let mut start = vec![0; magic.len()];
        file.read_exact(&mut start)?;
        Ok::<_, std::io::Error>((start, file.metadata()?.len()))
    };
    match read() {
        Ok((start, length)) if start == magic => Finding::ok(
            name,
            WHY,
            format!("{}, {}", path.display(), HumanBytes(length)),
        ),
        Ok(_) => Finding::missing(
            name,
            WHY,
            format!("{} has another format", path.display()),
            REMEDY,
        ),
        Err(error) => Finding::missing(name, WHY, format!("{}: {error}", path.display()), REMEDY),
    }
}

fn monitor(config: &Config) -> Finding {
    use std::os::unix::fs::PermissionsExt;
    const NAME: &str = "podvisor-monitor";
    const WHY: &str = "keeping each pod, one process each";
    const REMEDY: &str = "install it beside podvisord, or set monitor in the configuration";
    let path = config
        .monitor_path()
        .unwrap_or_else(|_| PathBuf::from("podvisor-monitor"));
    match path.metadata() {
        Ok(metadata) if metadata.is_file() && metadata.permissions().mode() & 0o111 != 0 => {
            Finding::ok(NAME, WHY, path.display().to_string())
        }
        Ok(_) => Finding::missing(
            NAME,
            WHY,
            format!("{} is not executable", path.display()),
            REMEDY,
        ),
        Err(error) => Finding::missing(NAME, WHY, format!("{}: {error}", path.display()), REMEDY),
    }
}

fn oci_runtimes(config: &Config) -> Finding {
    const NAME: &str = "OCI runtimes";
    const WHY: &str = "pods on the node itself, for what a VM cannot give";
    let found = |name| match handlers::runtime(config, name) {
        Ok(binary) => Ok(binary.map(|binary| format!("{name}: {}", binary.display()))),
        Err(error) => Err(error.to_string()),
    };
    let (mut installed, mut missing) = (Vec::new(), Vec::new());
    for handler in handlers::names(config) {
        match found(handler) {
            Ok(runtime) => installed.extend(runtime),
            Err(problem) => missing.push(problem),
        }
    }
    if missing.is_empty() {
        return Finding::ok(NAME, WHY, installed.join(", "));
    }
    let text = missing.join(", ");
    Finding::note(
        NAME,
        WHY,
        text,
        "apt-get install runc, or remove the handler from the configuration",
    )
}

async fn cni(config: &Config) -> Finding {
    const NAME: &str = "CNI";
    const WHY: &str = "the network of pods";
    let cni = Cni::new(CniConfig {
        conf_dir: config.network.conf_dir.clone(),
        plugin_dirs: config.network.plugin_dirs.clone(),
        cache_dir: config.data_dir.join("cni"),
        plugin_timeout: PATIENCE,
    });
    match cni.status().await {
        Ok(status) if status.ignored.is_empty() => Finding::ok(
            NAME,
            WHY,
            format!("network {:?} from {}", status.name, status.file.display()),
        ),
        Ok(status) => Finding::note(
            NAME,
            WHY,
            format!(
                "network {:?} from {}; ignored: {}",
                status.name,
                status.file.display(),
                status.ignored.join("; ")
            ),
            "repair or remove the ignored files",
        ),
        Err(error) => Finding::missing(
            NAME,
            WHY,
            error.to_string(),
            format!(
                "put a conflist into {} and its plugins into {} (Debian: apt-get install containernetworking-plugins)",
                config.network.conf_dir.display(),
                config
                    .network
                    .plugin_dirs
                    .iter()
                    .map(|dir| dir.display().to_string())
                    .collect::<Vec<_>>()
                    .join(" or ")
            ),
        ),
    }
}

async fn podvisord(socket: &Path) -> Finding {
    const NAME: &str = "podvisord";
    const WHY: &str = "kubelets, crictl and `podvisor run`";
    let mut daemon = match Daemon::connect(socket).await {
        Ok(daemon) => daemon,
        Err(error) => return Finding::note(NAME, WHY, "not reachable", error.to_string()),
    };
    match status(&mut daemon).await {
        Ok((version, unmet)) if unmet.is_empty() => {
            Finding::ok(NAME, WHY, format!("{version} on {}", socket.display()))
        }
        Ok((version, unmet)) => Finding::note(
            NAME,
            WHY,
            format!("{version} on {}", socket.display()),
            unmet.join("; "),
        ),
        Err(error) => Finding::note(NAME, WHY, error.to_string(), "see podvisord's log"),
    }
}

/// Name and version, and the conditions that are not met.
async fn status(daemon: &mut Daemon) -> Result<(String, Vec<String>), client::ClientError> {
    let version = daemon
        .runtime
        .version(client::within(PATIENCE, cri::VersionRequest::default()))
        .await
        .map_err(client::failed("Version"))?
        .into_inner();
    let conditions = daemon
        .runtime
        .status(client::within(
            PATIENCE,
            cri::StatusRequest { verbose: false },
        ))
        .await
        .map_err(client::failed("Status"))?
        .into_inner()
        .status
        .unwrap_or_default()
        .conditions;
    let unmet = conditions
        .into_iter()
        .filter(|condition| !condition.status)
        .map(|condition| {
            format!(
                "{}: {} {}",
                condition.r#type, condition.reason, condition.message
            )
        });
    Ok((
        format!("{} {}", version.runtime_name, version.runtime_version),
        unmet.collect(),
    ))
}

#[cfg(test)]
mod tests {
    use super::super::State;
    use super::*;

    #[test]
    fn guest_files_are_told_by_their_first_bytes() {
        let file = tempfile::NamedTempFile::new().unwrap();
        assert_eq!(guest_file("k", file.path(), ELF).state, State::Missing);
        std::fs::write(file.path(), b"\x7fELF rest").unwrap();
        assert_eq!(guest_file("k", file.path(), ELF).state, State::Ok);
        assert_eq!(
            guest_file("i", file.path(), CPIO_NEWC).state,
            State::Missing
        );
        assert_eq!(
            guest_file("k", Path::new("/nonexistent"), ELF).state,
            State::Missing
        );
    }

    #[tokio::test]
    async fn an_absent_or_failing_qemu_is_missing() {
        for binary in ["/nonexistent/qemu", "/bin/false"] {
            let finding = qemu(Path::new(binary)).await;
            assert_eq!(finding.state, State::Missing, "{finding:?}");
        }
    }

    #[tokio::test]
    async fn pods_live_without_the_daemon() {
        let finding = podvisord(Path::new("/nonexistent/podvisor.sock")).await;
        assert_eq!(finding.state, State::Note);
        assert!(finding.remedy.unwrap().contains("Start it"));
    }
}
