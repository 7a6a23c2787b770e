//! AppArmor and SELinux: modules of the node's kernel, which a process in a VM is not a process of.
//!
//! What a sandbox asks for confines the processes that its VM is made of on the host: the monitor, QEMU and
//! podvisor-fs. A container in the VM is within them, so it may name the same, and what means "as the runtime likes" or
//! "not at all". Another profile or label is refused, so that nobody believes to be confined who is not.

use std::ffi::CStr;
use std::fs;
use std::io;
use std::os::unix::process::CommandExt as _;
use std::process::Command;

use podvisor_proto::cri::{self, security_profile::ProfileType};

use crate::error::{Error, Result};

/// Before a profile's name.
const LOCALHOST: &str = "localhost/";

/// Fields of a container's security context, and of a sandbox's.
const APPARMOR: &str = "config.linux.security_context.apparmor";
const SELINUX: &str = "config.linux.security_context.selinux_options";

/// The types that a node gives those who name only a part of a label (container-selinux): containers, and what runs a VM.
const CONTAINER_TYPE: &str = "container_t";
const VM_TYPE: &str = "container_kvm_t";

/// What confines a process on the host, of what the node has.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Confinement {
    /// Name of a profile.
    pub apparmor: Option<String>,
    /// A label.
    pub selinux: Option<String>,
}

impl Confinement {
    /// Has `command` confined from its first instruction on. That it cannot be is an error of its `spawn`.
    pub fn confine(&self, command: &mut Command) {
        // proc_pid_attr(5); AppArmor has files of its own beside another module's.
        let mut files: Vec<(&'static CStr, String)> = Vec::new();
        if let Some(profile) = &self.apparmor {
            files.push((c"/proc/self/attr/apparmor/exec", format!("exec {profile}")));
        }
        if let Some(label) = &self.selinux {
            files.push((c"/proc/self/attr/exec", label.clone()));
        }
        if files.is_empty() {
            return;
        }
        let write = move || {
            for (path, text) in &files {
                write_whole(path, text.as_bytes())?;
            }
            Ok(())
        };
        // SAFETY: the closure runs between fork and exec and makes only system calls: no allocation, no locks. What
        // it needs was made before.
        unsafe { command.pre_exec(write) };
    }
}

/// Writes to a file of /proc in one call, as those want it. Safe between fork and exec.
fn write_whole(path: &CStr, text: &[u8]) -> io::Result<()> {
    // SAFETY: a string that ends with a zero.
    let file = unsafe { libc::open(path.as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC) };
    if file < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the file is open, and the bytes are there.
    let written = unsafe { libc::write(file, text.as_ptr().cast(), text.len()) };
    let result = if written < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    };
    // SAFETY: opened above, and nobody else's.
    unsafe { libc::close(file) };
    result
}

/// What confines the processes that a sandbox's VM is made of on the host.
///
/// # Errors
/// INVALID_ARGUMENT for what is no profile or label, FAILED_PRECONDITION for what the node does not have.
pub fn of_vm(sandbox: &cri::PodSandboxConfig) -> Result<Confinement> {
    let security = of_sandbox(sandbox);
    available(Confinement {
        apparmor: named(security.apparmor.as_ref())?,
        selinux: label(security.selinux_options.as_ref(), VM_TYPE)?,
    })
}

/// Refuses a container in a VM that is to be confined by something else than its sandbox is.
///
/// # Errors
/// INVALID_ARGUMENT for what is no profile or label, FAILED_PRECONDITION for what is one.
pub fn in_vm(
    container: &cri::LinuxContainerSecurityContext,
    sandbox: &cri::PodSandboxConfig,
) -> Result<()> {
    let pod = of_sandbox(sandbox);
    let asked = Confinement {
        apparmor: profile(container)?,
        selinux: label(container.selinux_options.as_ref(), VM_TYPE)?,
    };
    if asked.selinux.is_some() && asked.selinux != label(pod.selinux_options.as_ref(), VM_TYPE)? {
        return Err(Error::Precondition(format!(
            "{SELINUX}: a label of the node's kernel cannot confine a container in a VM, only the whole pod: name the same in the sandbox's security context"
        )));
    }
    match &asked.apparmor {
        Some(name) if asked.apparmor != named(pod.apparmor.as_ref())? => Err(Error::Precondition(format!(
            "{APPARMOR}: profile {name:?} {}",
            why_not(name).unwrap_or(
                "is one of the node's kernel, which cannot confine a container in a VM, only the whole pod: name it in the sandbox's security context"
            )
        ))),
        _ => Ok(()),
    }
}

/// What confines a container on the host.
///
/// # Errors
/// INVALID_ARGUMENT for what is no profile or label, FAILED_PRECONDITION for what the node does not have.
pub fn on_host(container: &cri::LinuxContainerSecurityContext) -> Result<Confinement> {
    available(Confinement {
        apparmor: profile(container)?,
        selinux: label(container.selinux_options.as_ref(), CONTAINER_TYPE)?,
    })
}

