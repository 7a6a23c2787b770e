use proptest::prelude::*;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::net::TcpStream;

use super::{Rig, SpdyClient, exec, rig};
use crate::PortForward;
use crate::websocket::channels::Channels;
use crate::websocket::frame::{opcode, unmask};
use crate::websocket::messages::Messages;
use crate::wire::{Idle, outbox};

const MASK: [u8; 4] = [1, 2, 3, 4];

/// A frame as clients send it.
fn masked(first: u8, payload: &[u8]) -> Vec<u8> {
    let mut frame = vec![first];
    match payload.len() {
        length @ 0..=125 => frame.push(0x80 | length as u8),
        length => {
            frame.push(0x80 | 127);
            frame.extend_from_slice(&(length as u64).to_be_bytes());
        }
    }
    frame.extend_from_slice(&MASK);
    let mut payload = payload.to_vec();
    unmask(&mut payload, MASK, 0);
    frame.extend_from_slice(&payload);
    frame
}

fn binary(payload: &[u8]) -> Vec<u8> {
    masked(0x80 | opcode::BINARY, payload)
}

async fn connect(rig: &Rig, url: &str, protocol: &str) -> TcpStream {
    let headers = [
        ("Connection", "Upgrade"),
        ("Upgrade", "websocket"),
        ("Sec-WebSocket-Version", "13"),
        ("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ=="),
        ("Sec-WebSocket-Protocol", protocol),
    ];
    let (stream, answer) = rig.request(url, &headers).await;
    assert!(answer.starts_with("http/1.1 101 "), "{answer}");
    let chosen = protocol.split(", ").next().unwrap().to_lowercase();
    assert!(
        answer.contains(&format!("sec-websocket-protocol: {chosen}")),
        "{answer}"
    );
    stream
}

/// The next message: what it is, and its bytes.
async fn message(stream: &mut (impl AsyncRead + Unpin)) -> (u8, Vec<u8>) {
    let first = stream.read_u8().await.unwrap();
    let length = match stream.read_u8().await.unwrap() {
        126 => u64::from(stream.read_u16().await.unwrap()),
        127 => stream.read_u64().await.unwrap(),
        length => u64::from(length),
    };
    let mut payload = vec![0; length as usize];
    stream.read_exact(&mut payload).await.unwrap();
    assert_eq!(first & 0x80, 0x80);
    (first & 0x0f, payload)
}

/// What comes in a channel until the server closes.
async fn channel(stream: &mut TcpStream, number: u8) -> (Vec<u8>, String) {
    let (mut bytes, mut error) = (Vec::new(), Vec::new());
    loop {
        match message(stream).await {
            (opcode::CLOSE, code) => {
                assert_eq!(code, 1000u16.to_be_bytes());
                return (bytes, String::from_utf8(error).unwrap());
            }
            (opcode::BINARY, payload) if payload[0] == number => bytes.extend(&payload[1..]),
            (opcode::BINARY, payload) if payload[0] == 3 => error.extend(&payload[1..]),
            _ => {}
        }
    }
}

#[tokio::test]
async fn version_5_ends_stdin() {
    let rig = rig().await;
    let url = rig.server.exec(exec(&["cat"], true, false)).unwrap();
    let mut client = connect(&rig, &url, "v5.channel.k8s.io, v4.channel.k8s.io").await;
    // First an empty message: the session is open.
    assert_eq!(message(&mut client).await, (opcode::BINARY, vec![1]));
    client
        .write_all(&masked(0x80 | opcode::PING, b"hi"))
        .await
        .unwrap();
    assert_eq!(message(&mut client).await, (opcode::PONG, b"hi".to_vec()));
    // One message in three frames, with a ping between.
    client
        .write_all(&masked(opcode::BINARY, &[0]))
        .await
        .unwrap();
    client
        .write_all(&masked(opcode::CONTINUATION, b"one "))
        .await
        .unwrap();
    client
        .write_all(&masked(0x80 | opcode::PING, b""))
        .await
        .unwrap();
    client
        .write_all(&masked(0x80 | opcode::CONTINUATION, b"message"))
        .await
        .unwrap();
    client.write_all(&binary(&[255, 0])).await.unwrap();
    let (stdout, status) = channel(&mut client, 1).await;
    assert_eq!(stdout, b"one message");
    assert!(status.contains("Success"), "{status}");
}

