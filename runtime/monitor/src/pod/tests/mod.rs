//! The pod against an agent of our own in this process: what the guest may do wrong, too.

mod fake;

use std::fs::File;
use std::io::{Read, Seek};
use std::sync::Arc;
use std::time::Duration;

use podvisor_monitor::fd_socket::Token;
use podvisor_monitor::fd_table::FdTable;
use podvisor_monitor::snapshots;
use podvisor_proto::agent::agent_server::AgentServer;
use podvisor_proto::agent::{self as api, event};
use podvisor_proto::monitor::{
    ConfigureRequest, Container, ContainerState, CreateContainerRequest, ExecSyncRequest, Layer,
    SandboxState, Snapshot,
};
use podvisor_vmm::{FsDevice, SegmentMap};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::Status;

use super::guest::{Guest, VmParts};
use super::{Pod, PodError};
use crate::agent::keep_link;
use crate::console::Console;
use crate::state::{State, now_ns};
use fake::{FakeAgent, FakeGuest};

/// A pod with a fake guest.
struct Rig {
    pod: Arc<Pod>,
    guest: Arc<FakeGuest>,
    fds: FdTable,
    dial_host: mpsc::Sender<UnixStream>,
    log: File,
    dir: tempfile::TempDir,
}

impl Rig {
    /// From now on its VM ends when it is killed.
    fn has_a_vm_that_dies(&self) {
        let pod = Arc::clone(&self.pod);
        tokio::spawn(async move {
            pod.guest().expect("a VM").kill().cancelled().await;
            pod.set_gone("Shutdown", String::new()).await;
        });
    }

    /// Booting: the agent has not dialled.
    fn booting() -> Self {
        let dir = tempfile::tempdir().expect("temporary directory");
        let folder = File::open(dir.path()).expect("directory").into();
        let guest = Arc::new(FakeGuest::default());
        let streams = Arc::clone(&guest);
        let fds = FdTable::default();
        let (console, _) = Console::new().expect("pipe");
        let state = State::new(Snapshot::default(), folder);
        let parts = VmParts {
            console,
            disk: SegmentMap::new(),
            fs: FsDevice::new().expect("device").1,
            scratch: api::Segment {
                start: 0,
                length: 4096,
            },
            dial: Box::new(move |_port| {
                let guest = Arc::clone(&streams);
                Box::pin(async move {
                    let (ours, mut guests) = UnixStream::pair()?;
                    tokio::spawn(async move {
                        let mut token = vec![0; Token::LENGTH];
                        guests.read_exact(&mut token).await.expect("a token");
                        guest.streams.lock().expect("streams").insert(token, guests);
                        guest.arrived.send_replace(());
                    });
                    Ok(ours)
                })
            }),
            vcpus: 1,
            memory_bytes: 512 << 20,
            max_memory_bytes: 1 << 30,
        };
        let pod = Pod::in_vm(state, fds.clone(), now_ns(), parts);
        let (dial_host, incoming) = mpsc::channel(4);
        let observer = Arc::clone(&pod);
        tokio::spawn(async move { keep_link(ReceiverStream::new(incoming), &observer).await });
        Self {
            pod,
            guest,
            fds,
            dial_host,
            log: tempfile::tempfile().expect("temporary file"),
            dir,
        }
    }

    fn guest(&self) -> &Guest {
        self.pod.guest().expect("a VM")
    }

    /// Ready for containers.
    async fn ready() -> Self {
        let rig = Self::booting();
        rig.pod.add_phase(super::PHASE_VM_START, now_ns(), now_ns());
        rig.connect_agent().await;
        let request = ConfigureRequest {
            sandbox: Some(api::ConfigureSandboxRequest::default()),
            network: None,
        };
        rig.pod.configure(request).await.expect("configured");
        rig
    }

