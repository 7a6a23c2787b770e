//! The configuration file: every key, its default, and where flags win.
//!
//! The shipped file `config.toml` lists every key with its default; a test holds the two together.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::handlers::{self, Reason};

/// Where the configuration is read from when no `--config` is given.
pub const DEFAULT_PATH: &str = "/etc/podvisor/config.toml";

/// More than any node has, MiB.
const MAX_MEMORY_MIB: u64 = 16 << 20;

/// The shipped default, with every key explained.
pub const SHIPPED: &str = include_str!("../config.toml");

/// Why a configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file named by `--config` cannot be read.
    #[error("cannot read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// Not TOML, an unknown key or a value of the wrong type.
    #[error("{path}: {source}")]
    Parse {
        /// The file.
        path: PathBuf,
        /// Line, column and key.
        source: toml::de::Error,
    },
    /// A value that cannot work.
    #[error("{key}: {problem}")]
    Value {
        /// The key, dotted.
        key: &'static str,
        /// What is wrong with it.
        problem: String,
    },
}

/// The whole configuration.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Sockets and runtime state.
    pub run_dir: PathBuf,
    /// Images, database, writable disks.
    pub data_dir: PathBuf,
    /// Log filter.
    pub log: String,
    /// Path of podvisor-monitor; empty: beside podvisord.
    pub monitor: PathBuf,
    /// What runs VMs.
    pub vmm: Vmm,
    /// Handler of pods that name none.
    pub default_handler: String,
    /// What pods that name no handler are routed to runc for.
    pub route_to_runc: Vec<Reason>,
    /// Kubernetes namespaces whose pods are routed; empty: all.
    pub route_namespaces: Vec<String>,
    /// Handlers besides the one for VMs, by name.
    pub handlers: BTreeMap<String, Handler>,
    /// The virtual machines.
    pub vm: Vm,
    /// The QEMU backend.
    pub qemu: Qemu,
    /// CNI.
    pub network: Network,
    /// Image pulls.
    pub image: Image,
    /// The pods' cgroups on the host.
    pub cgroup: Cgroup,
    /// Exec, attach and port-forward.
    pub streaming: Streaming,
    /// What podvisord counts.
    pub metrics: Metrics,
    /// Where its time goes.
    pub tracing: Tracing,
}

/// `[handlers.NAME]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Handler {
    /// An OCI runtime: a path, or a command's name.
    pub runtime: PathBuf,
}

/// `[vm]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Vm {
    /// Folder with vmlinux and initramfs.cpio.
    pub guest_dir: PathBuf,
    /// vCPUs of a pod that names no CPU limit.
    pub vcpus: u32,
    /// MiB of a pod that names no memory limit.
    pub memory_mib: u64,
    /// What a VM's memory may grow to, MiB; 0: what the node has, on QEMU at most 3 GiB more than it starts with.
    pub max_memory_mib: u64,
    /// Smallest VM, MiB.
    pub min_memory_mib: u64,
    /// Writable disk of a pod, MiB.
    pub scratch_mib: u64,
    /// Seconds until the agent must have called.
    pub boot_timeout_s: u64,
    /// Added to the kernel's command line.
    pub kernel_args: String,
}

/// What runs VMs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Vmm {
    /// Our own where the probe guest runs on KVM, else QEMU.
    Auto,
    /// Our own or nothing.
    Kvm,
    /// QEMU.
    Qemu,
}

/// `[qemu]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Qemu {
    /// The binary.
    pub binary: PathBuf,
    /// Accelerator.
    pub accel: Accel,
}

/// How QEMU runs guest code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Accel {
    /// KVM where the probe guest runs, else TCG.
    Auto,
    /// KVM or nothing.
    Kvm,
    /// Software.
    Tcg,
}

/// `[network]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Network {
    /// Folder of conflists.
    pub conf_dir: PathBuf,
    /// Folders searched for plugins, in order.
    pub plugin_dirs: Vec<PathBuf>,
    /// Seconds that one run of one plugin may take.
    pub plugin_timeout_s: u64,
}

