//! Attachments by the real plugins, as root on hosts made for each test.

mod common;

use std::collections::HashSet;
use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::time::Duration;

use common::{Host, on_a_host, sh, sh_in};
use podvisor_network::{
    Bandwidth, Cidr, CniError, PodNetwork, PortMapping, Protocol, Route, netns,
};
use serde_json::json;

/// Listens in the pod's namespace; the accepted connection answers with one byte.
async fn serve(netns: &Path, port: u16) {
    let listener = netns::enter(netns, move || TcpListener::bind(("::", port)).unwrap()).await;
    let listener = listener.unwrap();
    std::thread::spawn(move || {
        for connection in listener.incoming() {
            let _ = connection.unwrap().write_all(b"!");
        }
    });
}

fn reaches(address: impl Into<SocketAddr>) -> bool {
    let timeout = Duration::from_secs(10);
    TcpStream::connect_timeout(&address.into(), timeout).is_ok_and(|mut stream| {
        stream.set_read_timeout(Some(timeout)).unwrap();
        stream.read_exact(&mut [0]).is_ok()
    })
}

fn shown_addresses(network: &PodNetwork) -> Vec<String> {
    network
        .interface
        .addresses
        .iter()
        .map(Cidr::to_string)
        .collect()
}

fn shown_ips(network: &PodNetwork) -> Vec<String> {
    network.ips.iter().map(ToString::to_string).collect()
}

fn shown_routes(network: &PodNetwork) -> Vec<String> {
    let show = |route: &Route| match route.gateway {
        Some(gateway) => format!("{} via {gateway}", route.destination),
        None => route.destination.to_string(),
    };
    network.routes.iter().map(show).collect()
}

/// A whole life with all the plugins that take something from the pod.
async fn whole_life(host: Host, version: &str) {
    host.write_network(
        version,
        &[
            json!({"type": "portmap", "capabilities": {"portMappings": true}}),
            json!({"type": "bandwidth", "capabilities": {"bandwidth": true}}),
            json!({"type": "tuning"}),
        ],
    );
    let cni = host.cni();
    assert_eq!(cni.status().await.unwrap().name, "pods");
    let mut pod = host.pod("a1").await;
    let port = |protocol, container_port, host_port| PortMapping {
        protocol,
        container_port,
        host_port,
        host_ip: None,
    };
    pod.port_mappings = vec![port(Protocol::Tcp, 80, 8080), port(Protocol::Tcp, 81, 0)];
    pod.bandwidth = Some(Bandwidth {
        ingress_rate: 800_000_000,
        ingress_burst: 800_000_000,
        egress_rate: 0,
        egress_burst: 0,
    });

    let network = cni.add(&pod).await.unwrap();
    assert_eq!(network.network, "pods");
    assert_eq!(network.interface.mtu, 1400);
    let shown = sh_in(&pod.netns, "ip -o link show eth0").await;
    assert!(shown.contains(&network.interface.mac), "{shown}");
    assert_eq!(shown_addresses(&network), ["10.77.0.2/24"]);
    assert_eq!(shown_ips(&network), ["10.77.0.2"]);
    assert_eq!(shown_routes(&network), ["0.0.0.0/0 via 10.77.0.1"]);

    serve(&pod.netns, 80).await;
    assert!(reaches((network.ips[0], 80)), "address");
    let gateway = network.routes[0].gateway;
    assert!(reaches((gateway.unwrap(), 8080)), "host port");
    let shaped = sh("tc qdisc show");
    assert!(
        shaped.contains("tbf") && shaped.contains("800Mbit"),
        "{shaped}"
    );

    // No CHECK: portmap's looks for the rules of IPv4 in ip6tables as well (1.1.1).
    assert_eq!(cni.attachments().await.unwrap(), ["a1"]);
    let twice = cni.add(&pod).await.unwrap_err();
    assert!(matches!(twice, CniError::InvalidAttachment(_)), "{twice}");
    assert!(reaches((network.ips[0], 80)), "the second ADD did nothing");

    cni.del("a1").await.unwrap();
    host.assert_detached();
    cni.del("a1").await.unwrap();
    netns::delete(&pod.netns).await.unwrap();
    netns::delete(&pod.netns).await.unwrap();
    assert!(!host.netns("a1").exists());
}

