//! Kernel parameters, by their names in /proc/sys (sysctl(8)).

use std::io;
use std::path::{Path, PathBuf};

/// Why a parameter is not set.
#[derive(Debug, thiserror::Error)]
pub enum SysctlError {
    /// Not a name.
    #[error("{0:?} is not a sysctl name")]
    Name(String),
    /// The kernel refused.
    #[error("cannot set sysctl {name} to {value:?}: {source}")]
    Set {
        /// Name as given.
        name: String,
        /// Value as given.
        value: String,
        /// The kernel's reason.
        source: io::Error,
    },
}

/// Sets one parameter, in the namespaces of the calling thread.
pub fn set(name: &str, value: &str) -> Result<(), SysctlError> {
    let path = path(name)?;
    std::fs::OpenOptions::new()
        .write(true)
        .open(path)
        .and_then(|mut file| io::Write::write_all(&mut file, value.as_bytes()))
        .map_err(|source| SysctlError::Set {
            name: name.to_owned(),
            value: value.to_owned(),
            source,
        })
}

/// Whether `name` is a name at all.
pub fn check(name: &str) -> Result<(), SysctlError> {
    path(name).map(drop)
}

/// The file of `name`. Whichever of `.` and `/` comes first separates; the other is then part of a
/// component with its meaning swapped: `net.ipv4.conf.eth0/1.forwarding` is interface `eth0.1`.
fn path(name: &str) -> Result<PathBuf, SysctlError> {
    let separator = name.find(['.', '/']).map(|index| name.as_bytes()[index]);
    let slashed: String = match separator {
        Some(b'.') => name
            .chars()
            .map(|character| match character {
                '.' => '/',
                '/' => '.',
                other => other,
            })
            .collect(),
        _ => name.to_owned(),
    };
    let well_formed = slashed.split('/').all(|component| {
        !matches!(component, "" | "." | "..") && !component.contains(char::is_control)
    });
    if !well_formed {
        return Err(SysctlError::Name(name.to_owned()));
    }
    Ok(Path::new("/proc/sys").join(slashed))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_notations() {
        let file = |name| path(name).unwrap().to_str().unwrap().to_owned();
        assert_eq!(file("net.ipv4.ip_forward"), "/proc/sys/net/ipv4/ip_forward");
        assert_eq!(file("net/ipv4/ip_forward"), "/proc/sys/net/ipv4/ip_forward");
        assert_eq!(
            file("net.ipv4.conf.eth0/1.forwarding"),
            "/proc/sys/net/ipv4/conf/eth0.1/forwarding"
        );
        assert_eq!(
            file("net/ipv4/conf/eth0.1/forwarding"),
            "/proc/sys/net/ipv4/conf/eth0.1/forwarding"
        );
    }

    #[test]
    fn no_name_leads_out() {
        for name in [
            "",
            ".",
            "..",
            "a..b",
            "/etc/passwd",
            "a/../b",
            "../x",
            "a.//.b",
            "a\nb",
        ] {
            assert!(path(name).is_err(), "{name:?}");
        }
    }
}
