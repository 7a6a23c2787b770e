//! AppArmor and SELinux: modules of the node's kernel, which a process in a VM is not a process of.
//!
//! In a VM, what means "as the runtime likes" or "not at all" is obeyed by doing nothing; a profile or a label that
//! is to confine a container is refused, so that nobody believes to be confined who is not.

use std::fs;

use podvisor_proto::cri::{self, security_profile::ProfileType};

use crate::error::{Error, Result};

/// What confines a process on the host, of what the node has.
#[derive(Debug, Default)]
pub struct Confinement {
    /// Name of a profile.
    pub apparmor: Option<String>,
    /// A label.
    pub selinux: Option<String>,
}

/// Refuses what cannot be in a VM.
///
/// # Errors
/// INVALID_ARGUMENT for what is no profile or label, FAILED_PRECONDITION for what is one.
pub fn check(security: &cri::LinuxContainerSecurityContext) -> Result<()> {
    if label(security)?.is_some() {
        return Err(Error::Precondition(
            "config.linux.security_context.selinux_options: a label of the node's kernel cannot confine a container in a VM".into(),
        ));
    }
    match profile(security)? {
        None => Ok(()),
        Some(name) => Err(Error::Precondition(format!(
            "config.linux.security_context.apparmor: profile {name:?} {}",
            why_not(&name)
                .unwrap_or("is one of the node's kernel, which cannot confine a container in a VM")
        ))),
    }
}

/// What confines a container on the host.
///
/// # Errors
/// INVALID_ARGUMENT for what is no profile or label, FAILED_PRECONDITION for what the node does not have.
pub fn on_host(security: &cri::LinuxContainerSecurityContext) -> Result<Confinement> {
    let selinux = label(security)?;
    if selinux.is_some() && fs::metadata("/sys/fs/selinux/enforce").is_err() {
        return Err(Error::Precondition(
            "config.linux.security_context.selinux_options: cannot be enforced: this node has no SELinux".into(),
        ));
    }
    let apparmor = profile(security)?;
    if let Some((name, problem)) = apparmor
        .as_deref()
        .and_then(|name| Some((name, why_not(name)?)))
    {
        return Err(Error::Precondition(format!(
            "config.linux.security_context.apparmor: profile {name:?} {problem}"
        )));
    }
    Ok(Confinement { apparmor, selinux })
}

/// The AppArmor profile that is asked for by name.
fn profile(security: &cri::LinuxContainerSecurityContext) -> Result<Option<String>> {
    // A privileged container has none (CRI, `privileged`).
    if security.privileged {
        return Ok(None);
    }
    let profile = match &security.apparmor {
        Some(profile) if profile.profile_type() == ProfileType::Localhost => {
            Some(profile.localhost_ref.clone())
        }
        Some(_) => None,
        None => deprecated_profile(security)?,
    };
    if profile.as_deref() == Some("") {
        return Err(Error::Invalid {
            field: "config.linux.security_context.apparmor.localhost_ref",
            problem: "must not be empty".into(),
        });
    }
    Ok(profile)
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
        other => match other.strip_prefix("localhost/") {
            Some(name) => Ok(Some(name.to_owned())),
            None => Err(Error::Invalid {
                field: "config.linux.security_context.apparmor_profile",
                problem: format!("{other:?} is no profile"),
            }),
        },
    }
}

/// The container's own label. Kubelets send an empty one for "none".
fn label(security: &cri::LinuxContainerSecurityContext) -> Result<Option<String>> {
    let options = security.selinux_options.clone().unwrap_or_default();
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
            field: "config.linux.security_context.selinux_options",
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
    // What a node gives containers that name only a part (container-selinux).
    let (user, role) = (or(user, "system_u"), or(role, "system_r"));
    let (kind, level) = (or(kind, "container_t"), or(level, "s0"));
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

    #[test]
    fn what_would_confine_is_refused() {
        #[allow(deprecated)]
        let apparmor = |kind: Option<ProfileType>, name: &str, old: &str| {
            check(&cri::LinuxContainerSecurityContext {
                apparmor: kind.map(|kind| cri::SecurityProfile {
                    profile_type: kind as i32,
                    localhost_ref: name.into(),
                }),
                apparmor_profile: old.into(),
                ..Default::default()
            })
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
        let none = cri::LinuxContainerSecurityContext {
            selinux_options: Some(cri::SeLinuxOption::default()),
            ..Default::default()
        };
        check(&none).unwrap();
    }
}
