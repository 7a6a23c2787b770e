//! The path of a frame: bridge, veth, redirection, tap and back, with a guest of a few lines at
//! the other end of the tap. As root, on a host made for the test.

mod common;

use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use common::{Host, on_a_host, sh, sh_in};
use nix::sys::socket::{AddressFamily, SockFlag, SockProtocol, SockType, socket};
use podvisor_network::{INTERFACE, PodNetwork, TAP, link, netns, tap, tc};
use tokio::io::unix::AsyncFd;
use tokio::net::UdpSocket;
use tokio::time::timeout;

/// `struct virtio_net_hdr` before every frame (linux/virtio_net.h), the size until it is changed.
const VNET_HEADER: usize = 10;
const ETHERNET_HEADER: usize = 14;

/// What the guest has seen.
#[derive(Debug, Default)]
struct Seen {
    echo_requests: usize,
    longest_frame: usize,
    sources: Vec<[u8; 6]>,
}

/// Answers ARP for its address, and pings, with the payload turned round: nobody else does that.
struct Guest {
    tap: AsyncFd<OwnedFd>,
    mac: [u8; 6],
    ip: [u8; 4],
    seen: Arc<Mutex<Seen>>,
}

impl Guest {
    fn boot(tap: OwnedFd, network: &PodNetwork) -> Arc<Mutex<Seen>> {
        let mac = parse_mac(&network.interface.mac);
        let std::net::IpAddr::V4(ip) = network.ips[0] else {
            panic!("{:?}", network.ips)
        };
        let seen = Arc::new(Mutex::new(Seen::default()));
        let guest = Self {
            // SAFETY: an OwnedFd is one and the same open descriptor until it is dropped.
            tap: unsafe { AsyncFd::register(tap) }.unwrap(),
            mac,
            ip: ip.octets(),
            seen: Arc::clone(&seen),
        };
        tokio::spawn(guest.run());
        seen
    }

    async fn run(self) {
        let mut buffer = vec![0; 70_000];
        loop {
            let mut ready = self.tap.readable().await.unwrap();
            while let Ok(n) = nix::unistd::read(self.tap.get_ref(), &mut buffer) {
                if let Some(answer) = self.answer(&buffer[VNET_HEADER..n]) {
                    let message = [&[0; VNET_HEADER], answer.as_slice()].concat();
                    nix::unistd::write(self.tap.get_ref(), &message).unwrap();
                }
            }
            ready.clear_ready();
        }
    }

    fn answer(&self, frame: &[u8]) -> Option<Vec<u8>> {
        let mut seen = self.seen.lock().unwrap();
        seen.sources.push(frame[6..12].try_into().unwrap());
        seen.longest_frame = seen.longest_frame.max(frame.len());
        let mut answer = frame.to_vec();
        answer[..6].copy_from_slice(&frame[6..12]);
        answer[6..12].copy_from_slice(&self.mac);
        let body = &mut answer[ETHERNET_HEADER..];
        match (&frame[12..14], frame.get(ETHERNET_HEADER + 9)) {
            // ARP request (operation 1) for us.
            ([0x08, 0x06], _) if body[7] == 1 && body[24..28] == self.ip => {
                body[7] = 2;
                let asking: [u8; 10] = body[8..18].try_into().unwrap();
                body[8..14].copy_from_slice(&self.mac);
                body[14..18].copy_from_slice(&self.ip);
                body[18..28].copy_from_slice(&asking);
                Some(answer)
            }
            // ICMP echo request in an IPv4 packet that is whole.
            ([0x08, 0x00], Some(1)) if body[16..20] == self.ip && body[20] == 8 => {
                seen.echo_requests += 1;
                let length = usize::from(u16::from_be_bytes([body[2], body[3]]));
                let packet = &mut body[..length];
                let asking: [u8; 4] = packet[12..16].try_into().unwrap();
                packet[12..16].copy_from_slice(&self.ip);
                packet[16..20].copy_from_slice(&asking);
                let icmp = &mut packet[20..];
                icmp[0] = 0;
                icmp[8..].reverse();
                set_checksum(icmp);
                Some(answer)
            }
            _ => None,
        }
    }
}

fn parse_mac(text: &str) -> [u8; 6] {
    let bytes: Vec<u8> = text
        .split(':')
        .map(|b| u8::from_str_radix(b, 16).unwrap())
        .collect();
    bytes.try_into().unwrap()
}

/// RFC 1071, into the place where ICMP has it.
fn set_checksum(icmp: &mut [u8]) {
    icmp[2..4].fill(0);
    let sum: u32 = icmp
        .chunks(2)
        .map(|pair| u32::from(pair[0]) << 8 | pair.get(1).map_or(0, |b| u32::from(*b)))
        .sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    let folded = (folded & 0xffff) + (folded >> 16);
    icmp[2..4].copy_from_slice(&(!(folded as u16)).to_be_bytes());
}