fn of_sandbox(sandbox: &cri::PodSandboxConfig) -> cri::LinuxSandboxSecurityContext {
    sandbox
        .linux
        .as_ref()
        .and_then(|linux| linux.security_context.clone())
        .unwrap_or_default()
}

/// Refuses what the node does not have.
fn available(asked: Confinement) -> Result<Confinement> {
    if asked.selinux.is_some() && fs::metadata("/sys/fs/selinux/enforce").is_err() {
        return Err(Error::Precondition(format!(
            "{SELINUX}: cannot be enforced: this node has no SELinux"
        )));
    }
    if let Some(name) = &asked.apparmor
        && let Some(problem) = why_not(name)
    {
        return Err(Error::Precondition(format!(
            "{APPARMOR}: profile {name:?} {problem}"
        )));
    }
    Ok(asked)
}

/// The AppArmor profile that a container asks for by name.
fn profile(security: &cri::LinuxContainerSecurityContext) -> Result<Option<String>> {
    // A privileged container has none (CRI, `privileged`).
    if security.privileged {
        return Ok(None);
    }
    match &security.apparmor {
        Some(_) => named(security.apparmor.as_ref()),
        None => deprecated_profile(security),
    }
}

fn named(profile: Option<&cri::SecurityProfile>) -> Result<Option<String>> {
    match profile {
        Some(profile) if profile.profile_type() == ProfileType::Localhost => {
            let name = &profile.localhost_ref;
            // Some write it as in the deprecated field; all runtimes take both.
            not_empty(name.strip_prefix(LOCALHOST).unwrap_or(name)).map(Some)
        }
        _ => Ok(None),
    }
}

fn not_empty(name: &str) -> Result<String> {
    if name.is_empty() {
        return Err(Error::Invalid {
            field: "config.linux.security_context.apparmor.localhost_ref",
            problem: "must not be empty".into(),
        });
    }
    Ok(name.to_owned())
}

/// Why a profile cannot confine a process of the node's. `None`: it can.
fn why_not(profile: &str) -> Option<&'static str> {
    let enabled = fs::read_to_string("/sys/module/apparmor/parameters/enabled");
    if !enabled.is_ok_and(|text| text.starts_with('Y')) {
        return Some("cannot be enforced: this node has no AppArmor");
    }
    let loaded = fs::read_to_string("/sys/kernel/security/apparmor/profiles");
    let is_loaded = |text: String| {
        text.lines()
            .any(|line| line.split(" (").next() == Some(profile))
    };
    (!loaded.is_ok_and(is_loaded)).then_some("is not loaded")
}

/// What the field says that came before `apparmor`.
#[allow(deprecated)]
fn deprecated_profile(security: &cri::LinuxContainerSecurityContext) -> Result<Option<String>> {
    match security.apparmor_profile.as_str() {
        "" | "runtime/default" | "unconfined" => Ok(None),
        other => match other.strip_prefix(LOCALHOST) {
            Some(name) => not_empty(name).map(Some),
            None => Err(Error::Invalid {
                field: "config.linux.security_context.apparmor_profile",
                problem: format!("{other:?} is no profile"),
            }),
        },
    }
}

/// A label of one's own, of the `usual` type unless it names another. Kubelets send an empty one for "none".
fn label(options: Option<&cri::SeLinuxOption>, usual: &str) -> Result<Option<String>> {
    let options = options.cloned().unwrap_or_default();
    if options == cri::SeLinuxOption::default() {
        return Ok(None);
    }
    let word = |text: &str| {
        text.chars()
            .all(|letter| letter.is_ascii_alphanumeric() || "_-.".contains(letter))
    };
    let cri::SeLinuxOption {
        user,
        role,
        r#type: kind,
        level,
    } = options;
    if !is_level(&level) || ![&user, &role, &kind].into_iter().all(|text| word(text)) {
        return Err(Error::Invalid {
            field: SELINUX,
            problem: format!("\"{user}:{role}:{kind}:{level}\" is no label"),
        });
    }
    let or = |value: String, usual: &str| {
        if value.is_empty() {
            usual.to_owned()
        } else {
            value
        }
    };
    let (user, role) = (or(user, "system_u"), or(role, "system_r"));
    let (kind, level) = (or(kind, usual), or(level, "s0"));
    Ok(Some(format!("{user}:{role}:{kind}:{level}")))
}

