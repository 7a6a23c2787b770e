//! What the guest, or a pod on the host, is told of its pod: name, resolver, addresses.

use std::fmt::Write;
use std::net::IpAddr;

use podvisor_network::PodNetwork;
use podvisor_proto::{agent, cri};

/// The part of a sandbox id that serves as host name when the pod names none.
const SHORT_ID: usize = 12;

/// ConfigureSandbox for a pod; the monitor adds disk and clock.
pub fn sandbox(
    id: &str,
    config: &cri::PodSandboxConfig,
    ips: &[IpAddr],
    huge_pages: u64,
    user_namespace: Option<cri::IdMapping>,
) -> agent::ConfigureSandboxRequest {
    let hostname = hostname(id, config);
    let linux = config.linux.as_ref();
    let mut sysctls = linux.map(|linux| linux.sysctls.clone()).unwrap_or_default();
    if huge_pages > 0 {
        // Early, while there is memory in one piece.
        sysctls.insert("vm.nr_hugepages".into(), huge_pages.to_string());
    }
    agent::ConfigureSandboxRequest {
        resolv_conf: resolv_conf(config),
        hosts: hosts(&hostname, ips),
        hostname,
        sysctls,
        user_namespace: user_namespace.map(|mapping| agent::IdMapping {
            container_id: mapping.container_id,
            host_id: mapping.host_id,
            length: mapping.length,
        }),
        ..Default::default()
    }
}

/// As [`sandbox`], for a pod that uses the node's network: by the node's names.
pub fn host_network_sandbox(config: &cri::PodSandboxConfig) -> agent::ConfigureSandboxRequest {
    let read = |file: &str| std::fs::read_to_string(file).unwrap_or_default();
    agent::ConfigureSandboxRequest {
        resolv_conf: resolv_conf(config),
        hosts: read("/etc/hosts"),
        hostname: read("/proc/sys/kernel/hostname").trim_end().to_owned(),
        ..Default::default()
    }
}

/// ConfigureNetwork from CNI's result.
pub fn network(network: &PodNetwork) -> agent::ConfigureNetworkRequest {
    let interface = &network.interface;
    agent::ConfigureNetworkRequest {
        interfaces: vec![agent::Interface {
            name: interface.name.clone(),
            mac: interface.mac.clone(),
            mtu: interface.mtu,
            addresses: interface
                .addresses
                .iter()
                .map(ToString::to_string)
                .collect(),
        }],
        routes: network
            .routes
            .iter()
            .map(|route| agent::Route {
                destination: route.destination.to_string(),
                gateway: route.gateway.map(|ip| ip.to_string()).unwrap_or_default(),
                interface: interface.name.clone(),
            })
            .collect(),
    }
}

fn hostname(id: &str, config: &cri::PodSandboxConfig) -> String {
    if !config.hostname.is_empty() {
        return config.hostname.clone();
    }
    id.chars().take(SHORT_ID).collect()
}

/// The pod's DNS config, or the host's when it brings none (CRI, dns_config).
fn resolv_conf(config: &cri::PodSandboxConfig) -> String {
    let Some(dns) = &config.dns_config else {
        return std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
    };
    let mut text = String::new();
    // Writing to a String cannot fail.
    if !dns.searches.is_empty() {
        let _ = writeln!(text, "search {}", dns.searches.join(" "));
    }
    for server in &dns.servers {
        let _ = writeln!(text, "nameserver {server}");
    }
    if !dns.options.is_empty() {
        let _ = writeln!(text, "options {}", dns.options.join(" "));
    }
    text
}

fn hosts(hostname: &str, ips: &[IpAddr]) -> String {
    let mut text =
        String::from("127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n");
    for ip in ips {
        let _ = writeln!(text, "{ip}\t{hostname}");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dns_config_becomes_resolv_conf() {
        let config = cri::PodSandboxConfig {
            dns_config: Some(cri::DnsConfig {
                servers: vec!["10.10.10.10".into()],
                searches: vec!["google.com".into(), "b".into()],
                options: vec!["ndots:8".into()],
            }),
            ..Default::default()
        };
        assert_eq!(
            resolv_conf(&config),
            "search google.com b\nnameserver 10.10.10.10\noptions ndots:8\n"
        );
    }

    #[test]
    fn a_pod_without_a_host_name_gets_one() {
        let mut config = cri::PodSandboxConfig::default();
        assert_eq!(hostname("0123456789abcdef", &config), "0123456789ab");
        config.hostname = "web".into();
        assert_eq!(hostname("0123456789abcdef", &config), "web");
    }
}
