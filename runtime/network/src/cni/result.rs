//! What an ADD answers, in every version of the spec.
//!
//! The result itself travels on as it came, to the next plugin and into the cache. Read out of it
//! is only what the kernel cannot tell: which addresses are the pod's and in which order, and DNS.

use std::net::IpAddr;

use serde::Deserialize;
use serde_json::{Map, Value};

use crate::types::{Cidr, Dns};

/// A plugin's result. Unknown fields are other versions' business.
#[derive(Debug, Default, Deserialize)]
struct Wire {
    #[serde(default)]
    interfaces: Vec<Interface>,
    /// 0.3.0 and later.
    #[serde(default)]
    ips: Vec<Ip>,
    /// 0.1.0 and 0.2.0.
    ip4: Option<LegacyIp>,
    ip6: Option<LegacyIp>,
    #[serde(default)]
    dns: Dns,
}

#[derive(Debug, Deserialize)]
struct Interface {
    #[serde(default)]
    name: String,
    /// The namespace; empty for devices of the host.
    #[serde(default)]
    sandbox: String,
}

#[derive(Debug, Deserialize)]
struct Ip {
    address: Cidr,
    /// Index into `interfaces`. Older plugins leave it out.
    interface: Option<i64>,
}

#[derive(Debug, Deserialize)]
struct LegacyIp {
    ip: Cidr,
}

/// What a pod's status takes from a result.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// The plugins' order: the first is the pod's primary address.
    pub ips: Vec<IpAddr>,
    pub dns: Dns,
}

/// Checks that stdout is a result.
///
/// # Errors
/// Why it is none.
pub fn parse(stdout: &[u8]) -> Result<Map<String, Value>, String> {
    match serde_json::from_slice(stdout) {
        Ok(Value::Object(result)) => Ok(result),
        Ok(_) => Err("its result is not a JSON object".into()),
        Err(_) if stdout.trim_ascii().is_empty() => Err("it printed no result".into()),
        Err(e) => Err(format!("its result is not JSON: {e}")),
    }
}

/// Reads the addresses of device `interface` out of the last plugin's result.
///
/// # Errors
/// A field has a wrong form.
pub fn outcome(result: &Map<String, Value>, interface: &str) -> Result<Outcome, String> {
    let wire: Wire = serde_json::from_value(Value::Object(result.clone()))
        .map_err(|e| format!("its result is not as the spec has it: {e}"))?;
    let ours = |ip: &Ip| match ip.interface {
        None => true,
        Some(index) => usize::try_from(index)
            .ok()
            .and_then(|index| wire.interfaces.get(index))
            .is_some_and(|i| i.name == interface && !i.sandbox.is_empty()),
    };
    let legacy = [&wire.ip4, &wire.ip6].into_iter().flatten().map(|ip| ip.ip);
    let ips = wire
        .ips
        .iter()
        .filter(|ip| ours(ip))
        .map(|ip| ip.address)
        .chain(legacy);
    Ok(Outcome {
        ips: ips.map(|cidr| cidr.address()).collect(),
        dns: wire.dns,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn read(text: &str) -> Result<Outcome, String> {
        outcome(&parse(text.as_bytes())?, "eth0")
    }

    fn ips(text: &str) -> Vec<String> {
        read(text)
            .unwrap()
            .ips
            .iter()
            .map(ToString::to_string)
            .collect()
    }

    #[test]
    fn version_1_0() {
        let text = r#"{"cniVersion":"1.0.0",
            "interfaces":[{"name":"br0"},{"name":"veth1"},{"name":"eth0","sandbox":"/run/n"},
                          {"name":"net1","sandbox":"/run/n"}],
            "ips":[{"interface":2,"address":"10.1.0.5/16","gateway":"10.1.0.1"},
                   {"interface":2,"address":"fd00::5/64"},
                   {"interface":3,"address":"192.168.0.2/24"},
                   {"interface":0,"address":"10.1.0.1/16"},
                   {"interface":9,"address":"10.1.0.9/16"},
                   {"interface":-1,"address":"10.1.0.8/16"}],
            "routes":[{"dst":"0.0.0.0/0"}],
            "dns":{"nameservers":["10.96.0.10"],"search":["a.b"]}}"#;
        assert_eq!(ips(text), ["10.1.0.5", "fd00::5"]);
        assert_eq!(read(text).unwrap().dns.nameservers, ["10.96.0.10"]);
    }

    #[test]
    fn versions_0_3_and_0_4() {
        let text = r#"{"cniVersion":"0.4.0","interfaces":[{"name":"eth0","mac":"00:11","sandbox":"/n"}],
            "ips":[{"version":"6","address":"fd00::5/64","interface":0},{"version":"4","address":"10.0.0.2/24"}]}"#;
        assert_eq!(ips(text), ["fd00::5", "10.0.0.2"]);
    }

    #[test]
    fn version_0_2() {
        let text = r#"{"cniVersion":"0.2.0","ip6":{"ip":"fd00::2/64"},
            "ip4":{"ip":"10.0.0.2/24","gateway":"10.0.0.1","routes":[{"dst":"0.0.0.0/0"}]},"dns":{}}"#;
        assert_eq!(ips(text), ["10.0.0.2", "fd00::2"]);
    }

    #[test]
    fn no_addresses_are_a_result_too() {
        assert_eq!(
            read(r#"{"cniVersion":"1.0.0"}"#).unwrap(),
            Outcome::default()
        );
    }

    #[test]
    fn what_is_no_result() {
        for (text, word) in [
            ("", "no result"),
            (" \n", "no result"),
            ("[]", "object"),
            ("{", "not JSON"),
            (r#"{"ips":[{"address":"10.0.0.2"}]}"#, "CIDR"),
            (r#"{"ips":{}}"#, "spec"),
        ] {
            let error = read(text).unwrap_err();
            assert!(error.contains(word), "{text}: {error}");
        }
    }

    proptest! {
        #[test]
        fn hostile_results_never_panic(interface in any::<i64>(), bytes: Vec<u8>) {
            let _ = parse(&bytes);
            let text = format!(r#"{{"interfaces":[{{"name":"eth0","sandbox":"x"}}],
                "ips":[{{"interface":{interface},"address":"10.0.0.2/8"}}]}}"#);
            prop_assert_eq!(read(&text).unwrap().ips.len(), usize::from(interface == 0));
        }
    }
}
