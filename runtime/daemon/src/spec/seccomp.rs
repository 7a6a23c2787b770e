//! The container's system call filter: the runtime's default, a profile of the node, or none.
//!
//! A profile is OCI's `linux.seccomp` with the additions that Docker's and Podman's files have: rules that
//! depend on capabilities, and `archMap`. What comes out is OCI's, with nothing left to decide. For a container in a
//! VM, [`filter`] compiles it.

mod filter;

use std::collections::HashSet;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::LazyLock;

use oci_spec::runtime::{
    Arch, Capability, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg, LinuxSeccompBuilder,
    LinuxSeccompFilterFlag, LinuxSyscall, LinuxSyscallBuilder, Spec,
};
use podvisor_proto::agent::SeccompFilter;
use podvisor_proto::cri::{self, security_profile::ProfileType};
use serde::Deserialize;
use serde::de::IgnoredAny;

use super::build_error;
use crate::error::{Error, Result};

/// Largest file that is read as a profile. A long one has 20 KiB.
const LIMIT: u64 = 1 << 20;

/// Largest error number (linux/err.h, `MAX_ERRNO`).
const MAX_ERRNO: u32 = 4095;

/// The guest's kernel is at least this one: for rules that are about older ones.
const KERNEL: (u32, u32) = (6, 12);

/// containerd's default profile (contrib/seccomp/seccomp_default.go of its release 2.1.4, for amd64).
static DEFAULT: LazyLock<Profile> = LazyLock::new(|| {
    serde_json::from_str(include_str!("../../seccomp/default.json"))
        .unwrap_or_else(|error| unreachable!("a test reads the file: {error}"))
});

/// A profile as its file says it.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Profile {
    default_action: LinuxSeccompAction,
    #[serde(default)]
    default_errno_ret: Option<u32>,
    #[serde(default)]
    architectures: Vec<Arch>,
    #[serde(default)]
    arch_map: Vec<ArchMap>,
    #[serde(default)]
    flags: Vec<LinuxSeccompFilterFlag>,
    #[serde(default)]
    syscalls: Vec<Rule>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct ArchMap {
    architecture: Arch,
    #[serde(default)]
    sub_architectures: Vec<Arch>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Rule {
    names: Vec<String>,
    action: LinuxSeccompAction,
    #[serde(default)]
    errno_ret: Option<u32>,
    #[serde(default)]
    args: Option<Vec<LinuxSeccompArg>>,
    #[serde(default)]
    includes: Condition,
    #[serde(default)]
    excludes: Condition,
    /// For people.
    #[serde(default, rename = "comment")]
    _comment: IgnoredAny,
}

/// When a rule holds.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Condition {
    #[serde(default)]
    caps: Vec<Capability>,
    #[serde(default)]
    arches: Vec<String>,
    #[serde(default)]
    min_kernel: Option<String>,
}

/// The profile that a container asks for; none: all calls are allowed.
///
/// # Errors
/// INVALID_ARGUMENT: no such file, one that is no profile, a field that says nothing.
pub async fn profile(security: &cri::LinuxContainerSecurityContext) -> Result<Option<Profile>> {
    // A privileged container has none, whatever it names (CRI, `privileged`).
    if security.privileged {
        return Ok(None);
    }
    let (kind, path) = match &security.seccomp {
        Some(profile) => (profile.profile_type(), profile.localhost_ref.clone()),
        None => deprecated(security)?,
    };
    match kind {
        ProfileType::Unconfined => Ok(None),
        ProfileType::RuntimeDefault => Ok(Some(DEFAULT.clone())),
        ProfileType::Localhost => tokio::task::spawn_blocking(move || from_file(&path))
            .await
            .map_err(|_| Error::Cancelled)?
            .map(Some),
    }
}

