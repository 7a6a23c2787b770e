//! One layer: from the blob's bytes to a finished EROFS file.

use tempfile::NamedTempFile;

/// A finished layer: written and synced, not yet named.
pub(crate) struct NewLayer {
    pub(crate) file: NamedTempFile,
    /// Length of the file, bytes.
    pub(crate) length: u64,
    /// What the file takes on disk, bytes.
    pub(crate) disk_bytes: u64,
}
