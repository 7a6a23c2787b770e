use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};

use fuse_backend_rs::abi::fuse_abi::{CreateIn, FsOptions, SetattrValid};
use fuse_backend_rs::api::filesystem::{Context, FileSystem as _};

use super::nodes::ROOT;
use super::*;

/// Runs a test on files below a new directory, in a thread that may do as those of the process do; once with files held
/// open, once with files found again by their paths.
fn with(test: impl Fn(&Passthrough, &Path) + Sync) {
    for hold_at_most in [usize::MAX, 0] {
        let dir = tempfile::tempdir().unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                // SAFETY: numbers only. Of this thread alone (SECBIT_NO_SETUID_FIXUP).
                let set = unsafe { libc::prctl(libc::PR_SET_SECUREBITS, 4, 0, 0, 0) };
                assert_eq!(set, 0);
                let flags = OFlag::O_PATH | OFlag::O_CLOEXEC;
                let descriptors = nix::fcntl::open("/proc/self/fd", flags, Mode::empty()).unwrap();
                let mut files = Passthrough::new(dir.path(), descriptors).unwrap();
                files.hold_at_most = hold_at_most;
                files.enter_thread().unwrap();
                files.init(FsOptions::all()).unwrap();
                test(&files, dir.path());
            });
        });
    }
}

fn user(uid: u32, gid: u32) -> Context {
    Context {
        uid,
        gid,
        ..Context::default()
    }
}

fn code<T>(result: io::Result<T>) -> Option<i32> {
    result.err().and_then(|error| error.raw_os_error())
}

fn create(files: &Passthrough, context: &Context, name: &CStr, flags: i32) -> (Entry, u64) {
    let arguments = CreateIn {
        flags: flags as u32,
        mode: 0o644,
        umask: 0,
        fuse_flags: 0,
    };
    let (entry, handle, _, _) = files.create(context, ROOT, name, arguments).unwrap();
    (entry, handle.unwrap())
}

#[test]
fn a_name_is_one_component() {
    with(|files, dir| {
        fs::create_dir(dir.join("sub")).unwrap();
        let root = user(0, 0);
        for name in [c"..", c".", c"", c"sub/x", c"/etc", c"../x"] {
            assert_eq!(
                code(files.lookup(&root, ROOT, name)),
                Some(libc::EINVAL),
                "{name:?}"
            );
            assert_eq!(code(files.unlink(&root, ROOT, name)), Some(libc::EINVAL));
            assert_eq!(
                code(files.mkdir(&root, ROOT, name, 0o755, 0)),
                Some(libc::EINVAL)
            );
            let renamed = files.rename(&root, ROOT, c"sub", ROOT, name, 0);
            assert_eq!(code(renamed), Some(libc::EINVAL));
        }
        let sub = files.lookup(&root, ROOT, c"sub").unwrap();
        assert_eq!(
            code(files.lookup(&root, sub.inode, c"..")),
            Some(libc::EINVAL)
        );
    });
}

#[test]
fn links_are_the_guests_to_follow_and_only_files_are_opened() {
    with(|files, dir| {
        symlink("/etc", dir.join("link")).unwrap();
        nix::unistd::mkfifo(&dir.join("fifo"), Mode::S_IRWXU).unwrap();
        let root = user(0, 0);
        let link = files.lookup(&root, ROOT, c"link").unwrap();
        assert_eq!(files.readlink(&root, link.inode).unwrap(), b"/etc");
        assert_eq!(
            code(files.lookup(&root, link.inode, c"passwd")),
            Some(libc::ENOTDIR)
        );
        assert_eq!(code(files.open(&root, link.inode, 0, 0)), Some(libc::EBADF));
        let fifo = files.lookup(&root, ROOT, c"fifo").unwrap();
        // Would wait for a writer.
        assert_eq!(code(files.open(&root, fifo.inode, 0, 0)), Some(libc::EBADF));
    });
}

#[test]
fn new_files_belong_to_who_makes_them_whatever_the_directory_allows() {
    with(|files, dir| {
        fs::set_permissions(dir, fs::Permissions::from_mode(0o700)).unwrap();
        let who = user(1234, 99);
        create(files, &who, c"file", libc::O_WRONLY);
        files.mkdir(&who, ROOT, c"dir", 0o777, 0o027).unwrap();
        files.symlink(&who, c"x", ROOT, c"link").unwrap();
        for (name, mode) in [("file", 0o100_644), ("dir", 0o40750), ("link", 0o120_777)] {
            let made = fs::symlink_metadata(dir.join(name)).unwrap();
            assert_eq!(
                (made.uid(), made.gid(), made.mode()),
                (1234, 99, mode),
                "{name}"
            );
        }
        create(files, &user(0, 0), c"roots", libc::O_WRONLY);
        assert_eq!(dir.join("roots").metadata().unwrap().uid(), 0);
    });
}

