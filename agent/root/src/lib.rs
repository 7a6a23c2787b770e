//! What is in a container's root file system, looked up without being led outside: an image is its
//! author's, not ours. The agent uses it in the guest, a monitor for the containers of the host's own.
//!
//! - [`in_root`]: files, opened below a root
//! - [`user`]: users and groups of an image

pub mod in_root;
pub mod user;
