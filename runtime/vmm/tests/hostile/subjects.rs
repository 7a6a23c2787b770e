//! The devices, each with a host around it.

use std::fs::File;
use std::io::{self, IoSlice, Read as _, Write as _};
use std::net::Shutdown;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::fs::FileExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram, UnixListener, UnixStream};
use std::pin::{Pin, pin};
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, Waker};

use nix::sys::socket::{ControlMessage, MsgFlags, recv, send, sendmsg};
use podvisor_vmm::{
    Access, BalloonDevice, BalloonHandle, DeviceEvent, FsDevice, FsHandle, NetDevice, RngDevice,
    Segment, SegmentDisk, SegmentMap, Tap, VirtioDevice, VsockDevice, VsockHandle, VsockListener,
};
use vm_memory::{Bytes as _, GuestAddress};

use crate::driver::{DATA, Driver, MESSAGE, RECORD, Subject, WRITE, le16, le32};

/// A device by its name.
pub fn subject(name: &str) -> Box<dyn Subject> {
    match name {
        "disk" => Box::new(Disk::new()),
        "vsock" => Box::new(Vsock::new()),
        "net" => Box::new(Net::new()),
        "rng" => Box::new(Rng(RngDevice::new())),
        "balloon" => Box::new(Balloon::new()),
        "fs" => Box::new(Fs::new()),
        _ => panic!("no device {name}"),
    }
}

/// A disk of two segments, of which one is read-only.
struct Disk {
    device: SegmentDisk,
    layer: Segment,
}

const LAYER_BYTES: u64 = 64 << 10;

impl Disk {
    fn new() -> Self {
        let map = SegmentMap::new();
        let file = |byte: u8| -> File {
            let file = tempfile::tempfile().unwrap();
            file.write_all_at(&vec![byte; LAYER_BYTES as usize], 0)
                .unwrap();
            file
        };
        let layer = map
            .insert(file(7), 0, LAYER_BYTES, Access::ReadOnly)
            .unwrap();
        map.insert(file(0), 0, LAYER_BYTES, Access::Ephemeral)
            .unwrap();
        Self {
            device: SegmentDisk::new(map),
            layer,
        }
    }

    fn header(kind: u32, sector: u64) -> Vec<u8> {
        [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat()
    }
}

impl Subject for Disk {
    fn device(&mut self) -> &mut dyn VirtioDevice {
        &mut self.device
    }

    fn message(&self, seed: &[u8; RECORD]) -> Vec<u8> {
        let sector = if seed[12] < 240 {
            u64::from(le16(seed, 13)) % 512
        } else {
            u64::from(le32(seed, 13)) << 31
        };
        let mut message = Self::header(u32::from(seed[5]) % 15, sector);
        // What a discard names.
        message.extend(&Self::header(0, sector)[8..]);
        message.extend([seed[14], seed[15] & 1, 0, 0, seed[13] & 1, 0, 0, 0]);
        message
    }

    fn check(&mut self, driver: &mut Driver<'_>) {
        driver.write(MESSAGE, &Self::header(0, self.layer.start / 512));
        let parts = [(MESSAGE, 16, 0), (DATA, 512, WRITE), (DATA + 512, 1, WRITE)];
        assert_eq!(driver.request(self, 0, &parts), 513);
        let mut content = [0; 513];
        driver
            .memory
            .read_slice(&mut content, GuestAddress(DATA))
            .unwrap();
        assert!(content[..512] == [7; 512] && content[512] == 0);
    }
}

/// A vsock device with listeners, processes that dial, and streams that they use.
struct Vsock {
    device: VsockDevice,
    handle: VsockHandle,
    listeners: [VsockListener; 2],
    /// The socket of other processes, and those that wait for an answer on it.
    socket: SocketAddr,
    processes: Vec<UnixStream>,
    dials: Vec<Pin<Box<dyn Future<Output = io::Result<tokio::net::UnixStream>>>>>,
    streams: Vec<UnixStream>,
}

const GUEST_CID: u64 = 3;
const REQUEST: u16 = 1;
const RESET: u16 = 3;

/// What the handles' futures want to be made in. They are only ever looked at once.
static RUNTIME: LazyLock<tokio::runtime::Runtime> = LazyLock::new(|| {
    let mut builder = tokio::runtime::Builder::new_current_thread();
    builder.enable_io().build().unwrap()
});

/// The outcome of a future if it is there.
fn now<T>(future: Pin<&mut (impl Future<Output = T> + ?Sized)>) -> Option<T> {
    let _runtime = RUNTIME.enter();
    match future.poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(outcome) => Some(outcome),
        Poll::Pending => None,
    }
}

