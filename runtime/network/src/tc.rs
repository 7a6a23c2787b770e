//! Traffic control: every frame that comes in on one device goes out on the other.
//!
//! Frames are taken at ingress, before the namespace's own network stack, which so neither answers
//! nor forwards anything, although it holds the pod's addresses (the plugins put them there, and
//! CHECK wants to find them). What it could still do is talk: its IPv6 sends router solicitations
//! on the plugins' device for as long as no router answers, and the answers go to the guest. So
//! `accept_ra` is switched off on that device, which ends them and changes no address. Duplicate
//! address detection of the pod's addresses is over when ADD returns (plugins wait for it), and
//! the guest's own cannot collide with it later: the namespace sees no frame of the guest.
//! On the tap the namespace has no IPv6 at all ([`crate::tap::open`]).

use std::fs;
use std::io;
use std::path::Path;

use rtnetlink::{Handle, LinkUnspec};

use crate::link::{self, LinkError};
use crate::netlink::{Netlink, io_error};

/// All protocols, as a filter wants it: network byte order in a field of the host's.
const ALL_PROTOCOLS: u16 = (libc::ETH_P_ALL as u16).to_be();

/// Joins the plugins' device `veth` and the tap `tap`, in the namespace at `netns`: frames are
/// redirected both ways, and the tap gets the MTU of the other.
///
/// May be repeated.
///
/// # Errors
/// One of the devices is not there, or the kernel has no `sch_ingress`, `cls_u32` or `act_mirred`.
pub async fn mirror(netns: &Path, veth: &str, tap: &str) -> Result<(), LinkError> {
    let name = veth.to_owned();
    let netlink = Netlink::connect(netns, move || stop_router_solicitations(&name)).await?;
    let handle = netlink.handle();
    let (veth_index, _, mtu) = link::find(handle, netns, veth).await?;
    let (tap_index, _, _) = link::find(handle, netns, tap).await?;

    let set_mtu = LinkUnspec::new_with_index(tap_index).mtu(mtu).build();
    handle
        .link()
        .set(set_mtu)
        .execute()
        .await
        .map_err(failed(tap, "MTU"))?;
    // Devices that filter multicast by what the namespace joined (macvlan) must pass what the
    // guest joins.
    let all_multicast = LinkUnspec::new_with_index(veth_index)
        .allmulticast(true)
        .build();
    handle
        .link()
        .set(all_multicast)
        .execute()
        .await
        .map_err(failed(veth, "all multicast"))?;

    redirect(handle, veth, veth_index, tap_index).await?;
    redirect(handle, tap, tap_index, veth_index).await
}

/// Everything that comes in on device `from` goes out on device `to`.
async fn redirect(handle: &Handle, name: &str, from: u32, to: u32) -> Result<(), LinkError> {
    let from = from as i32;
    match handle
        .qdisc()
        .add(from)
        .ingress()
        .execute()
        .await
        .map_err(io_error)
    {
        // A plugin's ingress or clsact qdisc serves as well.
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
        result => result.map_err(|source| LinkError::Netlink {
            name: name.to_owned(),
            step: "ingress qdisc (kernel module sch_ingress)",
            source,
        })?,
    }
    handle
        .traffic_filter(from)
        .add()
        .ingress()
        .protocol(ALL_PROTOCOLS)
        .redirect(to)
        .map_err(failed(name, "redirect"))?
        .execute()
        .await
        .map_err(failed(
            name,
            "redirect (kernel modules cls_u32, act_mirred)",
        ))
}

fn failed(name: &str, step: &'static str) -> impl FnOnce(rtnetlink::Error) -> LinkError + use<> {
    let name = name.to_owned();
    move |e| LinkError::Netlink {
        name,
        step,
        source: io_error(e),
    }
}

/// Best effort, as for the tap: without IPv6 there is nothing to stop.
fn stop_router_solicitations(name: &str) {
    let path = format!("/proc/sys/net/ipv6/conf/{name}/accept_ra");
    if let Err(error) = fs::write(&path, "0")
        && error.kind() != io::ErrorKind::NotFound
    {
        tracing::warn!(path, %error, "the pod's namespace goes on soliciting routers");
    }
}
