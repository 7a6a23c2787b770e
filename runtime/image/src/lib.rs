//! Images: from a registry to read-only file system images that a virtual machine mounts.
//!
//! The path of a pull, and where each step lives:
//!
//! ```text
//! reference   "busybox" -> docker.io/library/busybox:latest
//! hosts       containerd's certs.d/HOST/hosts.toml: which hosts to ask for it, in which order
//! registry    HTTP: authentication, manifests, blobs; deadlines, retries, resumed downloads
//! layer       one blob: decompress, check both digests while streaming
//!   tar       entries of the layer's tar, hostile input
//!   erofs     the layer as an uncompressed EROFS file, written in one pass
//! pull        the whole image, its layers in parallel
//! jobs        layers in the making, each once at a time, shared by pulls
//! store       what is there: images in redb and in memory, layer files, who uses them
//! ```
//!
//! [`ImageStore`] is what podvisord uses. A layer is converted once, when it is pulled, and then shared by
//! every pod through the host's page cache. [`scratch`] makes the empty writable file system that
//! a pod lays over its layers.

mod erofs;
mod hosts;
mod jobs;
mod layer;
mod limits;
mod pull;
pub mod reference;
mod registry;
pub mod scratch;
mod store;
mod tar;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;

pub use hosts::Registries;
pub use limits::Limits;
pub use pull::{Credentials, Progress, PullError};
pub use store::{Image, ImageStore, Layer, StoreError, Usage};