impl Vsock {
    fn new() -> Self {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = format!("podvisor-vmm-hostile-{}-{number}", std::process::id());
        let socket = SocketAddr::from_abstract_name(name).unwrap();
        let (device, handle) = VsockDevice::new(GUEST_CID).unwrap();
        handle
            .serve(UnixListener::bind_addr(&socket).unwrap())
            .unwrap();
        Self {
            device,
            listeners: [1023, 1024].map(|port| handle.listen(port)),
            handle,
            socket,
            processes: Vec::new(),
            dials: Vec::new(),
            streams: Vec::new(),
        }
    }

    fn header(ports: (u32, u32), op: u16, length: u32, buffer: u32) -> Vec<u8> {
        let mut header = Vec::with_capacity(44);
        header.extend(GUEST_CID.to_le_bytes());
        header.extend(2_u64.to_le_bytes());
        header.extend(ports.1.to_le_bytes());
        header.extend(ports.0.to_le_bytes());
        header.extend(length.to_le_bytes());
        header.extend(1_u16.to_le_bytes());
        header.extend(op.to_le_bytes());
        header.extend(0_u32.to_le_bytes());
        header.extend(buffer.to_le_bytes());
        header.extend(0_u32.to_le_bytes());
        header
    }

    /// Takes over what was accepted, on either side.
    fn collect(&mut self) {
        for listener in &mut self.listeners {
            while let Some(Some(stream)) = now(pin!(listener.accept())) {
                self.streams.push(stream.into_std().unwrap());
            }
        }
        let streams = &mut self.streams;
        self.dials.retain_mut(|dial| match now(dial.as_mut()) {
            Some(answer) => {
                streams.extend(answer.ok().map(|stream| stream.into_std().unwrap()));
                false
            }
            None => true,
        });
    }

    fn dial(&mut self, port: u32) {
        let handle = self.handle.clone();
        let mut dial = Box::pin(async move { handle.connect(port).await });
        if now(dial.as_mut()).is_none() {
            self.dials.push(dial);
        }
    }

    fn dial_as_process(&mut self, port: u32) {
        if let Ok(mut stream) = UnixStream::connect_addr(&self.socket) {
            stream.set_nonblocking(true).unwrap();
            // An error says that the device has refused.
            let _ = writeln!(stream, "CONNECT {port}");
            self.processes.push(stream);
        }
    }
}

impl Subject for Vsock {
    fn device(&mut self) -> &mut dyn VirtioDevice {
        &mut self.device
    }

    fn host(&mut self, what: u8) {
        self.collect();
        let port = 1024 + u32::from(what >> 4) % 3;
        match what % 8 {
            0 => drop(self.streams.pop()),
            1 => self
                .streams
                .iter_mut()
                .for_each(|stream| drop(stream.write(&[what; 5000]))),
            2 => self
                .streams
                .iter_mut()
                .for_each(|stream| drop(stream.read(&mut vec![0; 50_000]))),
            3 => self
                .streams
                .iter()
                .for_each(|stream| drop(stream.shutdown(Shutdown::Write))),
            4 => self.dial(port),
            5 => self.dial_as_process(port),
            6 => drop(self.dials.pop()),
            _ => drop(self.processes.pop()),
        }
    }

