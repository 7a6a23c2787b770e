//! What goes into an attachment of a pod to its network, and what comes out.

use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// All that the plugins are told of a pod.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Attachment {
    /// `CNI_CONTAINERID`.
    pub sandbox_id: String,
    /// The pod's network namespace, a bind mount ([`crate::netns::create`]).
    pub netns: PathBuf,
    /// Goes to the plugins as `CNI_ARGS`.
    pub pod: PodIdentity,
    /// Capability `portMappings`. Mappings with host port 0 ask for nothing and are left out.
    pub port_mappings: Vec<PortMapping>,
    /// Capability `bandwidth`.
    pub bandwidth: Option<Bandwidth>,
    /// Capability `dns`.
    pub dns: Option<Dns>,
    /// Capability `ips`: addresses that the pod must get.
    pub ips: Vec<Cidr>,
    /// Capability `mac`.
    pub mac: Option<String>,
    /// Capability `io.kubernetes.cri.pod-annotations`.
    pub annotations: BTreeMap<String, String>,
}

/// Who the pod is to the cluster.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PodIdentity {
    /// `PodSandboxMetadata.name`.
    pub name: String,
    /// `PodSandboxMetadata.namespace`.
    pub namespace: String,
    /// `PodSandboxMetadata.uid`.
    pub uid: String,
}

/// A port of the node that leads to the pod.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortMapping {
    /// Transport.
    pub protocol: Protocol,
    /// Port in the pod.
    pub container_port: u16,
    /// Port of the node. 0: none.
    pub host_port: u16,
    /// Address of the node. `None`: all.
    pub host_ip: Option<IpAddr>,
}

/// Transport of a [`PortMapping`], in CNI's spelling.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// SCTP.
    Sctp,
}

/// Limits of traffic, as the pod sees the directions. 0: no limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Bandwidth {
    /// Into the pod, bits per second.
    pub ingress_rate: u64,
    /// Bits.
    pub ingress_burst: u64,
    /// Out of the pod, bits per second.
    pub egress_rate: u64,
    /// Bits.
    pub egress_burst: u64,
}

/// Resolver settings, as CNI writes them in results.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dns {
    /// Addresses of name servers.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub nameservers: Vec<String>,
    /// The local domain.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub domain: String,
    /// Search list.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub search: Vec<String>,
    /// Resolver options.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub options: Vec<String>,
}

/// A pod's network as it is after ADD.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodNetwork {
    /// Name of the CNI network.
    pub network: String,
    /// The device that the guest takes over.
    pub interface: PodInterface,
    /// In the order in which they can be added: routes on link before those through a gateway.
    pub routes: Vec<Route>,
    /// The plugins' wish, mostly empty: the kubelet says what the pod gets.
    pub dns: Dns,
    /// For PodSandboxStatus: the first is `ip`, the rest are `additional_ips`.
    pub ips: Vec<IpAddr>,
}

/// A device as the guest has to set it up.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodInterface {
    /// In the namespace and in the guest.
    pub name: String,
    /// `aa:bb:cc:dd:ee:ff`.
    pub mac: String,
    /// Bytes.
    pub mtu: u32,
    /// With the prefix that makes the right route on link: an address whose subnet is not
    /// reachable on link (plugins `ptp`, Calico) comes as /32 or /128, and [`PodNetwork::routes`]
    /// has the rest.
    pub addresses: Vec<Cidr>,
}

/// One route.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Route {
    /// `0.0.0.0/0` and `::/0` are the default routes.
    pub destination: Cidr,
    /// `None`: on link.
    pub gateway: Option<IpAddr>,
}

/// An address with the length of its network's prefix, `10.1.2.3/24`. Host bits may be set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct Cidr {
    address: IpAddr,
    prefix: u8,
}

/// Text that is no address with a prefix.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not an address in CIDR notation")]
pub struct CidrError(String);

impl Cidr {
    /// `None` when the prefix is longer than the address.
    pub fn new(address: IpAddr, prefix: u8) -> Option<Self> {
        (prefix <= bits(address)).then_some(Self { address, prefix })
    }

    /// The address alone: /32 or /128.
    pub fn host(address: IpAddr) -> Self {
        Self {
            address,
            prefix: bits(address),
        }
    }

    /// The address, host bits included.
    pub fn address(&self) -> IpAddr {
        self.address
    }

    /// Bits of the prefix.
    pub fn prefix(&self) -> u8 {
        self.prefix
    }

    /// The network: host bits cleared.
    pub fn network(&self) -> Self {
        let address = match self.address {
            IpAddr::V4(a) => {
                let mask = u32::MAX
                    .checked_shl(32 - u32::from(self.prefix))
                    .unwrap_or(0);
                IpAddr::V4(Ipv4Addr::from_bits(a.to_bits() & mask))
            }
            IpAddr::V6(a) => {
                let mask = u128::MAX
                    .checked_shl(128 - u32::from(self.prefix))
                    .unwrap_or(0);
                IpAddr::V6(Ipv6Addr::from_bits(a.to_bits() & mask))
            }
        };
        Self { address, ..*self }
    }
}

fn bits(address: IpAddr) -> u8 {
    if address.is_ipv4() { 32 } else { 128 }
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.prefix)
    }
}