    /// The agent dials; cancelling breaks the connection.
    async fn connect_agent(&self) -> CancellationToken {
        let (ours, mut far) = UnixStream::pair().expect("socketpair");
        let (mut near, guests) = UnixStream::pair().expect("socketpair");
        let server = tonic::transport::Server::builder()
            .add_service(AgentServer::new(FakeAgent(Arc::clone(&self.guest))))
            .serve_with_incoming(tokio_stream::once(Ok::<_, std::io::Error>(guests)));
        tokio::spawn(server);
        let cut = CancellationToken::new();
        let end = cut.clone();
        tokio::spawn(async move {
            let relay = tokio::io::copy_bidirectional(&mut far, &mut near);
            end.run_until_cancelled(relay).await
        });
        self.dial_host.send(ours).await.expect("the link listens");
        cut
    }

    fn request(&self, id: &str, program: &str) -> CreateContainerRequest {
        let log = Token::random();
        let file = self.log.try_clone().expect("second descriptor");
        assert!(self.fds.insert(log, vec![file.into()]));
        let layer = Token::random();
        let file = tempfile::tempfile().expect("temporary file");
        file.set_len(4096).expect("length");
        assert!(self.fds.insert(layer, vec![file.into()]));
        CreateContainerRequest {
            id: id.repeat(64),
            layers: vec![Layer {
                diff_id: "sha256:1".to_owned(),
                fd_token: layer.to_vec(),
                length: 4096,
            }],
            spec: program.as_bytes().to_vec(),
            log_fd_token: log.to_vec(),
            ..CreateContainerRequest::default()
        }
    }

    /// Creates and starts; the id is one character 64 times.
    async fn run(&self, id: &str, program: &str) -> String {
        let request = self.request(id, program);
        let id = request.id.clone();
        self.pod.create(request).await.expect("created");
        self.pod.start(&id).await.expect("start answered");
        id
    }

    fn container(&self, id: &str) -> Container {
        let containers = self.pod.state().snapshot().containers;
        let found = containers.into_iter().find(|container| container.id == id);
        found.expect("a container of this id")
    }

    async fn exited(&self, id: &str) -> Container {
        timeout(Duration::from_secs(20), self.pod.state().wait_exited(id))
            .await
            .expect("an end");
        self.container(id)
    }

    fn log_lines(&self) -> Vec<String> {
        let mut file = self.log.try_clone().expect("second descriptor");
        let mut text = String::new();
        file.rewind().expect("rewind");
        file.read_to_string(&mut text).expect("read");
        let lines = text.lines();
        lines
            .map(|line| line.split_once(' ').expect("timestamp").1.to_owned())
            .collect()
    }

    async fn exec(&self, id: &str, program: &str, timeout_ms: u64) -> Result<String, PodError> {
        let request = ExecSyncRequest {
            container_id: id.to_owned(),
            args: vec![program.to_owned()],
            timeout_ms,
            output_limit: 1000,
        };
        let done = self
            .pod
            .exec_sync(request, CancellationToken::new())
            .await?;
        Ok(format!(
            "{}{}{}",
            String::from_utf8_lossy(&done.stdout),
            String::from_utf8_lossy(&done.stderr),
            done.exit_code
        ))
    }

    fn signals(&self) -> Vec<(u32, bool)> {
        let signals = self.guest.signals.lock().expect("signals");
        signals.iter().map(|s| (s.signal, s.all)).collect()
    }
}

#[tokio::test]
async fn a_container_runs_and_its_log_is_complete_when_it_has_exited() {
    let rig = Rig::ready().await;
    assert_eq!(rig.pod.state().sandbox_state(), SandboxState::Ready);
    let id = rig.run("a", "true").await;
    let container = rig.exited(&id).await;
    assert_eq!(container.exit_code, 0);
    assert_eq!(container.reason, "Completed");
    assert_eq!(container.pid, 42);
    assert!(container.created_ns <= container.started_ns);
    assert!(container.started_ns <= container.finished_ns);
    let mut lines = rig.log_lines();
    lines.sort();
    assert_eq!(lines, ["stderr F err", "stdout F out"]);
}

