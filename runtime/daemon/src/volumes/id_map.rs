//! Volumes whose files have other ids in the pod than on the node (CRI `uidMappings`, `gidMappings`): an id-mapped mount
//! (mount_setattr(2)), made on the node, as runc does it.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{Pid, pipe2};
use podvisor_proto::cri;

use crate::user_namespace::check;

/// Lines of a map that a kernel takes (user_namespaces(7)).
const MAX_LINES: usize = 340;

/// Ids in the pod, and those that they are on the node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IdMap {
    uids: String,
    gids: String,
}

impl IdMap {
    /// What a mount asks for; none when it asks for no other ids.
    ///
    /// # Errors
    /// The field, and what is wrong with it.
    pub fn parse(mount: &cri::Mount) -> Result<Option<Self>, (&'static str, &'static str)> {
        if mount.uid_mappings.is_empty() && mount.gid_mappings.is_empty() {
            return Ok(None);
        }
        let map = |field, mappings: &[cri::IdMapping]| {
            if mappings.is_empty() {
                return Err((field, "missing, where the other is set"));
            }
            if mappings.len() > MAX_LINES {
                return Err((field, "has more than 340 lines"));
            }
            let mut text = String::new();
            for mapping in mappings {
                check(mapping).map_err(|problem| (field, problem))?;
                let cri::IdMapping {
                    host_id,
                    container_id,
                    length,
                } = mapping;
                // Writing to a String cannot fail.
                let _ = writeln!(text, "{container_id} {host_id} {length}");
            }
            Ok(text)
        };
        Ok(Some(Self {
            uids: map("uidMappings", &mount.uid_mappings)?,
            gids: map("gidMappings", &mount.gid_mappings)?,
        }))
    }

    /// Maps the ids of a mount that is nowhere yet. Blocking.
    ///
    /// # Errors
    /// The file system does not have it, or the kernel (5.12; ext4, xfs and btrfs have it since 5.15 at the latest, tmpfs since
    /// 6.3).
    pub fn apply(&self, mount: BorrowedFd<'_>) -> io::Result<()> {
        super::mount::map_ids(mount, self.user_namespace()?.as_fd())
    }

    /// A user namespace with this map, in which nobody is.
    fn user_namespace(&self) -> io::Result<OwnedFd> {
        let (reader, writer) = pipe2(OFlag::O_CLOEXEC)?;
        let process = Sleeper::start(&reader, &writer)?;
        let made = self.map(process.0);
        // It waits for this.
        drop(writer);
        process.join()?;
        made
    }

    fn map(&self, process: Pid) -> io::Result<OwnedFd> {
        let process = Path::new("/proc").join(process.to_string());
        fs::write(process.join("uid_map"), &self.uids)?;
        fs::write(process.join("gid_map"), &self.gids)?;
        Ok(File::open(process.join("ns/user"))?.into())
    }
}

/// A process in a user namespace of its own, in which it does nothing.
struct Sleeper(Pid);

impl Sleeper {
    /// It ends when this process has no `writer` any more, whatever becomes of it.
    fn start(reader: &OwnedFd, writer: &OwnedFd) -> io::Result<Self> {
        use std::os::fd::AsRawFd;
        let (reader, writer) = (reader.as_raw_fd(), writer.as_raw_fd());
        let none = std::ptr::null_mut::<libc::c_void>();
        // SAFETY: as fork(2): no flag shares memory. The child is a copy of a process with many threads: it makes system
        // calls with numbers and a buffer of its own stack alone, and ends.
        let child = unsafe {
            libc::syscall(
                libc::SYS_clone,
                libc::CLONE_NEWUSER | libc::SIGCHLD,
                none,
                none,
                none,
                none,
            )
        };
        if child == 0 {
            let mut byte = 0_u8;
            // SAFETY: see above.
            unsafe {
                libc::syscall(libc::SYS_close, writer);
                libc::syscall(libc::SYS_read, reader, &raw mut byte, 1);
                libc::syscall(libc::SYS_exit_group, 0);
                libc::abort();
            }
        }
        Ok(Self(Pid::from_raw(Errno::result(child)? as i32)))
    }

    fn join(self) -> io::Result<()> {
        loop {
            match waitpid(self.0, Some(WaitPidFlag::empty())) {
                Ok(WaitStatus::Exited(..) | WaitStatus::Signaled(..)) => return Ok(()),
                Ok(_) | Err(Errno::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsRawFd;
    use std::os::unix::fs::{MetadataExt, chown};

    fn mount(uids: &[(u32, u32, u32)], gids: &[(u32, u32, u32)]) -> cri::Mount {
        let ids = |lines: &[(u32, u32, u32)]| {
            let lines = lines.iter();
            let line = |&(container_id, host_id, length): &(u32, u32, u32)| cri::IdMapping {
                host_id,
                container_id,
                length,
            };
            lines.map(line).collect()
        };
        cri::Mount {
            uid_mappings: ids(uids),
            gid_mappings: ids(gids),
            ..Default::default()
        }
    }

    #[test]
    fn maps_are_checked() {
        let one: &[_] = &[(0, 100_000, 65536)];
        assert_eq!(IdMap::parse(&mount(&[], &[])), Ok(None));
        let map = IdMap::parse(&mount(one, &[(0, 1, 2), (2, 9, 1)]));
        let map = map.unwrap().unwrap();
        assert_eq!(map.uids, "0 100000 65536\n");
        assert_eq!(map.gids, "0 1 2\n2 9 1\n");
        let many = [(0, 0, 1); MAX_LINES + 1];
        for (uids, gids, wrong) in [
            (one, &[][..], "gidMappings"),
            (&[], one, "uidMappings"),
            (&[(0, 0, 0)], one, "uidMappings"),
            (one, &[(0, u32::MAX, 2)], "gidMappings"),
            (one, &many, "gidMappings"),
        ] {
            let (field, _) = IdMap::parse(&mount(uids, gids)).unwrap_err();
            assert_eq!(field, wrong);
        }
    }

    #[test]
    fn files_have_other_owners_in_the_mount() {
        // Where programs are built, there is a file system that has it; a tmpfs has it since Linux 6.3.
        let build = std::env::current_exe().unwrap();
        let dir = tempfile::tempdir_in(build.parent().unwrap()).unwrap();
        chown(dir.path(), Some(7), Some(8)).unwrap();
        let ids = mount(&[(0, 100_000, 65536)], &[(0, 200_000, 65536)]);
        let map = IdMap::parse(&ids).unwrap().unwrap();
        let place = File::open(dir.path()).unwrap();
        let tree = super::super::mount::clone(place.as_fd()).unwrap();
        map.apply(tree.as_fd()).unwrap();
        let inside = fs::metadata(format!("/proc/self/fd/{}", tree.as_raw_fd())).unwrap();
        assert_eq!((inside.uid(), inside.gid()), (100_007, 200_008));
        // Two lines for one id are no map.
        let twice = mount(&[(0, 1, 5), (3, 10, 5)], &[(0, 1, 5)]);
        let twice = IdMap::parse(&twice).unwrap().unwrap();
        assert!(twice.user_namespace().is_err());
    }
}
