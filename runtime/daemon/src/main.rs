//! podvisord: one CRI v1 endpoint, a virtual machine per pod.

use std::io::IsTerminal;
use std::path::PathBuf;

use clap::Parser;
use podvisor_daemon::{server, trace::ids::Ids};
use podvisor_node::config::Config;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::filter_fn;
use tracing_subscriber::layer::{Layer, SubscriberExt};
use tracing_subscriber::util::SubscriberInitExt;

/// Kubernetes container runtime that gives every pod its own virtual machine.
#[derive(Debug, Parser)]
#[command(name = "podvisord", version)]
struct Flags {
    /// Configuration file [default: /etc/podvisor/config.toml, if it is there]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Sockets and runtime state; wins over the file
    #[arg(long, value_name = "DIR")]
    run_dir: Option<PathBuf>,
    /// Images, database, writable disks; wins over the file
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// Log as JSON, one object a line
    #[arg(long)]
    log_json: bool,
    /// Print the default configuration, every key explained, and end
    #[arg(long)]
    print_default_config: bool,
}

fn main() -> anyhow::Result<()> {
    let flags = Flags::parse();
    if flags.print_default_config {
        print!("{}", podvisor_node::config::SHIPPED);
        return Ok(());
    }
    let mut config = Config::load(flags.config.as_deref())?;
    if let Some(dir) = flags.run_dir {
        config.run_dir = std::path::absolute(dir)?;
    }
    if let Some(dir) = flags.data_dir {
        config.data_dir = std::path::absolute(dir)?;
    }
    let filter = EnvFilter::try_from_default_env().or_else(|_| EnvFilter::try_new(&config.log))?;
    let log = tracing_subscriber::fmt::layer()
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr);
    let log = if flags.log_json {
        log.json().with_filter(filter).boxed()
    } else {
        log.with_filter(filter).boxed()
    };
    let ids =
        (!config.tracing.otlp_endpoint.is_empty()).then(|| Ids.with_filter(filter_fn(Ids::wants)));
    tracing_subscriber::registry().with(log).with(ids).init();
    // oci-client's TLS: two providers in one program would panic at the first connection.
    let _ = rustls::crypto::ring::default_provider().install_default();
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?
        .block_on(server::run(config))
}
