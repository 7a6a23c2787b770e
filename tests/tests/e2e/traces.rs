//! Where the time of an RPC goes, as an OpenTelemetry collector gets it.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};

use opentelemetry_proto::tonic::trace::v1::Span;
use opentelemetry_proto::tonic::trace::v1::span::SpanKind;
use podvisor_proto::cri;
use podvisor_tests::collector::{Collector, attribute, hex};
use podvisor_tests::cri::{image_spec, sandbox_config};
use podvisor_tests::crictl::shell;
use podvisor_tests::daemon::{Daemon, Options};
use podvisor_tests::eventually;
use podvisor_tests::http;
use podvisor_tests::machine::patience;
use podvisor_tests::registry::busybox;
use tonic::{Code, Request};

const CALLER: &str = "00f067aa0ba902b7";

/// A request with a trace context, as a kubelet whose tracing is on sends it.
fn traced<T>(message: T, trace: &str, sampled: bool) -> Request<T> {
    let mut request = Request::new(message);
    let parent = format!("00-{trace}-{CALLER}-{:02x}", u8::from(sampled));
    let parent = parent.parse().expect("ASCII");
    request.metadata_mut().insert("traceparent", parent);
    request
}

fn pod(name: &str) -> cri::RunPodSandboxRequest {
    cri::RunPodSandboxRequest {
        config: Some(sandbox_config(name)),
        ..Default::default()
    }
}

fn named<'a>(spans: &'a [Span], name: &str) -> &'a Span {
    let found: Vec<_> = spans.iter().filter(|span| span.name == name).collect();
    assert_eq!(found.len(), 1, "{name}: {spans:#?}");
    found[0]
}

fn with_collector(endpoint: &str) -> Options {
    Options {
        config: vec![
            ("tracing", format!("otlp_endpoint = {endpoint:?}")),
            // Only what a caller wants to be traced.
            ("tracing", "sampling_ratio = 0.0".to_owned()),
        ],
        ..Options::default()
    }
}

#[test]
fn spans_of_a_pod_reach_the_collector() {
    const PULL: &str = "4bf92f3577b34da6a3ce929d0e0e4731";
    const RUN: &str = "4bf92f3577b34da6a3ce929d0e0e4732";
    const FAIL: &str = "4bf92f3577b34da6a3ce929d0e0e4733";
    const QUIET: &str = "4bf92f3577b34da6a3ce929d0e0e4734";
    let collector = Collector::start();
    let mut daemon = Daemon::start_with(&with_collector(&collector.endpoint));
    let cri = daemon.cri();
    let pull = cri::PullImageRequest {
        image: Some(image_spec(&busybox())),
        ..Default::default()
    };
    cri.call_image(async |mut c| c.pull_image(traced(pull, PULL, true)).await)
        .expect("PullImage");
    let run = traced(pod("traced"), RUN, true);
    let sandbox = cri.call(async |mut c| c.run_pod_sandbox(run).await);
    let sandbox = sandbox.expect("RunPodSandbox").pod_sandbox_id;
    let quiet = traced(pod("quiet"), QUIET, false);
    cri.call(async |mut c| c.run_pod_sandbox(quiet).await)
        .expect("RunPodSandbox");
    let nobody = cri::ContainerStatusRequest {
        container_id: "nobody".into(),
        verbose: false,
    };
    let error = cri.call(async |mut c| c.container_status(traced(nobody, FAIL, true)).await);
    assert_eq!(error.expect_err("nobody").code(), Code::NotFound);
    daemon.remove_pods();
    // The last of them are sent at the end.
    daemon.stop();

    let spans = collector.trace(RUN);
    let rpc = named(&spans, "runtime.v1.RuntimeService/RunPodSandbox");
    assert_eq!(hex(&rpc.parent_span_id), CALLER);
    assert_eq!(rpc.kind(), SpanKind::Server);
    for (key, value) in [
        ("rpc.system", "grpc"),
        ("rpc.service", "runtime.v1.RuntimeService"),
        ("rpc.method", "RunPodSandbox"),
        ("rpc.grpc.status_code", "0"),
        ("k8s.namespace.name", "default"),
        ("k8s.pod.name", "traced"),
        ("podvisor.sandbox.id", &sandbox),
    ] {
        assert_eq!(attribute(rpc, key).as_deref(), Some(value), "{key}");
    }
    let waits = "wait for the guest";
    for (child, parent) in [
        ("host resources", rpc),
        ("monitor spawn", rpc),
        ("CNI", rpc),
        (waits, rpc),
        (
            "podvisor.monitor.v1.Monitor/Configure",
            named(&spans, waits),
        ),
        ("boot", rpc),
        ("vm start", named(&spans, "boot")),
        ("guest kernel", named(&spans, "boot")),
        ("agent", named(&spans, "boot")),
    ] {
        let span = named(&spans, child);
        assert_eq!(span.parent_span_id, parent.span_id, "{child}");
        assert!(
            span.start_time_unix_nano >= parent.start_time_unix_nano,
            "{child}"
        );
        assert!(
            span.end_time_unix_nano >= span.start_time_unix_nano,
            "{child}"
        );
    }

    let spans = collector.trace(PULL);
    let rpc = named(&spans, "runtime.v1.ImageService/PullImage");
    assert_eq!(attribute(rpc, "container.image.name"), Some(busybox()));
    let layer = named(&spans, "layer");
    assert_eq!(layer.parent_span_id, rpc.span_id);
    let digest = attribute(layer, "podvisor.layer.digest").expect("which");
    assert!(digest.starts_with("sha256:"), "{digest}");

    let spans = collector.trace(FAIL);
    let rpc = named(&spans, "runtime.v1.RuntimeService/ContainerStatus");
    assert_eq!(attribute(rpc, "rpc.grpc.status_code").as_deref(), Some("5"));
    assert_eq!(collector.trace(QUIET), vec![], "its caller wants none");
    daemon.restart();
}

