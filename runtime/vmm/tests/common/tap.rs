//! A tap as the network crate makes it.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};

use libc::{IFF_NO_PI, IFF_TAP, IFF_VNET_HDR, TUNSETIFF, ifreq, ioctl};

/// Opens a tap, `tap0` if there is none, in the calling thread's network namespace; `None`, and the reason printed, if
/// this machine does not let us.
pub fn open_tap() -> Option<OwnedFd> {
    open_named_tap("")
}

/// [`open_tap`], with a name.
pub fn open_named_tap(name: &str) -> Option<OwnedFd> {
    let tun = match File::options().read(true).write(true).open("/dev/net/tun") {
        Ok(tun) => tun,
        Err(error) => {
            println!("SKIPPED: /dev/net/tun: {error}");
            return None;
        }
    };
    // SAFETY: an all-zero ifreq is valid; the kernel picks a name.
    let mut request: ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (IFF_TAP | IFF_NO_PI | IFF_VNET_HDR) as i16;
    // SAFETY: TUNSETIFF takes an ifreq.
    if unsafe { ioctl(tun.as_raw_fd(), TUNSETIFF, &raw mut request) } != 0 {
        println!("SKIPPED: no tap: {}", io::Error::last_os_error());
        return None;
    }
    Some(tun.into())
}
