//! The pod network: real CNI plugins, a real bridge, both address families.

use std::net::TcpListener;

use podvisor_tests::crictl::{Pod, shell};
use podvisor_tests::daemon::{Daemon, Network, Options};
use podvisor_tests::registry::busybox;
use podvisor_tests::{eventually, http};
use serde_json::{Value, json};

/// A web server that answers every GET of /index.html with one word.
fn server(word: &str) -> Value {
    let script = format!("mkdir /www; echo {word} > /www/index.html; exec httpd -f -p 80 -h /www");
    shell("server", &busybox(), &script)
}

/// A pod that runs a web server. Its id and container.
fn serving(daemon: &Daemon, pod: &Pod, word: &str) -> (String, String) {
    let id = daemon.run_pod(pod);
    let container = daemon.create_started(&id, pod, &server(word));
    (id, container)
}

/// Asks a web server until it answers.
fn get(host: &str) -> String {
    let body = eventually(&format!("{host} answers"), || {
        let answer = http::request(host, "GET", "/index.html", &[], &[]).ok()?;
        (answer.status == 200).then_some(answer.body)
    });
    String::from_utf8(body).expect("text").trim().to_owned()
}

/// The pod's IPv4 and IPv6 addresses.
fn addresses(daemon: &Daemon, id: &str) -> (String, String) {
    let network = daemon.inspect_pod(id)["network"].take();
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    (
        text(&network["ip"]),
        text(&network["additionalIps"][0]["ip"]),
    )
}

#[test]
fn a_pod_has_addresses_that_the_host_reaches() {
    let daemon = Daemon::start();
    daemon.pull(&busybox());
    let pod = daemon.pod("addresses");
    let (id, container) = serving(&daemon, &pod, "hello");
    let (ip, ip6) = addresses(&daemon, &id);
    let number = daemon.instance.number();
    assert!(ip.starts_with(&format!("10.{number}.0.")), "{ip}");
    assert!(ip6.starts_with(&format!("fd00:{number}::")), "{ip6}");
    assert_eq!(get(&format!("{ip}:80")), "hello");
    assert_eq!(get(&format!("[{ip6}]:80")), "hello");

    // The guest sees what the CNI result says.
    let shown = daemon.exec(
        &container,
        &[
            "sh",
            "-c",
            "ip -o addr show eth0; ip route; ip -6 route; ip -o link show lo",
        ],
    );
    for wanted in [
        format!("inet {ip}/24"),
        format!("inet6 {ip6}/64"),
        format!("default via 10.{number}.0.1"),
        format!("default via fd00:{number}::1"),
        "LOOPBACK,UP".into(),
    ] {
        assert!(shown.contains(&wanted), "no {wanted}: {shown}");
    }

    // A stopped pod gives its addresses back.
    daemon.cri().stop_pod(&id).expect("StopPodSandbox");
    daemon.assert_nothing_left_but(&["sandbox"]);
}

#[test]
fn pods_reach_each_other() {
    let daemon = Daemon::start();
    daemon.pull(&busybox());
    let (first, _) = serving(&daemon, &daemon.pod("first"), "first");
    let (second, client) = serving(&daemon, &daemon.pod("second"), "second");
    let (ip, ip6) = addresses(&daemon, &first);
    assert_ne!(addresses(&daemon, &second).0, ip);
    get(&format!("{ip}:80"));
    let wget = |url: String| daemon.exec(&client, &["wget", "-q", "-O", "-", &url]);
    assert_eq!(wget(format!("http://{ip}/index.html")), "first");
    assert_eq!(wget(format!("http://[{ip6}]/index.html")), "first");
}

#[test]
fn much_data_arrives_whole() {
    let daemon = Daemon::start();
    daemon.pull(&busybox());
    let pod = daemon.pod("bulk");
    let id = daemon.run_pod(&pod);
    // More than all buffers on the way.
    let script = "mkdir /www; seq 1 500000 > /www/all; mv /www/all /www/index.html; exec httpd -f -p 80 -h /www";
    daemon.create_started(&id, &pod, &shell("server", &busybox(), script));
    let (ip, _) = addresses(&daemon, &id);
    let wanted = podvisor_tests::logs::seq(500_000).join("\n");
    let answer = eventually("the server serves", || {
        http::request(&format!("{ip}:80"), "GET", "/index.html", &[], &[]).ok()
    });
    let text = String::from_utf8(answer.body).expect("digits");
    assert!(text.trim_end() == wanted, "changed on the way");
}

#[test]
fn host_ports() {
    let daemon = Daemon::start_with(&Options {
        network: Some(Network::Node),
        ..Options::default()
    });
    daemon.pull(&busybox());
    let free = TcpListener::bind("127.0.0.1:0").expect("loopback has free ports");
    let port = free.local_addr().expect("it is bound").port();
    drop(free);
    let pod = daemon.pod("ports").with(
        "port_mappings",
        json!([
            {"protocol": 0, "container_port": 80, "host_port": port},
            // No host port: nothing to map.
            {"protocol": 0, "container_port": 81},
        ]),
    );
    let (id, _) = serving(&daemon, &pod, "mapped");
    assert_eq!(get(&format!("127.0.0.1:{port}")), "mapped");
    daemon.cri().stop_pod(&id).expect("StopPodSandbox");
    assert!(
        http::request(&format!("127.0.0.1:{port}"), "GET", "/", &[], &[]).is_err(),
        "still mapped"
    );
}

#[test]
fn without_settings_a_pod_has_the_hosts_dns() {
    let daemon = Daemon::start();
    daemon.pull(&busybox());
    let pod = daemon.pod("default-name");
    let id = daemon.run_pod(&pod);
    let container = daemon.create_started(&id, &pod, &shell("c", &busybox(), "sleep 1000"));
    let hosts = std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
    let servers = |text: &str| -> Vec<String> {
        let lines = text.lines().filter(|line| line.starts_with("nameserver"));
        lines.map(ToOwned::to_owned).collect()
    };
    let guests = daemon.exec(&container, &["cat", "/etc/resolv.conf"]);
    assert_eq!(servers(&guests), servers(&hosts));
    assert_eq!(daemon.exec(&container, &["hostname"]), id[..12]);
}
