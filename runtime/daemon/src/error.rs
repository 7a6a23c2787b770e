//! What can go wrong in an RPC, and the gRPC code each case carries.
//!
//! Kubelets act on codes (cri-api `pkg/errors`, kubelet `kuberuntime`): NOT_FOUND is tolerated where
//! something is being removed, DEADLINE_EXCEEDED of ExecSync fails a probe, UNIMPLEMENTED switches a
//! feature off for good. Messages are for people: they say what was asked and why it cannot be.

use podvisor_image::{PullError, StoreError as ImageStoreError};
use podvisor_network::CniError;
use podvisor_network::link::LinkError;
use podvisor_network::netns::NetnsError;
use podvisor_network::tap::TapError;
use podvisor_node::cgroup::CgroupError;
use podvisor_node::handlers::HandlerError;
use tonic::{Code, Status};

/// Result of an RPC.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why an RPC failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No such sandbox or container.
    #[error("{kind} {id:?} not found")]
    NotFound {
        /// "sandbox", "container" or "image".
        kind: &'static str,
        /// As the caller wrote it.
        id: String,
    },
    /// An id prefix that several objects share.
    #[error("{kind} id {id:?} is ambiguous: it is the beginning of {count} ids")]
    Ambiguous {
        /// "sandbox" or "container".
        kind: &'static str,
        /// As the caller wrote it.
        id: String,
        /// How many it fits.
        count: usize,
    },
    /// The name is reserved by another object.
    #[error("{kind} name {name:?} is reserved for {owner}")]
    NameTaken {
        /// "sandbox" or "container".
        kind: &'static str,
        /// The name, with what makes it unique.
        name: String,
        /// Id that holds it.
        owner: String,
    },
    /// The request contradicts the CRI.
    #[error("{field}: {problem}")]
    Invalid {
        /// Path of the field in the request.
        field: &'static str,
        /// What is wrong.
        problem: String,
    },
    /// A mount or a device of CreateContainer that cannot be.
    #[error("config.{list}[{index}].{field}: {problem}")]
    Element {
        /// "mounts" or "devices".
        list: &'static str,
        /// Which.
        index: usize,
        /// Which of its fields.
        field: &'static str,
        /// What is wrong.
        problem: String,
        /// What callers see.
        code: Code,
    },
    /// The object is not in a state that allows it.
    #[error("{0}")]
    Precondition(String),
    /// Asked for something this release does not do.
    #[error("{field}: {what} is not implemented yet")]
    Unsupported {
        /// Path of the field in the request.
        field: &'static str,
        /// What it asks for.
        what: String,
    },
    /// The pod's monitor or its guest said no.
    #[error("{}", .0.message())]
    Monitor(#[from] Status),
    /// The monitor cannot be reached.
    #[error("the sandbox's monitor does not answer: {0}")]
    MonitorUnreachable(String),
    /// An image could not be pulled.
    #[error(transparent)]
    Pull(#[from] PullError),
    /// The image store failed.
    #[error("image store: {0}")]
    Images(#[from] ImageStoreError),
    /// The pod's network could not be made.
    #[error("network: {0}")]
    Network(#[from] CniError),
    /// The pod's network namespace.
    #[error("network namespace: {0}")]
    Netns(#[from] NetnsError),
    /// The pod's tap device.
    #[error("tap device: {0}")]
    Tap(#[from] TapError),
    /// The pod's interface could not be joined with its tap.
    #[error("network: {0}")]
    Link(#[from] LinkError),
    /// The pod's cgroup.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// podvisord's database failed.
    #[error("database: {0}")]
    Store(#[from] crate::store::StoreError),
    /// Clients of exec, attach or port-forward do not come for their URLs.
    #[error(transparent)]
    Streaming(#[from] podvisor_streaming::TooMany),
    /// A system call failed.
    #[error("{context}: {source}")]
    Io {
        /// What was being done, with the path.
        context: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// The caller went away or podvisord is stopping.
    #[error("cancelled")]
    Cancelled,
}

impl Error {
    /// For `map_err`: an I/O error with what was being done.
    pub fn io(context: impl Into<String>) -> impl FnOnce(std::io::Error) -> Self {
        let context = context.into();
        move |source| Self::Io { context, source }
    }

    /// The gRPC code a caller sees.
    pub fn code(&self) -> Code {
        match self {
            Self::NotFound { .. } => Code::NotFound,
            Self::Ambiguous { .. } | Self::Invalid { .. } => Code::InvalidArgument,
            Self::NameTaken { .. } => Code::AlreadyExists,
            Self::Element { code, .. } => *code,
            Self::Precondition(_) => Code::FailedPrecondition,
            Self::Unsupported { .. } => Code::Unimplemented,
            Self::Monitor(status) => status.code(),
            Self::MonitorUnreachable(_) => Code::Unavailable,
            Self::Pull(error) => pull_code(error),
            Self::Network(error) => network_code(error),
            Self::Io { source, .. } if is_full(source) => Code::ResourceExhausted,
            Self::Store(error) if error.io().is_some_and(is_full) => Code::ResourceExhausted,
            Self::Images(_)
            | Self::Store(_)
            | Self::Netns(_)
            | Self::Tap(_)
            | Self::Link(_)
            | Self::Cgroup(_)
            | Self::Io { .. } => Code::Internal,
            Self::Streaming(_) => Code::ResourceExhausted,
            Self::Cancelled => Code::Cancelled,
        }
    }
}

/// What was looked for, or `None`: for who wants it to be gone.
///
/// # Errors
/// It was not looked for: the id is ambiguous or none.
pub fn if_there<T>(found: Result<T>) -> Result<Option<T>> {
    match found {
        Err(Error::NotFound { .. }) => Ok(None),
        found => found.map(Some),
    }
}

fn pull_code(error: &PullError) -> Code {
    match error {
        PullError::InvalidReference(_) => Code::InvalidArgument,
        PullError::NotFound(_) => Code::NotFound,
        PullError::Unauthorized(_) => Code::Unauthenticated,
        PullError::Forbidden(_) => Code::PermissionDenied,
        PullError::Unavailable(_) => Code::Unavailable,
        PullError::Corrupt(_) => Code::DataLoss,
        PullError::Unsupported(_) => Code::Unimplemented,
        PullError::TooLarge(_) | PullError::NoSpace(_) => Code::ResourceExhausted,
        PullError::Config(_) => Code::FailedPrecondition,
        PullError::Storage(_) => Code::Internal,
    }
}

fn network_code(error: &CniError) -> Code {
    match error {
        CniError::NoNetwork { .. } | CniError::PluginMissing { .. } => Code::FailedPrecondition,
        CniError::InvalidAttachment(_) => Code::InvalidArgument,
        CniError::Timeout { .. } => Code::DeadlineExceeded,
        CniError::Cache { source, .. } if is_full(source) => Code::ResourceExhausted,
        _ => Code::Internal,
    }
}

fn is_full(error: &std::io::Error) -> bool {
    matches!(
        error.kind(),
        std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded
    )
}

impl From<HandlerError> for Error {
    fn from(error: HandlerError) -> Self {
        let problem = error.to_string();
        match error {
            HandlerError::Unknown { .. } => Self::Invalid {
                field: "runtime_handler",
                problem,
            },
            HandlerError::NotConfigured(_) | HandlerError::NotInstalled { .. } => {
                Self::Precondition(problem)
            }
        }
    }
}

impl From<Error> for Status {
    fn from(error: Error) -> Self {
        Self::new(error.code(), error.to_string())
    }
}