/// Takes the profile out of a spec, compiled.
///
/// # Errors
/// INVALID_ARGUMENT: it contradicts itself, or is too large for the kernel.
pub async fn take_filter(spec: &mut Spec) -> Result<Option<SeccompFilter>> {
    let linux = spec.linux_mut().as_mut();
    let Some(profile) = linux.and_then(|linux| linux.seccomp_mut().take()) else {
        return Ok(None);
    };
    tokio::task::spawn_blocking(move || filter::compile(&profile))
        .await
        .map_err(|_| Error::Cancelled)?
        .map(Some)
        .map_err(|error| Error::Invalid {
            field: "config.linux.security_context.seccomp",
            problem: error.to_string(),
        })
}

/// What the field says that came before `seccomp`. Neither field: unconfined.
#[allow(deprecated)]
fn deprecated(security: &cri::LinuxContainerSecurityContext) -> Result<(ProfileType, String)> {
    match security.seccomp_profile_path.as_str() {
        "" | "unconfined" => Ok((ProfileType::Unconfined, String::new())),
        "runtime/default" | "docker/default" => Ok((ProfileType::RuntimeDefault, String::new())),
        other => match other.strip_prefix("localhost/") {
            Some(path) => Ok((ProfileType::Localhost, path.to_owned())),
            None => Err(Error::Invalid {
                field: "config.linux.security_context.seccomp_profile_path",
                problem: format!("{other:?} is no profile"),
            }),
        },
    }
}

/// Blocks.
fn from_file(path: &str) -> Result<Profile> {
    let invalid = |problem: String| Error::Invalid {
        field: "config.linux.security_context.seccomp.localhost_ref",
        problem,
    };
    if !Path::new(path).is_absolute() {
        return Err(invalid(format!("{path:?} is not an absolute path")));
    }
    let text = read(path).map_err(|error| invalid(format!("cannot read {path}: {error}")))?;
    let profile: Profile = serde_json::from_slice(&text)
        .map_err(|error| invalid(format!("{path} is no seccomp profile: {error}")))?;
    profile
        .check()
        .map_err(|problem| invalid(format!("{path} is no seccomp profile: {problem}")))?;
    Ok(profile)
}

fn read(path: &str) -> io::Result<Vec<u8>> {
    // Not to wait for the writer of a fifo.
    let file = File::options()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("not a regular file"));
    }
    let mut text = Vec::new();
    file.take(LIMIT + 1).read_to_end(&mut text)?;
    if text.len() as u64 > LIMIT {
        return Err(io::Error::other("larger than 1 MiB"));
    }
    Ok(text)
}

impl Profile {
    /// What can be seen at once. The compiler sees the rest.
    fn check(&self) -> Result<(), String> {
        let actions = self
            .syscalls
            .iter()
            .map(|rule| (rule.action, rule.errno_ret));
        for (action, errno) in actions.chain([(self.default_action, self.default_errno_ret)]) {
            if action == LinuxSeccompAction::ScmpActNotify {
                return Err(
                    "SCMP_ACT_NOTIFY needs an agent on the node, which no VM reaches".into(),
                );
            }
            if errno.is_some_and(|errno| errno > MAX_ERRNO) {
                return Err(format!("no errno is above {MAX_ERRNO}"));
            }
        }
        for rule in &self.syscalls {
            if rule.names.iter().any(String::is_empty) || rule.names.is_empty() {
                return Err("a rule without the name of a system call".into());
            }
            let arguments = rule.args.iter().flatten();
            if let Some(wrong) = arguments
                .map(LinuxSeccompArg::index)
                .find(|index| *index > 5)
            {
                return Err(format!("system calls have no argument {wrong}"));
            }
            let conditions = [&rule.includes, &rule.excludes];
            for version in conditions.into_iter().filter_map(|c| c.min_kernel.as_ref()) {
                kernel(version).ok_or_else(|| format!("{version:?} is no kernel version"))?;
            }
        }
        Ok(())
    }