/// `[image]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Image {
    /// Folder of hosts.toml folders.
    pub certs_dir: PathBuf,
    /// Seconds without a byte after which a registry is given up.
    pub stall_timeout_s: u64,
    /// Layers of one image pulled at once.
    pub parallel_layers: usize,
    /// MiB that a layer may unpack to.
    pub max_layer_mib: u64,
}

/// `[cgroup]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Cgroup {
    /// How cgroup_parent is written.
    pub driver: CgroupDriver,
    /// Parent of pods that name none.
    pub parent: String,
}

/// `[streaming]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Streaming {
    /// Where the server of exec, attach and port-forward listens.
    pub address: SocketAddr,
    /// Seconds without a byte after which a session ends.
    pub idle_timeout_s: u64,
    /// Seconds that a client may take to open its streams.
    pub creation_timeout_s: u64,
    /// PEM file of the certificate and those it is issued by; empty: no TLS.
    pub tls_certificate: PathBuf,
    /// PEM file of its private key.
    pub tls_key: PathBuf,
}

/// `[metrics]`
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Metrics {
    /// Address and port of the HTTP server; empty: none.
    pub address: String,
}

/// `[tracing]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Tracing {
    /// URL of an OTLP/gRPC collector; empty: none.
    pub otlp_endpoint: String,
    /// Part of the RPCs without a trace context that are traced.
    pub sampling_ratio: f64,
}

/// How a kubelet writes `cgroup_parent`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CgroupDriver {
    /// A path.
    Cgroupfs,
    /// A slice name.
    Systemd,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            run_dir: "/run/podvisor".into(),
            data_dir: "/var/lib/podvisor".into(),
            log: "info".into(),
            monitor: PathBuf::new(),
            vmm: Vmm::Auto,
            default_handler: handlers::PODVISOR.into(),
            route_to_runc: vec![
                Reason::HostNetwork,
                Reason::HostPid,
                Reason::HostIpc,
                Reason::Privileged,
            ],
            route_namespaces: Vec::new(),
            handlers: [(
                handlers::RUNC.to_owned(),
                Handler {
                    runtime: "runc".into(),
                },
            )]
            .into(),
            vm: Vm::default(),
            qemu: Qemu::default(),
            network: Network::default(),
            image: Image::default(),
            cgroup: Cgroup::default(),
            streaming: Streaming::default(),
            metrics: Metrics::default(),
            tracing: Tracing::default(),
        }
    }
}

impl Default for Vm {
    fn default() -> Self {
        Self {
            guest_dir: "/usr/lib/podvisor".into(),
            vcpus: 1,
            memory_mib: 512,
            max_memory_mib: 0,
            min_memory_mib: 96,
            scratch_mib: 10 * 1024,
            boot_timeout_s: 30,
            kernel_args: String::new(),
        }
    }
}

impl Default for Qemu {
    fn default() -> Self {
        Self {
            binary: "/usr/bin/qemu-system-x86_64".into(),
            accel: Accel::Auto,
        }
    }
}

impl Default for Network {
    fn default() -> Self {
        Self {
            conf_dir: "/etc/cni/net.d".into(),
            plugin_dirs: vec!["/opt/cni/bin".into(), "/usr/lib/cni".into()],
            plugin_timeout_s: 30,
        }
    }
}

impl Default for Image {
    fn default() -> Self {
        Self {
            certs_dir: "/etc/podvisor/certs.d".into(),
            stall_timeout_s: 30,
            parallel_layers: 3,
            max_layer_mib: 16 * 1024,
        }
    }
}

impl Default for Cgroup {
    fn default() -> Self {
        Self {
            driver: CgroupDriver::Cgroupfs,
            parent: "/podvisor".into(),
        }
    }
}

