//! The network of a pod, on the host.
//!
//! A pod has a network namespace of its own in which the CNI plugins make a device, as for any
//! container runtime. The VM is not in that namespace: a tap device in it is what the VMM holds,
//! and traffic control carries every frame between the plugins' device and the tap, both ways. The
//! guest takes over the device's addresses, so to everybody outside it *is* the pod.
//!
//! ```text
//!   bridge, routes …          pod's netns                         VMM
//!        veth ───────────────── eth0 ── tc mirred ── tap0 ──fd── virtio-net ── guest's eth0
//! ```
//!
//! - [`netns`]: network namespaces held by a bind mount, and running code in them.
//! - [`tap`]: the tap device.
//! - [`tc`]: the redirection, both ways.
//! - [`link`]: what the plugins really made: address, MTU, routes of a device.
//! - [`cni`]: the plugins themselves: configuration, ADD, CHECK, DEL, cached results.
//! - [`types`]: what the rest of podvisor sees: [`Attachment`] in, [`PodNetwork`] out.
//!
//! The order in RunPodSandbox: [`netns::create`], [`tap::open`] (the VM can start now), [`Cni::add`],
//! [`tc::mirror`]. The order at the end: the VM's exit (it holds the tap, and with it the
//! namespace), [`Cni::del`], [`netns::delete`]. Every step of the second row may be repeated and
//! does not mind what of the first row never happened. DEL wants the namespace: the bridge plugin
//! (1.1.1) finds the masquerading rules that it has to remove by the addresses on its device.

pub mod cni;
pub mod link;
mod netlink;
pub mod netns;
pub mod tap;
pub mod tc;
pub mod types;

pub use cni::{Cni, CniConfig, CniError, NetworkStatus};
pub use types::{
    Attachment, Bandwidth, Cidr, Dns, PodIdentity, PodInterface, PodNetwork, PortMapping, Protocol,
    Route,
};

/// The plugins' device in the pod's namespace, and the device's name in the guest.
pub const INTERFACE: &str = "eth0";

/// The tap device in the pod's namespace.
pub const TAP: &str = "tap0";
