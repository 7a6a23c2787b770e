//! The host's random numbers.

use std::io;

/// Bytes that getrandom(2) gives at once: with no more, a signal neither interrupts it nor shortens what it gives.
pub(super) const MAX_BYTES: usize = 256;

/// Fills `bytes`, at most [`MAX_BYTES`].
///
/// # Errors
/// The system call is not there or not allowed.
pub(super) fn fill(bytes: &mut [u8]) -> io::Result<()> {
    assert!(bytes.len() <= MAX_BYTES);
    // SAFETY: the kernel writes at most `bytes.len()` bytes, to `bytes`.
    let filled = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
    if usize::try_from(filled) == Ok(bytes.len()) {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}