/// A WebSocket client of a session, which waits for its end.
fn session(url: &str) {
    let at = url.strip_prefix("http://").expect("no TLS");
    let (host, path) = at.split_once('/').expect("a path");
    let mut stream = TcpStream::connect(host).expect("it is served");
    let request = format!(
        "GET /{path} HTTP/1.1\r\nHost: {host}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\
         Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Protocol: v5.channel.k8s.io\r\n\r\n"
    );
    stream.write_all(request.as_bytes()).expect("it is read");
    stream.set_read_timeout(Some(patience())).expect("not zero");
    let mut said = Vec::new();
    stream.read_to_end(&mut said).expect("an end");
    assert!(said.starts_with(b"HTTP/1.1 101"), "{said:?}");
    let said = String::from_utf8_lossy(&said);
    assert!(said.contains("in the session"), "{said}");
}

#[test]
fn calls_of_the_agent_and_sessions_are_in_the_trace() {
    const CREATE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
    const START: &str = "4bf92f3577b34da6a3ce929d0e0e4737";
    const EXEC: &str = "4bf92f3577b34da6a3ce929d0e0e4738";
    let collector = Collector::start();
    let mut daemon = Daemon::start_with(&with_collector(&collector.endpoint));
    daemon.pull(&busybox());
    let pod = daemon.pod("traced");
    let id = daemon.run_pod(&pod);
    let cri = daemon.cri();
    let create = pod.create_request(&id, &shell("c", &busybox(), "sleep 1000"));
    let created = cri.call(async |mut c| c.create_container(traced(create, CREATE, true)).await);
    let container_id = created.expect("CreateContainer").container_id;
    let start = cri::StartContainerRequest {
        container_id: container_id.clone(),
    };
    cri.call(async |mut c| c.start_container(traced(start, START, true)).await)
        .expect("StartContainer");
    let exec = cri::ExecRequest {
        container_id: container_id.clone(),
        cmd: ["echo", "in the session"].map(str::to_owned).into(),
        stdout: true,
        ..Default::default()
    };
    let exec = cri.call(async |mut c| c.exec(traced(exec, EXEC, true)).await);
    session(&exec.expect("Exec").url);
    daemon.remove_pods();
    daemon.stop();

    for (trace, rpc) in [
        (CREATE, "CreateContainer"),
        (START, "StartContainer"),
        (EXEC, "Exec"),
    ] {
        let spans = collector.trace(trace);
        let outer = named(&spans, &format!("runtime.v1.RuntimeService/{rpc}"));
        let monitor = named(&spans, &format!("podvisor.monitor.v1.Monitor/{rpc}"));
        let agent = named(&spans, &format!("podvisor.agent.v1.Agent/{rpc}"));
        assert_eq!(agent.parent_span_id, monitor.span_id, "{rpc}");
        assert_eq!(attribute(agent, "rpc.method").as_deref(), Some(rpc));
        let within = monitor.start_time_unix_nano..=monitor.end_time_unix_nano;
        for time in [agent.start_time_unix_nano, agent.end_time_unix_nano] {
            assert!(within.contains(&time), "{rpc}: {agent:?} {monitor:?}");
        }
        if rpc != "Exec" {
            continue;
        }
        // The call has ended with the URL; what its client then does is in its trace.
        assert!(outer.end_time_unix_nano < monitor.start_time_unix_nano);
        let session = named(&spans, "session");
        for span in [monitor, session] {
            assert_eq!(span.parent_span_id, outer.span_id, "{}", span.name);
        }
        assert!(session.end_time_unix_nano >= monitor.end_time_unix_nano);
    }
    daemon.restart();
}

#[test]
fn a_collector_that_is_away_is_no_matter() {
    let free = || {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        listener.local_addr().expect("it is bound").to_string()
    };
    let (metrics, nowhere) = (free(), format!("http://{}", free()));
    let mut options = with_collector(&nowhere);
    options
        .config
        .push(("metrics", format!("address = {metrics:?}")));
    let mut daemon = Daemon::start_with(&options);
    let cri = daemon.cri();
    let dropped = || {
        let answer = http::request(&metrics, "GET", "/metrics", &[], &[]).expect("it is served");
        let text = String::from_utf8(answer.body).expect("text");
        let sample = "podvisor_spans_dropped_total ";
        let value = text.lines().find_map(|line| line.strip_prefix(sample));
        value
            .and_then(|value| value.parse::<u64>().ok())
            .expect("a number")
    };
    assert_eq!(dropped(), 0);
    let trace = "4bf92f3577b34da6a3ce929d0e0e4735";
    let run = traced(pod("alone"), trace, true);
    cri.call(async |mut c| c.run_pod_sandbox(run).await)
        .expect("RunPodSandbox");
    let first = eventually("spans are given up", || Some(dropped()).filter(|n| *n > 0));
    let status = traced(cri::StatusRequest::default(), trace, true);
    cri.call(async |mut c| c.status(status).await)
        .expect("Status");
    eventually("and more", || (dropped() > first).then_some(()));
    daemon.remove_pods();
    daemon.stop();
    let log = daemon.log();
    let warnings = log.matches("the collector takes no spans").count();
    assert_eq!(warnings, 1, "{log}");
    daemon.restart();
}
