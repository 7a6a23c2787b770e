//! What plugins are given: `CNI_ARGS`, and the configuration on stdin.

use serde_json::{Map, Value, json};

use super::cache::Record;
use super::config::{Network, Plugin, is_identifier};
use super::error::CniError;
use crate::INTERFACE;
use crate::types::Attachment;

/// Refuses an id that is no `CNI_CONTAINERID`. It is also the name of a file.
pub fn check_id(sandbox_id: &str) -> Result<(), CniError> {
    if is_identifier(sandbox_id) {
        Ok(())
    } else {
        Err(CniError::InvalidAttachment(format!(
            "sandbox id {sandbox_id:?}"
        )))
    }
}

/// All that plugins will ever be told of an attachment.
pub fn record(attachment: &Attachment, network: Network) -> Result<Record, CniError> {
    check_id(&attachment.sandbox_id)?;
    Ok(Record {
        sandbox_id: attachment.sandbox_id.clone(),
        netns: attachment.netns.clone(),
        interface: INTERFACE.to_owned(),
        args: args(attachment)?,
        capabilities: capabilities(attachment),
        network,
        result: None,
    })
}

/// `CNI_ARGS`, with the names that Kubernetes' runtimes agreed on.
fn args(attachment: &Attachment) -> Result<String, CniError> {
    let mut args = String::from("IgnoreUnknown=1");
    for (key, value) in [
        ("K8S_POD_NAMESPACE", &attachment.pod.namespace),
        ("K8S_POD_NAME", &attachment.pod.name),
        ("K8S_POD_INFRA_CONTAINER_ID", &attachment.sandbox_id),
        ("K8S_POD_UID", &attachment.pod.uid),
    ] {
        // There is no way to quote, and one argument must not become two.
        if value.contains([';', '=', '\0']) {
            return Err(CniError::InvalidAttachment(format!(
                "{value:?} cannot be given to CNI plugins: ';' and '=' separate arguments"
            )));
        }
        args.extend([";", key, "=", value]);
    }
    Ok(args)
}

/// By capability, with the keys of
/// <https://github.com/containernetworking/cni/blob/spec-v1.0.0/CONVENTIONS.md>.
fn capabilities(attachment: &Attachment) -> Map<String, Value> {
    let mut all = Map::new();
    let ports: Vec<Value> = attachment
        .port_mappings
        .iter()
        .filter(|port| port.host_port > 0)
        .map(|port| {
            let mut entry = json!({
                "hostPort": port.host_port,
                "containerPort": port.container_port,
                "protocol": port.protocol,
            });
            if let Some(ip) = port.host_ip {
                entry["hostIP"] = Value::String(ip.to_string());
            }
            entry
        })
        .collect();
    if !ports.is_empty() {
        all.insert("portMappings".into(), ports.into());
    }
    if let Some(bandwidth) = &attachment.bandwidth {
        all.insert("bandwidth".into(), json!(bandwidth));
    }
    if let Some(dns) = &attachment.dns {
        let dns =
            json!({"servers": dns.nameservers, "searches": dns.search, "options": dns.options});
        all.insert("dns".into(), dns);
    }
    if !attachment.ips.is_empty() {
        all.insert("ips".into(), json!(attachment.ips));
    }
    if let Some(mac) = &attachment.mac {
        all.insert("mac".into(), json!(mac));
    }
    if !attachment.annotations.is_empty() {
        all.insert(
            "io.kubernetes.cri.pod-annotations".into(),
            json!(attachment.annotations),
        );
    }
    all
}

/// A plugin's stdin: its configuration as the file has it, with what the runtime adds.
pub fn stdin(record: &Record, plugin: &Plugin, previous: Option<&Map<String, Value>>) -> Vec<u8> {
    let mut config = plugin.config.clone();
    config.remove("capabilities");
    config.insert("name".into(), record.network.name.clone().into());
    config.insert("cniVersion".into(), record.network.version.as_str().into());
    let asked: Map<String, Value> = record
        .capabilities
        .iter()
        .filter(|(name, _)| plugin.has_capability(name))
        .map(|(name, value)| (name.clone(), value.clone()))
        .collect();
    if !asked.is_empty() {
        config.insert("runtimeConfig".into(), asked.into());
    }
    if let Some(previous) = previous {
        config.insert("prevResult".into(), previous.clone().into());
    }
    Value::Object(config).to_string().into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::{Bandwidth, Dns, PodIdentity, PortMapping, Protocol};

    fn attachment() -> Attachment {
        let port = |host_port, host_ip: Option<&str>| PortMapping {
            protocol: Protocol::Udp,
            container_port: 53,
            host_port,
            host_ip: host_ip.map(|ip| ip.parse().unwrap()),
        };
        Attachment {
            sandbox_id: "abc".into(),
            netns: "/run/n/abc".into(),
            pod: PodIdentity {
                name: "web".into(),
                namespace: "default".into(),
                uid: "u1".into(),
            },
            port_mappings: vec![port(0, None), port(5353, None), port(53, Some("::1"))],
            bandwidth: Some(Bandwidth {
                ingress_rate: 1000,
                ingress_burst: 2000,
                egress_rate: 0,
                egress_burst: 0,
            }),
            dns: Some(Dns {
                nameservers: vec!["10.0.0.10".into()],
                search: vec!["a.b".into()],
                ..Dns::default()
            }),
            ..Attachment::default()
        }
    }

    fn network() -> Network {
        Network::parse(
            br#"{"cniVersion":"0.4.0","name":"pods","plugins":[
                {"type":"a","name":"other","mtu":9000},
                {"type":"b","capabilities":{"portMappings":true,"bandwidth":true,"dns":true,"mac":true}}]}"#,
        )
        .unwrap()
    }

    #[test]
    fn arguments() {
        let record = record(&attachment(), network()).unwrap();
        assert_eq!(
            record.args,
            "IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=web;\
             K8S_POD_INFRA_CONTAINER_ID=abc;K8S_POD_UID=u1"
        );
        let mut hostile = attachment();
        hostile.pod.name = "x;K8S_POD_NAMESPACE=kube-system".into();
        assert!(super::record(&hostile, network()).is_err());
        for id in ["", "../x", "a/b", ".a", "a b"] {
            assert!(check_id(id).is_err(), "{id:?}");
        }
    }

    #[test]
    fn plugins_get_what_they_declare() {
        let record = record(&attachment(), network()).unwrap();
        let input = |plugin: usize, previous: Option<&Map<String, Value>>| -> Value {
            let plugin = &record.network.plugins[plugin];
            serde_json::from_slice(&stdin(&record, plugin, previous)).unwrap()
        };
        assert_eq!(
            input(0, None),
            json!({"type": "a", "name": "pods", "cniVersion": "0.4.0", "mtu": 9000})
        );
        let previous = Map::from_iter([("ips".to_owned(), json!([]))]);
        assert_eq!(
            input(1, Some(&previous)),
            json!({
                "type": "b", "name": "pods", "cniVersion": "0.4.0",
                "runtimeConfig": {
                    "portMappings": [
                        {"hostPort": 5353, "containerPort": 53, "protocol": "udp"},
                        {"hostPort": 53, "containerPort": 53, "protocol": "udp", "hostIP": "::1"},
                    ],
                    "bandwidth": {"ingressRate": 1000, "ingressBurst": 2000, "egressRate": 0, "egressBurst": 0},
                    "dns": {"servers": ["10.0.0.10"], "searches": ["a.b"], "options": []},
                },
                "prevResult": {"ips": []},
            })
        );
    }
}
