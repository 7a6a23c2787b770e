//! The requests of FUSE (linux/fuse.h), one method each.

use std::ffi::{CStr, CString};
use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, AsRawFd, FromRawFd as _};
use std::sync::PoisonError;
use std::time::Duration;

use fuse_backend_rs::abi::fuse_abi::{
    CreateIn, FOPEN_IN_KILL_SUIDGID, FsOptions, OpenOptions, SetattrValid, WRITE_KILL_PRIV,
};
use fuse_backend_rs::api::filesystem::{
    Context, DirEntry, Entry, FileSystem, GetxattrReply, ListxattrReply, ZeroCopyReader,
    ZeroCopyWriter,
};
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, RenameFlags, openat, readlinkat, renameat2};
use nix::sys::stat::{
    FchmodatFlags, Mode, SFlag, UtimensatFlags, fchmodat, mkdirat, mknodat, utimensat,
};
use nix::sys::time::TimeSpec;
use nix::unistd::{
    Gid, Uid, UnlinkatFlags, Whence, fchownat, ftruncate, linkat, symlinkat, unlinkat,
};

use super::caller::{Caller, WithoutFsetid};
use super::{Passthrough, check_name, descriptor_path, host};

/// Longest value and list of extended attributes (`XATTR_SIZE_MAX`, `XATTR_LIST_MAX`).
const MAX_XATTR: usize = 64 << 10;

/// Entries of a directory that are read at once, bytes.
const MAX_ENTRIES: usize = 32 << 10;

/// Linux' `RENAME_NOREPLACE`, `RENAME_EXCHANGE` and `RENAME_WHITEOUT`.
const RENAME_FLAGS: u32 = 7;

impl Passthrough {
    /// Makes something in a directory with `make`, as the user that asks, and tells the guest of it.
    fn make(
        &self,
        context: &Context,
        parent: u64,
        name: &CStr,
        make: impl FnOnce(&dyn AsDirectory) -> nix::Result<()>,
    ) -> io::Result<Entry> {
        check_name(name)?;
        let parent = self.node(parent)?;
        {
            let _caller = Caller::become_user(context.uid, context.gid)?;
            make(&parent.file.as_fd())?;
        }
        self.find_new(&parent, name)
    }

    fn remove(&self, parent: u64, name: &CStr, flags: UnlinkatFlags) -> io::Result<()> {
        check_name(name)?;
        Ok(unlinkat(self.node(parent)?.file.as_fd(), name, flags)?)
    }

