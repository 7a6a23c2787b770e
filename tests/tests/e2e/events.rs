//! GetContainerEvents, which kubelets follow instead of listing, and the lists that are streamed.

use std::net::TcpStream;

use nix::sys::signal::{Signal, kill};
use podvisor_proto::cri::{
    self, ContainerEventResponse, ContainerEventType as Kind, ContainerState, PodSandboxState,
};
use podvisor_tests::cri::Cri;
use podvisor_tests::crictl::{container, shell, with_pod};
use podvisor_tests::daemon::Daemon;
use podvisor_tests::machine::Backend;
use podvisor_tests::registry::busybox;
use podvisor_tests::{eventually, logs};
use tonic::{Code, Status, Streaming};

use crate::restart::process_of;

/// A subscriber.
struct Events<'a> {
    cri: &'a Cri,
    stream: Streaming<ContainerEventResponse>,
}

impl<'a> Events<'a> {
    fn of(cri: &'a Cri) -> Self {
        let request = cri::GetEventsRequest {};
        let stream = cri.call(async |mut c| c.get_container_events(request).await);
        let stream = stream.expect("GetContainerEvents");
        Self { cri, stream }
    }

    fn next(&mut self) -> ContainerEventResponse {
        let next = self.cri.next(&mut self.stream).expect("no error");
        let event = next.expect("no end");
        let pod = event.pod_sandbox_status.as_ref().expect("a pod's status");
        assert!(event.created_at >= pod.created_at, "{event:?}");
        let metadata = pod.metadata.as_ref().expect("metadata");
        assert!(metadata.uid.starts_with("uid-"), "{event:?}");
        event
    }

    /// The next event: what happened to `id`, and the states of the pod and of its containers with it.
    fn expect(&mut self, id: &str, kind: Kind, pod: PodSandboxState, containers: &[State]) {
        let event = self.next();
        let states: Vec<State> = event.containers_statuses.iter().map(state).collect();
        let status = event.pod_sandbox_status.as_ref().expect("checked");
        assert_eq!(
            (event.container_id.as_str(), event.container_event_type()),
            (id, kind)
        );
        assert_eq!((status.state(), states.as_slice()), (pod, containers));
    }

    fn error(mut self) -> Status {
        loop {
            match self.cri.next(&mut self.stream) {
                Ok(Some(_)) => {}
                Ok(None) => panic!("the stream ended without an error"),
                Err(status) => return status,
            }
        }
    }
}

/// State and exit code.
type State = (ContainerState, i32);

fn state(status: &cri::ContainerStatus) -> State {
    (status.state(), status.exit_code)
}

const CREATED: State = (ContainerState::ContainerCreated, 0);
const RUNNING: State = (ContainerState::ContainerRunning, 0);

#[test]
fn the_life_of_a_pod_in_a_vm() {
    life("podvisor");
}

#[test]
fn the_life_of_a_pod_on_the_host() {
    life("runc");
}