impl Default for Streaming {
    fn default() -> Self {
        Self {
            address: (Ipv4Addr::LOCALHOST, 0).into(),
            idle_timeout_s: 4 * 60 * 60,
            creation_timeout_s: 30,
            tls_certificate: PathBuf::new(),
            tls_key: PathBuf::new(),
        }
    }
}

impl Default for Tracing {
    fn default() -> Self {
        Self {
            otlp_endpoint: String::new(),
            sampling_ratio: 1.0,
        }
    }
}

impl Config {
    /// Reads `path`, or [`DEFAULT_PATH`] when none is named; without that file the defaults hold.
    ///
    /// # Errors
    /// A named file that is not there, unknown keys, values that cannot work.
    pub fn load(path: Option<&Path>) -> Result<Self, ConfigError> {
        let file = path.unwrap_or(Path::new(DEFAULT_PATH));
        let config = match std::fs::read_to_string(file) {
            Ok(text) => toml::from_str(&text).map_err(|source| ConfigError::Parse {
                path: file.into(),
                source,
            })?,
            Err(error) if path.is_none() && error.kind() == std::io::ErrorKind::NotFound => {
                Self::default()
            }
            Err(source) => {
                return Err(ConfigError::Read {
                    path: file.into(),
                    source,
                });
            }
        };
        config.validate()?;
        Ok(config)
    }

    fn validate(&self) -> Result<(), ConfigError> {
        let refuse = |key, problem: &str| {
            Err(ConfigError::Value {
                key,
                problem: problem.into(),
            })
        };
        if self.handlers.contains_key(handlers::PODVISOR) {
            return refuse("handlers", "\"podvisor\" is the handler for VMs");
        }
        if !handlers::names(self).any(|name| name == self.default_handler) {
            return refuse("default_handler", "is no handler");
        }
        if self.vm.vcpus == 0 {
            return refuse("vm.vcpus", "a VM needs at least one");
        }
        if self.vm.memory_mib < self.vm.min_memory_mib {
            return refuse("vm.memory_mib", "less than vm.min_memory_mib");
        }
        if self.vm.max_memory_mib > MAX_MEMORY_MIB {
            return refuse("vm.max_memory_mib", "more than 16 TiB");
        }
        if self.vm.scratch_mib < 16 {
            return refuse("vm.scratch_mib", "less than 16 MiB holds no file system");
        }
        if self.vm.boot_timeout_s == 0 {
            return refuse("vm.boot_timeout_s", "no VM boots in 0 s");
        }
        if self.network.plugin_timeout_s == 0 {
            return refuse("network.plugin_timeout_s", "no plugin ends in 0 s");
        }
        if self.image.parallel_layers == 0 {
            return refuse("image.parallel_layers", "at least 1");
        }
        if self.streaming.address.ip().is_unspecified() {
            return refuse(
                "streaming.address",
                "clients are told this address: name one",
            );
        }
        if self.streaming.idle_timeout_s == 0 || self.streaming.creation_timeout_s == 0 {
            return refuse("streaming", "a timeout of 0 s ends every session");
        }
        let address = &self.metrics.address;
        if !address.is_empty() && address.parse::<SocketAddr>().is_err() {
            return refuse(
                "metrics.address",
                "neither empty nor an address with a port",
            );
        }
        let endpoint = &self.tracing.otlp_endpoint;
        if !endpoint.is_empty() && !is_plain_http(endpoint) {
            return refuse(
                "tracing.otlp_endpoint",
                "neither empty nor http://ADDRESS:PORT",
            );
        }
        if !(0.0..=1.0).contains(&self.tracing.sampling_ratio) {
            return refuse("tracing.sampling_ratio", "not between 0 and 1");
        }
        let parent = Path::new(&self.cgroup.parent);
        if !parent.is_absolute() && parent.extension().is_none_or(|suffix| suffix != "slice") {
            return refuse("cgroup.parent", "neither a path from / nor a slice");
        }
        Ok(())
    }

