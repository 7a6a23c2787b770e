//! Lists that are streamed (StreamContainers and its like): for nodes with more than one message holds.

use prost::Message;
use tonic::Status;
use tonic::codegen::BoxStream;

/// Bytes of items after which a message is full: far from the largest message that clients take (16 MiB), and large
/// enough that a list of an ordinary node is one message.
const FULL: usize = 1 << 20;

/// A stream of messages, each with at least one item and every item in one. An item is made when the client has room for
/// its message.
pub fn stream<I, T, M>(items: I, message: fn(Vec<T>) -> M) -> BoxStream<M>
where
    I: Iterator<Item = T> + Send + 'static,
    T: Message + 'static,
    M: Send + 'static,
{
    let mut items = items.peekable();
    let messages = std::iter::from_fn(move || {
        items.peek()?;
        let mut chunk = Vec::new();
        let mut bytes = 0;
        while bytes < FULL {
            let Some(item) = items.next() else { break };
            bytes += item.encoded_len();
            chunk.push(item);
        }
        Some(Ok::<_, Status>(message(chunk)))
    });
    Box::pin(tokio_stream::iter(messages))
}

#[cfg(test)]
mod tests {
    use super::*;
    use podvisor_proto::cri;
    use tokio_stream::StreamExt;

    async fn sizes(count: usize, bytes: usize) -> Vec<usize> {
        let items = (0..count).map(move |number| cri::Container {
            id: number.to_string(),
            image_ref: "x".repeat(bytes),
            ..Default::default()
        });
        let message = |containers| cri::StreamContainersResponse { containers };
        let messages: Vec<_> = stream(items, message).collect().await;
        let mut sizes = Vec::new();
        let mut ids = Vec::new();
        for message in messages {
            let containers = message.unwrap().containers;
            sizes.push(containers.len());
            ids.extend(containers.into_iter().map(|container| container.id));
        }
        let all: Vec<_> = (0..count).map(|number| number.to_string()).collect();
        assert_eq!(ids, all);
        sizes
    }

    #[tokio::test]
    async fn every_item_is_in_one_message() {
        assert!(sizes(0, 0).await.is_empty());
        assert_eq!(sizes(1000, 100).await, [1000]);
        assert_eq!(sizes(5, FULL / 2).await, [2, 2, 1]);
        // However large: it may still fit.
        assert_eq!(sizes(2, FULL * 2).await, [1, 1]);
    }
}
