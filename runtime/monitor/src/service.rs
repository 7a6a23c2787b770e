//! The gRPC service: requests in, [`Pod`] does it, snapshots out.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use podvisor_monitor::agent_calls;
use podvisor_proto::agent::{SampleRequest, SampleResponse};
use podvisor_proto::monitor::monitor_server::Monitor;
use podvisor_proto::monitor::{
    AttachRequest, AttachResponse, ConfigureRequest, ConfigureResponse, ConsoleChunk,
    ConsoleRequest, CreateContainerRequest, CreateContainerResponse, ExecRequest, ExecResponse,
    ExecSyncRequest, ExecSyncResponse, FollowRequest, FollowResponse, GrowRequest, GrowResponse,
    PortForwardRequest, PortForwardResponse, RemoveContainerRequest, RemoveContainerResponse,
    ReopenLogRequest, ReopenLogResponse, ResizeRequest, ResizeResponse, ShutdownRequest,
    ShutdownResponse, Snapshot, StartContainerRequest, StartContainerResponse,
    StopContainerRequest, StopContainerResponse, UpdateContainerRequest, UpdateContainerResponse,
    VmStatsRequest, VmStatsResponse, WatchRequest,
};
use tokio::sync::oneshot;
use tokio::task::JoinError;
use tokio_stream::wrappers::WatchStream;
use tokio_util::sync::CancellationToken;
use tonic::codegen::BoxStream;
use tonic::{Request, Response, Status};

use crate::pod::{Pod, PodError};

/// Serves one pod.
pub struct Service {
    pod: Arc<Pod>,
}

impl Service {
    /// A service for `pod`.
    pub fn new(pod: Arc<Pod>) -> Self {
        Self { pod }
    }

    /// Runs a request that must not be left half done when its caller goes away, and returns the
    /// state after it.
    async fn to_the_end<F>(&self, request: F) -> Result<Option<Snapshot>, Status>
    where
        F: Future<Output = Result<(), PodError>> + Send + 'static,
    {
        detached(request).await??;
        Ok(Some(self.pod.state().snapshot()))
    }
}

/// Runs `work` as a task of its own: it goes on when the caller goes away.
async fn detached<T: Send + 'static>(
    work: impl Future<Output = T> + Send + 'static,
) -> Result<T, PodError> {
    let work = tokio::spawn(agent_calls::inherited(work));
    work.await.map_err(internal)
}

/// Runs `work` as a task of its own. The answer begins when the work says that it has started, and ends with what the
/// work gives. When the caller goes away, the work is told.
async fn session<T, F>(
    work: impl FnOnce(oneshot::Sender<()>, CancellationToken) -> F,
) -> Result<Response<BoxStream<T>>, Status>
where
    T: Send + 'static,
    F: Future<Output = Result<Option<T>, PodError>> + Send + 'static,
{
    let caller_gone = CancellationToken::new();
    // Dropped with the answer when the caller goes away.
    let told_on_drop = caller_gone.clone().drop_guard();
    let (started, has_started) = oneshot::channel();
    let work = tokio::spawn(agent_calls::inherited(work(started, caller_gone)));
    if has_started.await.is_err() {
        // It has ended without: a refusal.
        let refused = work.await.map_err(internal)?.err();
        return Err(refused.unwrap_or(PodError::Cancelled).into());
    }
    let end = async move {
        let _told_on_drop = told_on_drop;
        Ok(work.await.map_err(internal)??)
    };
    let messages = futures_util::stream::once(end)
        .filter_map(|ended: Result<_, Status>| std::future::ready(ended.transpose()));
    Ok(Response::new(Box::pin(messages)))
}

/// A task of ours has panicked.
fn internal(panic: JoinError) -> PodError {
    PodError::Internal(panic.to_string())
}

fn no_vm() -> Status {
    Status::failed_precondition("the pod is one of the host's own: it has no VM")
}

#[tonic::async_trait]
impl Monitor for Service {
    async fn watch(
        &self,
        _request: Request<WatchRequest>,
    ) -> Result<Response<BoxStream<Snapshot>>, Status> {
        let state = self.pod.state().clone();
        let finished = self.pod.finished().clone();
        let last = futures_util::stream::once(async move { state.snapshot() });
        let snapshots = WatchStream::new(self.pod.state().subscribe())
            .take_until(finished.cancelled_owned())
            .chain(last);
        Ok(Response::new(Box::pin(snapshots.map(Ok))))
    }

    async fn follow(
        &self,
        request: Request<FollowRequest>,
    ) -> Result<Response<FollowResponse>, Status> {
        self.pod.follow(&request.into_inner().stream_fd_token)?;
        Ok(Response::new(FollowResponse {}))
    }

    async fn configure(
        &self,
        request: Request<ConfigureRequest>,
    ) -> Result<Response<ConfigureResponse>, Status> {
        let pod = Arc::clone(&self.pod);
        let work = Box::pin(async move { pod.configure(request.into_inner()).await });
        let snapshot = self.to_the_end(work).await?;
        Ok(Response::new(ConfigureResponse { snapshot }))
    }

    async fn create_container(
        &self,
        request: Request<CreateContainerRequest>,
    ) -> Result<Response<CreateContainerResponse>, Status> {
        let pod = Arc::clone(&self.pod);
        let work = async move { pod.create(request.into_inner()).await };
        let snapshot = self.to_the_end(work).await?;
        Ok(Response::new(CreateContainerResponse { snapshot }))
    }