    /// The profile for a container with these capabilities.
    ///
    /// # Errors
    /// See [`build_error`].
    pub fn resolve(self, capabilities: &HashSet<Capability>) -> Result<LinuxSeccomp> {
        let mut filter = LinuxSeccompBuilder::default().default_action(self.default_action);
        if let Some(errno) = self.default_errno_ret {
            filter = filter.default_errno_ret(errno);
        }
        let native = self.arch_map.into_iter();
        let mapped = native
            .filter(|entry| entry.architecture == Arch::ScmpArchX86_64)
            .flat_map(|entry| [vec![entry.architecture], entry.sub_architectures].concat());
        let architectures: Vec<Arch> = self.architectures.into_iter().chain(mapped).collect();
        let syscalls = self.syscalls.into_iter();
        let syscalls = syscalls
            .filter(|rule| {
                rule.includes.holds(capabilities) && !rule.excludes.applies(capabilities)
            })
            .map(Rule::resolve);
        filter
            .architectures(architectures)
            .flags(self.flags)
            .syscalls(syscalls.collect::<Result<Vec<_>>>()?)
            .build()
            .map_err(build_error)
    }
}

impl Rule {
    fn resolve(self) -> Result<LinuxSyscall> {
        let mut rule = LinuxSyscallBuilder::default()
            .names(self.names)
            .action(self.action)
            .args(self.args.unwrap_or_default());
        if let Some(errno) = self.errno_ret {
            rule = rule.errno_ret(errno);
        }
        rule.build().map_err(build_error)
    }
}

impl Condition {
    /// As what includes a rule: all of it must be so.
    fn holds(&self, capabilities: &HashSet<Capability>) -> bool {
        self.caps.iter().all(|one| capabilities.contains(one))
            && (self.arches.is_empty() || self.is_here())
            && self
                .min_kernel
                .as_deref()
                .and_then(kernel)
                .is_none_or(|version| version <= KERNEL)
    }

    /// As what excludes a rule: any of it is enough.
    fn applies(&self, capabilities: &HashSet<Capability>) -> bool {
        self.caps.iter().any(|one| capabilities.contains(one))
            || self.is_here()
            || self
                .min_kernel
                .as_deref()
                .and_then(kernel)
                .is_some_and(|version| version <= KERNEL)
    }

    fn is_here(&self) -> bool {
        self.arches.iter().any(|name| name == "amd64")
    }
}