#[test]
fn whole_life_1_0() {
    on_a_host(|host| whole_life(host, "1.0.0"));
}

#[test]
fn whole_life_0_4() {
    on_a_host(|host| whole_life(host, "0.4.0"));
}

#[test]
fn whole_life_0_3() {
    on_a_host(|host| whole_life(host, "0.3.1"));
}

#[test]
fn both_families() {
    on_a_host(|host| async move {
        host.write_list("1.0.0", &[host.bridge(&["10.77.0.0/24", "fd00:77::/64"])]);
        let (cni, pod) = (host.cni(), host.pod("a1").await);
        let network = cni.add(&pod).await.unwrap();
        assert_eq!(shown_addresses(&network), ["10.77.0.2/24", "fd00:77::2/64"]);
        assert_eq!(shown_ips(&network), ["10.77.0.2", "fd00:77::2"]);
        assert_eq!(
            shown_routes(&network),
            ["0.0.0.0/0 via 10.77.0.1", "::/0 via fd00:77::1"]
        );
        serve(&pod.netns, 80).await;
        assert!(reaches((network.ips[0], 80)) && reaches((network.ips[1], 80)));
        cni.check("a1").await.unwrap();
        cni.del("a1").await.unwrap();
        host.assert_detached();
    });
}

#[test]
fn status_says_what_is_missing() {
    on_a_host(|host| async move {
        let cni = host.cni();
        let pod = host.pod("a1").await;
        let error = cni.status().await.unwrap_err();
        assert!(matches!(error, CniError::NoNetwork { .. }), "{error}");
        assert!(matches!(
            cni.add(&pod).await,
            Err(CniError::NoNetwork { .. })
        ));

        host.write_network("1.0.0", &[json!({"type": "no-such-plugin"})]);
        let error = cni.status().await.unwrap_err().to_string();
        assert!(
            error.contains("no-such-plugin") && error.contains("/usr/lib/cni"),
            "{error}"
        );
        assert!(matches!(
            cni.add(&pod).await,
            Err(CniError::PluginMissing { .. })
        ));

        host.write_list(
            "1.0.0",
            &[json!({"type": "bridge", "ipam": {"type": "no-ipam"}})],
        );
        assert!(
            cni.status()
                .await
                .unwrap_err()
                .to_string()
                .contains("no-ipam")
        );
        host.assert_detached();
    });
}

#[test]
fn check_sees_damage() {
    on_a_host(|host| async move {
        host.write_network(
            "1.0.0",
            &[json!({"type": "tuning"}), json!({"type": "portmap"})],
        );
        let (cni, pod) = (host.cni(), host.pod("a1").await);
        assert!(cni.check("a1").await.is_err(), "not attached");
        cni.add(&pod).await.unwrap();
        cni.check("a1").await.unwrap();
        sh_in(&pod.netns, "ip route delete default").await;
        let error = cni.check("a1").await.unwrap_err();
        assert!(
            matches!(
                error,
                CniError::Refused {
                    command: "CHECK",
                    ..
                }
            ),
            "{error}"
        );
        cni.del("a1").await.unwrap();
        host.assert_detached();
    });
}

#[test]
fn a_failed_add_is_undone() {
    on_a_host(|host| async move {
        host.write_plugin(
            "refuse",
            r#"[ "$CNI_COMMAND" = ADD ] || exit 0; echo '{"code":100,"msg":"not today"}'; exit 1"#,
        );
        host.write_plugin(
            "babble",
            r#"[ "$CNI_COMMAND" = ADD ] || exit 0; echo hello"#,
        );
        let (cni, pod) = (host.cni(), host.pod("a1").await);

        host.write_network("1.0.0", &[json!({"type": "refuse"})]);
        let error = cni.add(&pod).await.unwrap_err();
        assert_eq!(
            error.to_string(),
            "network pods: plugin refuse, ADD: not today (CNI error 100)"
        );
        host.assert_detached();

        host.write_network("1.0.0", &[json!({"type": "babble"})]);
        let error = cni.add(&pod).await.unwrap_err().to_string();
        assert!(
            error.contains("plugin babble, ADD: its result is not JSON"),
            "{error}"
        );
        host.assert_detached();

        // The plugins are content, but there is no device.
        host.write_plugin(
            "nothing",
            r#"[ "$CNI_COMMAND" = ADD ] || exit 0; echo '{}'"#,
        );
        host.write_list("1.0.0", &[json!({"type": "nothing"})]);
        let error = cni.add(&pod).await.unwrap_err();
        assert!(matches!(error, CniError::Interface { .. }), "{error}");
        host.assert_detached();
    });
}

