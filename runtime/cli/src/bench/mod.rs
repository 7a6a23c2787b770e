//! `podvisor bench`: what a user of the product waits for and pays.
//!
//! - [`pods`]: pods one after the other and in parallel, by RPC and by phase; memory while they run.
//! - [`throughput`]: bytes a second between a pod and its host.
//! - [`pull`]: pull and unpack, against another CRI runtime.
//! - [`stats`], [`report`]: samples to numbers, numbers to tables and JSON.
//!
//! Everything is measured from outside, through the CRI socket, as a kubelet would meet it.

mod pods;
mod pull;
mod report;
mod stats;
mod throughput;

use std::path::{Path, PathBuf};

use anyhow::Context as _;
use podvisor_node::config::Config;
use podvisor_proto::cri;

use crate::client::{self, Daemon};
use crate::image::{self, Pull};
use crate::signals::Interrupts;
use crate::{Context, Output, pod};
use pods::{AGAINST, Bench, SERIAL};
use report::{Machine, Report};
use stats::Samples;

/// Options of `podvisor bench`.
#[derive(Debug, clap::Args)]
pub struct BenchArgs {
    /// Pods, one after the other and again in parallel
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = at_least_one)]
    pods: usize,
    /// Pods that are started at a time in the second part; 0 leaves that out, and memory with it
    #[arg(long, value_name = "P", default_value_t = 4)]
    parallel: usize,
    /// Configuration of another podvisord, whose pods take turns with the first part's
    #[arg(long, value_name = "CONFIG")]
    against: Option<PathBuf>,
    /// Containers in each pod at last, to see what each further one costs the pod's monitor
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = at_least_one)]
    containers: usize,
    /// Also measure how fast bytes move between a pod and its host
    #[arg(long)]
    throughput: bool,
    /// Image of the pods; must have a shell. Pulled if it is not there
    #[arg(long, default_value = "busybox")]
    image: String,
    /// Also measure the pull of this image, cold
    #[arg(long, value_name = "IMAGE")]
    pull: Option<String>,
    /// CRI socket of another runtime to pull with by turns
    #[arg(long, value_name = "SOCKET", requires = "pull")]
    pull_against: Option<PathBuf>,
    /// Pulls with each runtime
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = at_least_one)]
    pull_rounds: usize,
    /// Write the results to this file, as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Print ratios to the results in this file
    #[arg(long, value_name = "FILE", overrides_with = "compare")]
    compare: Option<PathBuf>,
}

fn at_least_one(word: &str) -> Result<usize, String> {
    match word.parse() {
        Ok(count) if count > 0 => Ok(count),
        _ => Err("not a number from 1".to_owned()),
    }
}

/// Measures, and reports. Whatever way it ends, its pods are removed.
pub async fn bench(context: &Context, args: BenchArgs) -> anyhow::Result<()> {
    // Before the minutes that the rest takes.
    let earlier = args.compare.as_deref().map(read_report).transpose()?;
    let mut interrupts = Interrupts::new()?;
    let mut daemon = Daemon::connect(&context.socket).await?;
    let label = pod::uid()?;

    let measured = tokio::select! {
        measured = Box::pin(measure(context, &args, &daemon, &label)) => measured,
        _ = interrupts.next() => Err(anyhow::anyhow!("interrupted")),
    };
    if measured.is_err()
        && let Err(error) = pod::remove_all(&daemon, &label).await
    {
        eprintln!("podvisor: the pods are still there: {error}");
    }
    let samples = measured?;

    let machine = Machine::here(version(&mut daemon).await?);
    let (backend, samples) = samples;
    let report = Report::new(machine, backend, args.pods, args.parallel, &samples);
    let json = serde_json::to_string_pretty(&report)?;
    if let Some(path) = &args.json {
        std::fs::write(path, &json).with_context(|| format!("cannot write {}", path.display()))?;
    }
    match context.output {
        Output::Json => println!("{json}"),
        Output::Text => print!("{}", report.render()),
    }
    if let Some(earlier) = earlier {
        print!("\n{}", report.compare(&earlier));
    }
    Ok(())
}

async fn measure(
    context: &Context,
    args: &BenchArgs,
    daemon: &Daemon,
    label: &str,
) -> anyhow::Result<(String, Samples)> {
    let mut samples = Samples::default();
    let bench = Bench {
        daemon: daemon.clone(),
        socket: context.socket.clone(),
        run_dir: context.config.run_dir.clone(),
        label: label.to_owned(),
        image: image::ensure(daemon, &args.image, Pull::Missing, false).await?,
    };
    let other = match &args.against {
        Some(path) => Some(other_bench(path, args, label).await?),
        None => None,
    };
    eprintln!("warming up");
    let backend = bench.warm_up().await?;
    let mut turns = vec![(SERIAL, &bench)];
    if let Some(other) = &other {
        other.warm_up().await?;
        turns.push((AGAINST, other));
    }
    eprintln!("{} pods, one by one, on {backend}", args.pods);
    for done in 1..=args.pods {
        for (group, bench) in &turns {
            samples.append(Box::pin(bench.one(group, args.throughput)).await?);
        }
        progress(done);
    }
    eprintln!();
    if args.parallel > 0 {
        eprintln!("{} pods, {} at a time", args.pods, args.parallel);
        let parallel = bench.parallel(args.pods, args.parallel, args.containers);
        samples.append(Box::pin(parallel).await?);
    }

    if let Some(image) = &args.pull {
        let other = match &args.pull_against {
            Some(socket) => Some(Daemon::connect(socket).await?),
            None => None,
        };
        let mut runtimes = vec![(pull::PODVISOR, daemon)];
        runtimes.extend(other.as_ref().map(|other| (pull::OTHER, other)));
        eprintln!("{} pulls of {image} with each runtime", args.pull_rounds);
        let pulls = pull::compare(&runtimes, image, args.pull_rounds, progress);
        samples.append(pulls.await?);
        eprintln!();
    }
    Ok((backend, samples))
}

/// The podvisord that takes turns.
async fn other_bench(config: &Path, args: &BenchArgs, label: &str) -> anyhow::Result<Bench> {
    let config = Config::load(Some(config))?;
    let socket = config.socket_path();
    let daemon = Daemon::connect(&socket).await?;
    Ok(Bench {
        image: image::ensure(&daemon, &args.image, Pull::Missing, false).await?,
        daemon,
        socket,
        run_dir: config.run_dir,
        label: label.to_owned(),
    })
}

fn progress(done: usize) {
    eprint!(" {done}");
}

async fn version(daemon: &mut Daemon) -> Result<String, client::ClientError> {
    let request = client::within(client::CALL, cri::VersionRequest::default());
    let response = daemon.runtime.version(request).await;
    Ok(response
        .map_err(client::failed("Version"))?
        .into_inner()
        .runtime_version)
}

fn read_report(path: &Path) -> anyhow::Result<Report> {
    let text =
        std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    serde_json::from_str(&text).with_context(|| format!("{} is no report", path.display()))
}