#[tokio::test]
async fn a_follower_is_told_every_state_to_the_last() {
    let rig = Rig::ready().await;
    let (mut ours, theirs) = UnixStream::pair().expect("socketpair");
    let theirs = theirs.into_std().expect("registered").into();
    let token = Token::random();
    assert!(rig.fds.insert(token, vec![theirs]));
    rig.pod.follow(token.as_bytes()).expect("it came");
    let refused = rig.pod.follow(token.as_bytes());
    assert!(matches!(refused, Err(PodError::State(_))), "used");

    let now = snapshots::read(&mut ours).await.expect("a snapshot");
    assert_eq!(now.as_ref(), Some(&rig.pod.state().snapshot()));
    let id = rig.run("a", "true").await;
    rig.exited(&id).await;
    rig.has_a_vm_that_dies();
    rig.pod.shutdown(Duration::ZERO).await;
    let mut last = now;
    let rest = async {
        while let Some(next) = snapshots::read(&mut ours).await.expect("to the end") {
            last = Some(next);
        }
    };
    let seconds = Duration::from_secs(10);
    timeout(seconds, rest).await.expect("an end");
    assert_eq!(last, Some(rig.pod.state().snapshot()));
}

#[tokio::test]
async fn calls_may_be_repeated() {
    let rig = Rig::ready().await;
    let first = rig.request("a", "sleep");
    let id = first.id.clone();
    rig.pod.create(first).await.expect("created");
    rig.pod
        .create(rig.request("a", "sleep"))
        .await
        .expect("the same again");
    let other = rig.pod.create(rig.request("a", "true")).await;
    assert!(matches!(other, Err(PodError::Exists(_))));
    for _ in 0..2 {
        rig.pod.start(&id).await.expect("started");
        assert_eq!(rig.container(&id).state(), ContainerState::Running);
    }
    for _ in 0..2 {
        rig.pod.remove(&id).await.expect("removed");
        assert!(rig.pod.state().snapshot().containers.is_empty());
    }
    assert!(matches!(
        rig.pod.start(&id).await,
        Err(PodError::NotFound(_))
    ));
    let configured = rig.pod.configure(ConfigureRequest::default()).await;
    configured.expect("configured before");
}

#[tokio::test]
async fn an_exit_may_come_before_the_answer_to_start() {
    let rig = Rig::ready().await;
    let id = rig.run("a", "early").await;
    let container = rig.exited(&id).await;
    assert_eq!(
        (container.exit_code, container.reason.as_str()),
        (3, "Error")
    );
    assert!(container.started_ns > 0);
}

#[tokio::test]
async fn what_cannot_be_started_has_exited() {
    let rig = Rig::ready().await;
    let id = rig.run("a", "missing").await;
    let container = rig.container(&id);
    assert_eq!(container.state(), ContainerState::Exited);
    assert_eq!(container.exit_code, 128);
    assert_eq!(container.reason, "StartError");
    assert!(container.message.contains("no such file"));
}

#[tokio::test]
async fn a_failed_create_leaves_nothing() {
    let rig = Rig::ready().await;
    let request = rig.request("a", "no user");
    let id = request.id.clone();
    let error = rig.pod.create(request).await.expect_err("refused");
    assert_eq!(Status::from(error).code(), tonic::Code::InvalidArgument);
    assert!(matches!(rig.pod.remove(&id).await, Ok(())));
    // The id is free, also for another container.
    rig.run("a", "true").await;
}

#[tokio::test]
async fn output_held_open_does_not_hold_the_exit() {
    let rig = Rig::ready().await;
    let id = rig.run("a", "hold").await;
    let container = rig.exited(&id).await;
    assert_eq!(container.exit_code, 0);
    assert_eq!(rig.log_lines(), ["stdout F held"]);
}

#[tokio::test]
async fn stop_signals_waits_and_kills() {
    let rig = Rig::ready().await;
    let id = rig.run("a", "sleep").await;
    let grace = Duration::from_millis(20);
    let (one, two) = tokio::join!(rig.pod.stop(&id, 15, grace), rig.pod.stop(&id, 15, grace));
    one.expect("stopped");
    two.expect("stopped");
    let container = rig.container(&id);
    assert_eq!(container.state(), ContainerState::Exited);
    assert_eq!(container.exit_code, 137);
    let signals = rig.signals();
    let terms = signals.iter().filter(|signal| signal.0 == 15);
    assert_eq!(terms.count(), 1, "the first process hears it once");
    assert!(signals.contains(&(9, true)));
    rig.pod.stop(&id, 15, grace).await.expect("not running");
}