    /// Path of the monitor's binary.
    pub fn monitor_path(&self) -> std::io::Result<PathBuf> {
        if !self.monitor.as_os_str().is_empty() {
            return Ok(self.monitor.clone());
        }
        Ok(std::env::current_exe()?.with_file_name("podvisor-monitor"))
    }

    /// Path of podvisor-fs: beside the monitor.
    pub fn fs_path(&self) -> std::io::Result<PathBuf> {
        Ok(self.monitor_path()?.with_file_name("podvisor-fs"))
    }

    /// The guest kernel.
    pub fn kernel_path(&self) -> PathBuf {
        self.vm.guest_dir.join("vmlinux")
    }

    /// The guest's initramfs.
    pub fn initramfs_path(&self) -> PathBuf {
        self.vm.guest_dir.join("initramfs.cpio")
    }

    /// Where layers of images are mounted for pods on the host.
    pub fn layers_dir(&self) -> PathBuf {
        self.run_dir.join("layers")
    }

    /// The CRI socket.
    pub fn socket_path(&self) -> PathBuf {
        self.run_dir.join("podvisor.sock")
    }

    /// Records of network attachments.
    pub fn cni_cache_dir(&self) -> PathBuf {
        self.data_dir.join("cni")
    }

    /// How long a VM may boot.
    pub fn boot_timeout(&self) -> Duration {
        Duration::from_secs(self.vm.boot_timeout_s)
    }
}

fn is_plain_http(url: &str) -> bool {
    let url: Result<http::Uri, _> = url.parse();
    url.is_ok_and(|url| url.scheme() == Some(&http::uri::Scheme::HTTP) && url.port().is_some())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shipped_file_is_the_default() {
        let shipped: Config = toml::from_str(SHIPPED).unwrap();
        assert_eq!(shipped, Config::default());
        shipped.validate().unwrap();
    }

    #[test]
    fn shipped_file_names_every_key() {
        let all = toml::Value::try_from(Config::default()).unwrap();
        let shipped: toml::Value = toml::from_str(SHIPPED).unwrap();
        assert_eq!(shipped, all);
    }

    #[test]
    fn unknown_keys_are_errors() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("config.toml");
        std::fs::write(&file, "[vm]\nvcpu = 2\n").unwrap();
        let error = Config::load(Some(&file)).unwrap_err().to_string();
        assert!(error.contains("vcpu"), "{error}");
    }

    #[test]
    fn a_named_file_must_exist() {
        let error = Config::load(Some(Path::new("/nonexistent/podvisor.toml"))).unwrap_err();
        assert!(matches!(error, ConfigError::Read { .. }));
    }

    #[test]
    fn impossible_values_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("config.toml");
        for (text, key) in [
            ("[vm]\nvcpus = 0\n", "vm.vcpus"),
            ("default_handler = \"x\"\n", "default_handler"),
            ("[handlers.podvisor]\nruntime = \"x\"\n", "handlers"),
            ("[vm]\nmemory_mib = 8\n", "vm.memory_mib"),
            ("[vm]\nmax_memory_mib = 100000000\n", "vm.max_memory_mib"),
            ("[image]\nparallel_layers = 0\n", "image.parallel_layers"),
            ("[cgroup]\nparent = \"x\"\n", "cgroup.parent"),
            (
                "[streaming]\naddress = \"0.0.0.0:1\"\n",
                "streaming.address",
            ),
            ("[streaming]\nidle_timeout_s = 0\n", "streaming"),
            (
                "[tracing]\notlp_endpoint = \"https://127.0.0.1:4317\"\n",
                "tracing.otlp_endpoint",
            ),
            (
                "[tracing]\notlp_endpoint = \"127.0.0.1:4317\"\n",
                "tracing.otlp_endpoint",
            ),
            (
                "[tracing]\nsampling_ratio = 1.5\n",
                "tracing.sampling_ratio",
            ),
        ] {
            std::fs::write(&file, text).unwrap();
            let error = Config::load(Some(&file)).unwrap_err().to_string();
            assert!(error.contains(key), "{error}");
        }
    }
}
