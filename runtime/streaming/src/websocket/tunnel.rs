//! One byte stream in binary messages: a client's SPDY connection, inside a WebSocket.

use std::sync::Arc;

use tokio::io::{
    AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream, ReadHalf, WriteHalf,
};

use super::WebSocketError;
use super::frame::{self, opcode};
use super::messages::Messages;
use crate::wire::{CHUNK, Idle, Outbox, OutboxReader, outbox, write_frames};

/// Moves bytes between the WebSocket that `io` carries and the returned stream, for as long as the returned future is
/// run: it ends when both directions have.
pub fn tunnel<T>(io: T, idle: Arc<Idle>) -> (DuplexStream, impl Future<Output = ()>)
where
    T: AsyncRead + AsyncWrite,
{
    let (inside, outside) = tokio::io::duplex(2 * CHUNK);
    let (reader, writer) = tokio::io::split(io);
    let (from_inside, to_inside) = tokio::io::split(outside);
    let (outbox, frames) = outbox();
    let messages = Messages::new(reader, outbox.clone(), Arc::clone(&idle));
    let work = async move {
        let ((), (), ()) = tokio::join!(
            unwrap(messages, to_inside),
            wrap(from_inside, outbox),
            write(writer, frames, &idle),
        );
    };
    (inside, work)
}

async fn unwrap<R: AsyncRead + Unpin>(
    mut messages: Messages<R>,
    mut inside: WriteHalf<DuplexStream>,
) {
    // An end out of order is an end for who reads: SPDY says what is missing.
    while let Ok::<_, WebSocketError>(Some(piece)) = messages.next().await {
        // When nobody reads any more, the client is heard to its end all the same.
        let _ = inside.write_all(&piece.bytes).await;
    }
    let _ = inside.shutdown().await;
}

async fn wrap(mut inside: ReadHalf<DuplexStream>, outbox: Outbox) {
    let mut bytes = vec![0; CHUNK];
    while let Ok(count @ 1..) = inside.read(&mut bytes).await {
        let message = frame::message(opcode::BINARY, &bytes[..count]);
        if outbox.frame(message).await.is_err() {
            return;
        }
    }
    let _ = outbox.frame(frame::close(frame::NORMAL)).await;
    outbox.end().await;
}

async fn write<W: AsyncWrite>(writer: WriteHalf<W>, frames: OutboxReader, idle: &Idle) {
    // The reader finds out as well.
    let _ = write_frames(writer, frames, idle).await;
}
