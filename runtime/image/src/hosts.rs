//! Which hosts to ask for an image: containerd's `certs.d/HOST/hosts.toml`.

use std::path::PathBuf;

/// The registry configuration of this node. Files are read at each pull, so that a change needs no restart.
#[derive(Debug, Clone, Default)]
pub struct Registries {
    dir: Option<PathBuf>,
}

impl Registries {
    /// Reads `dir/HOST/hosts.toml`, and `dir/_default/hosts.toml` for hosts without one.
    pub fn new(dir: impl Into<PathBuf>) -> Self {
        Self {
            dir: Some(dir.into()),
        }
    }
}
