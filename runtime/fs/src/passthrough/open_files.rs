//! What the guest has open: a handle for each, by which it names them from then on.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicI32, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};

/// An open file or directory.
pub struct OpenFile {
    /// It.
    pub file: File,
    /// Held while a directory's position is used.
    pub position: Mutex<()>,
    /// The node it was opened from.
    node: u64,
    append: AtomicI32,
    /// How often it was read or written.
    transfers: AtomicU32,
}

/// What is used so often is handed over: most files are read or written once.
const OFTEN: u32 = 2;

impl OpenFile {
    /// It is read or written once more. Whether it is to be handed over now.
    pub fn is_used_often(&self) -> bool {
        // It wraps after 2^32 times, and is handed over once more.
        self.transfers.fetch_add(1, Ordering::Relaxed) + 1 == OFTEN
    }

    /// Whether what is written goes to its end.
    pub fn appends(&self) -> bool {
        self.append.load(Ordering::Relaxed) != 0
    }

    /// Makes the file append or not, as the guest's process has set it meanwhile (fcntl(2), `F_SETFL`).
    pub fn set_append(&self, flags: u32) -> io::Result<()> {
        let append = flags as i32 & libc::O_APPEND;
        if self.append.load(Ordering::Relaxed) == append {
            return Ok(());
        }
        let current = OFlag::from_bits_retain(fcntl(&self.file, FcntlArg::F_GETFL)?);
        let mut wanted = current - OFlag::O_APPEND;
        wanted |= OFlag::from_bits_retain(append);
        fcntl(&self.file, FcntlArg::F_SETFL(wanted))?;
        self.append.store(append, Ordering::Relaxed);
        Ok(())
    }
}

/// All of them.
pub struct OpenFiles {
    files: RwLock<HashMap<u64, Arc<OpenFile>>>,
    last: AtomicU64,
}

impl OpenFiles {
    /// None. Handles begin above `first`.
    pub fn new(first: u64) -> Self {
        Self {
            files: RwLock::default(),
            last: AtomicU64::new(first),
        }
    }

    /// Adds one. Returns its handle.
    pub fn add(&self, node: u64, file: OwnedFd, flags: u32) -> u64 {
        let handle = self.last.fetch_add(1, Ordering::Relaxed) + 1;
        let file = OpenFile {
            file: file.into(),
            position: Mutex::default(),
            node,
            append: AtomicI32::new(flags as i32 & libc::O_APPEND),
            transfers: AtomicU32::new(0),
        };
        let mut files = self.files.write().unwrap_or_else(PoisonError::into_inner);
        files.insert(handle, Arc::new(file));
        handle
    }

    /// The file of a handle, which must be of that node.
    pub fn get(&self, handle: u64, node: u64) -> io::Result<Arc<OpenFile>> {
        let files = self.files.read().unwrap_or_else(PoisonError::into_inner);
        let file = files.get(&handle).filter(|file| file.node == node);
        file.cloned().ok_or_else(|| Errno::EBADF.into())
    }

    /// The file of a node, if it is open.
    pub fn any_of(&self, node: u64) -> Option<Arc<OwnedFd>> {
        let files = self.files.read().unwrap_or_else(PoisonError::into_inner);
        let open = files.values().find(|file| file.node == node)?;
        Some(Arc::new(open.file.try_clone().ok()?.into()))
    }

    /// Closes it.
    pub fn remove(&self, handle: u64) {
        let file = {
            let mut files = self.files.write().unwrap_or_else(PoisonError::into_inner);
            files.remove(&handle)
        };
        // Closing may take time: not under the lock.
        drop(file);
    }

    /// Closes all.
    pub fn clear(&self) {
        let mut files = self.files.write().unwrap_or_else(PoisonError::into_inner);
        files.clear();
    }
}