    fn message(&self, seed: &[u8; RECORD]) -> Vec<u8> {
        let host = match seed[12] % 8 {
            0..6 => 1022 + u32::from(seed[12] % 3),
            // What the host dials from.
            _ => (1 << 30) + u32::from(seed[13] % 4),
        };
        let guest = 1024 + u32::from(seed[14] % 3);
        let payload = usize::from(seed[15]);
        let length = if seed[13] < 200 {
            payload as u32
        } else {
            le32(seed, 16) >> (seed[13] % 32)
        };
        let mut message = Self::header(
            (host, guest),
            u16::from(seed[5] % 9),
            length,
            le32(seed, 20),
        );
        message[32] = seed[13] & 3;
        message[40..44].copy_from_slice(&seed[16..20]);
        // Not from this guest, not a stream.
        message[0] ^= u8::from(seed[4] == 0xff);
        message[28] ^= u8::from(seed[4] == 0xfe);
        message.resize(44 + payload, seed[15]);
        message
    }

    fn check(&mut self, driver: &mut Driver<'_>) {
        let port = 77;
        driver.write(MESSAGE, &Self::header((9, port), REQUEST, 0, 4096));
        driver.request(self, 1, &[(MESSAGE, 44, 0)]);
        // What waits for the guest from before comes too.
        for _ in 0..4096 {
            driver.queues[0].push(&[(DATA, 4096, WRITE)]);
            driver.process(self, DeviceEvent::Queue(0));
            let mut header = [0; 44];
            let got = driver.queues[0].used().expect("no packet");
            assert!(got.1 >= 44);
            driver
                .memory
                .read_slice(&mut header, GuestAddress(DATA))
                .unwrap();
            let op = u16::from_le_bytes([header[30], header[31]]);
            if op == RESET && header[16] == 9 && header[20..24] == port.to_le_bytes() {
                return;
            }
        }
        panic!("no answer");
    }
}

/// A network device with a socket in the tap's place.
struct Net {
    device: NetDevice,
    network: UnixDatagram,
}

impl Net {
    fn new() -> Self {
        let (network, ours) = UnixDatagram::pair().unwrap();
        network.set_nonblocking(true).unwrap();
        let tap = Tap::over_socket(ours).unwrap();
        Self {
            device: NetDevice::new(tap, [2, 0, 0, 0, 0, 1], Some(1500)).unwrap(),
            network,
        }
    }

    /// The start of the next frame that the guest has sent.
    fn sent(&self) -> Option<Vec<u8>> {
        let mut frame = [0; 128];
        let length = self.network.recv(&mut frame).ok()?;
        Some(frame[..length].to_vec())
    }
}

impl Subject for Net {
    fn device(&mut self) -> &mut dyn VirtioDevice {
        &mut self.device
    }

    fn host(&mut self, what: u8) {
        if what < 32 {
            while self.sent().is_some() {}
        } else {
            // An error says that the guest has not taken the ones before.
            let length = if what.is_multiple_of(2) {
                72
            } else {
                12 + 257 * usize::from(what)
            };
            let _ = self.network.send(&vec![what; length]);
        }
    }

    fn message(&self, seed: &[u8; RECORD]) -> Vec<u8> {
        let mut message = seed[12..].to_vec();
        message.resize(12 + usize::from(le16(seed, 10)) % 2000, seed[5]);
        message
    }