    /// Calls `add` with the entries of a directory from `offset` on, with their numbers on the host, until it returns 0.
    fn read_directory(
        &self,
        number: u64,
        handle: u64,
        size: u32,
        offset: u64,
        mut add: impl FnMut(DirEntry<'_>) -> io::Result<usize>,
    ) -> io::Result<()> {
        let open = self.open.get(handle, number)?;
        let mut buffer = vec![0; (size as usize).min(MAX_ENTRIES)];
        let length = {
            let _position = open.position.lock().unwrap_or_else(PoisonError::into_inner);
            host::read_directory(&open.file, offset, &mut buffer)?
        };
        let mut entries = &buffer[..length];
        while let Some((entry, rest)) = host::first_entry(entries) {
            entries = rest;
            if entry.name == b"." || entry.name == b".." {
                continue;
            }
            let entry = DirEntry {
                ino: entry.number,
                offset: entry.next,
                type_: entry.kind.into(),
                name: entry.name,
            };
            // No room for more: the guest asks again from there.
            if add(entry)? == 0 {
                break;
            }
        }
        Ok(())
    }

    /// Sets what a request names, one after the other.
    fn set(
        &self,
        number: u64,
        attributes: &libc::stat64,
        handle: Option<u64>,
        valid: SetattrValid,
    ) -> io::Result<()> {
        let node = self.node(number)?;
        let path = descriptor_path(&node.file);
        let path = path.as_c_str();
        if valid.contains(SetattrValid::MODE) {
            let mode = Mode::from_bits_truncate(attributes.st_mode);
            fchmodat(&self.descriptors, path, mode, FchmodatFlags::FollowSymlink)?;
        }
        if valid.intersects(SetattrValid::UID | SetattrValid::GID) {
            let uid = valid.contains(SetattrValid::UID);
            let gid = valid.contains(SetattrValid::GID);
            fchownat(
                node.file.as_fd(),
                c"",
                uid.then(|| Uid::from_raw(attributes.st_uid)),
                gid.then(|| Gid::from_raw(attributes.st_gid)),
                AtFlags::AT_EMPTY_PATH | AtFlags::AT_SYMLINK_NOFOLLOW,
            )?;
        }
        if valid.contains(SetattrValid::SIZE) {
            let _strip = WithoutFsetid::when(valid.contains(SetattrValid::KILL_SUIDGID))?;
            match handle {
                Some(handle) => {
                    ftruncate(&self.open.get(handle, number)?.file, attributes.st_size)?;
                }
                None => ftruncate(self.reopen(&node, OFlag::O_WRONLY)?, attributes.st_size)?,
            }
        }
        if valid.intersects(SetattrValid::ATIME | SetattrValid::MTIME) {
            let time = |given, now, seconds, nanoseconds| match (
                valid.contains(given),
                valid.contains(now),
            ) {
                (true, true) => TimeSpec::UTIME_NOW,
                (true, false) => TimeSpec::new(seconds, nanoseconds),
                (false, _) => TimeSpec::UTIME_OMIT,
            };
            let access = time(
                SetattrValid::ATIME,
                SetattrValid::ATIME_NOW,
                attributes.st_atime,
                attributes.st_atime_nsec,
            );
            let modification = time(
                SetattrValid::MTIME,
                SetattrValid::MTIME_NOW,
                attributes.st_mtime,
                attributes.st_mtime_nsec,
            );
            utimensat(
                &self.descriptors,
                path,
                &access,
                &modification,
                UtimensatFlags::FollowSymlink,
            )?;
        }
        Ok(())
    }
}

/// A directory's descriptor.
trait AsDirectory: AsFd {}
impl<T: AsFd> AsDirectory for T {}

impl FileSystem for Passthrough {
    type Inode = u64;
    type Handle = u64;

    /// The first request of a guest's kernel: what an earlier one knew is forgotten.
    fn init(&self, _capable: FsOptions) -> io::Result<FsOptions> {
        self.destroy();
        Ok(FsOptions::ASYNC_READ
            | FsOptions::ASYNC_DIO
            | FsOptions::BIG_WRITES
            | FsOptions::MAX_PAGES
            | FsOptions::ATOMIC_O_TRUNC
            | FsOptions::PARALLEL_DIROPS
            | FsOptions::DO_READDIRPLUS
            | FsOptions::READDIRPLUS_AUTO
            | FsOptions::HANDLE_KILLPRIV_V2)
    }

    fn destroy(&self) {
        self.open.clear();
        self.nodes().clear();
    }

    fn lookup(&self, _: &Context, parent: u64, name: &CStr) -> io::Result<Entry> {
        self.find(&self.node(parent)?, name)
    }

    fn forget(&self, _: &Context, node: u64, count: u64) {
        self.nodes().forget(node, count);
    }

    fn batch_forget(&self, _: &Context, requests: Vec<(u64, u64)>) {
        let mut nodes = self.nodes();
        for (node, count) in requests {
            nodes.forget(node, count);
        }
    }

    fn getattr(
        &self,
        _: &Context,
        node: u64,
        handle: Option<u64>,
    ) -> io::Result<(libc::stat64, Duration)> {
        match handle {
            Some(handle) => self.attributes(&self.open.get(handle, node)?.file),
            None => self.attributes(&self.node(node)?.file.as_fd()),
        }
    }