fn life(handler: &'static str) {
    use PodSandboxState::{SandboxNotready as NotReady, SandboxReady as Ready};
    let daemon = Daemon::start();
    daemon.pull(&busybox());
    let cri = daemon.cri();
    let (mut events, mut other) = (Events::of(&cri), Events::of(&cri));
    let pod = daemon.pod("life").by_handler(handler);
    let id = daemon.run_pod(&pod);
    events.expect(&id, Kind::ContainerCreatedEvent, Ready, &[]);
    events.expect(&id, Kind::ContainerStartedEvent, Ready, &[]);

    let waits = daemon.create(&id, &pod, &shell("waits", &busybox(), "sleep 1000"));
    events.expect(&waits, Kind::ContainerCreatedEvent, Ready, &[CREATED]);
    daemon
        .cri()
        .start_container(&waits)
        .expect("StartContainer");
    events.expect(&waits, Kind::ContainerStartedEvent, Ready, &[RUNNING]);
    let script = "while [ ! -e /go ]; do sleep 0.05; done; exit 3";
    let ends = daemon.create(&id, &pod, &shell("ends", &busybox(), script));
    let both = [RUNNING, CREATED];
    events.expect(&ends, Kind::ContainerCreatedEvent, Ready, &both);
    daemon.cri().start_container(&ends).expect("StartContainer");
    let both = [RUNNING, RUNNING];
    events.expect(&ends, Kind::ContainerStartedEvent, Ready, &both);
    // Not by any call.
    let _ = daemon.crictl(&["exec", "-s", &ends, "touch", "/go"]);
    let ended = (ContainerState::ContainerExited, 3);
    let both = [RUNNING, ended];
    events.expect(&ends, Kind::ContainerStoppedEvent, Ready, &both);
    daemon.cri().remove_container(&ends);
    events.expect(&ends, Kind::ContainerDeletedEvent, Ready, &[RUNNING]);

    // One that cannot be executed has never been started; one that is removed before has never ended.
    let fails = container("fails", &busybox(), &["/no/such/program"]);
    let fails = daemon.create(&id, &pod, &fails);
    let both = [RUNNING, CREATED];
    events.expect(&fails, Kind::ContainerCreatedEvent, Ready, &both);
    daemon
        .crictl(&["start", &fails])
        .failed("FailedPrecondition");
    let both = [RUNNING, (ContainerState::ContainerExited, 128)];
    events.expect(&fails, Kind::ContainerStoppedEvent, Ready, &both);
    daemon.cri().remove_container(&fails);
    events.expect(&fails, Kind::ContainerDeletedEvent, Ready, &[RUNNING]);
    let early = daemon.create(&id, &pod, &shell("early", &busybox(), "true"));
    let both = [RUNNING, CREATED];
    events.expect(&early, Kind::ContainerCreatedEvent, Ready, &both);
    daemon.cri().remove_container(&early);
    events.expect(&early, Kind::ContainerDeletedEvent, Ready, &[RUNNING]);

    // The sandbox is not ready from the beginning of its stop; which of the two is told first is no matter.
    daemon.cri().stop_pod(&id).expect("StopPodSandbox");
    let mut stopped = [events.next(), events.next()].map(|event| {
        assert_eq!(event.container_event_type(), Kind::ContainerStoppedEvent);
        let status = event.pod_sandbox_status.as_ref().expect("checked");
        assert_eq!(status.state(), NotReady);
        event.container_id
    });
    stopped.sort();
    let mut both = [id.clone(), waits.clone()];
    both.sort();
    assert_eq!(stopped, both);
    daemon.cri().remove_pod(&id);
    events.expect(&waits, Kind::ContainerDeletedEvent, NotReady, &[]);
    events.expect(&id, Kind::ContainerDeletedEvent, NotReady, &[]);

    // Whoever reads later is told the same, and what was true then.
    other.expect(&id, Kind::ContainerCreatedEvent, Ready, &[]);
    other.expect(&id, Kind::ContainerStartedEvent, Ready, &[]);
    other.expect(&waits, Kind::ContainerCreatedEvent, Ready, &[CREATED]);
    let event = other.next();
    let status = event.pod_sandbox_status.expect("checked");
    assert_eq!(status.metadata.expect("metadata").uid, "uid-life");
    assert_eq!(status.runtime_handler, handler);
    assert!(!status.network.expect("a network").ip.is_empty());
    let status = &event.containers_statuses[0];
    assert!(status.started_at > 0 && !status.image_id.is_empty());
    assert!(!status.log_path.is_empty());
}

#[test]
fn a_monitor_that_dies_is_told_at_once() {
    let (daemon, pod, id) = with_pod("dies");
    let cri = daemon.cri();
    let c = daemon.create_started(&id, &pod, &shell("c", &busybox(), "sleep 1000"));
    let mut events = Events::of(&cri);
    kill(
        process_of(&daemon, "podvisor-monitor", &id),
        Signal::SIGKILL,
    )
    .expect("it runs");
    let killed = [(ContainerState::ContainerExited, 137)];
    let gone = PodSandboxState::SandboxNotready;
    events.expect(&c, Kind::ContainerStoppedEvent, gone, &killed);
    events.expect(&id, Kind::ContainerStoppedEvent, gone, &killed);
}

#[test]
fn a_daemon_that_ends_ends_its_streams() {
    let mut daemon = Daemon::start();
    let cri = daemon.cri();
    let events = Events::of(&cri);
    daemon.stop();
    assert_eq!(events.error().code(), Code::Unavailable);
    assert!(!daemon.log().contains("did not end in time"), "it waited");
    daemon.restart();
}

