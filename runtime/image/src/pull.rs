//! A pull: from a reference to an image whose layers are all on this node.

use std::fmt;
use std::sync::Arc;

use crate::reference::{Reference, ReferenceError};
use crate::store::{Image, Inner};

/// What proves to a registry who asks. Given with each pull, never stored.
#[derive(Clone, PartialEq, Eq)]
pub enum Credentials {
    /// User name and password, sent as basic authentication or to fetch a token.
    Password {
        /// User name.
        username: String,
        /// Password.
        password: String,
    },
    /// A bearer token for the registry itself (CRI `registry_token`).
    RegistryToken(String),
    /// An OAuth2 refresh token for the registry's token service (CRI `identity_token`).
    IdentityToken(String),
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Password { .. } => "Password(…)",
            Self::RegistryToken(_) => "RegistryToken(…)",
            Self::IdentityToken(_) => "IdentityToken(…)",
        })
    }
}

/// How far one layer of a pull is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Progress {
    /// Digest of the compressed layer, as in the manifest.
    pub layer: String,
    /// Compressed bytes received.
    pub done: u64,
    /// Compressed bytes in all. `done == total` at once for a layer that is already on this node.
    pub total: u64,
}

/// Why a pull failed. Each variant is one gRPC code; messages carry the registry's own words.
#[derive(Debug, Clone, thiserror::Error)]
pub enum PullError {
    /// INVALID_ARGUMENT: the name is not an image reference.
    #[error(transparent)]
    InvalidReference(#[from] ReferenceError),
    /// NOT_FOUND: no host has the image, or it has none for this platform.
    #[error("{0}")]
    NotFound(String),
    /// UNAUTHENTICATED or PERMISSION_DENIED: a host wants other credentials.
    #[error("{0}")]
    Unauthorized(String),
    /// UNAVAILABLE: unreachable, too slow, or answers with errors of its own.
    #[error("{0}")]
    Unavailable(String),
    /// DATA_LOSS: digests that do not match, a broken manifest or layer.
    #[error("{0}")]
    Corrupt(String),
    /// UNIMPLEMENTED: a format that podvisor does not read.
    #[error("{0}")]
    Unsupported(String),
    /// RESOURCE_EXHAUSTED: over one of [`Limits`](crate::Limits).
    #[error("{0}")]
    TooLarge(String),
    /// RESOURCE_EXHAUSTED: the node's disk is full.
    #[error("no space left for the image: {0}")]
    NoSpace(String),
    /// FAILED_PRECONDITION: this node's registry configuration cannot be used.
    #[error("{0}")]
    Config(String),
    /// INTERNAL: this node's disk or database.
    #[error("{0}")]
    Storage(String),
}

/// Layers in the making, so that each is made once at a time.
#[derive(Default)]
pub(crate) struct Jobs {}

pub(crate) async fn pull(
    _store: &Arc<Inner>,
    _reference: Reference,
    _credentials: Option<Credentials>,
    _progress: &(dyn Fn(Progress) + Send + Sync),
) -> Result<Arc<Image>, PullError> {
    Err(PullError::Unsupported("pull is on its way".to_owned()))
}