    fn setattr(
        &self,
        context: &Context,
        node: u64,
        attributes: libc::stat64,
        handle: Option<u64>,
        valid: SetattrValid,
    ) -> io::Result<(libc::stat64, Duration)> {
        self.set(node, &attributes, handle, valid)?;
        self.getattr(context, node, None)
    }

    fn readlink(&self, _: &Context, node: u64) -> io::Result<Vec<u8>> {
        use std::os::unix::ffi::OsStringExt as _;
        Ok(readlinkat(self.node(node)?.file.as_fd(), c"")?.into_vec())
    }

    fn symlink(
        &self,
        context: &Context,
        target: &CStr,
        parent: u64,
        name: &CStr,
    ) -> io::Result<Entry> {
        self.make(context, parent, name, |directory| {
            symlinkat(target, directory.as_fd(), name)
        })
    }

    fn mknod(
        &self,
        context: &Context,
        parent: u64,
        name: &CStr,
        mode: u32,
        device: u32,
        umask: u32,
    ) -> io::Result<Entry> {
        self.make(context, parent, name, |directory| {
            mknodat(
                directory.as_fd(),
                name,
                SFlag::from_bits_truncate(mode),
                Mode::from_bits_truncate(mode & !umask),
                device.into(),
            )
        })
    }

    fn mkdir(
        &self,
        context: &Context,
        parent: u64,
        name: &CStr,
        mode: u32,
        umask: u32,
    ) -> io::Result<Entry> {
        self.make(context, parent, name, |directory| {
            mkdirat(
                directory.as_fd(),
                name,
                Mode::from_bits_truncate(mode & !umask),
            )
        })
    }

    fn unlink(&self, _: &Context, parent: u64, name: &CStr) -> io::Result<()> {
        self.remove(parent, name, UnlinkatFlags::NoRemoveDir)
    }

    fn rmdir(&self, _: &Context, parent: u64, name: &CStr) -> io::Result<()> {
        self.remove(parent, name, UnlinkatFlags::RemoveDir)
    }

    fn rename(
        &self,
        _: &Context,
        from: u64,
        old: &CStr,
        to: u64,
        new: &CStr,
        flags: u32,
    ) -> io::Result<()> {
        check_name(old)?;
        check_name(new)?;
        if flags & !RENAME_FLAGS != 0 {
            return Err(Errno::EINVAL.into());
        }
        let (from, to) = (self.node(from)?, self.node(to)?);
        let flags = RenameFlags::from_bits_retain(flags);
        Ok(renameat2(
            from.file.as_fd(),
            old,
            to.file.as_fd(),
            new,
            flags,
        )?)
    }

    fn link(&self, _: &Context, node: u64, parent: u64, name: &CStr) -> io::Result<Entry> {
        check_name(name)?;
        let (node, parent) = (self.node(node)?, self.node(parent)?);
        let path = descriptor_path(&node.file);
        linkat(
            &self.descriptors,
            path.as_c_str(),
            parent.file.as_fd(),
            name,
            AtFlags::AT_SYMLINK_FOLLOW,
        )?;
        self.find(&parent, name)
    }

    fn open(
        &self,
        _: &Context,
        node: u64,
        flags: u32,
        fuse_flags: u32,
    ) -> io::Result<(Option<u64>, OpenOptions, Option<u32>)> {
        let _strip = WithoutFsetid::when(fuse_flags & FOPEN_IN_KILL_SUIDGID != 0)?;
        let file = self.reopen(&self.node(node)?, OFlag::from_bits_retain(flags as i32))?;
        let options = if self.is_as_opened_before(node, &file)? {
            OpenOptions::KEEP_CACHE
        } else {
            OpenOptions::empty()
        };
        let handle = self.open.add(node, file, flags);
        Ok((Some(handle), options, None))
    }

