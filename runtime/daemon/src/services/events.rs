//! GetContainerEvents: what [`crate::events`] tells, as a stream that ends in an error.

use futures_util::{FutureExt, StreamExt};
use podvisor_proto::cri;
use tokio_stream::wrappers::BroadcastStream;
use tokio_stream::wrappers::errors::BroadcastStreamRecvError::Lagged;
use tokio_util::sync::CancellationToken;
use tonic::Status;
use tonic::codegen::BoxStream;

use super::messages;
use crate::events::Events;

/// All events from this call on, each made when the client has room for it. tonic ends a stream at its first error:
/// UNAVAILABLE when podvisord ends, RESOURCE_EXHAUSTED for who has missed events.
pub fn stream(
    events: &Events,
    ending: CancellationToken,
) -> BoxStream<cri::ContainerEventResponse> {
    let events = BroadcastStream::new(events.subscribe()).map(|event| match event {
        Ok(event) => Ok(messages::event(&event)),
        Err(Lagged(missed)) => Err(Status::resource_exhausted(format!(
            "{missed} events were not read in time: subscribe again, then list"
        ))),
    });
    let end = async { Err(Status::unavailable("podvisord ends")) };
    let stream = events
        .take_until(ending.cancelled_owned())
        .chain(end.into_stream());
    Box::pin(stream)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use podvisor_proto::monitor;
    use tonic::Code;

    use super::*;
    use crate::ids::Names;
    use crate::pod::{Pod, Pods};
    use crate::store::{Phase, SandboxRecord};

    fn pod(names: &Names, id: String) -> Arc<Pod> {
        let name = names.reserve("sandbox", id.clone(), &id).unwrap();
        let record = SandboxRecord {
            id,
            phase: Phase::Ready as i32,
            ..Default::default()
        };
        let snapshot = monitor::Snapshot {
            state: monitor::SandboxState::Ready as i32,
            ..Default::default()
        };
        Arc::new(Pod::new(record, name, snapshot, None))
    }

    #[tokio::test]
    async fn events_of_one_pod_come_in_order_and_with_its_state_of_then() {
        let (names, pods) = (Names::default(), Pods::default());
        let ending = CancellationToken::new();
        let mut stream = stream(&pods.events, ending.clone());
        let pod = pod(&names, "a".into());
        pods.insert(&pod);
        pods.begin_stop(&pod);
        pods.remove(&pod);
        let mut events = Vec::new();
        for _ in 0..4 {
            let event = stream.next().await.unwrap().unwrap();
            let status = event.pod_sandbox_status.clone().unwrap();
            events.push((event.container_event_type(), status.state()));
        }
        use cri::ContainerEventType as Kind;
        use cri::PodSandboxState::{SandboxNotready, SandboxReady};
        let expected = [
            (Kind::ContainerCreatedEvent, SandboxReady),
            (Kind::ContainerStartedEvent, SandboxReady),
            (Kind::ContainerStoppedEvent, SandboxNotready),
            (Kind::ContainerDeletedEvent, SandboxNotready),
        ];
        assert_eq!(events, expected);
        ending.cancel();
        let end = stream.next().await.unwrap().unwrap_err();
        assert_eq!(end.code(), Code::Unavailable);
    }

    #[tokio::test]
    async fn a_subscriber_that_does_not_read_is_cut_off() {
        let (names, pods) = (Names::default(), Pods::default());
        let slow = stream(&pods.events, CancellationToken::new());
        for number in 0..1000 {
            let pod = pod(&names, number.to_string());
            pods.insert(&pod);
            pods.remove(&pod);
        }
        // Pods are not kept for it: only those of the events that it could still read.
        let first = slow.into_future().await.0.unwrap().unwrap_err();
        assert_eq!(first.code(), Code::ResourceExhausted);
    }
}
