//! Bounds on what registries and images may cost. All of that input is an attacker's.

use std::time::Duration;

/// Bounds on one pull. [`Limits::default`] fits every image in common use with a wide margin.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Time to establish a connection, TLS included.
    pub connect_timeout: Duration,
    /// Longest wait for the response's header, and then for each next piece of its body.
    pub stall_timeout: Duration,
    /// Requests made to one host before the next one is asked. Only failures that may pass are retried:
    /// connection errors, 429 and 5xx.
    pub attempts: u32,
    /// Wait before the first retry; doubles with each. `Retry-After` is honoured up to [`Limits::retry_after_max`].
    pub backoff: Duration,
    /// Longest wait that a registry may ask for with `Retry-After`.
    pub retry_after_max: Duration,
    /// Layers of one image that are downloaded and converted at the same time.
    pub parallel_layers: usize,
    /// Smallest blob of which a part is kept when its download fails, for the next pull to go on.
    pub min_resumed_bytes: u64,
    /// How long such a part is kept.
    pub resumable_for: Duration,
    /// Largest manifest, index or image configuration, bytes.
    pub max_manifest_bytes: u64,
    /// Most layers in an image. A pod's disk has 255 partitions, the container's overlay mount its own bound.
    pub max_layers: usize,
    /// Largest layer after decompression, and largest EROFS file of a layer (holes included), bytes.
    pub max_layer_bytes: u64,
    /// Most files, directories, links and devices in a layer.
    pub max_entries: usize,
    /// Names, symlink targets and extended attributes of a layer, bytes: what its conversion keeps in memory
    /// beside a fixed size for each entry.
    pub max_metadata_bytes: usize,
    /// Longest path in a layer, bytes. Linux's PATH_MAX: nothing longer could be opened.
    pub max_path_bytes: usize,
    /// Extended attributes of one file, names and values, bytes.
    pub max_xattr_bytes: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connect_timeout: Duration::from_secs(10),
            stall_timeout: Duration::from_secs(30),
            attempts: 3,
            backoff: Duration::from_millis(250),
            retry_after_max: Duration::from_secs(10),
            parallel_layers: 3,
            min_resumed_bytes: 4 << 20,
            resumable_for: Duration::from_hours(1),
            max_manifest_bytes: 4 << 20,
            max_layers: 127,
            max_layer_bytes: 256 << 30,
            max_entries: 2_000_000,
            max_metadata_bytes: 256 << 20,
            max_path_bytes: 4096,
            max_xattr_bytes: 64 << 10,
        }
    }
}