    fn create(
        &self,
        context: &Context,
        parent: u64,
        name: &CStr,
        arguments: CreateIn,
    ) -> io::Result<(Entry, Option<u64>, OpenOptions, Option<u32>)> {
        check_name(name)?;
        let parent = self.node(parent)?;
        let asked = OFlag::from_bits_retain(arguments.flags as i32);
        let created = {
            let _caller = Caller::become_user(context.uid, context.gid)?;
            let flags = asked & super::OPENED | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_CLOEXEC;
            let mode = Mode::from_bits_truncate(arguments.mode & !arguments.umask);
            openat(parent.file.as_fd(), name, flags, mode)
        };
        let exclusive = asked.contains(OFlag::O_EXCL);
        let (entry, file) = match created {
            Ok(file) => (self.find_new(&parent, name)?, file),
            // Made by someone else between the guest's lookup and now.
            Err(Errno::EEXIST) if !exclusive => {
                let entry = self.find(&parent, name)?;
                let strip = arguments.fuse_flags & FOPEN_IN_KILL_SUIDGID != 0;
                let _strip = WithoutFsetid::when(strip)?;
                (entry, self.reopen(&self.node(entry.inode)?, asked)?)
            }
            Err(error) => return Err(error.into()),
        };
        let handle = self.open.add(entry.inode, file, arguments.flags);
        Ok((entry, Some(handle), OpenOptions::empty(), None))
    }

    fn read(
        &self,
        _: &Context,
        node: u64,
        handle: u64,
        to: &mut dyn ZeroCopyWriter,
        size: u32,
        offset: u64,
        _lock_owner: Option<u64>,
        _flags: u32,
    ) -> io::Result<usize> {
        let open = self.open.get(handle, node)?;
        // SAFETY: borrowed: `open` outlives it, and it is never dropped.
        let file = unsafe { std::fs::File::from_raw_fd(open.file.as_raw_fd()) };
        to.write_from(&mut *ManuallyDrop::new(file), size as usize, offset)
    }

    fn write(
        &self,
        _: &Context,
        node: u64,
        handle: u64,
        from: &mut dyn ZeroCopyReader,
        size: u32,
        offset: u64,
        _lock_owner: Option<u64>,
        _delayed: bool,
        flags: u32,
        fuse_flags: u32,
    ) -> io::Result<usize> {
        let open = self.open.get(handle, node)?;
        open.set_append(flags)?;
        let _strip = WithoutFsetid::when(fuse_flags & WRITE_KILL_PRIV != 0)?;
        // SAFETY: borrowed: `open` outlives it, and it is never dropped.
        let file = unsafe { std::fs::File::from_raw_fd(open.file.as_raw_fd()) };
        from.read_to(&mut *ManuallyDrop::new(file), size as usize, offset)
    }

    /// Everything is written through: there is nothing to flush, and the guest need not ask again.
    fn flush(&self, _: &Context, _: u64, _: u64, _: u64) -> io::Result<()> {
        Err(Errno::ENOSYS.into())
    }

    fn fsync(&self, _: &Context, node: u64, data_only: bool, handle: u64) -> io::Result<()> {
        let open = self.open.get(handle, node)?;
        if data_only {
            open.file.sync_data()
        } else {
            open.file.sync_all()
        }
    }

    fn fallocate(
        &self,
        _: &Context,
        node: u64,
        handle: u64,
        mode: u32,
        offset: u64,
        length: u64,
    ) -> io::Result<()> {
        let open = self.open.get(handle, node)?;
        let mode = nix::fcntl::FallocateFlags::from_bits_retain(mode as i32);
        Ok(nix::fcntl::fallocate(
            &open.file,
            mode,
            offset as i64,
            length as i64,
        )?)
    }

