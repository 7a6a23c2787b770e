//! Files of a container's root, opened so that no name in it (`..`, an absolute link) leads outside:
//! `openat2` with `RESOLVE_IN_ROOT` (openat2(2)).

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Component, Path};

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, OFlag, OpenHow, ResolveFlag, openat2};
use nix::sys::stat::{Mode, mkdirat};

/// A container's root directory.
pub struct Root(OwnedFd);

impl Root {
    /// Opens the directory at `path`, a path of the agent's own.
    pub fn open(path: &Path) -> io::Result<Self> {
        let how = OpenHow::new().flags(OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC);
        Ok(Self(openat2(AT_FDCWD, path, how)?))
    }

    /// Opens a regular file for reading; none when there is no such file, or it is something else.
    pub fn open_file(&self, path: &str) -> io::Result<Option<File>> {
        // Non-blocking: the image may have a FIFO of that name.
        let flags = OFlag::O_RDONLY | OFlag::O_NONBLOCK | OFlag::O_NOCTTY;
        match self.resolve(Path::new(path), flags) {
            Ok(fd) => {
                let file = File::from(fd);
                Ok(file.metadata()?.is_file().then_some(file))
            }
            Err(Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP | Errno::ENXIO) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Makes the directory `path` and those above it, mode 0755, as far as they do not exist.
    pub fn create_directories(&self, path: &Path) -> io::Result<()> {
        let mut current = self.0.try_clone()?;
        let directory = OFlag::O_PATH | OFlag::O_DIRECTORY;
        if self.resolve(path, directory).is_ok() {
            return Ok(());
        }
        // `current` is what the components so far resolve to, from the root each time, so that
        // links in them keep their meaning.
        let mut so_far = std::path::PathBuf::new();
        for component in path.components() {
            let name = match component {
                Component::Normal(name) => name,
                Component::ParentDir => return Err(Errno::EINVAL.into()),
                Component::RootDir | Component::CurDir | Component::Prefix(_) => continue,
            };
            so_far.push(name);
            current = match self.resolve(&so_far, directory) {
                Ok(next) => next,
                Err(Errno::ENOENT) => {
                    mkdirat(current.as_fd(), name, Mode::from_bits_truncate(0o755))?;
                    self.resolve(&so_far, directory)?
                }
                Err(error) => return Err(error.into()),
            };
        }
        Ok(())
    }

    fn resolve(&self, path: &Path, flags: OFlag) -> nix::Result<OwnedFd> {
        let how = OpenHow::new()
            .flags(flags | OFlag::O_CLOEXEC)
            .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS);
        openat2(&self.0, path, how)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::os::unix::fs::symlink;

    fn root() -> (tempfile::TempDir, Root) {
        let directory = tempfile::tempdir().unwrap();
        let root = Root::open(directory.path()).unwrap();
        (directory, root)
    }

    #[test]
    fn links_stay_inside() {
        let (directory, root) = root();
        let outside = tempfile::tempdir().unwrap();
        std::fs::write(outside.path().join("passwd"), "outside").unwrap();
        symlink(outside.path(), directory.path().join("etc")).unwrap();
        assert!(root.open_file("etc/passwd").unwrap().is_none());

        // The same absolute name, below the root, is what the link means.
        let inside = directory
            .path()
            .join(outside.path().strip_prefix("/").unwrap());
        std::fs::create_dir_all(&inside).unwrap();
        std::fs::write(inside.join("passwd"), "inside").unwrap();
        let mut text = String::new();
        let mut file = root.open_file("etc/passwd").unwrap().unwrap();
        file.read_to_string(&mut text).unwrap();
        assert_eq!(text, "inside");
    }

    #[test]
    fn what_is_not_a_file_is_none() {
        let (directory, root) = root();
        std::fs::create_dir(directory.path().join("passwd")).unwrap();
        nix::unistd::mkfifo(&directory.path().join("fifo"), Mode::S_IRWXU).unwrap();
        symlink("loop", directory.path().join("loop")).unwrap();
        for name in ["passwd", "fifo", "loop", "missing", "passwd/x"] {
            assert!(root.open_file(name).unwrap().is_none(), "{name}");
        }
    }

    #[test]
    fn directories_are_made_below_links() {
        let (directory, root) = root();
        std::fs::create_dir(directory.path().join("real")).unwrap();
        symlink("/real", directory.path().join("link")).unwrap();
        root.create_directories(Path::new("/link/a/b")).unwrap();
        root.create_directories(Path::new("/link/a/b")).unwrap();
        assert!(directory.path().join("real/a/b").is_dir());
        assert!(root.create_directories(Path::new("/a/../../b")).is_err());
        symlink("/nowhere", directory.path().join("dangling")).unwrap();
        assert!(root.create_directories(Path::new("/dangling/a")).is_err());
    }
}
