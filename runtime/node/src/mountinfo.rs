//! The mount table, /proc/self/mountinfo (proc_pid_mountinfo(5)).

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

/// One mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// `major:minor`: the same for all mounts of one file system.
    pub device: String,
    /// The folder of the file system that is mounted.
    pub root: PathBuf,
    /// Where.
    pub point: PathBuf,
    /// What is mounted below it is mounted elsewhere too: it is in a peer group (mount_namespaces(7)).
    pub is_shared: bool,
    /// Type of the file system.
    pub fs_type: String,
    /// The file system's own options, split.
    pub super_options: Vec<String>,
}

/// All mounts of the calling thread's mount namespace, oldest first.
///
/// # Errors
/// No /proc.
pub fn read() -> io::Result<Vec<Mount>> {
    Ok(parse(&fs::read("/proc/thread-self/mountinfo")?))
}

/// Lines that are no mounts are skipped: the kernel writes none.
fn parse(table: &[u8]) -> Vec<Mount> {
    table
        .split(|b| *b == b'\n')
        .filter_map(parse_line)
        .collect()
}

fn parse_line(line: &[u8]) -> Option<Mount> {
    let mut fields = line.split(|b| *b == b' ');
    let device = text(fields.nth(2)?);
    let root = path(fields.next()?);
    let point = path(fields.next()?);
    // Mount options, then optional fields up to a lone hyphen.
    let mut optional = fields.by_ref().take_while(|field| *field != b"-");
    let is_shared = optional.any(|field| field.starts_with(b"shared:"));
    optional.for_each(drop);
    let fs_type = text(fields.next()?);
    let super_options = text(fields.nth(1)?).split(',').map(str::to_owned).collect();
    Some(Mount {
        device,
        root,
        point,
        is_shared,
        fs_type,
        super_options,
    })
}

fn text(field: &[u8]) -> String {
    String::from_utf8_lossy(field).into_owned()
}

/// Space, tab, newline and backslash are written as three octal digits.
fn path(field: &[u8]) -> PathBuf {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&first, after)) = rest.split_first() {
        let escaped = match after {
            [a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', ..] if first == b'\\' => {
                Some((a - b'0') << 6 | (b - b'0') << 3 | (c - b'0'))
            }
            _ => None,
        };
        bytes.push(escaped.unwrap_or(first));
        rest = if escaped.is_some() {
            &after[3..]
        } else {
            after
        };
    }
    OsString::from_vec(bytes).into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn lines() {
        let table = b"31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755\n\
            35 31 0:32 /x /with\\040space\\134 rw shared:1 master:2 - cgroup cgroup rw,memory\n\
            garbage\n";
        let mounts = parse(table);
        assert_eq!(mounts.len(), 2);
        assert_eq!(mounts[0].point, PathBuf::from("/sys/fs/cgroup"));
        assert_eq!(mounts[0].super_options, ["rw", "mode=755"]);
        assert_eq!(mounts[1].device, "0:32");
        assert_eq!(mounts[1].root, PathBuf::from("/x"));
        assert_eq!(mounts[1].point, PathBuf::from("/with space\\"));
        assert_eq!(mounts[1].fs_type, "cgroup");
    }

    proptest! {
        #[test]
        fn any_bytes(table: Vec<u8>) {
            let _ = parse(&table);
        }
    }

    #[test]
    fn this_machine_has_a_root_and_a_proc() {
        let points: Vec<_> = read().unwrap().into_iter().map(|m| m.point).collect();
        assert!(points.contains(&"/".into()) && points.contains(&"/proc".into()));
    }
}
