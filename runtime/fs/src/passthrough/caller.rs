//! Who asks: new files belong to the guest's process that makes them, and what strips set-uid bits strips them here.
//!
//! Permissions are not looked at here. The guest's kernel has done that, which alone knows the process's groups; so a
//! thread keeps its capabilities whatever its user is (`SECBIT_NO_SETUID_FIXUP`).

use std::io;

use crate::jail::{FSETID, capabilities, set_capabilities};

/// The calling thread is the user `uid` and the group `gid` until this is dropped.
pub struct Caller {
    changed: bool,
}

impl Caller {
    /// Becomes that user.
    pub fn become_user(uid: u32, gid: u32) -> io::Result<Self> {
        let changed = uid != 0 || gid != 0;
        let caller = Self { changed };
        if changed {
            set(libc::SYS_setresgid, gid)?;
            // When this fails, dropping `caller` undoes the other.
            set(libc::SYS_setresuid, uid)?;
        }
        Ok(caller)
    }
}

impl Drop for Caller {
    fn drop(&mut self) {
        if self.changed {
            let back = set(libc::SYS_setresuid, 0).and(set(libc::SYS_setresgid, 0));
            // Its real and saved user are 0, and it has the capabilities: it cannot fail. A thread that is someone else
            // from then on would make others' files.
            if back.is_err() {
                std::process::abort();
            }
        }
    }
}

/// Sets the effective id of the calling thread alone, which glibc's functions would do for all.
fn set(call: libc::c_long, id: u32) -> io::Result<()> {
    // SAFETY: numbers only.
    match unsafe { libc::syscall(call, -1, id, -1) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The calling thread has no `CAP_FSETID` until this is dropped: what it writes to loses its set-uid bit.
pub struct WithoutFsetid {
    changed: bool,
}

impl WithoutFsetid {
    /// Drops it if `drop`.
    pub fn when(drop: bool) -> io::Result<Self> {
        if drop {
            set_capabilities(capabilities() & !(1 << FSETID), capabilities())?;
        }
        Ok(Self { changed: drop })
    }
}

impl Drop for WithoutFsetid {
    fn drop(&mut self) {
        if self.changed && set_capabilities(capabilities(), capabilities()).is_err() {
            // It is permitted: it cannot fail.
            std::process::abort();
        }
    }
}
