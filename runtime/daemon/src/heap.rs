//! What podvisord has freed goes back to the node.
//!
//! glibc keeps freed memory for the next time, unless it is at the end of an arena. After a pull, or pods that are gone,
//! that is several times what still lives, and podvisord may be idle for hours.

use std::sync::atomic::{AtomicBool, Ordering};

/// Gives it back, soon and beside the caller. Within a tokio runtime.
pub fn give_back() {
    static PENDING: AtomicBool = AtomicBool::new(false);
    // Pods go in crowds.
    if PENDING.swap(true, Ordering::AcqRel) {
        return;
    }
    tokio::task::spawn_blocking(|| {
        PENDING.store(false, Ordering::Release);
        // SAFETY: malloc_trim(3) takes no pointer and is thread-safe.
        unsafe { libc::malloc_trim(0) };
    });
}