#[tokio::test]
async fn version_4_has_codes_and_sizes() {
    let rig = rig().await;
    let url = rig.server.exec(exec(&["exit", "7"], false, false)).unwrap();
    let mut client = connect(&rig, &url, "v4.channel.k8s.io").await;
    let (stderr, status) = channel(&mut client, 2).await;
    assert_eq!(stderr, b"err");
    assert!(status.contains(r#""message":"7""#), "{status}");

    let url = rig.server.exec(exec(&["size"], false, true)).unwrap();
    let mut client = connect(&rig, &url, "v4.channel.k8s.io").await;
    client
        .write_all(&binary(b"\x04{\"Width\":1,\"Height\":2}"))
        .await
        .unwrap();
    assert_eq!(channel(&mut client, 1).await.0, b"1x2");
}

#[tokio::test]
async fn a_flood_of_sizes_holds_up_nothing() {
    let rig = rig().await;
    let url = rig.server.exec(exec(&["cat"], true, true)).unwrap();
    let mut client = connect(&rig, &url, "v4.channel.k8s.io").await;
    let sizes = (0..20_000u32).map(|n| format!("\x04{{\"Width\":{n},\"Height\":{n}}}"));
    let mut flood: Vec<u8> = sizes.flat_map(|size| binary(size.as_bytes())).collect();
    flood.extend(binary(b"\0still here"));
    client.write_all(&flood).await.unwrap();
    loop {
        let (_, payload) = message(&mut client).await;
        if payload == b"\x01still here" {
            break;
        }
        assert_eq!(payload, [1], "what says that the session is open");
    }
}

#[tokio::test]
async fn a_close_and_a_malformed_frame_end_the_command() {
    let rig = rig().await;
    let unmasked = vec![0x82, 1, 0];
    let reserved = masked(0xc2, b"");
    let stray = masked(0x80 | opcode::CONTINUATION, b"");
    let long_ping = [&[0x89, 0xfe, 1, 0][..], &[0; 260]].concat();
    for end in [masked(0x88, b""), unmasked, reserved, stray, long_ping] {
        let url = rig.server.exec(exec(&["cat"], true, false)).unwrap();
        let mut client = connect(&rig, &url, "v5.channel.k8s.io").await;
        message(&mut client).await;
        client.write_all(&end).await.unwrap();
        rig.killed.acquire().await.unwrap().forget();
    }
}

#[tokio::test]
async fn ports_have_two_channels_each() {
    let rig = rig().await;
    let forward = PortForward {
        sandbox_id: "pod".to_owned(),
        ports: vec![9, 7],
    };
    let url = rig.server.port_forward(forward).unwrap();
    let mut client = connect(&rig, &url, "v4.channel.k8s.io").await;
    client.write_all(&binary(b"\x02echo")).await.unwrap();
    let mut channels = vec![Vec::new(); 4];
    while channels[1].len() < 3 || channels[2].len() < 6 {
        let (_, payload) = message(&mut client).await;
        channels[usize::from(payload[0])].extend_from_slice(&payload[1..]);
    }
    assert_eq!(channels[0], [9, 0]);
    assert_eq!(channels[1], b"\x09\0port 9: connection refused");
    assert_eq!(channels[2], b"\x07\0echo");
    assert_eq!(channels[3], [7, 0]);
}

/// A client's SPDY connection inside its WebSocket.
fn inside(client: TcpStream) -> SpdyClient<DuplexStream> {
    let (ours, outside) = tokio::io::duplex(4096);
    let (mut reader, mut writer) = client.into_split();
    let (mut from_inside, mut to_inside) = tokio::io::split(outside);
    tokio::spawn(async move {
        while let (opcode::BINARY, payload) = message(&mut reader).await {
            to_inside.write_all(&payload).await.unwrap();
        }
    });
    tokio::spawn(async move {
        let mut bytes = vec![0; 100];
        while let Ok(count @ 1..) = from_inside.read(&mut bytes).await {
            writer.write_all(&binary(&bytes[..count])).await.unwrap();
        }
    });
    SpdyClient::new(ours)
}

#[tokio::test]
async fn spdy_goes_through_a_tunnel() {
    let rig = rig().await;
    let forward = PortForward {
        sandbox_id: "pod".to_owned(),
        ports: Vec::new(),
    };
    let url = rig.server.port_forward(forward).unwrap();
    let protocols = "SPDY/3.1+portforward.k8s.io, v4.channel.k8s.io";
    let mut client = inside(connect(&rig, &url, protocols).await);
    let error = client
        .open(&[("streamtype", "error"), ("port", "7"), ("requestid", "0")])
        .await;
    let data = client
        .open(&[("streamtype", "data"), ("port", "7"), ("requestid", "0")])
        .await;
    let text = "tunnel ".repeat(1000);
    client.data(data, text.as_bytes(), true).await;
    assert_eq!(client.text(data).await, text);
    assert_eq!(client.text(error).await, "");
}

/// Runs what a client sends through a reader, cut into pieces; returns what came in channels 0 and 4.
async fn received(sent: &[u8], piece: usize) -> [Vec<u8>; 2] {
    let (mut client, server) = tokio::io::duplex(piece);
    let (outbox, mut frames) = outbox();
    let idle = std::sync::Arc::new(Idle::new(std::time::Duration::from_mins(1)));
    let answers = tokio::spawn(async move { while frames.discard().await {} });
    let mut channels = Channels::new(true);
    let collecting = [0, 4].map(|number| {
        let mut incoming = channels.open(number);
        tokio::spawn(async move {
            let mut bytes = Vec::new();
            while let Some(chunk) = incoming.recv().await {
                bytes.extend_from_slice(&chunk);
            }
            bytes
        })
    });
    let reading = tokio::spawn(async move {
        let mut messages = Messages::new(server, outbox, idle);
        let _ = channels.run(&mut messages).await;
    });
    // It may end the connection earlier.
    let _ = client.write_all(sent).await;
    drop(client);
    reading.await.unwrap();
    answers.await.unwrap();
    let [first, second] = collecting;
    [first.await.unwrap(), second.await.unwrap()]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn frames_may_be_cut_anywhere(
        messages in prop::collection::vec(
            (any::<bool>(), prop::collection::vec(prop::collection::vec(any::<u8>(), 0..40_000), 1..4)), 0..6),
        piece in 1..5000usize)
    {
        let mut sent = Vec::new();
        let mut expected = [Vec::new(), Vec::new()];
        for (second, parts) in messages {
            let last = parts.len() - 1;
            for (index, part) in parts.iter().enumerate() {
                let mut payload = part.clone();
                let mut first = opcode::CONTINUATION;
                if index == 0 {
                    payload.insert(0, if second { 4 } else { 0 });
                    first = opcode::BINARY;
                }
                sent.extend(masked(first | if index == last { 0x80 } else { 0 }, &payload));
                expected[usize::from(second)].extend_from_slice(part);
            }
        }
        let received = super::block_on(received(&sent, piece));
        prop_assert!(received == expected);
    }

    #[test]
    fn nonsense_ends_without_a_panic(sent in prop::collection::vec(any::<u8>(), 0..200)) {
        super::block_on(received(&sent, 64));
    }
}
