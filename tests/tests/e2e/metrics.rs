//! What podvisord counts, as Prometheus reads it.

use std::net::TcpListener;

use podvisor_tests::crictl::container;
use podvisor_tests::daemon::{Daemon, Options};
use podvisor_tests::http;
use podvisor_tests::registry::busybox;
use serde_json::json;

/// The value of the sample that begins with `name`.
fn sample(text: &str, name: &str) -> Option<f64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    line.trim().parse().ok()
}

#[test]
fn what_happened_is_counted() {
    let free = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = free.local_addr().expect("it is bound").to_string();
    drop(free);
    let daemon = Daemon::start_with(&Options {
        config: vec![("metrics", format!("address = \"{address}\""))],
        ..Options::default()
    });
    let scrape = || {
        let answer = http::request(&address, "GET", "/metrics", &[], &[]).expect("it is served");
        assert_eq!(answer.status, 200);
        let kind = answer.header("content-type").unwrap_or_default();
        assert!(kind.starts_with("application/openmetrics-text"), "{kind}");
        String::from_utf8(answer.body).expect("text")
    };
    let empty = scrape();
    assert!(empty.ends_with("# EOF\n"), "{empty}");
    assert_eq!(sample(&empty, "podvisor_pods{"), None, "{empty}");

    daemon.pull(&busybox());
    let context = json!({"security_context": {"namespace_options": {"network": 2}}});
    let routed = daemon
        .pod("routed")
        .by_handler("")
        .with("linux", context.clone());
    daemon.run_pod(&routed);
    daemon
        .try_run_pod(&daemon.pod("refused").with("linux", context))
        .failed("FailedPrecondition");
    let pod = daemon.pod("vm");
    let id = daemon.run_pod(&pod);
    daemon.create_started(&id, &pod, &container("c", &busybox(), &["sleep", "1000"]));

    let text = scrape();
    for (name, value) in [
        ("podvisor_pods_routed_total{reason=\"host-network\"}", 1.0),
        ("podvisor_pods{handler=\"runc\",state=\"ready\"}", 1.0),
        ("podvisor_pods{handler=\"podvisor\",state=\"ready\"}", 1.0),
        ("podvisor_containers{state=\"running\"}", 1.0),
        (
            "podvisor_rpc_duration_seconds_count{method=\"RunPodSandbox\",code=\"OK\"}",
            2.0,
        ),
        (
            "podvisor_rpc_duration_seconds_count{method=\"RunPodSandbox\",code=\"FAILED_PRECONDITION\"}",
            1.0,
        ),
        (
            "podvisor_pod_start_phase_duration_seconds_count{phase=\"guest kernel\"}",
            1.0,
        ),
    ] {
        assert_eq!(sample(&text, name), Some(value), "{name}\n{text}");
    }

    daemon.cri().remove_pod(&id);
    assert_eq!(sample(&scrape(), "podvisor_containers{"), None);
    let elsewhere = http::request(&address, "GET", "/", &[], &[]).expect("it is served");
    assert_eq!(elsewhere.status, 404);
}