    fn check(&mut self, driver: &mut Driver<'_>) {
        while self.sent().is_some() {}
        let mut frame = [5; 72];
        driver.write(MESSAGE, &frame);
        driver.request(self, 1, &[(MESSAGE, 72, 0)]);
        assert_eq!(self.sent(), Some(frame.to_vec()));

        driver.queues[0].push(&[(DATA, 2048, WRITE)]);
        driver.process(self, DeviceEvent::Queue(0));
        self.network.send(&frame).unwrap();
        assert!(driver.process(self, DeviceEvent::Wake));
        assert_eq!(driver.queues[0].used(), Some((0, 72)));
        frame[10..12].copy_from_slice(&[1, 0]);
        let mut got = [0; 72];
        driver
            .memory
            .read_slice(&mut got, GuestAddress(DATA))
            .unwrap();
        assert_eq!(got, frame);
    }
}

/// The random number device.
struct Rng(RngDevice);

impl Subject for Rng {
    fn device(&mut self) -> &mut dyn VirtioDevice {
        &mut self.0
    }

    fn message(&self, seed: &[u8; RECORD]) -> Vec<u8> {
        seed.to_vec()
    }

    fn check(&mut self, driver: &mut Driver<'_>) {
        driver.write(DATA, &[0; 64]);
        assert_eq!(driver.request(self, 0, &[(DATA, 64, WRITE)]), 64);
        let mut got = [0; 64];
        driver
            .memory
            .read_slice(&mut got, GuestAddress(DATA))
            .unwrap();
        assert_ne!(got, [0; 64]);
    }
}

/// The balloon.
struct Balloon {
    device: BalloonDevice,
    handle: BalloonHandle,
}

impl Balloon {
    fn new() -> Self {
        let (device, handle) = BalloonDevice::new().unwrap();
        Self { device, handle }
    }
}

impl Subject for Balloon {
    fn device(&mut self) -> &mut dyn VirtioDevice {
        &mut self.device
    }

    fn host(&mut self, what: u8) {
        self.handle.set_target(u64::from(what) << (what % 50));
    }

    /// Numbers of pages, behind the queues and the messages mostly.
    fn message(&self, seed: &[u8; RECORD]) -> Vec<u8> {
        let first = le32(seed, 12) >> (seed[16] % 32);
        let pages = (0..u32::from(seed[17])).map(|at| first.wrapping_add(at * u32::from(seed[18])));
        pages.flat_map(u32::to_le_bytes).collect()
    }

    fn check(&mut self, driver: &mut Driver<'_>) {
        driver.write(DATA, &[1; 4096]);
        driver.write(MESSAGE, &(DATA as u32 / 4096).to_le_bytes());
        assert_eq!(driver.request(self, 0, &[(MESSAGE, 4, 0)]), 0);
        let mut got = [9; 4096];
        driver
            .memory
            .read_slice(&mut got, GuestAddress(DATA))
            .unwrap();
        assert_eq!(got, [0; 4096]);
    }
}

/// The fs device, with a server that answers what it likes.
struct Fs {
    device: FsDevice,
    handle: FsHandle,
    server: OwnedFd,
}

const FUSE_GETATTR: u32 = 3;
/// `FUSE_WRITE` is the next.
const FUSE_READ: u8 = 15;

impl Fs {
    fn new() -> Self {
        let (device, handle) = FsDevice::new().unwrap();
        let server = Self::connect(&handle);
        Self {
            device,
            handle,
            server,
        }
    }

