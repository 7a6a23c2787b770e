//! Which calls of the agent an RPC of the monitor's took, and when: in its answer's metadata, for podvisord's traces.

use std::sync::{Arc, Mutex, PoisonError};

use podvisor_proto::monitor::{AgentCall, AgentCalls};
use prost::Message;
use tonic::codegen::http::Response;
use tonic::metadata::{BinaryMetadataValue, MetadataMap};

const KEY: &str = "podvisor-agent-calls-bin";

/// More are not told: metadata is not for long lists.
const MAX_CALLS: usize = 32;

tokio::task_local! {
    static CALLS: Arc<Mutex<Vec<AgentCall>>>;
}

/// An RPC, whose answer tells the calls that are [`record`]ed meanwhile.
///
/// # Errors
/// Those of `rpc`.
pub async fn told<B, E>(
    rpc: impl Future<Output = Result<Response<B>, E>>,
) -> Result<Response<B>, E> {
    let calls = Arc::default();
    let mut answer = CALLS.scope(Arc::clone(&calls), rpc).await?;
    let calls = std::mem::take(&mut *calls.lock().unwrap_or_else(PoisonError::into_inner));
    if !calls.is_empty() {
        let value = BinaryMetadataValue::from_bytes(&AgentCalls { calls }.encode_to_vec());
        let mut metadata = MetadataMap::new();
        metadata.insert_bin(KEY, value);
        answer.headers_mut().extend(metadata.into_headers());
    }
    Ok(answer)
}

/// `work`, which is to be a task of its own, as a part of the RPC that is under way here.
pub fn inherited<T>(work: impl Future<Output = T>) -> impl Future<Output = T> {
    let calls = CALLS.try_with(Arc::clone).unwrap_or_default();
    CALLS.scope(calls, work)
}

/// A call has ended, well or not.
pub fn record(call: AgentCall) {
    // Calls that no RPC asks for have nobody to be told to.
    let _ = CALLS.try_with(|calls| {
        let mut calls = calls.lock().unwrap_or_else(PoisonError::into_inner);
        if calls.len() < MAX_CALLS {
            calls.push(call);
        }
    });
}

/// What an answer with that metadata tells.
pub fn read(metadata: &MetadataMap) -> Vec<AgentCall> {
    let value = metadata
        .get_bin(KEY)
        .and_then(|value| value.to_bytes().ok());
    let calls = value.and_then(|bytes| AgentCalls::decode(bytes).ok());
    calls.unwrap_or_default().calls
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call(rpc: &str) -> AgentCall {
        AgentCall {
            rpc: rpc.into(),
            start_ns: 1,
            end_ns: 2,
        }
    }

    async fn metadata(rpc: impl Future<Output = ()>) -> MetadataMap {
        let answer = told(async {
            rpc.await;
            Ok::<_, ()>(Response::new(()))
        });
        MetadataMap::from_headers(answer.await.unwrap().into_parts().0.headers)
    }

    #[tokio::test]
    async fn an_answer_tells_the_calls_of_its_own_tasks() {
        record(call("nobody's"));
        let metadata = metadata(async {
            record(call("Create"));
            let detached = tokio::spawn(inherited(async { record(call("Start")) }));
            tokio::spawn(async { record(call("Sample")) })
                .await
                .unwrap();
            detached.await.unwrap();
        });
        assert_eq!(read(&metadata.await), [call("Create"), call("Start")]);
    }

    #[tokio::test]
    async fn many_calls_are_cut_and_none_are_no_header() {
        assert!(metadata(async {}).await.is_empty());
        let many = metadata(async { (0..100).for_each(|_| record(call("Signal"))) });
        assert_eq!(read(&many.await).len(), MAX_CALLS);
    }
}