/// "4.8" as numbers.
fn kernel(version: &str) -> Option<(u32, u32)> {
    let (major, minor) = version.split_once('.')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn parse(profile: Value) -> Result<Profile, String> {
        let profile: Profile = serde_json::from_value(profile).map_err(|e| e.to_string())?;
        profile.check()?;
        Ok(profile)
    }

    fn allowed(profile: &Profile, capabilities: &[Capability], call: &str) -> bool {
        let capabilities = capabilities.iter().copied().collect();
        let filter = profile.clone().resolve(&capabilities).unwrap();
        let rules = filter.syscalls().clone().unwrap();
        rules.iter().any(|rule| {
            rule.action() == LinuxSeccompAction::ScmpActAllow
                && rule.names().iter().any(|name| name == call)
                && rule.args().as_ref().is_none_or(Vec::is_empty)
        })
    }

    #[test]
    fn the_default_follows_capabilities() {
        DEFAULT.check().unwrap();
        assert!(allowed(&DEFAULT, &[], "openat"));
        assert!(!allowed(&DEFAULT, &[], "mount"));
        assert!(
            !allowed(&DEFAULT, &[], "clone"),
            "only without new namespaces"
        );
        assert!(allowed(&DEFAULT, &[Capability::SysAdmin], "mount"));
        assert!(allowed(&DEFAULT, &[Capability::SysAdmin], "clone"));
        assert!(!allowed(&DEFAULT, &[Capability::SysAdmin], "reboot"));
        assert!(!allowed(&DEFAULT, &[], "io_uring_setup"));
    }

    #[test]
    fn files_of_other_tools_are_read() {
        let profile = parse(json!({
            "defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 38,
            "archMap": [
                { "architecture": "SCMP_ARCH_X86_64", "subArchitectures": ["SCMP_ARCH_X86"] },
                { "architecture": "SCMP_ARCH_AARCH64", "subArchitectures": ["SCMP_ARCH_ARM"] },
            ],
            "syscalls": [
                { "names": ["a"], "action": "SCMP_ACT_ALLOW", "args": null, "comment": "c", "includes": {}, "excludes": {} },
                { "names": ["b"], "action": "SCMP_ACT_ALLOW", "includes": { "arches": ["s390x"] } },
                { "names": ["c"], "action": "SCMP_ACT_ALLOW", "includes": { "minKernel": "4.8" } },
                { "names": ["d"], "action": "SCMP_ACT_ALLOW", "excludes": { "arches": ["amd64"] } },
                { "names": ["e"], "action": "SCMP_ACT_ALLOW", "includes": { "minKernel": "99.0" } },
            ],
        }))
        .unwrap();
        let calls = ["a", "b", "c", "d", "e"].map(|call| allowed(&profile, &[], call));
        assert_eq!(calls, [true, false, true, false, false]);
        let filter = profile.resolve(&HashSet::new()).unwrap();
        let architectures = [Arch::ScmpArchX86_64, Arch::ScmpArchX86];
        assert_eq!(filter.architectures().as_deref(), Some(&architectures[..]));
        assert_eq!(filter.default_errno_ret(), Some(38));
    }

    #[test]
    fn what_is_no_profile_says_why() {
        let rule = |rule: Value| json!({ "defaultAction": "SCMP_ACT_ALLOW", "syscalls": [rule] });
        let errno = "SCMP_ACT_ERRNO";
        for (profile, word) in [
            (json!({}), "defaultAction"),
            (json!({ "defaultAction": "SCMP_ACT_NO" }), "SCMP_ACT_NO"),
            (json!({ "defaultAction": "SCMP_ACT_NOTIFY" }), "NOTIFY"),
            (
                json!({ "defaultAction": "SCMP_ACT_ALLOW", "rules": [] }),
                "rules",
            ),
            (rule(json!({ "names": [], "action": errno })), "name"),
            (
                rule(json!({ "names": ["a"], "action": errno, "errnoRet": 5000 })),
                "errno",
            ),
            (
                rule(
                    json!({ "names": ["a"], "action": errno, "args": [{ "index": 6, "value": 0, "op": "SCMP_CMP_EQ" }] }),
                ),
                "argument 6",
            ),
            (
                rule(
                    json!({ "names": ["a"], "action": errno, "includes": { "minKernel": "new" } }),
                ),
                "new",
            ),
        ] {
            let problem = parse(profile.clone()).unwrap_err();
            assert!(problem.contains(word), "{profile}: {problem}");
        }
    }

    #[tokio::test]
    async fn a_newer_field_wins_and_privileged_has_none() {
        let with = |kind: Option<ProfileType>, path: &str, privileged| {
            #[allow(deprecated)]
            cri::LinuxContainerSecurityContext {
                privileged,
                seccomp: kind.map(|kind| cri::SecurityProfile {
                    profile_type: kind as i32,
                    localhost_ref: String::new(),
                }),
                seccomp_profile_path: path.into(),
                ..Default::default()
            }
        };
        let has = async |security| profile(&security).await.unwrap().is_some();
        assert!(!has(with(None, "", false)).await);
        assert!(has(with(None, "runtime/default", false)).await);
        assert!(
            !has(with(
                Some(ProfileType::Unconfined),
                "runtime/default",
                false
            ))
            .await
        );
        assert!(has(with(Some(ProfileType::RuntimeDefault), "unconfined", false)).await);
        assert!(!has(with(Some(ProfileType::RuntimeDefault), "", true)).await);
        assert!(!has(with(Some(ProfileType::Localhost), "", true)).await);
        for bad in [
            with(Some(ProfileType::Localhost), "", false),
            with(None, "localhost/no/such", false),
            with(None, "localhost//etc", false),
            with(None, "localhost//etc/passwd", false),
            with(None, "localhost//no/such/file", false),
            with(None, "/etc/passwd", false),
        ] {
            let result = profile(&bad).await;
            assert!(matches!(result, Err(Error::Invalid { .. })), "{result:?}");
        }
    }
}