    fn lseek(
        &self,
        _: &Context,
        node: u64,
        handle: u64,
        offset: u64,
        whence: u32,
    ) -> io::Result<u64> {
        let open = self.open.get(handle, node)?;
        // The guest's kernel knows all others itself.
        let whence = match whence as i32 {
            libc::SEEK_DATA => Whence::SeekData,
            libc::SEEK_HOLE => Whence::SeekHole,
            _ => return Err(Errno::EINVAL.into()),
        };
        Ok(nix::unistd::lseek(&open.file, offset as i64, whence)? as u64)
    }

    fn statfs(&self, _: &Context, node: u64) -> io::Result<libc::statvfs64> {
        host::file_system(&self.node(node)?.file)
    }

    fn setxattr(
        &self,
        _: &Context,
        node: u64,
        name: &CStr,
        value: &[u8],
        flags: u32,
    ) -> io::Result<()> {
        let node = self.node(node)?;
        host::set_attribute(&descriptor_path(&node.file), name, value, flags)
    }

    fn getxattr(
        &self,
        _: &Context,
        node: u64,
        name: &CStr,
        size: u32,
    ) -> io::Result<GetxattrReply> {
        let node = self.node(node)?;
        let mut value = vec![0; (size as usize).min(MAX_XATTR)];
        let length = host::get_attribute(&descriptor_path(&node.file), name, &mut value)?;
        if size == 0 {
            return Ok(GetxattrReply::Count(length as u32));
        }
        value.truncate(length);
        Ok(GetxattrReply::Value(value))
    }

    fn listxattr(&self, _: &Context, node: u64, size: u32) -> io::Result<ListxattrReply> {
        let node = self.node(node)?;
        let mut names = vec![0; (size as usize).min(MAX_XATTR)];
        let length = host::list_attributes(&descriptor_path(&node.file), &mut names)?;
        if size == 0 {
            return Ok(ListxattrReply::Count(length as u32));
        }
        names.truncate(length);
        Ok(ListxattrReply::Names(names))
    }

    fn removexattr(&self, _: &Context, node: u64, name: &CStr) -> io::Result<()> {
        let node = self.node(node)?;
        host::remove_attribute(&descriptor_path(&node.file), name)
    }

    fn opendir(
        &self,
        _: &Context,
        node: u64,
        flags: u32,
    ) -> io::Result<(Option<u64>, OpenOptions)> {
        let file = self.reopen(&self.node(node)?, OFlag::O_RDONLY | OFlag::O_DIRECTORY)?;
        let handle = self.open.add(node, file, flags);
        Ok((Some(handle), OpenOptions::empty()))
    }

    fn readdir(
        &self,
        _: &Context,
        number: u64,
        handle: u64,
        size: u32,
        offset: u64,
        add: &mut dyn FnMut(DirEntry<'_>) -> io::Result<usize>,
    ) -> io::Result<()> {
        let device = self.node(number)?.node.identity.device;
        self.read_directory(number, handle, size, offset, |mut entry| {
            entry.ino = self.nodes().shown_number(device, entry.ino);
            add(entry)
        })
    }

    fn readdirplus(
        &self,
        _: &Context,
        number: u64,
        handle: u64,
        size: u32,
        offset: u64,
        add: &mut dyn FnMut(DirEntry<'_>, Entry) -> io::Result<usize>,
    ) -> io::Result<()> {
        let directory = self.node(number)?;
        self.read_directory(number, handle, size, offset, |mut entry| {
            let name = CString::new(entry.name)?;
            let Ok(found) = self.find(&directory, &name) else {
                // It was there a moment ago.
                return Ok(1);
            };
            entry.ino = found.attr.st_ino;
            let added = add(entry, found);
            if !matches!(added, Ok(1..)) {
                self.nodes().forget(found.inode, 1);
            }
            added
        })
    }

    fn fsyncdir(
        &self,
        context: &Context,
        node: u64,
        data_only: bool,
        handle: u64,
    ) -> io::Result<()> {
        self.fsync(context, node, data_only, handle)
    }
}
