//! An allocator that counts what a thread has in use.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

struct Counting;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

thread_local! {
    static IN_USE: Cell<usize> = const { Cell::new(0) };
    static PEAK: Cell<usize> = const { Cell::new(0) };
}

/// Bytes that this thread has allocated and not freed.
pub fn in_use() -> usize {
    IN_USE.get()
}

/// The most that was in use since `forget_peak`.
pub fn peak() -> usize {
    PEAK.get()
}

/// Begins to look for the peak anew.
pub fn forget_peak() {
    PEAK.set(in_use());
}

// SAFETY: all of it is the system's allocator; the counters are cells without destructors, which allocate nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // What another thread frees is not seen here: the count is the bytes' thread's, and may wrap.
        let in_use = IN_USE.get().wrapping_add(layout.size());
        IN_USE.set(in_use);
        PEAK.set(PEAK.get().max(in_use));
        // SAFETY: as of the caller.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        IN_USE.set(IN_USE.get().wrapping_sub(layout.size()));
        // SAFETY: as of the caller.
        unsafe { System.dealloc(pointer, layout) }
    }
}