#[test]
fn one_file_has_one_number_until_it_is_forgotten() {
    with(|files, dir| {
        fs::write(dir.join("a"), "x").unwrap();
        fs::hard_link(dir.join("a"), dir.join("b")).unwrap();
        let root = user(0, 0);
        let a = files.lookup(&root, ROOT, c"a").unwrap();
        let b = files.lookup(&root, ROOT, c"b").unwrap();
        assert_eq!(a.inode, b.inode);
        assert_eq!((a.attr_timeout, a.entry_timeout), (VALIDITY, VALIDITY));
        fs::remove_file(dir.join("a")).unwrap();
        assert_eq!(code(files.lookup(&root, ROOT, c"a")), Some(libc::ENOENT));
        assert_eq!(files.getattr(&root, a.inode, None).unwrap().0.st_nlink, 1);
        files.forget(&root, a.inode, 2);
        assert_eq!(
            code(files.getattr(&root, a.inode, None)),
            Some(libc::ESTALE)
        );
        assert_eq!(code(files.open(&root, 12345, 0, 0)), Some(libc::ESTALE));
        // Another guest's kernel knows nothing.
        let b = files.lookup(&root, ROOT, c"b").unwrap();
        files.init(FsOptions::all()).unwrap();
        assert_eq!(
            code(files.getattr(&root, b.inode, None)),
            Some(libc::ESTALE)
        );
    });
}

#[test]
fn attributes() {
    with(|files, dir| {
        let root = user(0, 0);
        let path = dir.join("file");
        fs::write(&path, "12345678").unwrap();
        let file = files.lookup(&root, ROOT, c"file").unwrap();
        let mut new = file.attr;
        new.st_mode = 0o600;
        new.st_uid = 7;
        new.st_size = 3;
        new.st_mtime = 1_000_000;
        new.st_mtime_nsec = 5;
        let valid =
            SetattrValid::MODE | SetattrValid::UID | SetattrValid::SIZE | SetattrValid::MTIME;
        let (set, _) = files.setattr(&root, file.inode, new, None, valid).unwrap();
        assert_eq!((set.st_mode, set.st_uid, set.st_gid), (0o100_600, 7, 0));
        assert_eq!(
            (set.st_size, set.st_mtime, set.st_mtime_nsec),
            (3, 1_000_000, 5)
        );
        assert_eq!(fs::read(&path).unwrap(), b"123");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o4777)).unwrap();
        new.st_size = 1;
        let valid = SetattrValid::SIZE | SetattrValid::KILL_SUIDGID;
        let (set, _) = files.setattr(&root, file.inode, new, None, valid).unwrap();
        assert_eq!(set.st_mode, 0o100_777);
        // Of a link, not of what it leads to.
        symlink("file", dir.join("link")).unwrap();
        let link = files.lookup(&root, ROOT, c"link").unwrap();
        new.st_uid = 8;
        files
            .setattr(&root, link.inode, new, None, SetattrValid::UID)
            .unwrap();
        assert_eq!(fs::symlink_metadata(dir.join("link")).unwrap().uid(), 8);
        assert_eq!(path.metadata().unwrap().uid(), 7);
    });
}

#[test]
fn directories_are_read_from_any_place() {
    with(|files, dir| {
        for n in 0..3000 {
            fs::write(dir.join(format!("a-file-with-a-name-{n}")), "").unwrap();
        }
        let root = user(0, 0);
        let (handle, _) = files.opendir(&root, ROOT, 0).unwrap();
        let (mut names, mut offset) = (std::collections::HashSet::new(), 0);
        loop {
            let before = names.len();
            let mut room = 100;
            files
                .readdir(&root, ROOT, handle.unwrap(), 4096, offset, &mut |entry| {
                    if room == 0 {
                        return Ok(0);
                    }
                    room -= 1;
                    offset = entry.offset;
                    assert!(names.insert(entry.name.to_owned()));
                    Ok(1)
                })
                .unwrap();
            if names.len() == before {
                break;
            }
        }
        assert_eq!(names.len(), 3000);
    });
}

#[test]
fn extended_attributes() {
    use fuse_backend_rs::api::filesystem::{GetxattrReply, ListxattrReply};
    with(|files, dir| {
        let root = user(0, 0);
        fs::write(dir.join("file"), "").unwrap();
        let file = files.lookup(&root, ROOT, c"file").unwrap().inode;
        let name = c"user.test";
        match files.setxattr(&root, file, name, b"value", 0) {
            // Not all temporary directories have them.
            Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => return,
            result => result.unwrap(),
        }
        let get = |size| files.getxattr(&root, file, name, size);
        assert!(matches!(get(0), Ok(GetxattrReply::Count(5))));
        assert!(matches!(get(100), Ok(GetxattrReply::Value(value)) if value == b"value"));
        assert_eq!(code(get(1)), Some(libc::ERANGE));
        let list = files.listxattr(&root, file, u32::MAX);
        assert!(
            matches!(list, Ok(ListxattrReply::Names(names)) if names.starts_with(b"user.test\0"))
        );
        files.removexattr(&root, file, name).unwrap();
        assert_eq!(code(get(100)), Some(libc::ENODATA));
    });
}

#[test]
fn an_open_file_is_itself_whatever_becomes_of_its_name() {
    with(|files, dir| {
        let root = user(0, 0);
        let (file, handle) = create(files, &root, c"file", libc::O_RDWR);
        let size = || files.getattr(&root, file.inode, None).unwrap().0.st_size;
        fs::write(dir.join("file"), "12345").unwrap();
        fs::rename(dir.join("file"), dir.join("moved")).unwrap();
        fs::write(dir.join("file"), "another one").unwrap();
        assert_eq!(size(), 5);
        fs::remove_file(dir.join("moved")).unwrap();
        assert_eq!(size(), 5);
        files.close(handle);
    });
}
