//! The OCI runtime spec (runtime-spec 1.2, config.md, config-linux.md): the part of it that this agent
//! carries out. A spec that asks for more is refused, not half obeyed.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// A container.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Spec {
    /// Of the spec's own format.
    pub oci_version: String,
    pub process: Process,
    #[serde(default)]
    pub root: Root,
    #[serde(default)]
    pub hostname: String,
    /// For people and other programs: without effect on the container.
    #[serde(default)]
    pub annotations: BTreeMap<String, String>,
    #[serde(default)]
    pub mounts: Vec<Mount>,
    pub linux: Linux,
}

/// A process of a container.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Process {
    #[serde(default)]
    pub terminal: bool,
    #[serde(default)]
    pub user: User,
    #[serde(default)]
    pub args: Vec<String>,
    #[serde(default)]
    pub env: Vec<String>,
    pub cwd: PathBuf,
    #[serde(default)]
    pub capabilities: Capabilities,
    #[serde(default)]
    pub rlimits: Vec<Limit>,
    #[serde(default)]
    pub no_new_privileges: bool,
    #[serde(default)]
    pub oom_score_adj: Option<i32>,
}

/// Who a process runs as.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct User {
    pub uid: u32,
    pub gid: u32,
    #[serde(default)]
    pub umask: Option<u32>,
    #[serde(default)]
    pub additional_gids: Vec<u32>,
}

/// Sets of capabilities; one that is not named is empty.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Capabilities {
    pub bounding: Vec<Capability>,
    pub effective: Vec<Capability>,
    pub inheritable: Vec<Capability>,
    pub permitted: Vec<Capability>,
    pub ambient: Vec<Capability>,
}

/// A capability and its number (linux/capability.h).
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
#[allow(
    clippy::enum_variant_names,
    reason = "the prefix is part of the spec's names"
)]
pub enum Capability {
    CapChown = 0,
    CapDacOverride = 1,
    CapDacReadSearch = 2,
    CapFowner = 3,
    CapFsetid = 4,
    CapKill = 5,
    CapSetgid = 6,
    CapSetuid = 7,
    CapSetpcap = 8,
    CapLinuxImmutable = 9,
    CapNetBindService = 10,
    CapNetBroadcast = 11,
    CapNetAdmin = 12,
    CapNetRaw = 13,
    CapIpcLock = 14,
    CapIpcOwner = 15,
    CapSysModule = 16,
    CapSysRawio = 17,
    CapSysChroot = 18,
    CapSysPtrace = 19,
    CapSysPacct = 20,
    CapSysAdmin = 21,
    CapSysBoot = 22,
    CapSysNice = 23,
    CapSysResource = 24,
    CapSysTime = 25,
    CapSysTtyConfig = 26,
    CapMknod = 27,
    CapLease = 28,
    CapAuditWrite = 29,
    CapAuditControl = 30,
    CapSetfcap = 31,
    CapMacOverride = 32,
    CapMacAdmin = 33,
    CapSyslog = 34,
    CapWakeAlarm = 35,
    CapBlockSuspend = 36,
    CapAuditRead = 37,
    CapPerfmon = 38,
    CapBpf = 39,
    CapCheckpointRestore = 40,
}

/// A resource limit (setrlimit(2)).
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Limit {
    #[serde(rename = "type")]
    pub resource: Resource,
    pub soft: u64,
    pub hard: u64,
}

/// What a [`Limit`] limits.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
#[allow(
    clippy::enum_variant_names,
    reason = "the prefix is part of the spec's names"
)]
pub enum Resource {
    RlimitCpu,
    RlimitFsize,
    RlimitData,
    RlimitStack,
    RlimitCore,
    RlimitRss,
    RlimitNproc,
    RlimitNofile,
    RlimitMemlock,
    RlimitAs,
    RlimitLocks,
    RlimitSigpending,
    RlimitMsgqueue,
    RlimitNice,
    RlimitRtprio,
    RlimitRttime,
}

/// The root file system.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Root {
    pub path: PathBuf,
    #[serde(default)]
    pub readonly: bool,
}

/// A mount.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Mount {
    pub destination: PathBuf,
    #[serde(default, rename = "type")]
    pub kind: String,
    #[serde(default)]
    pub source: Option<PathBuf>,
    #[serde(default)]
    pub options: Vec<String>,
}

