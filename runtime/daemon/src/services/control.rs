//! `podvisor.control.v1.Control`: what the CLI asks beyond CRI.

use std::sync::Arc;

use podvisor_proto::control::control_server::Control as ControlService;
use podvisor_proto::control::{PullProgress, PullRequest};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::codegen::BoxStream;
use tonic::{Request, Response, Status};
use tracing::{Instrument, instrument};

use crate::daemon::Daemon;
use crate::error::Error;

/// Progress messages in flight. A reader that is slower misses some, never the last.
const BACKLOG: usize = 64;

/// Serves the CLI.
#[derive(Debug)]
pub struct Control {
    daemon: Arc<Daemon>,
}

impl Control {
    /// A service for `daemon`.
    pub fn new(daemon: Arc<Daemon>) -> Self {
        Self { daemon }
    }
}

#[tonic::async_trait]
impl ControlService for Control {
    #[instrument(skip_all, name = "Pull", fields(image = request.get_ref().image))]
    async fn pull(
        &self,
        request: Request<PullRequest>,
    ) -> Result<Response<BoxStream<PullProgress>>, Status> {
        let name = request.into_inner().image;
        let images = self.daemon.images.clone();
        let (sender, receiver) = mpsc::channel(BACKLOG);
        let pull = async move {
            let progress = |progress: podvisor_image::Progress| {
                let _ = sender.try_send(Ok(PullProgress {
                    layer: progress.layer,
                    done: progress.done,
                    total: progress.total,
                    image_ref: String::new(),
                }));
            };
            let last = tokio::select! {
                result = images.pull(&name, None, &progress) => match result {
                    Ok(image) => Ok(PullProgress {
                        image_ref: image.id.clone(),
                        ..Default::default()
                    }),
                    Err(error) => Err(Error::from(error).into()),
                },
                () = sender.closed() => return,
            };
            let _ = sender.send(last).await;
        };
        tokio::spawn(pull.in_current_span());
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }
}
