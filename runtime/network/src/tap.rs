//! The tap device that joins a VM to its pod's namespace.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use crate::link;
use crate::netns::{self, NetnsError};

nix::ioctl_write_ptr_bad!(
    /// Makes or joins the device that the request names (linux/if_tun.h).
    tun_set_iff,
    libc::TUNSETIFF,
    libc::ifreq
);

/// What can go wrong with a tap device.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// The pod's namespace cannot be entered.
    #[error(transparent)]
    Netns(#[from] NetnsError),
    /// A step of making the device.
    #[error("tap device {name}: {step}: {source}")]
    Io {
        /// Device name.
        name: String,
        /// What was tried.
        step: &'static str,
        /// Why it failed.
        source: io::Error,
    },
}

/// Makes the tap device `name` in the namespace at `netns`, up, for the VMM to hold.
///
/// Frames on the descriptor carry a virtio-net header (`IFF_VNET_HDR`), 10 bytes until the VMM
/// sets another size; no offloads are on until it sets them. One queue. The device lives as long
/// as the descriptor and keeps the namespace alive as long.
///
/// The host's own IPv6 is off on it: it would send router solicitations and its own address'
/// duplicate detection to the guest.
///
/// # Errors
/// No `/dev/net/tun`, the name is taken, or the namespace is gone.
pub async fn open(netns: &Path, name: &str) -> Result<OwnedFd, TapError> {
    let name = name.to_owned();
    netns::enter(netns, move || open_here(&name)).await?
}

fn open_here(name: &str) -> Result<OwnedFd, TapError> {
    let failed = |step| {
        move |source: io::Error| TapError::Io {
            name: name.to_owned(),
            step,
            source,
        }
    };

    let tun = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open("/dev/net/tun")
        .map_err(failed("open /dev/net/tun"))?;
    attach(&tun, name).map_err(failed("TUNSETIFF"))?;
    disable_ipv6(name);
    link::set_up(name).map_err(failed("up"))?;
    Ok(tun.into())
}

fn attach(tun: &File, name: &str) -> io::Result<()> {
    let mut request = link::ifreq(name)?;
    request.ifr_ifru.ifru_flags =
        (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | libc::IFF_TUN_EXCL) as i16;
    // SAFETY: the descriptor is /dev/net/tun's and `request` is a whole ifreq that outlives the call.
    unsafe { tun_set_iff(tun.as_raw_fd(), &raw const request) }?;
    Ok(())
}

/// Best effort: a kernel without IPv6 has no such file, and a read-only /proc/sys costs the guest
/// no more than a few frames that it ignores.
fn disable_ipv6(name: &str) {
    let path = format!("/proc/sys/net/ipv6/conf/{name}/disable_ipv6");
    if let Err(error) = fs::write(&path, "1")
        && error.kind() != io::ErrorKind::NotFound
    {
        tracing::warn!(path, %error, "the host's own IPv6 stays on for the pod's tap");
    }
}
