//! Files of a container's root, opened so that no name in it (`..`, an absolute link) leads outside:
//! `openat2` with `RESOLVE_IN_ROOT` (openat2(2)).

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Component, Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, OFlag, OpenHow, ResolveFlag, openat2};
use nix::sys::stat::{Mode, SFlag, mkdirat, mknodat};

/// A container's root directory.
pub struct Root(OwnedFd);

impl Root {
    /// Opens the directory at `path`, a path of the agent's own.
    pub fn new(path: &Path) -> io::Result<Self> {
        let how = OpenHow::new().flags(OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC);
        Ok(Self(openat2(AT_FDCWD, path, how)?))
    }

    /// Opens a regular file for reading; none when there is no such file, or it is something else.
    pub fn open_file(&self, path: &str) -> io::Result<Option<File>> {
        // Non-blocking: the image may have a FIFO of that name.
        let flags = OFlag::O_RDONLY | OFlag::O_NONBLOCK | OFlag::O_NOCTTY;
        match self.open(Path::new(path), flags) {
            Ok(fd) => {
                let file = File::from(fd);
                Ok(file.metadata()?.is_file().then_some(file))
            }
            Err(Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP | Errno::ENXIO) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// The directory `path`, made with those above it, mode 0755, as far as they do not exist.
    pub fn directory(&self, path: &Path) -> io::Result<OwnedFd> {
        let directory = OFlag::O_PATH | OFlag::O_DIRECTORY;
        if let Ok(present) = self.open(path, directory) {
            return Ok(present);
        }
        // `current` is what the components so far resolve to, from the root each time, so that
        // links in them keep their meaning.
        let mut current = self.0.try_clone()?;
        let mut so_far = PathBuf::new();
        for component in path.components() {
            let name = match component {
                Component::Normal(name) => name,
                Component::ParentDir => return Err(Errno::EINVAL.into()),
                Component::RootDir | Component::CurDir | Component::Prefix(_) => continue,
            };
            so_far.push(name);
            current = match self.open(&so_far, directory) {
                Ok(next) => next,
                Err(Errno::ENOENT) => {
                    mkdirat(current.as_fd(), name, Mode::from_bits_truncate(0o755))?;
                    self.open(&so_far, directory)?
                }
                Err(error) => return Err(error.into()),
            };
        }
        Ok(current)
    }

    /// As [`Self::directory`]; no link leads there, so that it is nowhere else than its name says.
    pub fn directory_without_links(&self, path: &Path) -> io::Result<OwnedFd> {
        self.directory(path)?;
        let how = OpenHow::new()
            .flags(OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC)
            .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_SYMLINKS);
        Ok(openat2(&self.0, path, how)?)
    }

    /// What is at `path`; an empty file of mode 0644 is made where nothing is.
    pub fn file(&self, path: &Path) -> io::Result<OwnedFd> {
        match self.open(path, OFlag::O_PATH) {
            Err(Errno::ENOENT) => {}
            result => return Ok(result?),
        }
        let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
            return Err(Errno::EINVAL.into());
        };
        let parent = self.directory(parent)?;
        mknodat(
            &parent,
            name,
            SFlag::S_IFREG,
            Mode::from_bits_truncate(0o644),
            0,
        )?;
        Ok(self.open(path, OFlag::O_PATH)?)
    }

    /// What is at `path`. With `O_PATH` it is only found: to be mounted on, to be looked at.
    pub fn open(&self, path: &Path, flags: OFlag) -> nix::Result<OwnedFd> {
        let how = OpenHow::new()
            .flags(flags | OFlag::O_CLOEXEC)
            .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS);
        openat2(&self.0, path, how)
    }
}

impl From<OwnedFd> for Root {
    /// A directory that is open already.
    fn from(directory: OwnedFd) -> Self {
        Self(directory)
    }
}

impl AsFd for Root {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::os::unix::fs::symlink;

    fn root() -> (tempfile::TempDir, Root) {
        let directory = tempfile::tempdir().unwrap();
        let root = Root::new(directory.path()).unwrap();
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
        root.directory(Path::new("/link/a/b")).unwrap();
        root.directory(Path::new("/link/a/b")).unwrap();
        assert!(directory.path().join("real/a/b").is_dir());
        assert!(root.directory(Path::new("/a/../../b")).is_err());
        assert!(root.directory_without_links(Path::new("/link/a")).is_err());
        root.directory_without_links(Path::new("/real/c")).unwrap();
        symlink("/nowhere", directory.path().join("dangling")).unwrap();
        assert!(root.directory(Path::new("/dangling/a")).is_err());
    }

    #[test]
    fn a_file_is_made_where_nothing_is() {
        let (directory, root) = root();
        root.file(Path::new("/etc/hosts")).unwrap();
        assert!(directory.path().join("etc/hosts").is_file());
        // What is there stays what it is.
        std::fs::write(directory.path().join("etc/hosts"), "mine").unwrap();
        symlink("hosts", directory.path().join("etc/link")).unwrap();
        root.file(Path::new("/etc/link")).unwrap();
        let text = std::fs::read_to_string(directory.path().join("etc/hosts")).unwrap();
        assert_eq!(text, "mine");
        symlink("/nowhere/at/all", directory.path().join("dangling")).unwrap();
        assert!(root.file(Path::new("/dangling")).is_err());
    }
}