#[test]
fn del_does_not_need_the_namespace() {
    on_a_host(|host| async move {
        // Without ipMasq: the bridge plugin forgets its rules when the namespace is gone.
        host.write_list(
            "1.0.0",
            &[json!({"type": "bridge", "bridge": "pv0", "ipam": {
                "type": "host-local", "dataDir": host.path("ipam"), "subnet": "10.77.0.0/24"}})],
        );
        let (cni, pod) = (host.cni(), host.pod("a1").await);
        cni.add(&pod).await.unwrap();
        sh("ip link delete $(ip -o link show type veth | sed 's/^[0-9]*: //; s/@.*//')");
        netns::delete(&pod.netns).await.unwrap();
        cni.del("a1").await.unwrap();
        host.assert_detached();

        // A mount point without a mount, as a crash may leave it.
        let pod = host.pod("a2").await;
        cni.add(&pod).await.unwrap();
        netns::delete(&pod.netns).await.unwrap();
        fs::write(&pod.netns, "").unwrap();
        cni.del("a2").await.unwrap();
        assert!(cni.attachments().await.unwrap().is_empty());
        netns::delete(&pod.netns).await.unwrap();
        assert!(!pod.netns.exists());
    });
}

#[test]
fn del_uses_the_configuration_of_add() {
    on_a_host(|host| async move {
        host.write_network("1.0.0", &[]);
        let (cni, pod) = (host.cni(), host.pod("a1").await);
        cni.add(&pod).await.unwrap();
        fs::remove_dir_all(host.path("net.d")).unwrap();
        cni.check("a1").await.unwrap();
        // Another process, as after an upgrade of the daemon.
        host.cni().del("a1").await.unwrap();
        host.assert_detached();
    });
}

#[test]
fn a_damaged_record_is_cleaned_with_the_current_network() {
    on_a_host(|host| async move {
        host.write_network("1.0.0", &[]);
        let (cni, pod) = (host.cni(), host.pod("a1").await);
        cni.add(&pod).await.unwrap();
        netns::delete(&pod.netns).await.unwrap();
        fs::write(host.path("cache/a1.json"), "\0\0").unwrap();
        assert!(cni.check("a1").await.is_err());
        cni.del("a1").await.unwrap();
        assert!(cni.attachments().await.unwrap().is_empty());
        assert!(!host.ipam_dir().join("10.77.0.2").exists(), "the lease");
    });
}

#[test]
fn del_runs_every_plugin_and_can_be_repeated() {
    on_a_host(|host| async move {
        let broken = host.path("broken");
        let body = format!(
            "case $CNI_COMMAND in ADD) sed 's/.*\"prevResult\":\\({{.*}}\\),\"type\".*/\\1/';; \
             DEL) ! test -e {} ;; esac",
            broken.display()
        );
        host.write_plugin("moody", &body);
        host.write_network("1.0.0", &[json!({"type": "moody"})]);
        let (cni, pod) = (host.cni(), host.pod("a1").await);
        cni.add(&pod).await.unwrap();

        fs::write(&broken, "").unwrap();
        let error = cni.del("a1").await.unwrap_err();
        assert!(
            matches!(&error, CniError::Broken { plugin, .. } if plugin == "moody"),
            "{error}"
        );
        assert_eq!(sh("ip -o link show type veth"), "", "bridge has run");
        assert_eq!(cni.attachments().await.unwrap(), ["a1"]);

        fs::remove_file(&broken).unwrap();
        cni.del("a1").await.unwrap();
        host.assert_detached();
    });
}

