//! Any bytes as a client's WebSocket connection, as channels.

#![no_main]

use podvisor_streaming::websocket::channels::Channels;
use podvisor_streaming::websocket::messages::Messages;
use podvisor_streaming::wire::outbox;
use podvisor_streaming_fuzz::{idle, read, run, take};

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    run(async {
        let (outbox, answers) = outbox();
        let mut channels = Channels::new(true);
        let stdin = channels.open(0);
        let resize = channels.open(4);
        let reading = async {
            let mut messages = Messages::new(bytes, outbox, idle());
            let _ = channels.run(&mut messages).await;
        };
        tokio::join!(reading, take(answers), read(stdin), read(resize));
    });
});
