//! The tap device, the host's end of the VM's network (Linux, Documentation/networking/tuntap.rst).

use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixDatagram;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use tracing::debug;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_USO4, VIRTIO_NET_F_GUEST_USO6,
    VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_HOST_USO,
};

/// `struct virtio_net_hdr_v1` before each frame, in both directions.
pub(super) const HEADER_BYTES: usize = 12;

/// Largest frame with its header: 64 KiB of IP packet to be segmented, Ethernet's header and a VLAN tag.
pub(super) const MAX_FRAME_BYTES: usize = HEADER_BYTES + 14 + 4 + (64 << 10);

/// Frames that wait in a tap at most: Linux gives it room for 500 unless told otherwise.
const MAX_WAITING: usize = 1024;

const SEGMENTATION: u32 = libc::TUN_F_TSO4 | libc::TUN_F_TSO6;
const UDP_SEGMENTATION: u32 = libc::TUN_F_USO4 | libc::TUN_F_USO6;
const ALL: u32 = libc::TUN_F_CSUM | SEGMENTATION | libc::TUN_F_TSO_ECN | UDP_SEGMENTATION;

nix::ioctl_write_ptr_bad!(set_header_size, libc::TUNSETVNETHDRSZ, libc::c_int);
nix::ioctl_write_int_bad!(set_offload, libc::TUNSETOFFLOAD);

/// Where frames go and come from.
#[derive(Debug)]
pub struct Tap {
    fd: OwnedFd,
    kind: Kind,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// A tap, and whether its kernel (6.2 and later) knows UDP segmentation.
    Tap { udp_segmentation: bool },
    /// A socket.
    Socket,
}

impl Tap {
    /// Prepares a tap that was opened with `IFF_TAP | IFF_NO_PI | IFF_VNET_HDR`.
    ///
    /// # Errors
    /// It is no tap, or its interface is gone.
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        let flags = OFlag::from_bits_retain(fcntl(&fd, FcntlArg::F_GETFL)?);
        fcntl(&fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        let size = HEADER_BYTES as libc::c_int;
        // SAFETY: the request takes a pointer to an int, which outlives the call.
        unsafe { set_header_size(fd.as_raw_fd(), &raw const size) }?;
        // A kernel refuses what it does not know.
        let udp_segmentation = offload(fd.as_fd(), ALL).is_ok();
        offload(fd.as_fd(), 0)?;
        let kind = Kind::Tap { udp_segmentation };
        Ok(Self { fd, kind })
    }

    /// A datagram socket in a tap's place, for tests and benches: a datagram is a frame with its header, nothing is
    /// offloaded.
    ///
    /// # Errors
    /// As of `fcntl(2)`.
    pub fn over_socket(socket: UnixDatagram) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        Ok(Self {
            fd: socket.into(),
            kind: Kind::Socket,
        })
    }

    /// The features of a virtio-net device over this that are about offloads.
    pub(super) fn features(&self) -> u64 {
        let features = 1 << VIRTIO_NET_F_CSUM
            | 1 << VIRTIO_NET_F_GUEST_CSUM
            | 1 << VIRTIO_NET_F_HOST_TSO4
            | 1 << VIRTIO_NET_F_HOST_TSO6
            | 1 << VIRTIO_NET_F_HOST_ECN
            | 1 << VIRTIO_NET_F_GUEST_TSO4
            | 1 << VIRTIO_NET_F_GUEST_TSO6
            | 1 << VIRTIO_NET_F_GUEST_ECN;
        let udp_segmentation = 1 << VIRTIO_NET_F_HOST_USO
            | 1 << VIRTIO_NET_F_GUEST_USO4
            | 1 << VIRTIO_NET_F_GUEST_USO6;
        match self.kind {
            Kind::Tap {
                udp_segmentation: false,
            } => features,
            Kind::Tap { .. } | Kind::Socket => features | udp_segmentation,
        }
    }

    /// Has the tap give what a driver takes that accepted `features`.
    pub(super) fn set_features(&self, features: u64) {
        if self.kind != Kind::Socket
            && let Err(error) = offload(self.fd.as_fd(), offloads(features))
        {
            // Its interface is gone, which shows in what it does with frames.
            debug!(%error, "the tap's offloads stay as they are");
        }
    }

    /// Throws away the frames that wait: they were made for what the last driver had accepted.
    pub(super) fn clear(&self) {
        let mut start = [0; 64];
        for _ in 0..MAX_WAITING {
            // What does not fit is cut off and lost, as all of it is to be.
            if nix::unistd::read(&self.fd, &mut start).is_err() {
                break;
            }
        }
    }

    pub(super) fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// What to tell the tap for a driver that accepted `features`, none that needs another which is not there (virtio 1.2,
/// 5.1.3.1): the kernel would refuse all.
fn offloads(features: u64) -> u32 {
    let accepted = |bit: u32| features & 1 << bit != 0;
    if !accepted(VIRTIO_NET_F_GUEST_CSUM) {
        return 0;
    }
    let mut flags = libc::TUN_F_CSUM;
    if accepted(VIRTIO_NET_F_GUEST_TSO4) {
        flags |= libc::TUN_F_TSO4;
    }
    if accepted(VIRTIO_NET_F_GUEST_TSO6) {
        flags |= libc::TUN_F_TSO6;
    }
    if accepted(VIRTIO_NET_F_GUEST_ECN) && flags & SEGMENTATION != 0 {
        flags |= libc::TUN_F_TSO_ECN;
    }
    if accepted(VIRTIO_NET_F_GUEST_USO4) && accepted(VIRTIO_NET_F_GUEST_USO6) {
        flags |= UDP_SEGMENTATION;
    }
    flags
}

fn offload(fd: BorrowedFd<'_>, flags: u32) -> nix::Result<()> {
    // SAFETY: the request takes a number.
    unsafe { set_offload(fd.as_raw_fd(), flags as libc::c_int) }.map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offloads_need_each_other() {
        let of = |bits: &[u32]| offloads(bits.iter().map(|bit| 1 << bit).sum());
        let (csum, tso4, ecn) = (
            VIRTIO_NET_F_GUEST_CSUM,
            VIRTIO_NET_F_GUEST_TSO4,
            VIRTIO_NET_F_GUEST_ECN,
        );
        assert_eq!(of(&[VIRTIO_NET_F_CSUM, VIRTIO_NET_F_HOST_TSO4]), 0);
        assert_eq!(of(&[tso4, ecn]), 0, "no checksums, no segmentation");
        assert_eq!(of(&[csum, ecn]), libc::TUN_F_CSUM);
        let with_ecn = libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO_ECN;
        assert_eq!(of(&[csum, tso4, ecn]), with_ecn);
        assert_eq!(of(&[csum, VIRTIO_NET_F_GUEST_USO4]), libc::TUN_F_CSUM);
        assert_eq!(offloads(u64::MAX), ALL);
    }
}