#[tokio::test]
async fn out_of_memory_is_the_reason() {
    let rig = Rig::ready().await;
    let id = rig.run("a", "sleep").await;
    rig.guest.push(event::Kind::OutOfMemory(api::OutOfMemory {
        container_id: id.clone(),
    }));
    rig.guest.exit(&id, "", 137);
    assert_eq!(rig.exited(&id).await.reason, "OOMKilled");
}

#[tokio::test]
async fn exits_of_strangers_are_ignored() {
    let rig = Rig::ready().await;
    let id = rig.run("a", "sleep").await;
    rig.guest.exit("nobody", "", 0);
    rig.guest.exit(&id, "no such exec", 0);
    rig.guest.exit(&id, "", 1000);
    rig.guest.exit(&id, "", 1);
    assert_eq!(rig.exited(&id).await.exit_code, 255);
}

#[tokio::test]
async fn exec_returns_output_and_code() {
    let rig = Rig::ready().await;
    let id = rig.run("a", "sleep").await;
    assert_eq!(rig.exec(&id, "true", 0).await.expect("done"), "out\nerr\n0");
    assert_eq!(rig.exec(&id, "hold", 0).await.expect("done"), "held\n0");
    let missing = rig.exec(&id, "missing", 0).await.expect_err("no command");
    assert!(missing.to_string().contains("no such file"));
    let unknown = rig.exec("nobody", "true", 0).await;
    assert!(matches!(unknown, Err(PodError::NotFound(_))));
}

#[tokio::test]
async fn exec_is_killed_at_its_timeout_and_with_its_caller() {
    let rig = Rig::ready().await;
    let id = rig.run("a", "sleep").await;
    let late = rig.exec(&id, "sleep", 20).await;
    assert!(matches!(late, Err(PodError::Deadline(_))));
    assert_eq!(rig.signals(), [(9, true)]);

    let gone = CancellationToken::new();
    gone.cancel();
    let request = ExecSyncRequest {
        container_id: id.clone(),
        args: vec!["sleep".to_owned()],
        ..ExecSyncRequest::default()
    };
    let result = rig.pod.exec_sync(request, gone).await;
    assert!(matches!(result, Err(PodError::Cancelled)));
    assert_eq!(rig.signals().len(), 2);
    assert_eq!(rig.container(&id).state(), ContainerState::Running);

    rig.pod.stop(&id, 9, Duration::ZERO).await.expect("stopped");
    let stopped = rig.exec(&id, "true", 0).await;
    assert!(matches!(stopped, Err(PodError::State(_))));
}

#[tokio::test]
async fn the_agent_may_dial_again() {
    let rig = Rig::booting();
    let cut = rig.connect_agent().await;
    rig.pod
        .configure(ConfigureRequest::default())
        .await
        .expect("configured");
    let id = rig.run("a", "sleep").await;
    // A process in the guest that dials, too, changes nothing.
    let _stranger = rig.connect_agent().await;
    assert_eq!(rig.exec(&id, "true", 0).await.expect("done"), "out\nerr\n0");

    cut.cancel();
    rig.guest().agent_gone().await;
    rig.guest.exit(&id, "", 7);
    rig.connect_agent().await;
    assert_eq!(rig.exited(&id).await.exit_code, 7);
}

#[tokio::test]
async fn an_agent_that_talks_nonsense_is_left() {
    let rig = Rig::booting();
    // HTTP/2: frames of 16 MiB, a stream that nobody opened, a length without end.
    let nonsense: [&[u8]; 4] = [
        b"HTTP/1.1 200 OK\r\n\r\n",
        &[0xff; 9],
        &[0, 0, 4, 0, 0, 0, 0, 0, 9, 1, 2, 3, 4],
        &[0; 10_000],
    ];
    for words in nonsense {
        let (ours, mut guests) = UnixStream::pair().expect("socketpair");
        rig.dial_host.send(ours).await.expect("the link listens");
        // It may be cut off before it has said all.
        let _ = guests.write_all(words).await;
        let mut answer = Vec::new();
        let read = timeout(Duration::from_secs(20), guests.read_to_end(&mut answer)).await;
        let _ = read.expect("the link ends");
    }
    rig.connect_agent().await;
    rig.pod
        .configure(ConfigureRequest::default())
        .await
        .expect("configured");
    let id = rig.run("a", "true").await;
    assert_eq!(rig.exited(&id).await.exit_code, 0);
}

