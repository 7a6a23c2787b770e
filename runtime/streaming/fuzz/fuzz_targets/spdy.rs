//! Any bytes as a client's SPDY connection. The first byte: 0, bytes as they are; else control frames, each of a kind, a length and
//! flags, so that what is behind the frame's header is reached.

#![no_main]

use podvisor_streaming::spdy::connection::Connection;
use podvisor_streaming::spdy::frame;
use podvisor_streaming::wire::outbox;
use podvisor_streaming_fuzz::{idle, read, run, take};
use tokio::sync::mpsc;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let Some((&how, bytes)) = bytes.split_first() else {
        return;
    };
    let sent = if how == 0 {
        bytes.to_vec()
    } else {
        frames(bytes)
    };
    run(async {
        let (outbox, answers) = outbox();
        let (opened, mut streams) = mpsc::channel(8);
        let connection = Connection::new(&sent[..], outbox, opened, idle());
        let reading = async {
            let mut readers = tokio::task::JoinSet::new();
            while let Some(stream) = streams.recv().await {
                readers.spawn(read(stream.incoming));
            }
            while readers.join_next().await.is_some() {}
        };
        let _ = tokio::join!(connection.run(), take(answers), reading);
    });
});

fn frames(mut bytes: &[u8]) -> Vec<u8> {
    let mut sent = Vec::new();
    while let Some((&[kind, length, flags], rest)) = bytes.split_first_chunk() {
        let (payload, after) = rest.split_at(usize::from(length).min(rest.len()));
        let mut frame = frame::control(u16::from(kind % 10), &[payload]);
        frame[4] = flags;
        sent.extend(frame);
        bytes = after;
    }
    sent
}
