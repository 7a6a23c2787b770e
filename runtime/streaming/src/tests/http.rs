use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::{exec, rig, rig_with};
use crate::Config;

const SPDY: [(&str, &str); 2] = [
    ("Connection", "keep-alive, Upgrade"),
    ("Upgrade", "SPDY/3.1"),
];

#[tokio::test]
async fn a_url_is_good_once_and_for_its_endpoint() {
    let rig = rig().await;
    let headers = [
        SPDY[0],
        SPDY[1],
        ("X-Stream-Protocol-Version", "v4.channel.k8s.io"),
    ];
    let url = rig.server.exec(exec(&["cat"], true, false)).unwrap();
    assert!(url.starts_with(&format!("http://{}/exec/", rig.address)));
    let other = url.replace("/exec/", "/attach/");
    for wrong in [
        "/exec/",
        "/",
        "/exec/AAAAAAAAAAAAAAAAAAAAAA",
        "/exec",
        &other,
        &url,
    ] {
        let (_, answer) = rig.request(wrong, &headers).await;
        assert!(answer.starts_with("http/1.1 404 "), "{wrong}: {answer}");
    }
    let url = rig.server.exec(exec(&["cat"], true, false)).unwrap();
    assert!(
        rig.request(&url, &headers)
            .await
            .1
            .contains("x-stream-protocol-version: v4.channel.k8s.io")
    );
    assert!(
        rig.request(&url, &headers)
            .await
            .1
            .starts_with("http/1.1 404 ")
    );
}

#[tokio::test]
async fn requests_that_cannot_be_upgraded() {
    let rig = rig().await;
    let v4 = ("X-Stream-Protocol-Version", "v4.channel.k8s.io");
    let websocket = [
        ("Connection", "Upgrade"),
        ("Upgrade", "websocket"),
        ("Sec-WebSocket-Key", "eA=="),
    ];
    let version = ("Sec-WebSocket-Version", "13");
    for (headers, status) in [
        (vec![], "400"),
        (vec![v4], "400"),
        (vec![SPDY[0], ("Upgrade", "h2c"), v4], "400"),
        (vec![SPDY[1], v4], "400"),
        (vec![SPDY[0], SPDY[1]], "400"),
        (
            vec![
                SPDY[0],
                SPDY[1],
                ("X-Stream-Protocol-Version", "v5.channel.k8s.io"),
            ],
            "403",
        ),
        (vec![websocket[0], websocket[1], version], "400"),
        (websocket.to_vec(), "400"),
        (
            vec![
                websocket[0],
                websocket[1],
                websocket[2],
                version,
                ("Sec-WebSocket-Protocol", "chat"),
            ],
            "403",
        ),
    ] {
        let url = rig.server.exec(exec(&["cat"], true, false)).unwrap();
        let (_, answer) = rig.request(&url, &headers).await;
        assert!(
            answer.starts_with(&format!("http/1.1 {status} ")),
            "{headers:?}: {answer}"
        );
        let lists_ours = answer.contains("x-accepted-stream-protocol-versions: v4.channel.k8s.io");
        assert_eq!(lists_ours, status == "403" && headers[1].1 == "SPDY/3.1");
    }
}

#[tokio::test]
async fn heads_without_end_are_refused() {
    let rig = rig().await;
    let mut client = TcpStream::connect(rig.address).await.unwrap();
    client.write_all(b"GET / HTTP/1.1\r\nX: ").await.unwrap();
    // Ends by the server's hand: after kilobytes, not the gigabyte.
    let mut sent = 0;
    while sent < 1 << 30 && client.write_all(&[b'x'; 4096]).await.is_ok() {
        sent += 4096;
    }
    assert!(sent < 1 << 30);
    let mut client = TcpStream::connect(rig.address).await.unwrap();
    client.write_all(b"GET / HTTP/1.1\r\n").await.unwrap();
    let mut sent = 0;
    while sent < 1 << 28 && client.write_all(b"X: y\r\n").await.is_ok() {
        sent += 1;
    }
    assert!(sent < 1 << 28);
    let mut client = TcpStream::connect(rig.address).await.unwrap();
    client.write_all(b"\0\0\r\n\r\n").await.unwrap();
    let mut answer = Vec::new();
    client.read_to_end(&mut answer).await.unwrap();
    assert!(answer.starts_with(b"HTTP/1.1 400"));
}

#[tokio::test(start_paused = true)]
async fn a_head_that_comes_too_slowly_is_given_up() {
    for head in ["", "GET / HTTP/1.1\r\n"] {
        let rig = rig().await;
        let (mut reader, mut writer) = TcpStream::connect(rig.address).await.unwrap().into_split();
        writer.write_all(head.as_bytes()).await.unwrap();
        // A byte now and then, which is no progress.
        let drip = async {
            let byte = if head.is_empty() { b"\n" } else { b"X" };
            while writer.write_all(byte).await.is_ok() {
                tokio::time::sleep(Duration::from_secs(3)).await;
            }
        };
        let end = async {
            let _ = reader.read_to_end(&mut Vec::new()).await;
        };
        tokio::time::timeout(Duration::from_mins(1), async {
            tokio::select! {
                () = drip => {}
                () = end => {}
            }
        })
        .await
        .expect("it ends");
    }
}

#[tokio::test]
async fn a_client_that_opens_no_streams_is_given_up() {
    let rig = rig_with(Config {
        creation_timeout: Duration::from_millis(50),
        ..Config::default()
    })
    .await;
    let url = rig.server.exec(exec(&["cat"], true, false)).unwrap();
    let mut client = rig.spdy(&url, "v4.channel.k8s.io").await;
    client.streams(["error"]).await;
    while client.frame().await.is_some() {}
}

#[tokio::test]
async fn an_idle_session_ends_with_its_command() {
    let rig = rig_with(Config {
        idle_timeout: Duration::from_millis(50),
        ..Config::default()
    })
    .await;
    let url = rig.server.exec(exec(&["cat"], true, false)).unwrap();
    let mut client = rig.spdy(&url, "v4.channel.k8s.io").await;
    client.streams(["error", "stdin", "stdout", "stderr"]).await;
    rig.killed.acquire().await.unwrap().forget();
}
