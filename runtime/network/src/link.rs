//! What a network device is, as the kernel tells it.
//!
//! The guest is configured from this and not from the plugins' JSON: plugins make more than their
//! results say (Calico's result has no routes; `ptp` removes the route of the subnet that its
//! result shows).

use std::cmp::Reverse;
use std::fmt::Write as _;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use futures_util::TryStreamExt;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
use rtnetlink::packet_route::address::{AddressAttribute, AddressMessage};
use rtnetlink::packet_route::link::LinkAttribute;
use rtnetlink::packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteType, RouteVia,
};
use rtnetlink::{Handle, RouteMessageBuilder};

use crate::netlink::{Netlink, io_error};
use crate::netns::NetnsError;
use crate::types::{Cidr, Route};

nix::ioctl_readwrite_bad!(
    /// Reads a device's flags, netdevice(7).
    get_flags,
    libc::SIOCGIFFLAGS,
    libc::ifreq
);
nix::ioctl_write_ptr_bad!(
    /// Sets a device's flags, netdevice(7).
    set_flags,
    libc::SIOCSIFFLAGS,
    libc::ifreq
);

/// What can go wrong when a device is read.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// The pod's namespace cannot be entered.
    #[error(transparent)]
    Netns(#[from] NetnsError),
    /// No such device there.
    #[error("no device {name} in network namespace {netns}")]
    Missing {
        /// Device name.
        name: String,
        /// The namespace.
        netns: PathBuf,
    },
    /// The kernel's answer.
    #[error("device {name}: {step}: {source}")]
    Netlink {
        /// Device name.
        name: String,
        /// What was asked.
        step: &'static str,
        /// The answer.
        source: io::Error,
    },
}

/// A device as the guest has to imitate it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LinkState {
    /// In its namespace.
    pub index: u32,
    /// `aa:bb:cc:dd:ee:ff`.
    pub mac: String,
    /// Bytes.
    pub mtu: u32,
    /// Without IPv6 link-local ones: the guest derives its own from the same MAC, the same.
    /// Narrowed to /32 or /128 when the subnet is not on link.
    pub addresses: Vec<Cidr>,
    /// All that leave by this device, but those the kernel makes of the addresses.
    pub routes: Vec<Route>,
}

/// Reads device `name` in the namespace at `netns`.
///
/// # Errors
/// No such namespace or device.
pub async fn observe(netns: &Path, name: &str) -> Result<LinkState, LinkError> {
    let netlink = Netlink::connect(netns, || ()).await?;
    let handle = netlink.handle();
    let (index, mac, mtu) = find(handle, netns, name).await?;
    let failed = |step| {
        let name = name.to_owned();
        move |e| LinkError::Netlink {
            name,
            step,
            source: io_error(e),
        }
    };

    let addresses: Vec<AddressMessage> = handle
        .address()
        .get()
        .set_link_index_filter(index)
        .execute()
        .try_collect()
        .await
        .map_err(failed("addresses"))?;
    let mut routes: Vec<RouteMessage> = Vec::new();
    for query in [
        RouteMessageBuilder::<Ipv4Addr>::new().build(),
        RouteMessageBuilder::<Ipv6Addr>::new().build(),
    ] {
        let asked = query.header.address_family;
        let family: Vec<RouteMessage> = handle
            .route()
            .get(query)
            .execute()
            .try_collect()
            .await
            .map_err(failed("routes"))?;
        // A kernel without IPv6 answers with all it has: IPv4's routes once more.
        let answered = family.into_iter();
        routes.extend(answered.filter(|route| route.header.address_family == asked));
    }

    let routes: Vec<DeviceRoute> = routes
        .iter()
        .filter_map(|message| DeviceRoute::of(message, index))
        .collect();
    Ok(LinkState {
        index,
        mac,
        mtu,
        addresses: addresses
            .iter()
            .filter_map(usable_address)
            .map(|address| narrow_unless_on_link(address, &routes))
            .collect(),
        routes: in_order_of_adding(routes),
    })
}