/// Pings from the host, and gives the payloads of all answers until none comes for a while.
async fn ping(target: Ipv4Addr, payload: &[u8]) -> Vec<Vec<u8>> {
    let icmp = socket(
        AddressFamily::Inet,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
        SockProtocol::Icmp,
    )
    .unwrap();
    // The standard library has no raw sockets; sending and receiving is the same.
    let icmp = UdpSocket::from_std(icmp.into()).unwrap();
    let mut request = [&[8, 0, 0, 0, 0x12, 0x34, 0, 1], payload].concat();
    set_checksum(&mut request);
    icmp.send_to(&request, (target, 0)).await.unwrap();

    let mut answers = Vec::new();
    // The first may wait for ARP; a second one, which is an error, would come with the first.
    let mut patience = Duration::from_secs(20);
    let mut packet = [0; 4096];
    while let Ok(received) = timeout(patience, icmp.recv_from(&mut packet)).await {
        let (n, _) = received.unwrap();
        // An echo reply to us, after an IP header without options.
        if packet[20] == 0 && packet[24..26] == [0x12, 0x34] {
            answers.push(packet[28..n].to_vec());
            patience = Duration::from_millis(300);
        }
    }
    answers
}

async fn guest_takes_over(host: Host) {
    host.write_network("1.0.0", &[]);
    let (cni, pod) = (host.cni(), host.pod("a1").await);
    // As in RunPodSandbox: the tap is there, and held by a VM, before the plugins run.
    let tap = tap::open(&pod.netns, TAP).await.unwrap();
    let network = cni.add(&pod).await.unwrap();
    let seen = Guest::boot(tap, &network);
    tc::mirror(&pod.netns, INTERFACE, TAP).await.unwrap();

    let own = link::observe(&pod.netns, TAP).await.unwrap();
    assert_eq!(own.mtu, network.interface.mtu);
    assert!(own.addresses.is_empty(), "{:?}", own.addresses);
    let target = Ipv4Addr::new(10, 77, 0, 2);
    let payload: Vec<u8> = (0..=255).collect();
    let answers = ping(target, &payload).await;
    assert_eq!(answers.len(), 1, "answers");
    assert!(
        answers[0].iter().eq(payload.iter().rev()),
        "the guest's answer"
    );
    // A second redirection changes nothing for the worse.
    tc::mirror(&pod.netns, INTERFACE, TAP).await.unwrap();
    assert_eq!(ping(target, &payload).await, answers);
    // Frames as long as the MTU allows.
    let long = vec![7; 1400 - 20 - 8];
    assert_eq!(ping(target, &long).await, [long]);

    {
        let seen = seen.lock().unwrap();
        assert_eq!(seen.echo_requests, 3);
        assert_eq!(seen.longest_frame, 1400 + ETHERNET_HEADER);
        // The namespace's own stack says nothing to the guest.
        let own = [parse_mac(&own.mac), parse_mac(&network.interface.mac)];
        assert!(
            own.iter().all(|mac| !seen.sources.contains(mac)),
            "{seen:?}"
        );
    }

    cni.check("a1").await.unwrap();
    cni.del("a1").await.unwrap();
    host.assert_detached();
}

#[test]
fn the_guest_is_the_pod() {
    on_a_host(guest_takes_over);
}

#[test]
fn a_tap_goes_with_its_descriptor() {
    on_a_host(|host| async move {
        let pod = host.pod("a1").await;
        let tap = tap::open(&pod.netns, TAP).await.unwrap();
        let shown = sh_in(&pod.netns, "ip -d -o link show tap0").await;
        assert!(
            shown.contains("vnet_hdr on") && shown.contains("persist off"),
            "{shown}"
        );
        assert!(shown.contains("UP"), "{shown}");
        assert!(
            tap::open(&pod.netns, TAP).await.is_err(),
            "the name is taken"
        );
        assert!(!sh("ip -o link show").contains("tap0"), "on the host");
        drop(tap);
        let shown = sh_in(&pod.netns, "ip -o link show").await;
        assert!(!shown.contains("tap0"), "{shown}");
    });
}

#[test]
fn devices_that_are_not_there() {
    on_a_host(|host| async move {
        let pod = host.pod("a1").await;
        let error = tc::mirror(&pod.netns, INTERFACE, TAP).await.unwrap_err();
        assert!(matches!(error, link::LinkError::Missing { .. }), "{error}");
        let nowhere = host.netns("a2");
        assert!(tap::open(&nowhere, TAP).await.is_err());
        assert!(link::observe(&nowhere, INTERFACE).await.is_err());
        // A file that is no namespace.
        std::fs::write(&nowhere, "").unwrap();
        assert!(netns::enter(&nowhere, || ()).await.is_err());
        assert!(!netns::is_namespace(&nowhere) && netns::is_namespace(&pod.netns));
        assert!(netns::create(&nowhere).await.is_err(), "somebody's file");
        netns::delete(&nowhere).await.unwrap();
        // A namespace mounted twice, and the loopback device is up in a new one.
        assert!(sh_in(&pod.netns, "ip -o link show lo").await.contains("UP"));
        sh(&format!("mount --bind {0} {0}", pod.netns.display()));
        netns::delete(&pod.netns).await.unwrap();
        assert!(!pod.netns.exists());
    });
}
