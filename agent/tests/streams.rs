//! Standard streams of containers and execs.

mod support;

use podvisor_proto::agent::{ExecRequest, ResizeRequest, StartContainerRequest, Stdio};
use serde_json::json;
use support::local;
use support::{read, spec};
use tokio::io::AsyncWriteExt;
use tonic::Code;

#[tokio::test]
async fn input_ends_where_the_host_says() {
    let mut guest = local::start().await;
    guest.create("c1", &spec(&["cat"]), "").await.unwrap();
    let (stdin, mut input) = guest.stream(1).await;
    let (stdout, mut output) = guest.stream(2).await;
    let request = StartContainerRequest {
        id: "c1".to_owned(),
        stdio: Some(Stdio {
            stdin,
            stdout,
            ..Stdio::default()
        }),
    };
    guest.client.start_container(request).await.unwrap();
    input.write_all(b"there and back").await.unwrap();
    input.shutdown().await.unwrap();
    assert_eq!(read(&mut output).await, "there and back");
    assert_eq!(guest.exit_code("c1", "").await, 0);
}

#[tokio::test]
async fn a_terminal_is_one_stream_with_a_size() {
    let mut guest = local::start().await;
    let mut shell = spec(&[
        "sh",
        "-c",
        "read line; stty size; tty; echo got $line; exit 4",
    ]);
    shell["process"]["terminal"] = json!(true);
    guest.create("c1", &shell, "").await.unwrap();
    let (stdout, mut terminal) = guest.stream(1).await;
    let stdio = Stdio {
        stdout,
        terminal: true,
        ..Stdio::default()
    };
    let request = StartContainerRequest {
        id: "c1".to_owned(),
        stdio: Some(stdio),
    };
    guest.client.start_container(request).await.unwrap();
    let size = ResizeRequest {
        container_id: "c1".to_owned(),
        columns: 132,
        rows: 43,
        ..ResizeRequest::default()
    };
    guest.client.resize(size).await.unwrap();
    terminal.write_all(b"word\n").await.unwrap();
    let text = read(&mut terminal).await;
    assert!(text.contains("43 132\r\n"), "{text:?}");
    assert!(text.ends_with("got word\r\n"), "{text:?}");
    assert_eq!(guest.exit_code("c1", "").await, 4);

    // The same for an exec.
    guest
        .create("c2", &spec(&["sleep", "1000"]), "web")
        .await
        .unwrap();
    guest.start_quietly("c2").await.unwrap();
    let (stdout, mut terminal) = guest.stream(2).await;
    let exec = ExecRequest {
        container_id: "c2".to_owned(),
        exec_id: "e1".to_owned(),
        args: ["sh", "-c", "read line; stty size; echo $line > /dev/tty"]
            .map(str::to_owned)
            .to_vec(),
        stdio: Some(Stdio {
            stdout,
            terminal: true,
            ..Stdio::default()
        }),
        ..ExecRequest::default()
    };
    guest.client.exec(exec).await.unwrap();
    let size = ResizeRequest {
        container_id: "c2".to_owned(),
        exec_id: "e1".to_owned(),
        columns: 80,
        rows: 24,
    };
    guest.client.resize(size).await.unwrap();
    terminal.write_all(b"word\n").await.unwrap();
    let text = read(&mut terminal).await;
    assert!(text.ends_with("24 80\r\nword\r\n"), "{text:?}");
}

#[tokio::test(start_paused = false)]
async fn a_start_without_its_stream_fails_and_can_be_repeated() {
    let mut guest = local::start().await;
    guest
        .create("c1", &spec(&["echo", "late"]), "")
        .await
        .unwrap();
    let request = StartContainerRequest {
        id: "c1".to_owned(),
        stdio: Some(Stdio {
            stdout: vec![9; 16],
            ..Stdio::default()
        }),
    };
    let missing = guest
        .client
        .start_container(request.clone())
        .await
        .unwrap_err();
    assert_eq!(missing.code(), Code::DeadlineExceeded);
    let (_, mut output) = guest.stream(9).await;
    guest.client.start_container(request).await.unwrap();
    assert_eq!(read(&mut output).await, "late\n");
}

#[tokio::test]
async fn many_execs_have_their_streams_at_once() {
    // More than the descriptors that the agent is given at first.
    const EXECS: u8 = 120;
    let mut guest = local::start().await;
    let sleeper = spec(&["sleep", "1000"]);
    guest.create("c1", &sleeper, "").await.unwrap();
    guest.start_quietly("c1").await.unwrap();
    let mut sessions = Vec::new();
    for number in 1..=EXECS {
        let (stdin, input) = guest.stream(number).await;
        let (stdout, output) = guest.stream(EXECS + number).await;
        let request = ExecRequest {
            container_id: "c1".to_owned(),
            exec_id: number.to_string(),
            args: vec!["cat".to_owned()],
            stdio: Some(Stdio {
                stdin,
                stdout,
                ..Stdio::default()
            }),
            ..ExecRequest::default()
        };
        guest.client.exec(request).await.unwrap();
        sessions.push((number, input, output));
    }
    for (number, mut input, mut output) in sessions {
        let line = format!("this is {number}\n");
        input.write_all(line.as_bytes()).await.unwrap();
        drop(input);
        assert_eq!(read(&mut output).await, line);
    }
}
