//! podvisor-monitor: keeper of one pod. It owns the VM, or the containers of a pod that is the host's own,
//! knows what they do, and writes their logs; podvisord may die and come back meanwhile.
//!
//! - [`launch`]: what podvisord hands over at the start
//! - [`vm`]: the VM's life
//! - [`agent`]: the agent in the guest: RPCs with deadlines, the link that keeps its connection
//! - [`pod`]: the sandbox and its containers, and everything callers ask for
//! - [`state`]: what is known, for watchers and in a file
//! - [`log`]: CRI log files
//! - [`console`]: the guest's console
//! - [`service`]: the gRPC service
//! - [`text`]: the guest's words, made harmless
//!
//! One thread runs all of that. Others: a pump for each container with output, the devices of the
//! VM (crate `podvisor-vmm`), and short-lived ones that write the state file. The guest is hostile:
//! what it sends is bounded, and nothing waits for it without a deadline.

mod agent;
mod console;
mod launch;
mod log;
mod pod;
mod service;
mod state;
mod text;
mod vm;

use std::io;
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use podvisor_monitor::agent_calls;
use podvisor_monitor::fd_table::FdTable;
use podvisor_proto::monitor::monitor_server::MonitorServer;
use podvisor_proto::monitor::{HostSpec, SandboxState, Snapshot};
use podvisor_vmm::qemu::TscMeter;
use podvisor_vmm::{Access, FsDevice, NetConfig, SegmentMap, VmConfig, VsockDevice, VsockListener};
use tokio::signal::unix::{SignalKind, signal};
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::Server;
use tower::util::MapFutureLayer;
use tracing::{error, info, warn};
use tracing_subscriber::filter::Targets;
use tracing_subscriber::prelude::*;

use agent::Observer;
use console::Console;
use launch::{Inherited, Runner};
use pod::Pod;
use pod::guest::VmParts;
use pod::host::{Dirs, Host, OwnNamespaces};
use podvisor_oci::children::Children;
use state::{State, now_ns};

/// Address of the guest in vsock; one VM has one vsock device, so all guests have the same.
const GUEST_CID: u64 = 3;

/// For containers that run when SIGTERM comes.
const SIGTERM_GRACE: Duration = Duration::from_secs(10);

/// Calls at a time on podvisord's one connection: execs and attaches are calls for as long as they last, and must leave room
/// for others. (hyper's own limit is 200.)
const MAX_CALLS: u32 = 1024;

/// How long connections may stay open after the last answer.
const CLOSE_DEADLINE: Duration = Duration::from_secs(2);

fn main() -> anyhow::Result<()> {
    let begin_ns = now_ns();
    // Whether KVM works here, asked by podvisord in a process of its own: exit code and one sentence.
    if std::env::args().nth(1).as_deref() == Some("probe-kvm") {
        if let Err(error) = podvisor_vmm::kvm::probe::run() {
            eprintln!("{error}");
            std::process::exit(1);
        }
        return Ok(());
    }
    if std::env::args().nth(1).as_deref() == Some(podvisor_oci::pause::ARGUMENT) {
        return podvisor_oci::pause::run().context("the pod's first process");
    }
    let tsc = TscMeter::start();
    // SAFETY: first thing in the process, no other thread allocates yet. Few arenas and early return
    // of memory: dozens of monitors share a node.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
        libc::mallopt(libc::M_TRIM_THRESHOLD, 64 * 1024);
        libc::mallopt(libc::M_MMAP_THRESHOLD, 64 * 1024);
    }
    let inherited = launch::receive(io::stdin().lock())?;
    start_log(&inherited.log_filter);
    // Fails only for who leads a session already.
    let _ = nix::unistd::setsid();
    ignore_signals();

    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(4)
        .thread_keep_alive(Duration::from_secs(1))
        .thread_stack_size(256 * 1024)
        .build()
        .context("starting the runtime")?;
    let result = runtime.block_on(run(inherited, begin_ns, tsc));
    // Threads that hang in a disk's write do not keep the process.
    runtime.shutdown_background();
    result
}

