//! What podvisord has freed goes back to the node.
//!
//! glibc keeps freed memory for the next time, unless it is at the end of an arena. After a pull, a long list, or pods that
//! are gone, that is several times what still lives, and podvisord may be idle for hours.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// Pods go in crowds, and an answer is freed when it has been sent.
const SOON: Duration = Duration::from_secs(1);

/// Gives it back, soon and beside the caller. Within a tokio runtime.
pub fn give_back() {
    static PENDING: AtomicBool = AtomicBool::new(false);
    if PENDING.swap(true, Ordering::AcqRel) {
        return;
    }
    tokio::spawn(async {
        tokio::time::sleep(SOON).await;
        PENDING.store(false, Ordering::Release);
        // SAFETY: malloc_trim(3) takes no pointer and is thread-safe.
        let _ = tokio::task::spawn_blocking(|| unsafe { libc::malloc_trim(0) }).await;
    });
}
