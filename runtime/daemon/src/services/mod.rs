//! The gRPC services: from CRI messages to the daemon and back. No decisions here.

pub mod around;
pub mod control;
pub mod deadline;
mod events;
pub mod health;
pub mod image;
pub mod later;
mod lists;
pub(crate) mod messages;
pub mod metered;
pub mod runtime;
mod status;
pub mod traced;

use tonic::{Response, Status};
use tracing::{Level, debug, info, warn};

use crate::error::Error;

/// Largest message in either direction: the kubelet's and containerd's maxMsgSize.
pub const MAX_MESSAGE: usize = 16 << 20;

/// Ends an RPC: logs how it went and turns the error into a gRPC status. Calls that only read are
/// logged at debug level: a kubelet lists every second.
fn answer<T>(level: Level, result: Result<T, Error>) -> Result<Response<T>, Status> {
    match result {
        Ok(value) => {
            if level == Level::INFO {
                info!("ok");
            } else {
                debug!("ok");
            }
            Ok(Response::new(value))
        }
        Err(error) => {
            let code = error.code();
            warn!(?code, %error, "failed");
            Err(error.into())
        }
    }
}