fn start_log(filter: &str) {
    let filter: Targets = filter.parse().unwrap_or_else(|_| {
        let default = tracing::Level::INFO;
        Targets::new().with_default(default)
    });
    let format = tracing_subscriber::fmt::layer()
        .with_writer(io::stderr)
        .with_ansi(false);
    tracing_subscriber::registry()
        .with(format)
        .with(filter)
        .init();
}

/// A monitor ends by Shutdown or SIGTERM, not with a terminal. Rust has set SIGPIPE to be ignored.
fn ignore_signals() {
    use nix::sys::signal::{SigHandler, Signal, signal};
    for ignored in [Signal::SIGHUP, Signal::SIGINT] {
        // SAFETY: no handler is installed, and nobody relies on the default action.
        if let Err(error) = unsafe { signal(ignored, SigHandler::SigIgn) } {
            warn!(%error, %ignored, "cannot be ignored");
        }
    }
}

async fn run(inherited: Inherited, begin_ns: u64, tsc: TscMeter) -> anyhow::Result<()> {
    let span = tracing::info_span!("pod", sandbox = inherited.sandbox_id);
    let _entered = span.enter();
    let mut terminate = signal(SignalKind::terminate()).context("SIGTERM")?;
    let fds = FdTable::default();
    let initial = Snapshot {
        sandbox_id: inherited.sandbox_id.clone(),
        state: SandboxState::Booting.into(),
        monitor_pid: std::process::id(),
        ..Snapshot::default()
    };
    let state = State::new(initial, inherited.dir);
    let times = (inherited.requested_ns, begin_ns);
    let pod = match inherited.runner {
        Runner::Vm(vm) => start_vm(inherited.sandbox_id, *vm, state, fds.clone(), times, tsc)?,
        Runner::Host(spec) => start_on_host(spec, state, fds.clone(), times)?,
    };
    tokio::spawn(serve_fds(fds, inherited.fd_socket));
    tokio::spawn({
        let pod = Arc::clone(&pod);
        async move {
            while terminate.recv().await.is_some() {
                info!("SIGTERM");
                pod.shutdown(SIGTERM_GRACE).await;
            }
        }
    });
    serve(&pod, inherited.grpc).await
}

/// `times`: when the pod was asked for and when this process began, nanoseconds since the epoch.
fn start_vm(
    id: String,
    vm: launch::Vm,
    state: State,
    fds: FdTable,
    (requested_ns, begin_ns): (u64, u64),
    tsc: TscMeter,
) -> anyhow::Result<Arc<Pod>> {
    podvisor_vmm::seccomp::report_violations();
    let backend = vm::backend(&vm.spec)?;
    let (console, console_writer) = Console::new().context("the console's pipe")?;
    let (vsock_device, vsock) = VsockDevice::new(GUEST_CID).context("vsock")?;
    vsock.serve(vm.vsock).context("the vsock socket")?;
    let agent_connections = vsock.listen(agent::CONTROL_PORT);
    let (fs_device, fs) = FsDevice::new().context("the fs device")?;
    let disk = SegmentMap::new();
    let scratch = disk
        .insert(vm.scratch.into(), 0, vm.scratch_bytes, Access::Ephemeral)
        .context("the scratch file")?;

    let parts = VmParts {
        console,
        disk: disk.clone(),
        fs,
        scratch: podvisor_proto::agent::Segment {
            start: scratch.start,
            length: scratch.length,
        },
        dial: Box::new(move |port| {
            let vsock = vsock.clone();
            Box::pin(async move { vsock.connect(port).await })
        }),
        vcpus: vm.spec.vcpus,
        memory_bytes: vm.spec.memory_bytes,
        max_memory_bytes: vm.spec.max_memory_bytes,
    };
    let pod = Pod::in_vm(state, fds, requested_ns, parts);
    pod.add_phase("monitor start", begin_ns, now_ns());
    let config = VmConfig {
        id,
        vcpus: vm.spec.vcpus,
        memory_bytes: vm.spec.memory_bytes,
        max_memory_bytes: vm.spec.max_memory_bytes,
        kernel: vm.kernel,
        initramfs: vm.initramfs,
        cmdline: vm::kernel_cmdline(&backend, tsc, &vm.spec.cmdline),
        net: vm.tap.map(|tap| NetConfig {
            tap,
            mac: vm.spec.mac,
        }),
        disk,
        vsock: vsock_device,
        fs: fs_device,
        console: console_writer,
    };
    let boot_timeout = vm.boot_timeout;
    tokio::spawn(vm::run(Arc::clone(&pod), config, backend, boot_timeout));
    tokio::spawn(keep_agent(Arc::clone(&pod), agent_connections));
    Ok(pod)
}

