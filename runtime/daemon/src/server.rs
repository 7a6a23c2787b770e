//! From a configuration to a served socket: locks, folders, parts, reconcile, services, end.

use std::fs::File;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::os::unix::net::UnixListener as StdUnixListener;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use nix::fcntl::{Flock, FlockArg};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use podvisor_image::{ImageStore, Limits, Registries};
use podvisor_network::{Cni, CniConfig};
use podvisor_node::backend;
use podvisor_node::config::Config;
use podvisor_oci::rootfs::Layers;
use podvisor_proto::control::control_server::ControlServer;
use podvisor_proto::cri::image_service_server::ImageServiceServer;
use podvisor_proto::cri::runtime_service_server::RuntimeServiceServer;
use tokio::net::{TcpListener, UnixListener};
use tokio::signal::unix::{SignalKind, signal};
use tokio_stream::wrappers::UnixListenerStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::Server;
use tonic_health::pb::health_server::HealthServer;
use tracing::{info, warn};

use crate::daemon::Daemon;
use crate::ids::Names;
use crate::metrics::{self, Metrics};
use crate::pod::Pods;
use crate::services::around::Around;
use crate::services::deadline::Deadline;
use crate::services::later::Later;
use crate::services::metered::Metered;
use crate::services::traced::Traced;
use crate::services::{
    MAX_MESSAGE, control::Control, health::Health, image::Images, runtime::Runtime,
};
use crate::store::Store;
use crate::streaming;
use crate::trace::export::Exporter;

/// How long RPCs in flight may go on after SIGTERM.
const DRAIN: Duration = Duration::from_secs(5);

/// How long the last spans may take to the collector after that.
const FLUSH: Duration = Duration::from_secs(2);

/// Runs podvisord until SIGTERM or SIGINT. Pods live on.
///
/// # Errors
/// Another podvisord has the directories, or something cannot be set up.
pub async fn run(config: Config) -> anyhow::Result<()> {
    make_room_for_descriptors().context("setrlimit")?;
    make_dir(&config.run_dir, 0o711)?;
    let _lock = lock(&config.run_dir)?;
    for dir in ["sandboxes", "netns"] {
        make_dir(&config.run_dir.join(dir), 0o711)?;
    }
    make_dir(&config.data_dir, 0o711)?;
    make_dir(&config.data_dir.join("scratch"), 0o700)?;
    let daemon = Arc::new(build(config).await?);
    for warning in &daemon.warnings {
        warn!("{warning}");
    }
    let dropped = daemon.metrics.spans_dropped.clone();
    let exporter = Exporter::start(&daemon.config.tracing, dropped);
    let exporter = exporter.context("tracing.otlp_endpoint")?;
    daemon.reconcile().await?;
    tokio::spawn(Arc::clone(&daemon).sweep_forever());

    let streaming = streaming::listen(&daemon).await?;
    let address = &daemon.config.metrics.address;
    if !address.is_empty() {
        let listener = TcpListener::bind(address)
            .await
            .with_context(|| format!("metrics.address: cannot listen at {address}"))?;
        tokio::spawn(metrics::serve(listener, Arc::clone(&daemon)));
    }
    let listener = listen(&daemon.config.socket_path())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let traced = Traced {
        enabled: exporter.is_some(),
    };
    let server = Server::builder()
        .layer(Around(traced))
        .layer(Around(Metered(Arc::clone(&daemon))))
        .layer(Around(Deadline))
        .layer(Around(Later))
        .add_service(
            RuntimeServiceServer::new(Runtime::new(Arc::clone(&daemon), streaming))
                .max_decoding_message_size(MAX_MESSAGE)
                .max_encoding_message_size(MAX_MESSAGE),
        )
        .add_service(
            ImageServiceServer::new(Images::new(Arc::clone(&daemon)))
                .max_decoding_message_size(MAX_MESSAGE)
                .max_encoding_message_size(MAX_MESSAGE),
        )
        .add_service(HealthServer::new(Health::new(Arc::clone(&daemon))))
        .add_service(ControlServer::new(Control::new(Arc::clone(&daemon))))
        .serve_with_incoming_shutdown(UnixListenerStream::new(listener), daemon.ending.cancelled());
    let mut server = std::pin::pin!(server);
    info!(socket = %daemon.config.socket_path().display(), "ready");
    tokio::select! {
        result = &mut server => return result.context("gRPC server"),
        _ = terminate.recv() => info!("SIGTERM: pods live on"),
        _ = interrupt.recv() => info!("SIGINT: pods live on"),
    }
    daemon.ending.cancel();
    if tokio::time::timeout(DRAIN, server).await.is_err() {
        warn!("some RPCs did not end in time: a restart undoes what they began");
    }
    let _ = std::fs::remove_file(daemon.config.socket_path());
    if let Some(exporter) = exporter {
        exporter.shut_down(FLUSH).await;
    }
    Ok(())
}

