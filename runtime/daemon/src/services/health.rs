//! `grpc.health.v1.Health` on CRI's socket: for `grpc_health_probe`, systemd units and node agents.
//!
//! | service                                          | SERVING                                          |
//! |--------------------------------------------------|--------------------------------------------------|
//! | "", "liveness", `runtime.v1.RuntimeService`, `runtime.v1.ImageService` | as long as calls are answered |
//! | "readiness"                                      | while all of CRI Status' conditions are true     |

use std::sync::Arc;

use futures_util::{FutureExt, StreamExt};
use podvisor_proto::cri::image_service_server::SERVICE_NAME as IMAGE_SERVICE;
use podvisor_proto::cri::runtime_service_server::SERVICE_NAME as RUNTIME_SERVICE;
use tonic::codegen::BoxStream;
use tonic::{Request, Response, Status};
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_server::Health as HealthService;
use tonic_health::pb::{HealthCheckRequest, HealthCheckResponse};

use super::status;
use crate::daemon::Daemon;

/// Services that are well when they answer.
const LIVENESS: [&str; 4] = ["", "liveness", RUNTIME_SERVICE, IMAGE_SERVICE];

const READINESS: &str = "readiness";

/// Serves health checks.
#[derive(Debug)]
pub struct Health {
    daemon: Arc<Daemon>,
}

impl Health {
    /// A service for `daemon`.
    pub fn new(daemon: Arc<Daemon>) -> Self {
        Self { daemon }
    }
}

fn answer(status: ServingStatus) -> HealthCheckResponse {
    HealthCheckResponse {
        status: status.into(),
    }
}

#[tonic::async_trait]
impl HealthService for Health {
    async fn check(
        &self,
        request: Request<HealthCheckRequest>,
    ) -> Result<Response<HealthCheckResponse>, Status> {
        let service = request.into_inner().service;
        if service == READINESS {
            let network = self.daemon.cni.status().await;
            let conditions = status::conditions(&self.daemon, &network);
            let ready = conditions.iter().all(|condition| condition.status);
            return Ok(Response::new(answer(if ready {
                ServingStatus::Serving
            } else {
                ServingStatus::NotServing
            })));
        }
        if LIVENESS.contains(&service.as_str()) {
            return Ok(Response::new(answer(ServingStatus::Serving)));
        }
        Err(Status::not_found(format!("no service {service:?}")))
    }

    type WatchStream = BoxStream<HealthCheckResponse>;

    /// SERVING, and NOT_SERVING when podvisord ends. What readiness depends on tells nobody when it changes: that is
    /// to be asked for.
    async fn watch(
        &self,
        request: Request<HealthCheckRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        let service = request.into_inner().service;
        if service == READINESS {
            return Err(Status::unimplemented("readiness has no Watch: use Check"));
        }
        let (now, then) = if LIVENESS.contains(&service.as_str()) {
            (ServingStatus::Serving, ServingStatus::NotServing)
        } else {
            // grpc/health/v1: a Watch of a service that is not known goes on.
            (ServingStatus::ServiceUnknown, ServingStatus::ServiceUnknown)
        };
        let ending = self.daemon.ending.clone();
        let end = async move {
            ending.cancelled().await;
            Ok(answer(then))
        };
        let stream = tokio_stream::once(Ok(answer(now))).chain(end.into_stream());
        Ok(Response::new(Box::pin(stream)))
    }
}