    async fn start_container(
        &self,
        request: Request<StartContainerRequest>,
    ) -> Result<Response<StartContainerResponse>, Status> {
        let pod = Arc::clone(&self.pod);
        let work = async move { pod.start(&request.into_inner().id).await };
        let snapshot = self.to_the_end(work).await?;
        Ok(Response::new(StartContainerResponse { snapshot }))
    }

    async fn stop_container(
        &self,
        request: Request<StopContainerRequest>,
    ) -> Result<Response<StopContainerResponse>, Status> {
        let StopContainerRequest {
            id,
            signal,
            grace_ms,
        } = request.into_inner();
        let pod = Arc::clone(&self.pod);
        // Who has asked for the end has asked for all of it.
        let work = async move { pod.stop(&id, signal, Duration::from_millis(grace_ms)).await };
        let snapshot = self.to_the_end(work).await?;
        Ok(Response::new(StopContainerResponse { snapshot }))
    }

    async fn update_container(
        &self,
        request: Request<UpdateContainerRequest>,
    ) -> Result<Response<UpdateContainerResponse>, Status> {
        let pod = Arc::clone(&self.pod);
        detached(async move { pod.update(request.into_inner()).await }).await??;
        Ok(Response::new(UpdateContainerResponse {}))
    }

    async fn grow(&self, request: Request<GrowRequest>) -> Result<Response<GrowResponse>, Status> {
        let pod = Arc::clone(&self.pod);
        let work = async move { pod.grow(request.into_inner().memory_bytes).await };
        let snapshot = self.to_the_end(work).await?;
        Ok(Response::new(GrowResponse { snapshot }))
    }

    async fn remove_container(
        &self,
        request: Request<RemoveContainerRequest>,
    ) -> Result<Response<RemoveContainerResponse>, Status> {
        let pod = Arc::clone(&self.pod);
        let work = async move { pod.remove(&request.into_inner().id).await };
        let snapshot = self.to_the_end(work).await?;
        Ok(Response::new(RemoveContainerResponse { snapshot }))
    }

    async fn reopen_log(
        &self,
        request: Request<ReopenLogRequest>,
    ) -> Result<Response<ReopenLogResponse>, Status> {
        let ReopenLogRequest { id, log_fd_token } = request.into_inner();
        self.pod.reopen_log(&id, &log_fd_token).await?;
        Ok(Response::new(ReopenLogResponse {}))
    }

    async fn exec_sync(
        &self,
        request: Request<ExecSyncRequest>,
    ) -> Result<Response<ExecSyncResponse>, Status> {
        let pod = Arc::clone(&self.pod);
        let caller_gone = CancellationToken::new();
        // Dropped with this future when the caller goes away: the task then kills the command.
        let _told_on_drop = caller_gone.clone().drop_guard();
        let work = async move { pod.exec_sync(request.into_inner(), caller_gone).await };
        Ok(Response::new(detached(work).await??))
    }

    async fn exec(
        &self,
        request: Request<ExecRequest>,
    ) -> Result<Response<BoxStream<ExecResponse>>, Status> {
        let (pod, request) = (Arc::clone(&self.pod), request.into_inner());
        let work = |started, caller_gone| async move {
            let exit_code = pod.exec(request, started, caller_gone).await?;
            Ok(Some(ExecResponse { exit_code }))
        };
        session(work).await
    }

    async fn attach(
        &self,
        request: Request<AttachRequest>,
    ) -> Result<Response<BoxStream<AttachResponse>>, Status> {
        let (pod, request) = (Arc::clone(&self.pod), request.into_inner());
        let work = |started, caller_gone| async move {
            pod.attach(request, started, caller_gone).await?;
            Ok(None)
        };
        session(work).await
    }

    async fn resize(
        &self,
        request: Request<ResizeRequest>,
    ) -> Result<Response<ResizeResponse>, Status> {
        self.pod.resize(request.into_inner()).await?;
        Ok(Response::new(ResizeResponse {}))
    }

    async fn port_forward(
        &self,
        request: Request<PortForwardRequest>,
    ) -> Result<Response<PortForwardResponse>, Status> {
        self.pod.port_forward(request.into_inner()).await?;
        Ok(Response::new(PortForwardResponse {}))
    }

    async fn console(
        &self,
        request: Request<ConsoleRequest>,
    ) -> Result<Response<BoxStream<ConsoleChunk>>, Status> {
        let finished = self.pod.finished().clone();
        let guest = self.pod.guest().ok_or_else(no_vm)?;
        let chunks = guest.console().read(request.into_inner().follow);
        let chunks = chunks.take_until(finished.cancelled_owned());
        let answers = chunks.map(|data| {
            Ok(ConsoleChunk {
                data: data.to_vec(),
            })
        });
        Ok(Response::new(Box::pin(answers)))
    }

    async fn sample(
        &self,
        _request: Request<SampleRequest>,
    ) -> Result<Response<SampleResponse>, Status> {
        Ok(Response::new(self.pod.sample().await?))
    }

    async fn vm_stats(
        &self,
        _request: Request<VmStatsRequest>,
    ) -> Result<Response<VmStatsResponse>, Status> {
        let stats = self.pod.guest().ok_or_else(no_vm)?.stats();
        let stats = stats.ok_or_else(|| Status::failed_precondition("the VM does not run yet"))?;
        Ok(Response::new(stats))
    }

    async fn shutdown(
        &self,
        request: Request<ShutdownRequest>,
    ) -> Result<Response<ShutdownResponse>, Status> {
        let grace = Duration::from_millis(request.into_inner().grace_ms);
        // The work is a task of its own already.
        let snapshot = Some(self.pod.shutdown(grace).await);
        Ok(Response::new(ShutdownResponse { snapshot }))
    }
}