/// `times`: as with [`start_vm`].
fn start_on_host(
    spec: HostSpec,
    state: State,
    fds: FdTable,
    (requested_ns, begin_ns): (u64, u64),
) -> anyhow::Result<Arc<Pod>> {
    let children = Children::adopt().context("becoming a subreaper")?;
    let own = OwnNamespaces {
        uts: spec.own_uts,
        ipc: spec.own_ipc,
    };
    let (tell, mut news) = tokio::sync::mpsc::unbounded_channel();
    let dirs = Dirs {
        sandbox: spec.dir.into(),
        writable: spec.writable_dir.into(),
    };
    let host = Host::new(spec.runtime.into(), dirs, own, children.clone(), tell);
    let pod = Pod::on_host(
        state,
        fds,
        requested_ns,
        host.context("the pod's namespaces")?,
    );
    pod.add_phase("monitor start", begin_ns, now_ns());
    let observer = Arc::clone(&pod);
    tokio::spawn(async move {
        while let Some(event) = news.recv().await {
            observer.event(event);
        }
    });
    tokio::spawn(async move {
        if let Err(error) = children.reap_orphans().await {
            error!(%error, "orphans are not reaped any more");
        }
    });
    Ok(pod)
}

async fn keep_agent(pod: Arc<Pod>, connections: VsockListener) {
    let connections = futures_util::stream::unfold(connections, |mut listener| async {
        let stream = listener.accept().await?;
        Some((stream, listener))
    });
    agent::keep_link(std::pin::pin!(connections), &pod).await;
}

async fn serve_fds(fds: FdTable, listener: std::os::fd::OwnedFd) {
    if let Err(error) = fds.serve(listener).await {
        // Containers cannot be created any more; those that run are not harmed.
        error!(%error, "fd.sock broke");
    }
}

/// Serves gRPC until the pod is finished.
async fn serve(pod: &Arc<Pod>, listener: UnixListener) -> anyhow::Result<()> {
    nix::sys::socket::listen(&listener, nix::sys::socket::Backlog::MAXCONN)
        .context("the gRPC socket")?;
    listener.set_nonblocking(true)?;
    let listener = tokio::net::UnixListener::from_std(listener).context("the gRPC socket")?;
    let finished = pod.finished();
    let server = Server::builder()
        .max_concurrent_streams(MAX_CALLS)
        .layer(MapFutureLayer::new(agent_calls::told))
        .add_service(MonitorServer::new(service::Service::new(Arc::clone(pod))))
        .serve_with_incoming_shutdown(UnixListenerStream::new(listener), finished.cancelled());
    let server = std::pin::pin!(server);
    let close_deadline = async {
        finished.cancelled().await;
        tokio::time::sleep(CLOSE_DEADLINE).await;
    };
    tokio::select! {
        served = server => {
            if served.is_err() {
                // Nobody can reach the pod any more, but its containers run: SIGTERM ends it.
                error!(?served, "the gRPC socket broke");
                finished.cancelled().await;
            }
        }
        () = close_deadline => warn!("a caller does not take its last answer"),
    }
    info!("end");
    Ok(())
}