/// "s0", "s0:c1,c2", "s0-s1:c0.c1023".
fn is_level(level: &str) -> bool {
    let number = |text: &str, letter: char| {
        let digits = text.strip_prefix(letter).unwrap_or_default();
        !digits.is_empty() && digits.bytes().all(|digit| digit.is_ascii_digit())
    };
    let one = |text: &str| match text.split_once(':') {
        None => number(text, 's'),
        Some((sensitivity, categories)) => {
            number(sensitivity, 's')
                && categories
                    .split([',', '.'])
                    .all(|category| number(category, 'c'))
        }
    };
    level.is_empty() || level.splitn(2, '-').all(one)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn localhost(name: &str) -> cri::SecurityProfile {
        cri::SecurityProfile {
            profile_type: ProfileType::Localhost as i32,
            localhost_ref: name.into(),
        }
    }

    fn level(level: &str) -> cri::SeLinuxOption {
        cri::SeLinuxOption {
            level: level.into(),
            ..Default::default()
        }
    }

    fn pod(profile: Option<&str>, selinux: &str) -> cri::PodSandboxConfig {
        let security = cri::LinuxSandboxSecurityContext {
            apparmor: profile.map(localhost),
            selinux_options: Some(level(selinux)),
            ..Default::default()
        };
        cri::PodSandboxConfig {
            linux: Some(cri::LinuxPodSandboxConfig {
                security_context: Some(security),
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    #[test]
    fn what_would_confine_is_refused() {
        #[allow(deprecated)]
        let apparmor = |kind: Option<ProfileType>, name: &str, old: &str| {
            let container = cri::LinuxContainerSecurityContext {
                apparmor: kind.map(|kind| cri::SecurityProfile {
                    profile_type: kind as i32,
                    localhost_ref: name.into(),
                }),
                apparmor_profile: old.into(),
                ..Default::default()
            };
            in_vm(&container, &pod(None, ""))
        };
        apparmor(None, "", "").unwrap();
        apparmor(None, "", "runtime/default").unwrap();
        apparmor(Some(ProfileType::Unconfined), "", "localhost/x").unwrap();
        let refused = apparmor(Some(ProfileType::Localhost), "x", "");
        assert!(
            matches!(refused, Err(Error::Precondition(_))),
            "{refused:?}"
        );
        let refused = apparmor(None, "", "localhost/x");
        assert!(
            matches!(refused, Err(Error::Precondition(_))),
            "{refused:?}"
        );
        for bad in [
            apparmor(Some(ProfileType::Localhost), "", ""),
            apparmor(None, "", "x"),
        ] {
            assert!(matches!(bad, Err(Error::Invalid { .. })), "{bad:?}");
        }
    }

    #[test]
    fn a_profile_is_named_with_or_without_a_prefix() {
        for name in ["own", "localhost/own"] {
            assert_eq!(
                named(Some(&localhost(name))).unwrap().as_deref(),
                Some("own")
            );
        }
        assert!(named(Some(&localhost("localhost/"))).is_err());
    }

    #[test]
    fn labels() {
        for (level, good) in [
            ("s0", true),
            ("s0:c1,c2", true),
            ("s0-s15:c0.c1023", true),
            ("gibberish", false),
            ("s", false),
            ("s0:", false),
            ("s0:c1,", false),
        ] {
            assert_eq!(is_level(level), good, "{level}");
        }
        assert_eq!(
            label(Some(&cri::SeLinuxOption::default()), VM_TYPE).unwrap(),
            None
        );
        assert_eq!(
            label(Some(&level("s0:c7")), VM_TYPE).unwrap().unwrap(),
            "system_u:system_r:container_kvm_t:s0:c7"
        );
    }

    #[test]
    fn a_container_may_name_what_its_pod_names() {
        let pod = pod(Some("own"), "s0:c1");
        let named = |profile: &str, selinux: &str| {
            let container = cri::LinuxContainerSecurityContext {
                apparmor: Some(localhost(profile)),
                selinux_options: Some(level(selinux)),
                ..Default::default()
            };
            in_vm(&container, &pod)
        };
        named("own", "s0:c1").unwrap();
        named("own", "").unwrap();
        for other in [named("other", "s0:c1"), named("own", "s0:c2")] {
            assert!(matches!(other, Err(Error::Precondition(_))), "{other:?}");
        }
    }

    /// Not on a node that has the module: there it would be taken.
    #[test]
    fn a_node_without_the_module_cannot() {
        for (module, pod) in [
            ("/sys/module/apparmor", pod(Some("own"), "")),
            ("/sys/fs/selinux", pod(None, "s0:c1")),
        ] {
            let refused = of_vm(&pod);
            let there = fs::exists(module).unwrap();
            assert!(
                there || matches!(refused, Err(Error::Precondition(_))),
                "{refused:?}"
            );
        }
    }

    #[test]
    fn what_cannot_be_confined_does_not_start() {
        let mut command = Command::new("true");
        let confinement = Confinement {
            apparmor: Some("no such profile".into()),
            selinux: None,
        };
        confinement.confine(&mut command);
        assert!(command.spawn().is_err());
    }
}
