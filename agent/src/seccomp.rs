//! System call filters. The host compiles them; here each is kept in a file, and installed as it is by each of a
//! container's processes. The kernel checks what it says.

use std::fs;
use std::io;
use std::path::PathBuf;

use nix::errno::Errno;
use podvisor_proto::agent::SeccompFilter;
use serde::{Deserialize, Serialize};

/// What the kernel takes (linux/bpf_common.h, `BPF_MAXINSNS`).
const LIMIT: usize = 4096;
/// Bytes of an instruction, `struct sock_filter` (linux/filter.h).
const INSTRUCTION: usize = 8;
/// Those that change nothing about how a filter is installed.
const FLAGS: u32 = (libc::SECCOMP_FILTER_FLAG_LOG | libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW) as u32;

/// Why there is no filter.
#[derive(Debug, thiserror::Error)]
pub enum SeccompFilterError {
    /// Not whole instructions, none, or more than [`LIMIT`].
    #[error("a seccomp filter has 1 to {LIMIT} instructions of {INSTRUCTION} bytes, not {0} bytes")]
    Length(usize),
    /// See [`FLAGS`].
    #[error("a seccomp filter cannot have the flags {0:#x}")]
    Flags(u32),
    /// Somewhere to keep it.
    #[error("the seccomp filter cannot be written: {0}")]
    Write(#[from] io::Error),
}

/// A filter in a file.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct StoredFilter {
    path: PathBuf,
    /// `SECCOMP_FILTER_FLAG_*`.
    flags: u32,
}

/// A filter as seccomp(2) takes it.
pub struct Filter {
    /// An instruction each.
    program: Vec<u64>,
    flags: u32,
}

impl StoredFilter {
    /// Checks a filter from the host and keeps it in the file `path`.
    pub fn store(filter: &SeccompFilter, path: PathBuf) -> Result<Self, SeccompFilterError> {
        let SeccompFilter { program, flags } = filter;
        let length = program.len();
        let is_whole = length.is_multiple_of(INSTRUCTION);
        if !is_whole || !(1..=LIMIT).contains(&(length / INSTRUCTION)) {
            return Err(SeccompFilterError::Length(length));
        }
        if flags & !FLAGS != 0 {
            return Err(SeccompFilterError::Flags(*flags));
        }
        fs::write(&path, program)?;
        Ok(Self {
            path,
            flags: *flags,
        })
    }

    /// Reads it back.
    pub fn read(&self) -> io::Result<Filter> {
        let bytes = fs::read(&self.path)?;
        let (instructions, _) = bytes.as_chunks::<INSTRUCTION>();
        Ok(Filter {
            program: instructions
                .iter()
                .map(|one| u64::from_ne_bytes(*one))
                .collect(),
            flags: self.flags,
        })
    }
}

impl Filter {
    /// Filters the calling process's system calls from now on. It needs CAP_SYS_ADMIN or no_new_privs.
    pub fn load(&self) -> nix::Result<()> {
        let program = libc::sock_fprog {
            // At most `LIMIT`.
            len: self.program.len() as libc::c_ushort,
            filter: self.program.as_ptr().cast_mut().cast(),
        };
        // SAFETY: the kernel reads as many instructions as `len` says, each of 8 bytes, and writes none.
        let result = unsafe {
            libc::syscall(
                libc::SYS_seccomp,
                libc::SECCOMP_SET_MODE_FILTER,
                self.flags,
                &raw const program,
            )
        };
        Errno::result(result).map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_filter_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let store = |bytes: usize, flags: libc::c_ulong| {
            let filter = SeccompFilter {
                program: vec![7; bytes],
                flags: flags as u32,
            };
            StoredFilter::store(&filter, directory.path().join("filter"))
        };
        for bytes in [0, 7, 9, LIMIT * INSTRUCTION + INSTRUCTION] {
            let stored = store(bytes, 0);
            assert!(
                matches!(stored, Err(SeccompFilterError::Length(_))),
                "{bytes}"
            );
        }
        let listens = store(8, libc::SECCOMP_FILTER_FLAG_NEW_LISTENER);
        assert!(matches!(listens, Err(SeccompFilterError::Flags(_))));
        let stored = store(LIMIT * INSTRUCTION, libc::SECCOMP_FILTER_FLAG_LOG).unwrap();
        let read = stored.read().unwrap();
        assert_eq!(read.program, vec![0x0707_0707_0707_0707; LIMIT]);
        assert_eq!(read.flags, 2);
    }
}