async fn build(config: Config) -> anyhow::Result<Daemon> {
    let store = Store::open(&config.data_dir.join("state.redb"))?;
    let limits = Limits {
        stall_timeout: Duration::from_secs(config.image.stall_timeout_s),
        parallel_layers: config.image.parallel_layers,
        max_layer_bytes: config.image.max_layer_mib << 20,
        ..Limits::default()
    };
    let images = ImageStore::open(
        store.database(),
        &config.data_dir.join("images"),
        Registries::new(&config.image.certs_dir),
        limits,
    )?;
    let cni = Cni::new(CniConfig {
        conf_dir: config.network.conf_dir.clone(),
        plugin_dirs: config.network.plugin_dirs.clone(),
        cache_dir: config.cni_cache_dir(),
        plugin_timeout: Duration::from_secs(config.network.plugin_timeout_s),
    });
    let mut warnings = Vec::new();
    let vmm = backend::Choice::make(&config).await;
    warnings.extend(vmm.warning());
    if !has_cap_sys_resource() {
        warnings.push(
            "no CAP_SYS_RESOURCE: limits cannot be raised and oom_score_adj cannot be lowered"
                .into(),
        );
    }
    Ok(Daemon {
        metrics: Metrics::new(vmm.name()),
        vmm,
        warnings,
        store,
        images,
        layers: Arc::new(Layers::new(config.layers_dir())),
        cni,
        pods: Pods::default(),
        sandbox_names: Names::default(),
        container_names: Names::default(),
        ending: CancellationToken::new(),
        pod_cidr: std::sync::Mutex::default(),
        config,
    })
}

fn make_dir(path: &Path, mode: u32) -> anyhow::Result<()> {
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(mode)
        .create(path)
        .with_context(|| format!("cannot make {}", path.display()))
}

/// Held while podvisord runs; the kernel gives it back however it ends.
fn lock(run_dir: &Path) -> anyhow::Result<Flock<File>> {
    let path = run_dir.join("lock");
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .with_context(|| format!("cannot open {}", path.display()))?;
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => Ok(lock),
        Err((_, nix::errno::Errno::EWOULDBLOCK)) => {
            bail!("another podvisord runs with {}", run_dir.display())
        }
        Err((_, error)) => Err(error).with_context(|| format!("cannot lock {}", path.display())),
    }
}

/// The socket appears under its name only when it is served and nobody but root can connect.
fn listen(path: &Path) -> anyhow::Result<UnixListener> {
    let temporary = path.with_extension("sock.new");
    let _ = std::fs::remove_file(&temporary);
    let listener = StdUnixListener::bind(&temporary)
        .with_context(|| format!("cannot bind {}", temporary.display()))?;
    std::fs::set_permissions(&temporary, std::fs::Permissions::from_mode(0o600))?;
    std::fs::rename(&temporary, path).with_context(|| format!("cannot make {}", path.display()))?;
    listener.set_nonblocking(true)?;
    Ok(UnixListener::from_std(listener)?)
}

/// Room for the descriptors of many pods and streams: as many as may be had. Monitors inherit it.
fn make_room_for_descriptors() -> nix::Result<()> {
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, most, most)
}

fn has_cap_sys_resource() -> bool {
    /// linux/capability.h
    const CAP_SYS_RESOURCE: u64 = 24;
    std::fs::read_to_string("/proc/self/status")
        .ok()
        .and_then(|status| {
            let line = status.lines().find(|line| line.starts_with("CapEff:"))?;
            u64::from_str_radix(line.split_whitespace().nth(1)?, 16).ok()
        })
        .is_some_and(|effective| effective & (1 << CAP_SYS_RESOURCE) != 0)
}