impl FromStr for Cidr {
    type Err = CidrError;

    fn from_str(text: &str) -> Result<Self, CidrError> {
        text.split_once('/')
            .and_then(|(address, prefix)| Self::new(address.parse().ok()?, prefix.parse().ok()?))
            .ok_or_else(|| CidrError(text.to_owned()))
    }
}

impl TryFrom<String> for Cidr {
    type Error = CidrError;

    fn try_from(text: String) -> Result<Self, CidrError> {
        text.parse()
    }
}

impl From<Cidr> for String {
    fn from(cidr: Cidr) -> Self {
        cidr.to_string()
    }
}

/// Annotations that Kubernetes defines for a pod's bandwidth.
const INGRESS_BANDWIDTH: &str = "kubernetes.io/ingress-bandwidth";
const EGRESS_BANDWIDTH: &str = "kubernetes.io/egress-bandwidth";

impl Bandwidth {
    /// The limits a pod's annotations ask for; `None` when they ask for none.
    ///
    /// Bursts are the plugin's maximum, as with other runtimes: the annotations have no word for
    /// them, and the plugin refuses a rate without a burst.
    ///
    /// # Errors
    /// A value that is not a positive quantity ("10M", "1Gi", "500k"), with the annotation's name.
    pub fn from_annotations<'a>(
        annotation: impl Fn(&str) -> Option<&'a str>,
    ) -> Result<Option<Self>, String> {
        let rate = |name: &str| match annotation(name) {
            None => Ok(0),
            Some(text) => parse_quantity(text)
                .filter(|rate| *rate > 0)
                .ok_or_else(|| format!("annotation {name}: {text:?} is not a positive quantity")),
        };
        let (ingress_rate, egress_rate) = (rate(INGRESS_BANDWIDTH)?, rate(EGRESS_BANDWIDTH)?);
        if ingress_rate == 0 && egress_rate == 0 {
            return Ok(None);
        }
        let burst = |rate: u64| if rate == 0 { 0 } else { u64::from(u32::MAX) };
        Ok(Some(Self {
            ingress_rate,
            ingress_burst: burst(ingress_rate),
            egress_rate,
            egress_burst: burst(egress_rate),
        }))
    }
}

/// A Kubernetes quantity without fraction or exponent.
fn parse_quantity(text: &str) -> Option<u64> {
    let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
    let unit = match &text[digits.len()..] {
        "" => 1,
        "k" => 1000,
        "M" => 1000u64.pow(2),
        "G" => 1000u64.pow(3),
        "T" => 1000u64.pow(4),
        "Ki" => 1 << 10,
        "Mi" => 1 << 20,
        "Gi" => 1 << 30,
        "Ti" => 1 << 40,
        _ => return None,
    };
    digits.parse::<u64>().ok()?.checked_mul(unit)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn cidr_rejects_what_is_none() {
        for bad in [
            "",
            "10.0.0.1",
            "10.0.0.1/",
            "10.0.0.1/33",
            "/8",
            "::1/129",
            "a/1",
            "1.2.3.4/-1",
        ] {
            assert!(bad.parse::<Cidr>().is_err(), "{bad}");
        }
    }

    #[test]
    fn network_clears_host_bits() {
        let network = |text: &str| text.parse::<Cidr>().unwrap().network().to_string();
        assert_eq!(network("10.1.2.3/24"), "10.1.2.0/24");
        assert_eq!(network("10.1.2.3/32"), "10.1.2.3/32");
        assert_eq!(network("10.1.2.3/0"), "0.0.0.0/0");
        assert_eq!(network("fd00::1:2/112"), "fd00::1:0/112");
        assert_eq!(network("fd00::1/0"), "::/0");
    }

    proptest! {
        #[test]
        fn cidr_survives_text(address: IpAddr, prefix in 0u8..=128) {
            if let Some(cidr) = Cidr::new(address, prefix) {
                prop_assert_eq!(cidr.to_string().parse::<Cidr>().unwrap(), cidr);
                prop_assert_eq!(cidr.network().network(), cidr.network());
            } else {
                prop_assert!(address.is_ipv4() && prefix > 32);
            }
        }

        #[test]
        fn quantities_never_panic(text in ".{0,12}") {
            let _ = parse_quantity(&text);
        }
    }

    #[test]
    fn bandwidth_of_annotations() {
        let ask = |ingress: Option<&'static str>, egress: Option<&'static str>| {
            Bandwidth::from_annotations(|name| {
                if name == INGRESS_BANDWIDTH {
                    ingress
                } else {
                    egress
                }
            })
        };
        assert_eq!(ask(None, None), Ok(None));
        let limits = ask(Some("10M"), None).unwrap().unwrap();
        assert_eq!(
            (limits.ingress_rate, limits.egress_rate, limits.egress_burst),
            (10_000_000, 0, 0)
        );
        assert_eq!(
            ask(None, Some("1Gi")).unwrap().unwrap().egress_rate,
            1 << 30
        );
        for bad in ["", "0", "-1", "M", "1.5M", "99999999999T"] {
            assert!(ask(Some(bad), None).is_err(), "{bad}");
        }
    }
}