/// A kubelet lists when its stream breaks; what a daemon that comes back learns only after that list, it tells.
#[test]
fn an_exit_that_a_new_daemon_hears_of_late_is_told() {
    if Backend::here() == Backend::Kvm {
        eprintln!("skipped: a monitor that is stopped has a VM that is stopped");
        return;
    }
    let (mut daemon, pod, id) = with_pod("late");
    let script = "echo listens; nc -l -p 99; exit 17";
    let c = daemon.create_started(&id, &pod, &shell("c", &busybox(), script));
    logs::wait_for(&pod.log("c"), "listens");
    let ip = daemon.cri().pod_status(&id).network.expect("a network").ip;
    let monitor = process_of(&daemon, "podvisor-monitor", &id);
    daemon.kill();
    eventually("the container listens", || {
        kill(monitor, Signal::SIGSTOP).expect("it runs");
        let connected = TcpStream::connect((ip.as_str(), 99)).ok();
        if connected.is_none() {
            kill(monitor, Signal::SIGCONT).expect("it runs");
        }
        connected
    });
    daemon.restart();
    let cri = daemon.cri();
    let mut events = Events::of(&cri);
    // The monitor does not answer: what it has written down by then is what is known.
    let known = state(&cri.status(&c));
    assert_ne!(known.0, ContainerState::ContainerExited);
    kill(monitor, Signal::SIGCONT).expect("it runs");
    if known == CREATED {
        let event = events.next();
        assert_eq!(event.container_event_type(), Kind::ContainerStartedEvent);
    }
    let ready = PodSandboxState::SandboxReady;
    let ended = [(ContainerState::ContainerExited, 17)];
    events.expect(&c, Kind::ContainerStoppedEvent, ready, &ended);
}

#[test]
fn streamed_lists_are_the_lists() {
    let (daemon, pod, id) = with_pod("streamed");
    let other = daemon.pod("other").by_handler("runc");
    let other_id = daemon.run_pod(&other);
    for name in ["a", "b", "c"] {
        daemon.create(&id, &pod, &shell(name, &busybox(), "true"));
    }
    let on_host = daemon.create(&other_id, &other, &shell("d", &busybox(), "true"));
    let cri = daemon.cri();

    let request = cri::StreamPodSandboxesRequest::default();
    let stream = cri.call(async |mut c| c.stream_pod_sandboxes(request).await);
    assert_eq!(all(&cri, stream, |m| m.pod_sandboxes), cri.pods());
    let request = cri::StreamContainersRequest::default();
    let stream = cri.call(async |mut c| c.stream_containers(request).await);
    assert_eq!(all(&cri, stream, |m| m.containers), cri.containers());
    let request = cri::StreamImagesRequest::default();
    let stream = cri.call_image(async |mut c| c.stream_images(request).await);
    let list = cri::ListImagesRequest::default();
    let list = cri.call_image(async |mut c| c.list_images(list).await);
    let list = list.expect("ListImages").images;
    assert_eq!(list.len(), 1);
    assert_eq!(all(&cri, stream, |m| m.images), list);

    // Filters count; nothing that fits is an empty stream, no error.
    let of = |pod_sandbox_id: &str| cri::StreamContainersRequest {
        filter: Some(cri::ContainerFilter {
            pod_sandbox_id: pod_sandbox_id.into(),
            ..Default::default()
        }),
    };
    let stream = cri.call(async |mut c| c.stream_containers(of(&other_id)).await);
    let found = all(&cri, stream, |m| m.containers);
    assert_eq!(found.len(), 1);
    assert_eq!(found[0].id, on_host);
    let stream = cri.call(async |mut c| c.stream_containers(of("no such pod")).await);
    assert!(all(&cri, stream, |m| m.containers).is_empty());
}

/// All items of a streamed list, none of whose messages is empty.
fn all<M, T>(
    cri: &Cri,
    stream: Result<Streaming<M>, Status>,
    items: impl Fn(M) -> Vec<T>,
) -> Vec<T> {
    let mut stream = stream.expect("a stream");
    let mut all = Vec::new();
    while let Some(message) = cri.next(&mut stream).expect("no error") {
        let items = items(message);
        assert!(!items.is_empty(), "an empty message");
        all.extend(items);
    }
    all
}