#[tokio::test]
async fn answers_that_are_too_large_fail_their_call_alone() {
    let rig = Rig::ready().await;
    let huge = rig.pod.create(rig.request("a", "huge")).await;
    assert!(huge.is_err());
    let chatty = rig.pod.create(rig.request("b", "chatty")).await;
    let words = chatty.expect_err("an error").to_string();
    assert!(words.len() < 4096 && !words.contains('\x1b'), "{words}");
    let id = rig.run("c", "true").await;
    assert_eq!(rig.exited(&id).await.exit_code, 0);
    assert_eq!(rig.pod.state().snapshot().containers.len(), 1);
}

#[tokio::test]
async fn the_end_of_the_vm_is_the_end_of_its_containers() {
    let rig = Rig::ready().await;
    let running = rig.run("a", "sleep").await;
    let ended = rig.run("b", "true").await;
    rig.exited(&ended).await;
    rig.pod.set_gone("GuestPanic", "so sorry".to_owned()).await;
    let snapshot = rig.pod.state().snapshot();
    assert_eq!(snapshot.state(), SandboxState::Stopped);
    assert_eq!(snapshot.reason, "GuestPanic");
    assert_eq!(rig.container(&running).exit_code, 137);
    assert_eq!(rig.container(&ended).exit_code, 0);
    let refused = rig.pod.create(rig.request("c", "true")).await;
    assert!(matches!(refused, Err(PodError::State(_))));
    rig.pod.remove(&running).await.expect("removed");
    rig.pod.shutdown(Duration::ZERO).await;
}

#[tokio::test]
async fn configure_tells_why_a_vm_did_not_boot() {
    let rig = Rig::booting();
    let waiting = tokio::spawn({
        let pod = Arc::clone(&rig.pod);
        async move { pod.configure(ConfigureRequest::default()).await }
    });
    rig.pod
        .set_gone("BootTimeout", "last words".to_owned())
        .await;
    let error = waiting.await.expect("answered").expect_err("no VM");
    assert!(error.to_string().contains("last words"));
    assert_eq!(Status::from(error).code(), tonic::Code::DeadlineExceeded);
}

#[tokio::test]
async fn shutdown_ends_everything_and_saves_it() {
    let rig = Rig::ready().await;
    let id = rig.run("a", "sleep").await;
    rig.has_a_vm_that_dies();
    let (one, two) = tokio::join!(
        rig.pod.shutdown(Duration::from_millis(10)),
        rig.pod.shutdown(Duration::from_secs(1000)),
    );
    assert_eq!(one, two);
    assert_eq!(one.state(), SandboxState::Stopped);
    assert_eq!(rig.container(&id).exit_code, 137);
    let saved = std::fs::read(rig.dir.path().join("state")).expect("state file");
    let saved = <Snapshot as prost::Message>::decode(saved.as_slice()).expect("a snapshot");
    assert_eq!(saved, one);
}

#[tokio::test]
async fn a_log_is_reopened_while_the_container_runs() {
    let rig = Rig::ready().await;
    let id = rig.run("a", "sleep").await;
    let token = Token::random();
    let new = tempfile::tempfile().expect("temporary file");
    assert!(rig.fds.insert(
        token,
        vec![new.try_clone().expect("second descriptor").into()]
    ));
    rig.pod
        .reopen_log(&id, token.as_bytes())
        .await
        .expect("reopened");
    assert!(rig.pod.reopen_log(&id, token.as_bytes()).await.is_err());
}

#[tokio::test]
async fn memory_is_given_to_a_vm_that_runs() {
    let rig = Rig::ready().await;
    // It has as much.
    rig.pod.grow(512 << 20).await.expect("nothing to do");
    // There is no VM behind this guest.
    let error = rig.pod.grow((512 << 20) + 1).await.expect_err("no VM");
    assert!(matches!(error, PodError::State(_)), "{error}");
    assert_eq!(rig.pod.state().snapshot().memory_bytes, 512 << 20);
}
