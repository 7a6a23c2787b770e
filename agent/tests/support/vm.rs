//! The agent in a VM: the guest's kernel, the pod's devices, QEMU without KVM.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use hyper_util::rt::TokioIo;
use podvisor_proto::agent::agent_client::AgentClient;
use podvisor_proto::agent::{ConfigureSandboxRequest, Segment};
use podvisor_vmm::qemu::{self, Accel, QemuConfig, TscMeter};
use podvisor_vmm::{Access, FsDevice, SegmentMap, VmConfig, Vmm, VsockDevice, VsockListener};
use tokio::time::timeout;
use tonic::transport::{Channel, Endpoint};

use super::{Guest, PATIENCE, Streams, command, make_root, sandbox};

const QEMU: &str = "/usr/bin/qemu-system-x86_64";

/// A guest in a VM.
pub struct VmGuest {
    pub guest: Guest,
    pub vmm: Box<dyn Vmm>,
    control: VsockListener,
    /// What the guest has written to its console.
    pub console: Console,
}

/// Text that a thread collects.
#[derive(Clone, Default)]
pub struct Console(Arc<Mutex<Vec<u8>>>);

impl Console {
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.0.lock().unwrap()).into_owned()
    }

    fn collect(&self, mut from: io::PipeReader) {
        let console = self.clone();
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(count @ 1..) = io::Read::read(&mut from, &mut buffer) {
                console.0.lock().unwrap().extend(&buffer[..count]);
            }
        });
    }
}

/// What is not in the repository; says what is missing.
fn prerequisites() -> Option<(PathBuf, PathBuf)> {
    let built = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/guest");
    let (kernel, initramfs) = (built.join("vmlinux"), built.join("initramfs.cpio"));
    for path in [Path::new(QEMU), &kernel, &initramfs] {
        if !path.exists() {
            println!("SKIPPED: {} is not there", path.display());
            return None;
        }
    }
    Some((kernel, initramfs))
}

/// Boots a VM and configures its sandbox. None: a prerequisite is not there.
pub async fn boot() -> Option<VmGuest> {
    let (kernel, initramfs) = prerequisites()?;
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
    make_root(&directory.path().join("root"));
    command("mkfs.erofs", &["--quiet", &path("layer"), &path("root")]);
    File::create(path("scratch"))
        .unwrap()
        .set_len(64 << 20)
        .unwrap();
    command("mkfs.ext4", &["-q", &path("scratch")]);

    let disk = SegmentMap::new();
    let insert = |name: &str, access| {
        let file = File::options()
            .read(true)
            .write(true)
            .open(path(name))
            .unwrap();
        let length = file.metadata().unwrap().len();
        let segment = disk.insert(file, 0, length, access).unwrap();
        Segment {
            start: segment.start,
            length: segment.length,
        }
    };
    let layer = insert("layer", Access::ReadOnly);
    let scratch = insert("scratch", Access::ReadWrite);

    let (device, vsock) = VsockDevice::new(3).unwrap();
    let mut control = vsock.listen(1024);
    let (console_out, console_in) = io::pipe().unwrap();
    let console = Console::default();
    console.collect(console_out);
    let config = VmConfig {
        id: "agent-test".into(),
        vcpus: 1,
        memory_bytes: 256 << 20,
        max_memory_bytes: 0,
        kernel: File::open(kernel).unwrap().into(),
        initramfs: File::open(initramfs).unwrap().into(),
        cmdline: format!(
            "console=ttyS0 quiet reboot=t panic=-1 random.trust_cpu=on no_timer_check noreplace-smp \
             rcupdate.rcu_expedited=1 {}",
            TscMeter::start().tcg_cmdline()
        ),
        net: None,
        disk,
        vsock: device,
        fs: FsDevice::new().unwrap().0,
        console: console_in.into(),
    };
    let qemu = QemuConfig {
        binary: QEMU.into(),
        accel: Accel::Tcg,
    };
    let vmm = qemu::start(config, qemu).await.unwrap();
    let Some(mut client) = accept(&mut control).await else {
        panic!("the guest does not dial: {}", console.text());
    };
    let configuration = ConfigureSandboxRequest {
        time_ns: std::time::UNIX_EPOCH.elapsed().unwrap().as_nanos() as u64,
        ..sandbox(scratch)
    };
    client.configure_sandbox(configuration).await.unwrap();
    Some(VmGuest {
        guest: Guest {
            client,
            layer,
            namespaces: None,
            streams: Streams::Vsock(vsock),
            _keep: Box::new(directory),
        },
        vmm,
        control,
        console,
    })
}

impl VmGuest {
    /// Ends the connection to the agent and takes the next one that it dials.
    pub async fn reconnect(&mut self) {
        // The old connection ends with its last handle: the placeholder has none.
        let nowhere = Endpoint::from_static("http://agent").connect_lazy();
        self.guest.client = AgentClient::new(nowhere);
        self.guest.client = accept(&mut self.control).await.expect("the agent dials");
    }
}

/// The next connection that the agent dials.
async fn accept(control: &mut VsockListener) -> Option<AgentClient<Channel>> {
    let connection = timeout(PATIENCE, control.accept()).await.ok()??;
    let connection = Mutex::new(Some(connection));
    let channel = Endpoint::from_static("http://agent")
        .connect_with_connector(tower::service_fn(move |_| {
            let connection = connection.lock().unwrap().take();
            let connection = connection.ok_or_else(|| io::Error::other("it broke"));
            async { Ok::<_, io::Error>(TokioIo::new(connection?)) }
        }))
        .await
        .unwrap();
    Some(AgentClient::new(channel))
}