/// Index, MAC and MTU of a device.
pub(crate) async fn find(
    handle: &Handle,
    netns: &Path,
    name: &str,
) -> Result<(u32, String, u32), LinkError> {
    let missing = || LinkError::Missing {
        name: name.to_owned(),
        netns: netns.to_owned(),
    };
    let message = handle
        .link()
        .get()
        .match_name(name)
        .execute()
        .try_next()
        .await
        .map_err(|e| match io_error(e) {
            source if source.raw_os_error() == Some(libc::ENODEV) => missing(),
            source => LinkError::Netlink {
                name: name.to_owned(),
                step: "look up",
                source,
            },
        })?
        .ok_or_else(missing)?;

    let (mut mac, mut mtu) = (String::new(), 0);
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::Address(bytes) => mac = format_mac(bytes),
            LinkAttribute::Mtu(bytes) => mtu = *bytes,
            _ => {}
        }
    }
    Ok((message.header.index, mac, mtu))
}

fn format_mac(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len() * 3);
    for (i, byte) in bytes.iter().enumerate() {
        let separator = if i == 0 { "" } else { ":" };
        // Writing to a String cannot fail.
        let _ = write!(text, "{separator}{byte:02x}");
    }
    text
}

fn usable_address(message: &AddressMessage) -> Option<Cidr> {
    let (mut local, mut peer) = (None, None);
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Local(address) => local = Some(*address),
            AddressAttribute::Address(address) => peer = Some(*address),
            _ => {}
        }
    }
    // On a point-to-point device IFA_ADDRESS is the peer's; IPv6 sends IFA_ADDRESS alone.
    let address = local.or(peer)?;
    let link_local = matches!(address, IpAddr::V6(a) if a.is_unicast_link_local());
    if link_local || address.is_loopback() {
        return None;
    }
    Cidr::new(address, message.header.prefix_len)
}

/// A unicast route of the main table that leaves by the device.
struct DeviceRoute {
    route: Route,
    /// The kernel made it of an address, and the guest's kernel will as well.
    of_address: bool,
}

impl DeviceRoute {
    fn of(message: &RouteMessage, device: u32) -> Option<Self> {
        let header = &message.header;
        let mut table = u32::from(header.table);
        let (mut destination, mut gateway, mut output) = (None, None, None);
        for attribute in &message.attributes {
            match attribute {
                RouteAttribute::Destination(a) => destination = ip(a),
                RouteAttribute::Gateway(a) => gateway = ip(a),
                RouteAttribute::Via(RouteVia::Inet(a)) => gateway = Some(IpAddr::V4(*a)),
                RouteAttribute::Via(RouteVia::Inet6(a)) => gateway = Some(IpAddr::V6(*a)),
                RouteAttribute::Oif(index) => output = Some(*index),
                RouteAttribute::Table(id) => table = *id,
                _ => {}
            }
        }
        let learned = matches!(
            header.protocol,
            RouteProtocol::IcmpRedirect | RouteProtocol::Ra
        );
        if output != Some(device)
            || table != u32::from(RouteHeader::RT_TABLE_MAIN)
            || header.kind != RouteType::Unicast
            || learned
        {
            return None;
        }
        let any = match header.address_family {
            rtnetlink::packet_route::AddressFamily::Inet => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
            rtnetlink::packet_route::AddressFamily::Inet6 => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
            _ => return None,
        };
        let destination = Cidr::new(destination.unwrap_or(any), header.destination_prefix_length)?;
        Some(Self {
            route: Route {
                destination,
                gateway,
            },
            of_address: header.protocol == RouteProtocol::Kernel,
        })
    }
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(a) => Some(IpAddr::V4(*a)),
        RouteAddress::Inet6(a) => Some(IpAddr::V6(*a)),
        _ => None,
    }
}

fn narrow_unless_on_link(address: Cidr, routes: &[DeviceRoute]) -> Cidr {
    let subnet = address.network();
    let on_link = routes
        .iter()
        .any(|r| r.of_address && r.route.destination == subnet);
    if on_link {
        address
    } else {
        Cidr::host(address.address())
    }
}

