//! Makes the guest's interfaces look like those that CNI made in the pod's network namespace
//! (rtnetlink(7)). Applying the same configuration twice changes nothing.

use std::fs::File;
use std::io;
use std::net::IpAddr;
use std::os::fd::AsRawFd;
use std::str::FromStr;

use futures_util::TryStreamExt;
use netlink_packet_route::AddressFamily;
use netlink_packet_route::address::{AddressAttribute, AddressFlags};
use netlink_packet_route::link::{LinkAttribute, LinkMessage};
use netlink_packet_route::route::RouteScope;
use nix::sched::{CloneFlags, setns};
use podvisor_proto::agent::{ConfigureNetworkRequest, Interface, Route};
use rtnetlink::{Handle, LinkUnspec, RouteMessageBuilder, new_connection};
use tokio::task::JoinHandle;

/// Most interfaces, addresses of one, and routes of a request.
const LIMIT: usize = 1024;

/// Why the network is not as it was asked for.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// A malformed request.
    #[error("{text:?} is not {what}")]
    Malformed {
        /// What was expected.
        what: &'static str,
        /// What was there.
        text: String,
    },
    /// See [`LIMIT`].
    #[error("more than {LIMIT} interfaces, addresses or routes")]
    TooMany,
    /// The pod's own.
    #[error("the pod's network namespace: {0}")]
    Namespace(#[source] io::Error),
    /// No such interface.
    #[error("the guest has no interface {0:?}")]
    NoInterface(String),
    /// The kernel refused.
    #[error("{action}: {reason}")]
    Kernel {
        /// What was tried.
        action: String,
        /// The kernel's reason.
        reason: String,
    },
}

/// Applies the whole request; in `namespace`, to which the interfaces are moved, or the guest's own.
pub async fn configure(
    request: &ConfigureNetworkRequest,
    namespace: Option<&File>,
) -> Result<(), NetworkError> {
    let addresses = request.interfaces.iter().map(|i| i.addresses.len()).max();
    let counts = [
        request.interfaces.len(),
        request.routes.len(),
        addresses.unwrap_or(0),
    ];
    if counts.into_iter().any(|count| count > LIMIT) {
        return Err(NetworkError::TooMany);
    }
    let (connection, handle, _) =
        new_connection().map_err(|error| kernel("opening a netlink socket", &error))?;
    let driver = tokio::spawn(connection);
    let result = match namespace {
        None => apply(&handle, request).await,
        Some(namespace) => apply_in(namespace, &handle, request).await,
    };
    driver.abort();
    result
}

/// Applies it in another network namespace. `handle` is of the one that interfaces come from.
async fn apply_in(
    namespace: &File,
    handle: &Handle,
    request: &ConfigureNetworkRequest,
) -> Result<(), NetworkError> {
    let (driver, inside) = connect_in(namespace).map_err(NetworkError::Namespace)?;
    for Interface { name, .. } in &request.interfaces {
        // A repeated call finds it moved.
        if let Ok(found) = link(handle, name).await {
            let link = LinkUnspec::new_with_index(found.header.index);
            let moved = link.setns_by_fd(namespace.as_raw_fd()).build();
            set_link(handle, moved, || format!("moving interface {name}")).await?;
        }
    }
    let result = apply(&inside, request).await;
    driver.abort();
    result
}

/// A netlink socket, which is of the namespace that the thread was in which made it.
fn connect_in(namespace: &File) -> io::Result<(JoinHandle<()>, Handle)> {
    let runtime = tokio::runtime::Handle::current();
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().spawn_scoped(scope, || {
            setns(namespace, CloneFlags::CLONE_NEWNET)?;
            let _entered = runtime.enter();
            let (connection, handle, _) = new_connection()?;
            Ok((tokio::spawn(connection), handle))
        })?;
        let made = thread.join();
        made.unwrap_or_else(|_| Err(io::Error::other("a thread of the agent's died")))
    })
}

async fn apply(handle: &Handle, request: &ConfigureNetworkRequest) -> Result<(), NetworkError> {
    for interface in &request.interfaces {
        configure_interface(handle, interface).await?;
    }
    // Routes without a gateway first: they say how to reach the gateways.
    let (direct, via): (Vec<_>, Vec<_>) = request
        .routes
        .iter()
        .partition(|route| route.gateway.is_empty());
    for route in direct.into_iter().chain(via) {
        let name = match (&route.interface, request.interfaces.first()) {
            (name, _) if !name.is_empty() => name,
            (_, Some(first)) => &first.name,
            (_, None) => return Err(NetworkError::NoInterface(String::new())),
        };
        let index = link(handle, name).await?.header.index;
        add_route(handle, route, index).await?;
    }
    Ok(())
}

async fn configure_interface(handle: &Handle, wanted: &Interface) -> Result<(), NetworkError> {
    let name = &wanted.name;
    let action = |what: &str| format!("{what} of interface {name}");
    let current = link(handle, name).await?;
    let index = current.header.index;

    if !wanted.mac.is_empty() {
        let mac = parse_mac(&wanted.mac)?;
        let has = current
            .attributes
            .iter()
            .any(|attribute| matches!(attribute, LinkAttribute::Address(a) if *a == mac));
        if !has {
            // Most drivers want the interface down for this.
            let down = LinkUnspec::new_with_index(index).down();
            set_link(handle, down.build(), || action("taking down")).await?;
            let address = LinkUnspec::new_with_index(index).address(mac);
            set_link(handle, address.build(), || {
                action("setting the MAC address")
            })
            .await?;
        }
    }
    let mut up = LinkUnspec::new_with_index(index).up();
    if wanted.mtu != 0 {
        up = up.mtu(wanted.mtu);
    }
    set_link(handle, up.build(), || action("setting MTU and state")).await?;

    for text in &wanted.addresses {
        let Cidr { address, prefix } = text.parse()?;
        let mut request = handle.address().add(index, address, prefix).replace();
        if address.is_ipv6() {
            // CNI has made sure that the address is free; probing again would delay its use.
            request
                .message_mut()
                .attributes
                .push(AddressAttribute::Flags(AddressFlags::Nodad));
        }
        request
            .execute()
            .await
            .map_err(|error| kernel(action(&format!("adding address {text}")), &error))?;
    }
    Ok(())
}

