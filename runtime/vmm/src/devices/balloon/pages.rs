//! The pages that the driver puts into the balloon (virtio 1.2, 5.5.6.1).

use vm_memory::{GuestAddress, GuestMemoryMmap};

use crate::buffers::{GuestSlices, release};

/// The unit of the balloon in bytes, whatever pages the guest has.
pub(super) const PAGE_BYTES: u64 = 4096;

/// Page numbers read at once. Linux gives 256 in a request.
const AT_ONCE: usize = 256;

/// Page numbers looked at in one request; with more the pages simply stay.
const MAX_PAGES: usize = 16 * AT_ONCE;

/// Releases the pages whose numbers are in a request. Returns the bytes released.
pub(super) fn inflate(memory: &GuestMemoryMmap, mut request: GuestSlices<'_>) -> usize {
    request.truncate(4 * MAX_PAGES);
    let mut released = 0;
    let mut bytes = [0; 4 * AT_ONCE];
    while !request.is_empty() {
        let bytes = &mut bytes[..request.len().min(4 * AT_ONCE)];
        let read = request.read(bytes);
        debug_assert!(read, "no more than there is");
        let (pages, _) = bytes.as_chunks_mut();
        pages.sort_unstable_by_key(|page| number(*page));
        // Neighbours in one call.
        for run in pages.chunk_by(|page, next| number(*next) - number(*page) <= 1) {
            let (first, last) = (number(run[0]), number(run[run.len() - 1]));
            let length = (last - first + 1) * PAGE_BYTES;
            released += release(memory, GuestAddress(first * PAGE_BYTES), length as usize);
        }
    }
    released
}

fn number(page: [u8; 4]) -> u64 {
    u32::from_le_bytes(page).into()
}
