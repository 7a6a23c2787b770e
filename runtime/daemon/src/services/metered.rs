//! Every RPC is counted and timed ([`crate::metrics`]).

use std::sync::Arc;
use std::time::Instant;

use http::Request;
use tonic::{Code, Status};

use super::around::{Answer, Wrap};
use crate::daemon::Daemon;

/// Tells the daemon's metrics of each call.
#[derive(Debug, Clone)]
pub struct Metered(pub Arc<Daemon>);

impl Wrap for Metered {
    fn wrap<B, E: 'static>(
        &self,
        request: &Request<B>,
    ) -> impl FnOnce(Answer<E>) -> Answer<E> + use<B, E> {
        let begin = Instant::now();
        let method = method(request.uri().path()).to_owned();
        let daemon = Arc::clone(&self.0);
        move |answer| {
            Box::pin(async move {
                let answer = answer.await?;
                // An error is all of an answer, and in its headers; a success ends with its trailers.
                let code = Status::from_header_map(answer.headers()).map_or(Code::Ok, |s| s.code());
                // A name that anybody can make up is none to keep.
                let method = if code == Code::Unimplemented {
                    "other"
                } else {
                    &method
                };
                daemon.metrics.rpc(method, code, begin.elapsed());
                Ok(answer)
            })
        }
    }
}

/// "/runtime.v1.RuntimeService/Status": its last part.
fn method(path: &str) -> &str {
    path.rsplit_once('/').map_or(path, |(_, method)| method)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn methods_are_the_last_part_of_the_path() {
        assert_eq!(method("/runtime.v1.RuntimeService/Status"), "Status");
        assert_eq!(method("nonsense"), "nonsense");
    }
}