async fn add_route(handle: &Handle, route: &Route, index: u32) -> Result<(), NetworkError> {
    let action = || {
        format!(
            "adding the route to {} via {:?}",
            route.destination, route.gateway
        )
    };
    let Cidr { address, prefix } = route.destination.parse()?;
    let mut message = RouteMessageBuilder::<IpAddr>::new()
        .destination_prefix(address, prefix)
        .map_err(|error| malformed("a destination", &error.to_string()))?
        .output_interface(index);
    if route.gateway.is_empty() {
        if address.is_ipv4() {
            message = message.scope(RouteScope::Link);
        }
    } else {
        let gateway: IpAddr = route
            .gateway
            .parse()
            .map_err(|_| malformed("an IP address", &route.gateway))?;
        message = message
            .gateway(gateway)
            .map_err(|error| malformed("a gateway for this destination", &error.to_string()))?
            // Some plugins (Calico) give gateways outside of every subnet of the interface.
            .onlink();
    }
    let mut message = message.build();
    // A default route has no destination attribute.
    if prefix == 0 {
        message.attributes.retain(|attribute| {
            !matches!(
                attribute,
                netlink_packet_route::route::RouteAttribute::Destination(_)
            )
        });
        message.header.address_family = if address.is_ipv4() {
            AddressFamily::Inet
        } else {
            AddressFamily::Inet6
        };
    }
    handle
        .route()
        .add(message)
        .replace()
        .execute()
        .await
        .map_err(|error| kernel(action(), &error))
}

async fn link(handle: &Handle, name: &str) -> Result<LinkMessage, NetworkError> {
    let mut links = handle.link().get().match_name(name.to_owned()).execute();
    match links.try_next().await {
        Ok(Some(link)) => Ok(link),
        Ok(None) | Err(_) => Err(NetworkError::NoInterface(name.to_owned())),
    }
}

async fn set_link(
    handle: &Handle,
    message: LinkMessage,
    action: impl FnOnce() -> String,
) -> Result<(), NetworkError> {
    handle
        .link()
        .set(message)
        .execute()
        .await
        .map_err(|error| kernel(action(), &error))
}

fn kernel(action: impl Into<String>, error: &(dyn std::error::Error + 'static)) -> NetworkError {
    let reason = match error.downcast_ref::<rtnetlink::Error>() {
        Some(rtnetlink::Error::NetlinkError(message)) => message.to_io().to_string(),
        _ => error.to_string(),
    };
    NetworkError::Kernel {
        action: action.into(),
        reason,
    }
}

fn malformed(what: &'static str, text: &str) -> NetworkError {
    NetworkError::Malformed {
        what,
        text: text.to_owned(),
    }
}

/// An address and the length of its network's prefix.
#[derive(Debug, PartialEq, Eq)]
struct Cidr {
    address: IpAddr,
    prefix: u8,
}

impl FromStr for Cidr {
    type Err = NetworkError;

    fn from_str(text: &str) -> Result<Self, NetworkError> {
        let parse = || {
            let (address, prefix) = text.split_once('/')?;
            let address: IpAddr = address.parse().ok()?;
            let prefix: u8 = prefix.parse().ok()?;
            let longest = if address.is_ipv4() { 32 } else { 128 };
            (prefix <= longest).then_some(Self { address, prefix })
        };
        parse().ok_or_else(|| malformed("an address in CIDR notation", text))
    }
}

fn parse_mac(text: &str) -> Result<Vec<u8>, NetworkError> {
    let bytes: Option<Vec<u8>> = text
        .split(':')
        .map(|byte| {
            let two_digits = byte.len() == 2 && byte.bytes().all(|b| b.is_ascii_hexdigit());
            two_digits
                .then(|| u8::from_str_radix(byte, 16).ok())
                .flatten()
        })
        .collect();
    bytes
        .filter(|bytes| bytes.len() == 6)
        .ok_or_else(|| malformed("a MAC address", text))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cidr_notation() {
        let parsed: Cidr = "10.88.0.5/16".parse().unwrap();
        assert_eq!(parsed.prefix, 16);
        assert!("fd00::5/64".parse::<Cidr>().is_ok());
        assert!("::/0".parse::<Cidr>().is_ok());
        for text in [
            "10.0.0.1",
            "10.0.0.1/33",
            "fd00::/129",
            "10.0.0/8",
            "/8",
            "1.2.3.4/-1",
            "",
        ] {
            assert!(text.parse::<Cidr>().is_err(), "{text}");
        }
    }

    #[test]
    fn mac_addresses() {
        assert_eq!(
            parse_mac("02:0A:ff:00:10:9c").unwrap(),
            [2, 10, 255, 0, 16, 156]
        );
        for text in [
            "",
            "02:0a:ff:00:10",
            "02:0a:ff:00:10:9c:1",
            "2:a:ff:0:10:9c",
            "+2:0a:ff:00:10:9c",
        ] {
            assert!(parse_mac(text).is_err(), "{text}");
        }
    }
}
