//! As much of FUSE as it takes to move its messages, and the contents of files (linux/fuse.h).

/// `enum fuse_opcode`.
pub(super) const LOOKUP: u32 = 1;
pub(super) const FORGET: u32 = 2;
pub(super) const GETATTR: u32 = 3;
pub(super) const SETATTR: u32 = 4;
const SYMLINK: u32 = 6;
const MKNOD: u32 = 8;
const MKDIR: u32 = 9;
const UNLINK: u32 = 10;
const RMDIR: u32 = 11;
const LINK: u32 = 13;
pub(super) const READ: u32 = 15;
pub(super) const WRITE: u32 = 16;
pub(super) const RELEASE: u32 = 18;
pub(super) const INIT: u32 = 26;
pub(super) const RELEASEDIR: u32 = 29;
const CREATE: u32 = 35;
pub(super) const INTERRUPT: u32 = 36;
pub(super) const DESTROY: u32 = 38;
pub(super) const BATCH_FORGET: u32 = 42;

/// These change the directory that they name. To what has succeeded
/// podvisor-fs answers with the attributes that the directory has then, as to a GETATTR, between the answer's header and
/// its rest; the header does not count them. podvisor-fs has the same list (runtime/fs/src/serve.rs).
pub(super) const CHANGES: [u32; 7] = [SYMLINK, MKNOD, MKDIR, UNLINK, RMDIR, LINK, CREATE];

/// These change nothing that can be seen of a directory.
pub(super) const CHANGES_NOTHING: [u32; 4] = [LOOKUP, FORGET, GETATTR, BATCH_FORGET];

/// Set in `fuse_setattr_in.valid`: the mode changes.
const FATTR_MODE: u32 = 1;

/// `struct fuse_in_header`.
pub(super) const IN_HEADER_BYTES: usize = 40;
/// What is looked at of the arguments that follow: `struct fuse_read_in` and `struct fuse_write_in`.
pub(super) const ARGUMENTS_BYTES: usize = 40;
/// `struct fuse_out_header`.
pub(super) const OUT_HEADER_BYTES: usize = 16;
/// `struct fuse_attr_out`.
pub(super) const ATTRIBUTES_BYTES: usize = 104;
/// The header with `struct fuse_write_out`.
pub(super) const WRITTEN_BYTES: usize = OUT_HEADER_BYTES + 8;

/// What a message with this as its `error`, which is never positive in an answer, and with a file beside it says: this is
/// what the request `unique` names as its open file; its answer follows. It has nothing but its header.
pub(super) const HANDED_OVER: i32 = 1;

/// What a request that names an open file means by it. A number never stands for another opening later.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Handle {
    /// The file's number.
    pub(super) node: u64,
    /// This opening's.
    pub(super) number: u64,
}

/// What a READ or WRITE asks for.
#[derive(Debug, Clone, Copy)]
pub(super) struct Transfer {
    pub(super) handle: Handle,
    pub(super) offset: u64,
    pub(super) length: usize,
    /// Of the guest's process: `O_APPEND`.
    pub(super) appends: bool,
}

/// The front of a request: its header and, where there are as many, the first bytes of its arguments. The others are zero.
#[derive(Debug)]
pub(super) struct Front {
    pub(super) bytes: [u8; IN_HEADER_BYTES + ARGUMENTS_BYTES],
}

impl Default for Front {
    fn default() -> Self {
        Self {
            bytes: [0; IN_HEADER_BYTES + ARGUMENTS_BYTES],
        }
    }
}

impl Front {
    pub(super) fn opcode(&self) -> u32 {
        u32_at(&self.bytes, 4)
    }

    pub(super) fn unique(&self) -> u64 {
        u64_at(&self.bytes, 8)
    }

    pub(super) fn node(&self) -> u64 {
        u64_at(&self.bytes, 16)
    }

    /// The open file that a READ, WRITE, RELEASE or RELEASEDIR names.
    pub(super) fn handle(&self) -> Handle {
        Handle {
            node: self.node(),
            number: u64_at(&self.bytes, IN_HEADER_BYTES),
        }
    }

    /// What a READ or WRITE asks for.
    pub(super) fn transfer(&self) -> Transfer {
        let arguments = &self.bytes[IN_HEADER_BYTES..];
        Transfer {
            handle: self.handle(),
            offset: u64_at(arguments, 8),
            length: u32_at(arguments, 16) as usize,
            appends: u32_at(arguments, 32) & libc::O_APPEND as u32 != 0,
        }
    }

    /// Whether a SETATTR is about the mode.
    pub(super) fn sets_mode(&self) -> bool {
        u32_at(&self.bytes, IN_HEADER_BYTES) & FATTR_MODE != 0
    }
}

/// `struct fuse_out_header` of a message of so many bytes.
pub(super) fn out_header(length: usize, error: i32, unique: u64) -> [u8; OUT_HEADER_BYTES] {
    let mut header = [0; OUT_HEADER_BYTES];
    header[..4].copy_from_slice(&(length as u32).to_ne_bytes());
    header[4..8].copy_from_slice(&(-error).to_ne_bytes());
    header[8..].copy_from_slice(&unique.to_ne_bytes());
    header
}

/// The whole answer to a WRITE.
pub(super) fn written(count: usize, unique: u64) -> [u8; WRITTEN_BYTES] {
    let mut answer = [0; WRITTEN_BYTES];
    answer[..OUT_HEADER_BYTES].copy_from_slice(&out_header(WRITTEN_BYTES, 0, unique));
    answer[OUT_HEADER_BYTES..][..4].copy_from_slice(&(count as u32).to_ne_bytes());
    answer
}

pub(super) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let mut word = [0; 4];
    word.copy_from_slice(&bytes[at..at + 4]);
    u32::from_ne_bytes(word)
}

pub(super) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[at..at + 8]);
    u64::from_ne_bytes(word)
}
