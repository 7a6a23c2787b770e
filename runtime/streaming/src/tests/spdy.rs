use proptest::prelude::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::mpsc;

use super::{exec, rig};
use crate::PortForward;
use crate::spdy::connection::{Connection, STREAM_LIMIT};
use crate::spdy::frame::{self, kind};
use crate::wire::{Idle, outbox};

#[tokio::test]
async fn output_and_exit_code() {
    let rig = rig().await;
    let url = rig.server.exec(exec(&["exit", "3"], false, false)).unwrap();
    let mut client = rig.spdy(&url, "v5.channel.k8s.io, v4.channel.k8s.io").await;
    let [error, stdout, stderr] = client.streams(["error", "stdout", "stderr"]).await;
    assert_eq!(client.text(stdout).await, "out");
    assert_eq!(client.text(stderr).await, "err");
    let status = client.text(error).await;
    assert!(
        status.contains(r#"{"message":"3","reason":"ExitCode"}"#),
        "{status}"
    );
    assert!(client.control(kind::GOAWAY).await.is_some());
}

#[tokio::test]
async fn stdin_goes_on_until_the_client_ends_it() {
    let rig = rig().await;
    let url = rig.server.exec(exec(&["cat"], true, false)).unwrap();
    let mut client = rig.spdy(&url, "v4.channel.k8s.io").await;
    let [error, stdin, stdout, _] = client.streams(["error", "stdin", "stdout", "stderr"]).await;
    // Far more than any buffer, in both directions at once.
    let text = "0123456789abcdef".repeat(64 * 1024);
    let (mut reader, mut writer) = tokio::io::split(client.stream);
    let bytes = text.clone().into_bytes();
    let writing = tokio::spawn(async move {
        for chunk in bytes.chunks(50_000) {
            let mut room = [0; 16];
            let header = frame::data_header(&mut room, stdin, chunk.len(), false);
            writer.write_all(header).await.unwrap();
            writer.write_all(chunk).await.unwrap();
        }
        let mut room = [0; 16];
        let end = frame::data_header(&mut room, stdin, 0, true);
        writer.write_all(end).await.unwrap();
        writer
    });
    let mut received = Vec::new();
    reader.read_to_end(&mut received).await.unwrap();
    let (parse, _keep) = (received, writing.await.unwrap());
    let (ours, theirs) = tokio::io::duplex(parse.len());
    let mut replay = super::SpdyClient::new(ours);
    let mut theirs = theirs;
    theirs.write_all(&parse).await.unwrap();
    drop(theirs);
    assert_eq!(replay.text(stdout).await, text);
    assert_eq!(
        replay.text(error).await,
        r#"{"metadata":{},"status":"Success"}"#
    );
}

#[tokio::test]
async fn a_terminal_has_a_size() {
    let rig = rig().await;
    let url = rig.server.exec(exec(&["size"], false, true)).unwrap();
    let mut client = rig.spdy(&url, "v4.channel.k8s.io").await;
    let [error, stdout, resize] = client.streams(["error", "stdout", "resize"]).await;
    client.data(resize, b"{\"Width\":80,", false).await;
    client.data(resize, b"\"Height\":24}\n", false).await;
    assert_eq!(client.text(stdout).await, "80x24");
    client.text(error).await;
}

#[tokio::test]
async fn a_refusal_is_told_by_each_version_in_its_way() {
    let rig = rig().await;
    for (protocol, expected) in [
        (
            "v4.channel.k8s.io",
            r#""message":"no such program","metadata":{},"reason":"InternalError""#,
        ),
        ("v2.channel.k8s.io", "no such program"),
    ] {
        let url = rig.server.exec(exec(&["refused"], false, false)).unwrap();
        let mut client = rig.spdy(&url, protocol).await;
        let [error, ..] = client.streams(["error", "stdout", "stderr"]).await;
        let text = client.text(error).await;
        assert!(text.contains(expected), "{text}");
    }
}

#[tokio::test]
async fn a_client_that_goes_away_ends_its_command() {
    let rig = rig().await;
    for args in [["cat"], ["yes"]] {
        let url = rig.server.exec(exec(&args, true, false)).unwrap();
        let mut client = rig.spdy(&url, "v4.channel.k8s.io").await;
        let [_, _, _, stderr] = client.streams(["error", "stdin", "stdout", "stderr"]).await;
        while !client.received.contains_key(&stderr) {
            client.frame().await.unwrap();
        }
        drop(client);
        rig.killed.acquire().await.unwrap().forget();
    }
}

#[tokio::test]
async fn pings_are_answered() {
    let rig = rig().await;
    let url = rig.server.exec(exec(&["cat"], true, false)).unwrap();
    let mut client = rig.spdy(&url, "v4.channel.k8s.io").await;
    let ping = frame::control(kind::PING, &[&77u32.to_be_bytes()]);
    client.send(&ping).await;
    assert_eq!(
        client.control(kind::PING).await.unwrap(),
        77u32.to_be_bytes()
    );
}

#[tokio::test]
async fn ports_are_forwarded_and_a_refused_one_ends_alone() {
    let rig = rig().await;
    let forward = PortForward {
        sandbox_id: "pod".to_owned(),
        ports: Vec::new(),
    };
    let url = rig.server.port_forward(forward).unwrap();
    let mut client = rig.spdy(&url, "portforward.k8s.io").await;
    let mut pairs = Vec::new();
    for (request, port) in [("0", "7"), ("1", "9"), ("2", "7")] {
        let mut pair = [0; 2];
        for (id, kind) in pair.iter_mut().zip(["error", "data"]) {
            let headers = [("streamtype", kind), ("port", port), ("requestid", request)];
            *id = client.open(&headers).await;
        }
        client.data(pair[0], b"", true).await;
        pairs.push(pair);
    }
    assert_eq!(client.text(pairs[1][0]).await, "port 9: connection refused");
    assert_eq!(client.text(pairs[1][1]).await, "");
    for [error, data] in [pairs[2], pairs[0]] {
        client.data(data, b"echo", false).await;
        client.data(data, b"ed", true).await;
        assert_eq!(client.text(data).await, "echoed");
        assert_eq!(client.text(error).await, "");
    }
    // Old clients name no request: the error stream comes right before the other.
    let error = client.open(&[("streamtype", "error"), ("port", "7")]).await;
    let data = client.open(&[("streamtype", "data"), ("port", "7")]).await;
    client.data(data, b"old", true).await;
    assert_eq!(client.text(data).await, "old");
    assert_eq!(client.text(error).await, "");
}

#[tokio::test]
async fn open_streams_are_bounded() {
    let rig = rig().await;
    let forward = PortForward {
        sandbox_id: "pod".to_owned(),
        ports: Vec::new(),
    };
    let url = rig.server.port_forward(forward).unwrap();
    let mut client = rig.spdy(&url, "portforward.k8s.io").await;
    // Pairs that are over take no place.
    for request in 0..STREAM_LIMIT {
        let request = format!("past {request}");
        let mut last = 0;
        for kind in ["error", "data"] {
            let headers = [("streamtype", kind), ("port", "9"), ("requestid", &request)];
            last = client.open(&headers).await;
        }
        client.text(last).await;
    }
    for request in 0..=STREAM_LIMIT {
        let request = request.to_string();
        client
            .open(&[
                ("streamtype", "error"),
                ("port", "7"),
                ("requestid", &request),
            ])
            .await;
    }
    let refused = client.control(kind::RST_STREAM).await.unwrap();
    assert_eq!(refused[..4], (client.next_id - 2).to_be_bytes());
}

#[tokio::test]
async fn what_is_no_spdy_ends_with_goaway() {
    let rig = rig().await;
    let syn_reply = frame::control(kind::SYN_REPLY, &[&1u32.to_be_bytes()]);
    let mut long = frame::control(kind::SYN_STREAM, &[]);
    long[5..8].fill(0xff);
    let unopened = vec![0, 0, 0, 9, 0, 0, 0, 0];
    let not_compressed = frame::control(kind::SYN_STREAM, &[&1u32.to_be_bytes(), &[0; 60]]);
    let version = vec![0x80, 2, 0, 1, 0, 0, 0, 0];
    let short = frame::control(kind::HEADERS, &[&[0]]);
    for bad in [syn_reply, long, unopened, not_compressed, version, short] {
        let url = rig.server.exec(exec(&["cat"], true, false)).unwrap();
        let mut client = rig.spdy(&url, "v4.channel.k8s.io").await;
        client.send(&bad).await;
        let goaway = client.control(kind::GOAWAY).await;
        assert!(goaway.is_some_and(|payload| payload[7] == 1), "{bad:?}");
    }
}

/// Runs what a client sends through a connection, cut into pieces; returns the bytes of each stream.
async fn received(sent: &[u8], piece: usize) -> Vec<Vec<u8>> {
    let (mut client, server) = tokio::io::duplex(piece);
    let (opened, mut streams) = mpsc::channel(600);
    let (outbox, mut frames) = outbox();
    let idle = std::sync::Arc::new(Idle::new(std::time::Duration::from_mins(1)));
    let connection = tokio::spawn(Connection::new(server, outbox, opened, idle).run());
    let answers = tokio::spawn(async move { while frames.discard().await {} });
    let collecting = tokio::spawn(async move {
        let mut all = Vec::new();
        while let Some(mut stream) = streams.recv().await {
            all.push(tokio::spawn(async move {
                let mut bytes = Vec::new();
                while let Some(chunk) = stream.incoming.recv().await {
                    bytes.extend_from_slice(&chunk);
                }
                bytes
            }));
        }
        let mut bytes = Vec::new();
        for one in all {
            bytes.push(one.await.unwrap());
        }
        bytes
    });
    // It may end the connection earlier.
    let _ = client.write_all(sent).await;
    drop(client);
    let _ = connection.await.unwrap();
    let bytes = collecting.await.unwrap();
    answers.await.unwrap();
    bytes
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn frames_may_be_cut_anywhere(
        writes in prop::collection::vec((0..3usize, prop::collection::vec(any::<u8>(), 0..90_000)), 0..6),
        piece in 1..5000usize)
    {
        let (ours, _theirs) = tokio::io::duplex(1);
        let mut client = super::SpdyClient::new(ours);
        let mut sent = Vec::new();
        let mut expected = vec![Vec::new(); 3];
        for _ in 0..3 {
            sent.extend(client.syn_stream(&[("streamtype", "data")]).1);
        }
        for (stream, bytes) in writes {
            let mut room = [0; 16];
            let id = stream as u32 * 2 + 1;
            sent.extend_from_slice(frame::data_header(&mut room, id, bytes.len(), false));
            sent.extend_from_slice(&bytes);
            expected[stream].extend(bytes);
        }
        prop_assert_eq!(super::block_on(received(&sent, piece)), expected);
    }

    #[test]
    fn nonsense_ends_without_a_panic(
        frames in prop::collection::vec((0..12u16, any::<u8>(), prop::collection::vec(any::<u8>(), 0..60)), 0..20),
        tail in prop::collection::vec(any::<u8>(), 0..40))
    {
        let mut sent = Vec::new();
        for (kind, flags, payload) in frames {
            let mut frame = frame::control(kind, &[&payload]);
            frame[4] = flags;
            sent.extend(frame);
        }
        sent.extend(tail);
        super::block_on(received(&sent, 4096));
    }
}