/// A plugin that says that it was begun, and then waits for ever in ADD.
fn write_hanging_plugin(host: &Host) {
    let begun = host.path("begun");
    let body = format!(
        "[ $CNI_COMMAND = ADD ] || exit 0; echo $$ > {0}.tmp; mv {0}.tmp {0}; exec sleep 1000",
        begun.display()
    );
    host.write_plugin("hang", &body);
    host.write_network("1.0.0", &[json!({"type": "hang"})]);
}

async fn wait_for(path: &Path) -> String {
    for _ in 0..60_000 {
        if let Ok(text) = fs::read_to_string(path) {
            return text.trim().to_owned();
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    panic!("{} does not appear", path.display());
}

#[test]
fn an_add_that_nobody_waits_for_is_undone() {
    on_a_host(|host| async move {
        write_hanging_plugin(&host);
        let (cni, pod) = (host.cni(), host.pod("a1").await);
        let begun = host.path("begun");
        let pid = tokio::select! {
            added = cni.add(&pod) => panic!("{added:?}"),
            pid = wait_for(&begun) => pid,
        };
        // Waits for the undoing, which has begun; there is nothing left to do for it.
        cni.del("a1").await.unwrap();
        host.assert_detached();
        assert!(!Path::new("/proc").join(pid).exists(), "the plugin lives");
    });
}

#[test]
fn an_add_of_a_daemon_that_died_is_found_and_undone() {
    on_a_host(|host| async move {
        write_hanging_plugin(&host);
        let pod = host.pod("a1").await;
        let (cni, begun) = (host.cni(), host.path("begun"));
        // A runtime that is dropped takes its tasks with it wherever they are.
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_multi_thread()
                .enable_all()
                .build()
                .unwrap();
            runtime.block_on(async {
                tokio::select! {
                    added = cni.add(&pod) => panic!("{added:?}"),
                    _ = wait_for(&begun) => {}
                }
            });
            runtime.shutdown_background();
        })
        .join()
        .unwrap();

        let cni = host.cni();
        cni.del("a1").await.unwrap();
        host.assert_detached();
    });
}

#[test]
fn point_to_point_networks_have_no_subnet_on_link() {
    on_a_host(|host| async move {
        host.write_list(
            "1.0.0",
            &[json!({"type": "ptp", "ipam": {
                "type": "host-local", "dataDir": host.path("ipam"), "subnet": "10.77.0.0/24",
                "routes": [{"dst": "0.0.0.0/0"}]}})],
        );
        let (cni, pod) = (host.cni(), host.pod("a1").await);
        let network = cni.add(&pod).await.unwrap();
        assert_eq!(shown_addresses(&network), ["10.77.0.2/32"]);
        assert_eq!(
            shown_routes(&network),
            [
                "10.77.0.1/32",
                "10.77.0.0/24 via 10.77.0.1",
                "0.0.0.0/0 via 10.77.0.1"
            ]
        );
        cni.del("a1").await.unwrap();
        host.assert_detached();
    });
}

#[test]
fn many_pods_at_once() {
    on_a_host(|host| async move {
        host.write_network(
            "1.0.0",
            &[json!({"type": "portmap", "capabilities": {"portMappings": true}})],
        );
        let cni = host.cni();
        let mut pods = Vec::new();
        for i in 0..16 {
            let mut pod = host.pod(&format!("p{i}")).await;
            pod.port_mappings.push(PortMapping {
                protocol: Protocol::Tcp,
                container_port: 80,
                host_port: 9000 + i,
                host_ip: None,
            });
            pods.push(pod);
        }
        let added = futures_util::future::join_all(pods.iter().map(|pod| cni.add(pod))).await;
        let ips: HashSet<_> = added
            .into_iter()
            .map(|network| network.unwrap().ips[0])
            .collect();
        assert_eq!(ips.len(), pods.len());
        let deleted =
            futures_util::future::join_all(pods.iter().map(|pod| cni.del(&pod.sandbox_id))).await;
        for result in deleted {
            result.unwrap();
        }
        host.assert_detached();
    });
}