/// A gateway must be reachable when its route is added: routes on link first, then narrow before
/// wide ones.
fn in_order_of_adding(routes: Vec<DeviceRoute>) -> Vec<Route> {
    let mut routes: Vec<Route> = routes
        .into_iter()
        .filter(|r| !r.of_address)
        .map(|r| r.route)
        .collect();
    routes.sort_by_key(|r| (r.gateway.is_some(), Reverse(r.destination.prefix())));
    routes
}

/// Sets device `name` of the calling thread's namespace up.
pub(crate) fn set_up(name: &str) -> io::Result<()> {
    let control = socket(
        AddressFamily::Inet,
        SockType::Datagram,
        SockFlag::SOCK_CLOEXEC,
        None,
    )?;
    let mut request = ifreq(name)?;
    // SAFETY: `control` is a socket and `request` a whole ifreq that the kernel fills.
    unsafe { get_flags(control.as_raw_fd(), &raw mut request) }?;
    // SAFETY: SIOCGIFFLAGS has just set this member of the union.
    unsafe { request.ifr_ifru.ifru_flags |= libc::IFF_UP as i16 };
    // SAFETY: as above; the kernel only reads.
    unsafe { set_flags(control.as_raw_fd(), &raw const request) }?;
    Ok(())
}

/// A request for device `name` with everything else zero.
///
/// # Errors
/// The name does not fit (`IFNAMSIZ`), is empty or contains a NUL.
pub(crate) fn ifreq(name: &str) -> io::Result<libc::ifreq> {
    if name.is_empty() || name.len() >= libc::IFNAMSIZ || name.contains('\0') {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "not a device name",
        ));
    }
    // SAFETY: an ifreq of zeroes is valid: integers and a union of plain data.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    Ok(request)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn route(destination: &str, gateway: Option<&str>, of_address: bool) -> DeviceRoute {
        DeviceRoute {
            route: Route {
                destination: destination.parse().unwrap(),
                gateway: gateway.map(|g| g.parse().unwrap()),
            },
            of_address,
        }
    }

    #[test]
    fn gateways_are_reachable_when_their_routes_are_added() {
        // As `ptp` leaves it: the subnet's route goes through the gateway as well.
        let routes = in_order_of_adding(vec![
            route("0.0.0.0/0", Some("10.9.0.1"), false),
            route("10.9.0.0/24", Some("10.9.0.1"), false),
            route("fe80::/64", None, true),
            route("10.9.0.1/32", None, false),
        ]);
        let shown: Vec<_> = routes.iter().map(|r| r.destination.to_string()).collect();
        assert_eq!(shown, ["10.9.0.1/32", "10.9.0.0/24", "0.0.0.0/0"]);
    }

    #[test]
    fn an_address_keeps_its_prefix_only_when_the_subnet_is_on_link() {
        let bridge = [route("10.9.0.0/24", None, true)];
        let ptp = [route("10.9.0.0/24", Some("10.9.0.1"), false)];
        let address: Cidr = "10.9.0.7/24".parse().unwrap();
        assert_eq!(narrow_unless_on_link(address, &bridge), address);
        assert_eq!(
            narrow_unless_on_link(address, &ptp).to_string(),
            "10.9.0.7/32"
        );
    }

    #[test]
    fn device_names_are_bounded() {
        assert!(ifreq("").is_err());
        assert!(ifreq("sixteen-letters-").is_err());
        assert!(ifreq("a\0b").is_err());
        let request = ifreq("fifteen-letters").unwrap();
        assert_eq!(request.ifr_name[15], 0);
    }

    #[test]
    fn macs_are_lower_case_pairs() {
        assert_eq!(format_mac(&[0xAA, 0, 1, 2, 3, 0xF]), "aa:00:01:02:03:0f");
        assert_eq!(format_mac(&[]), "");
    }
}