/// What only Linux has.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Linux {
    #[serde(default)]
    pub namespaces: Vec<Namespace>,
    #[serde(default)]
    pub devices: Vec<Device>,
    #[serde(default)]
    pub resources: Resources,
    #[serde(default)]
    pub sysctl: BTreeMap<String, String>,
    #[serde(default)]
    pub rootfs_propagation: String,
    #[serde(default)]
    pub masked_paths: Vec<PathBuf>,
    #[serde(default)]
    pub readonly_paths: Vec<PathBuf>,
}

/// A namespace: one of the container's own, or the one at `path`.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Namespace {
    #[serde(rename = "type")]
    pub kind: NamespaceKind,
    #[serde(default)]
    pub path: Option<PathBuf>,
}

/// What a [`Namespace`] is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NamespaceKind {
    Mount,
    Pid,
    Ipc,
    Uts,
    Cgroup,
    Network,
    User,
}

impl NamespaceKind {
    /// Its name in /proc/PID/ns.
    pub const fn file_name(self) -> &'static str {
        match self {
            Self::Mount => "mnt",
            Self::Pid => "pid",
            Self::Ipc => "ipc",
            Self::Uts => "uts",
            Self::Cgroup => "cgroup",
            Self::Network => "net",
            Self::User => "user",
        }
    }
}

/// A device node to be made.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Device {
    pub path: PathBuf,
    #[serde(rename = "type")]
    pub kind: NodeKind,
    #[serde(default)]
    pub major: u64,
    #[serde(default)]
    pub minor: u64,
    #[serde(default)]
    pub file_mode: Option<u32>,
    #[serde(default)]
    pub uid: Option<u32>,
    #[serde(default)]
    pub gid: Option<u32>,
}

/// What a [`Device`] is.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub enum NodeKind {
    #[serde(rename = "b")]
    Block,
    #[serde(rename = "c", alias = "u")]
    Character,
    #[serde(rename = "p")]
    Fifo,
}

/// Limits of the control group.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct Resources {
    /// None: every device may be used.
    pub devices: Vec<DeviceRule>,
    pub cpu: Cpu,
    pub memory: Memory,
    pub pids: Option<Pids>,
    pub hugepage_limits: Vec<HugepageLimit>,
    /// Files of the control group.
    pub unified: BTreeMap<String, String>,
}

impl Resources {
    /// Takes over what `changes` names; devices stay.
    pub fn change(&mut self, changes: Self) {
        self.cpu.change(changes.cpu);
        let memory = changes.memory;
        self.memory.limit = memory.limit.or(self.memory.limit);
        self.memory.reservation = memory.reservation.or(self.memory.reservation);
        self.memory.swap = memory.swap.or(self.memory.swap);
        self.pids = changes.pids.or(self.pids.take());
        for limit in changes.hugepage_limits {
            self.hugepage_limits
                .retain(|old| old.page_size != limit.page_size);
            self.hugepage_limits.push(limit);
        }
        self.unified.extend(changes.unified);
    }
}

impl Cpu {
    fn change(&mut self, changes: Self) {
        self.shares = changes.shares.or(self.shares);
        self.quota = changes.quota.or(self.quota);
        self.period = changes.period.or(self.period);
        self.burst = changes.burst.or(self.burst);
        self.idle = changes.idle.or(self.idle);
        self.cpus = changes.cpus.or(self.cpus.take());
        self.mems = changes.mems.or(self.mems.take());
    }
}

/// Who may use a device. What is none, or -1, is any.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceRule {
    pub allow: bool,
    #[serde(default, rename = "type")]
    pub kind: DeviceKind,
    #[serde(default)]
    pub major: Option<i64>,
    #[serde(default)]
    pub minor: Option<i64>,
    #[serde(default)]
    pub access: Option<String>,
}

/// What a [`DeviceRule`] is about.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub enum DeviceKind {
    #[default]
    #[serde(rename = "a")]
    Any,
    #[serde(rename = "b")]
    Block,
    #[serde(rename = "c")]
    Character,
}

/// Of the CPU, in version 1's words.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Cpu {
    pub shares: Option<u64>,
    pub quota: Option<i64>,
    pub period: Option<u64>,
    pub burst: Option<u64>,
    pub idle: Option<i64>,
    pub cpus: Option<String>,
    pub mems: Option<String>,
}

/// Of memory, in version 1's words; bytes.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Memory {
    pub limit: Option<i64>,
    pub reservation: Option<i64>,
    /// Memory and swap together.
    pub swap: Option<i64>,
}

/// Of processes.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pids {
    pub limit: i64,
}

/// Of huge pages of one size.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct HugepageLimit {
    pub page_size: String,
    pub limit: i64,
}
