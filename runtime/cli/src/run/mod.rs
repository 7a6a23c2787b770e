//! `podvisor run`: one container in a pod of its own, from pull to removal.
//!
//! Everything is done through podvisord's socket, as a kubelet would; the one thing CRI cannot tell
//! without polling, the container's exit, comes from the pod's monitor.

mod args;

use std::io;
use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;

use podvisor_proto::cri;

pub use args::RunArgs;

use crate::client::Daemon;
use crate::logs::{Follower, LogError};
use crate::pod::{Exit, Pod};
use crate::signals::Interrupts;
use crate::timeline::Phase;
use crate::{Context, image, pod, text, timeline};

/// Seconds between the stop signal and SIGKILL at the first Ctrl-C; at the second there are none.
const STOP_GRACE_S: i64 = 10;

/// Runs the command to its end. The exit code is the container's.
pub async fn run(context: &Context, args: RunArgs) -> anyhow::Result<ExitCode> {
    let mut interrupts = Interrupts::new()?;
    let daemon = Daemon::connect(&context.socket).await?;
    let image = tokio::select! {
        image = image::ensure(&daemon, &args.image, args.pull, args.quiet) => image?,
        signal = interrupts.next() => return Ok(killed_by(signal)),
    };
    let logs = tempfile::Builder::new().prefix("podvisor-run-").tempdir()?;
    let uid = pod::uid()?;
    let sandbox = args.sandbox_config(&uid, logs.path());
    let mut pod = Pod::new(daemon, context.config.run_dir.clone(), uid);

    let session = session(&args, &image, sandbox, &mut pod, &mut interrupts);
    let result = Box::pin(session).await;

    if args.keep {
        eprintln!(
            "kept: pod {}, log {}",
            text::short_id(pod.id().unwrap_or("(none)")),
            logs.keep().join(args::LOG_PATH).display()
        );
    } else if let Err(error) = pod.remove().await {
        eprintln!("podvisor: the pod is still there: {error}");
    }
    result
}

/// From RunPodSandbox to the last byte of output. Whatever it leaves behind is in `pod`.
async fn session(
    args: &RunArgs,
    image: &str,
    sandbox: cri::PodSandboxConfig,
    pod: &mut Pod,
    interrupts: &mut Interrupts,
) -> anyhow::Result<ExitCode> {
    let started = tokio::select! {
        started = start(args, image, sandbox, pod) => started?,
        signal = interrupts.next() => return Ok(killed_by(signal)),
    };
    match started {
        Started::Running { container, output } => attend(pod, &container, output, interrupts).await,
        Started::Ended(exit) => Ok(exit_code(&exit)),
    }
}

/// A container after StartContainer.
enum Started {
    Running {
        container: String,
        output: Follower,
    },
    /// Its command could not be started; the container says why.
    Ended(Exit),
}

async fn start(
    args: &RunArgs,
    image: &str,
    sandbox: cri::PodSandboxConfig,
    pod: &mut Pod,
) -> anyhow::Result<Started> {
    let begin = Instant::now();
    let elapsed = || begin.elapsed().as_secs_f64() * 1e3;
    pod.run(sandbox.clone(), &args.handler).await?;

    let log = Path::new(&sandbox.log_directory).join(args::LOG_PATH);
    if let Some(directory) = log.parent() {
        std::fs::create_dir_all(directory)?;
    }
    // Before the first byte is written.
    let output = Follower::new(&log)?;
    let before_create = elapsed();
    let create = pod.create(args.container_config(image), sandbox);
    let container = Box::pin(create).await?;
    let before_start = elapsed();
    if let Some(exit) = pod.start(&container).await? {
        return Ok(Started::Ended(exit));
    }
    if args.timeline || !args.quiet {
        let mut phases = timeline::from_info(&pod.info().await?);
        phases.push(Phase {
            name: "create container".to_owned(),
            start_ms: before_create,
            end_ms: before_start,
        });
        phases.push(Phase {
            name: "start container".to_owned(),
            start_ms: before_start,
            end_ms: elapsed(),
        });
        eprint!("{}", timeline::render(&phases));
    }
    Ok(Started::Running { container, output })
}

/// Passes output on and signals in, until the container has ended and its output is complete.
async fn attend(
    pod: &Pod,
    container: &str,
    output: Follower,
    interrupts: &mut Interrupts,
) -> anyhow::Result<ExitCode> {
    let (ended, wait_for_end) = tokio::sync::oneshot::channel::<()>();
    let output = output.follow(tokio::io::stdout(), tokio::io::stderr(), async {
        // An error means that the exit is not known and this function has returned.
        let _ = wait_for_end.await;
    });
    let exit = pod.exit_of(container);
    tokio::pin!(output, exit);

    let mut ended = Some(ended);
    let mut code = None;
    let mut signals = 0;
    loop {
        tokio::select! {
            result = &mut exit, if code.is_none() => {
                code = Some(exit_code(&result?));
                if let Some(ended) = ended.take() {
                    // The other end lives until the output is complete.
                    let _ = ended.send(());
                }
            }
            result = &mut output => match (result, code) {
                (Ok(()), Some(code)) => return Ok(code),
                (Ok(()), None) => anyhow::bail!("the log ended before the container"),
                // Whoever read the output has gone away, as `head` does.
                (Err(LogError::Write(error)), _) if error.kind() == io::ErrorKind::BrokenPipe => {
                    return Ok(killed_by(libc::SIGPIPE));
                }
                (Err(error), _) => return Err(error.into()),
            },
            signal = interrupts.next() => {
                signals += 1;
                match signals {
                    1 => pod.stop_in_background(container, STOP_GRACE_S),
                    2 => pod.stop_in_background(container, 0),
                    _ => return Ok(killed_by(signal)),
                }
            }
        }
    }
}

fn exit_code(exit: &Exit) -> ExitCode {
    // "Completed" and "Error" say no more than the code.
    if !matches!(exit.reason.as_str(), "" | "Completed" | "Error") {
        eprintln!("podvisor: {}: {}", exit.reason, exit.message);
    }
    ExitCode::from(exit.code.clamp(0, 255) as u8)
}

/// The exit code that shells give a process that died of a signal.
fn killed_by(signal: i32) -> ExitCode {
    ExitCode::from((128 + signal) as u8)
}