    fn connect(handle: &FsHandle) -> OwnedFd {
        use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let (ours, theirs) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags).unwrap();
        handle.connect(ours);
        theirs
    }

    /// The number of the next request, if there is one.
    fn request(&self) -> Option<[u8; 8]> {
        let mut request = [0; 64];
        match recv(self.server.as_raw_fd(), &mut request, MsgFlags::empty()) {
            Ok(length @ 40..) => {
                let said = u32::from_le_bytes(request[..4].try_into().unwrap());
                assert!(said as usize >= length, "its own length");
                request[8..16].try_into().ok()
            }
            _ => None,
        }
    }

    fn answer(&self, length: u32, number: [u8; 8], rest: usize) {
        let header = [&length.to_le_bytes()[..], &[0; 4], &number].concat();
        let message = [header, vec![7; rest]].concat();
        let _ = send(self.server.as_raw_fd(), &message, MsgFlags::MSG_NOSIGNAL);
    }

    /// Hands a file over to the next request, whatever it is, and answers it.
    fn hand_over(&self) {
        let Some(number) = self.request() else { return };
        let header = [&16_u32.to_le_bytes()[..], &[1, 0, 0, 0], &number].concat();
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&[7; 3000], 0).unwrap();
        let _ = sendmsg::<()>(
            self.server.as_raw_fd(),
            &[IoSlice::new(&header)],
            &[ControlMessage::ScmRights(&[file.as_raw_fd()])],
            MsgFlags::MSG_NOSIGNAL,
            None,
        );
        self.answer(16, number, 0);
    }

    fn header(opcode: u32, length: u32) -> Vec<u8> {
        let mut header = vec![0; 40];
        header[..4].copy_from_slice(&length.to_le_bytes());
        header[4..8].copy_from_slice(&opcode.to_le_bytes());
        header[8..16].copy_from_slice(&[9; 8]);
        header
    }
}

impl Subject for Fs {
    fn device(&mut self) -> &mut dyn VirtioDevice {
        &mut self.device
    }

    fn host(&mut self, what: u8) {
        match what % 8 {
            // The server is gone, or another one.
            0 => self.server = Self::connect(&self.handle),
            1 => {
                let _ = nix::sys::socket::shutdown(
                    self.server.as_raw_fd(),
                    nix::sys::socket::Shutdown::Both,
                );
            }
            // Answers to nothing, cut short, of a length that is not theirs.
            2 => self.answer(16, [what; 8], 0),
            3 => {
                let _ = send(self.server.as_raw_fd(), &[what; 7], MsgFlags::MSG_NOSIGNAL);
            }
            4 => {
                if let Some(number) = self.request() {
                    self.answer(u32::from(what), number, 3);
                }
            }
            5 => self.hand_over(),
            // With the attributes of what has changed.
            6 => {
                if let Some(number) = self.request() {
                    self.answer(16, number, 104);
                }
            }
            // As it should.
            _ => {
                while let Some(number) = self.request() {
                    self.answer(16 + 104, number, 104);
                }
            }
        }
    }

    fn message(&self, seed: &[u8; RECORD]) -> Vec<u8> {
        // Half of them read or write, by one of few handles, where something is.
        let opcode = match seed[5] % 120 {
            opcode @ ..60 => opcode,
            opcode => FUSE_READ + opcode % 2,
        };
        let mut message = Self::header(opcode.into(), le32(seed, 12) >> (seed[16] % 32));
        let number = |at: usize, most: u64| u64::from(le32(seed, at)) % most;
        for number in [number(6, 3), number(8, 4096), number(10, 2048)] {
            message.extend(number.to_le_bytes());
        }
        message.extend(seed);
        message
    }

    fn check(&mut self, driver: &mut Driver<'_>) {
        self.server = Self::connect(&self.handle);
        driver.process(self, DeviceEvent::Wake);
        driver.write(MESSAGE, &Self::header(FUSE_GETATTR, 56));
        driver.queues[1].push(&[(MESSAGE, 56, 0), (DATA, 120, WRITE)]);
        driver.process(self, DeviceEvent::Queue(1));
        let number = self.request().expect("a request");
        self.answer(16 + 104, number, 104);
        assert!(driver.process(self, DeviceEvent::Wake));
        assert_eq!(driver.queues[1].used(), Some((0, 120)));
        let mut got = [0; 120];
        driver
            .memory
            .read_slice(&mut got, GuestAddress(DATA))
            .unwrap();
        assert_eq!(
            got[..16],
            [120, 0, 0, 0, 0, 0, 0, 0, 9, 9, 9, 9, 9, 9, 9, 9]
        );
        assert_eq!(got[16..], [7; 104]);
    }
}
