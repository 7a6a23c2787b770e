//! Which processes are a pod's.
//!
//! Two signs, of which either is enough: the process is in a cgroup of the instance's, or it is
//! one of our programs and its command line names a sandbox's folder of the instance's. The first
//! alone would miss a process that died before it was put into its group was undone; the second
//! alone would take an administrator's `tail -f` of a pod's log for a part of the pod, and misses
//! VMMs that were only given file descriptors.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use super::{Kind, Resource, sandbox_id};
use crate::pidfd::start_time;

/// Processes of the sandboxes in `run_dirs`, which are spellings of one folder, and those in
/// `cgroups`.
pub fn scan(run_dirs: &[&Path], cgroups: &[Resource]) -> io::Result<Vec<Resource>> {
    let mut owners: HashMap<u32, String> = HashMap::new();
    for group in cgroups {
        let procs = fs::read_to_string(group.path.join("cgroup.procs")).unwrap_or_default();
        for pid in procs.lines().filter_map(|line| line.parse().ok()) {
            owners.insert(pid, group.sandbox_id.clone());
        }
    }

    let folders: Vec<Vec<u8>> = run_dirs
        .iter()
        .map(|dir| [dir.as_os_str().as_bytes(), b"/sandboxes/"].concat())
        .collect();
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let Some(pid) = entry?
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok())
        else {
            continue;
        };
        if pid == std::process::id() {
            continue;
        }
        // Empty for what has ended, and for a moment while a program is executed.
        let command = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let owner = owners
            .remove(&pid)
            .or_else(|| named_sandbox(&command, &folders));
        if let Some(sandbox_id) = owner
            && let Ok(start_time) = start_time(pid)
            // What has ended has no program.
            && fs::read_link(format!("/proc/{pid}/exe")).is_ok()
        {
            found.push(Resource {
                kind: Kind::Process { pid, start_time },
                sandbox_id,
                path: shown(&command),
            });
        }
    }
    Ok(found)
}

/// The sandbox that a command line of one of our programs names: `podvisor-monitor <folder>`, or a
/// VMM that is called `podvisor-<id>` and has something in the folder.
fn named_sandbox(command: &[u8], folders: &[Vec<u8>]) -> Option<String> {
    let arguments: Vec<&[u8]> = command.split(|b| *b == 0).collect();
    let program = Path::new(OsStr::from_bytes(arguments.first()?)).file_name()?;
    let is_ours = program.as_bytes().starts_with(b"podvisor-");
    let is_vmm = arguments
        .windows(2)
        .any(|pair| matches!(pair, [b"-name", name] if name.starts_with(b"podvisor-")));
    if !is_ours && !is_vmm {
        return None;
    }
    arguments.iter().find_map(|argument| {
        folders.iter().find_map(|folder| {
            let start = find(argument, folder)? + folder.len();
            let id = argument.get(start..start + 64)?;
            sandbox_id(str::from_utf8(id).ok()?).map(str::to_owned)
        })
    })
}

fn find(text: &[u8], part: &[u8]) -> Option<usize> {
    text.windows(part.len()).position(|window| window == part)
}

/// The program, and its first argument, which for ours is the folder.
fn shown(command: &[u8]) -> PathBuf {
    let mut words = command.split(|b| *b == 0).filter(|word| !word.is_empty());
    let words: Vec<_> = words.by_ref().take(2).collect();
    OsStr::from_bytes(&words.join(&b' ')).into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const ID: &str = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

    fn named(arguments: &[&str]) -> Option<String> {
        let folders = [
            b"/run/podvisor/sandboxes/".to_vec(),
            b"/r/sandboxes/".to_vec(),
        ];
        named_sandbox(arguments.join("\0").as_bytes(), &folders)
    }

    #[test]
    fn our_programs() {
        let folder = format!("/run/podvisor/sandboxes/{ID}");
        let ours = Some(ID.to_owned());
        assert_eq!(named(&["/usr/bin/podvisor-monitor", &folder, ""]), ours);
        assert_eq!(
            named(&["podvisor-fs", &format!("--root=/r/sandboxes/{ID}/shares")]),
            ours
        );
        let socket = format!("socket,id=c0,path={folder}/disk.sock");
        let name = format!("podvisor-{ID},debug-threads=on");
        assert_eq!(
            named(&["qemu-system-x86_64", "-name", &name, "-chardev", &socket]),
            ours
        );
    }

    #[test]
    fn programs_of_others() {
        let folder = format!("/run/podvisor/sandboxes/{ID}");
        assert_eq!(
            named(&["tail", "-f", &format!("{folder}/monitor.log")]),
            None
        );
        assert_eq!(
            named(&["qemu-system-x86_64", "-name", "other", &folder]),
            None
        );
        // Another instance's.
        assert_eq!(
            named(&["podvisor-monitor", &format!("/run/two/sandboxes/{ID}")]),
            None
        );
        let name = format!("podvisor-{ID}");
        assert_eq!(named(&["qemu-system-x86_64", "-name", &name]), None);
        // No sandbox.
        assert_eq!(
            named(&["podvisor-monitor", "/run/podvisor/sandboxes/"]),
            None
        );
        assert_eq!(
            named(&["podvisor-monitor", &folder[..folder.len() - 1]]),
            None
        );
        assert_eq!(
            named(&["podvisor-monitor", &folder.replace('a', "A")]),
            None
        );
        assert_eq!(named(&[""]), None);
    }

    proptest! {
        #[test]
        fn any_command_line(command: Vec<u8>) {
            let _ = named_sandbox(&command, &[b"/".to_vec()]);
            let _ = shown(&command);
        }
    }
}
