//! `podvisor`: the command line beside the CRI socket.
//!
//! | module       | what it holds                                                              |
//! |--------------|----------------------------------------------------------------------------|
//! | [`client`]   | gRPC over unix sockets: podvisord, and a pod's monitor; errors for people  |
//! | [`image`]    | has an image pulled, with bars                                             |
//! | [`signals`]  | Ctrl-C and its like                                                        |
//! | [`pod`]      | a pod that a command makes for itself                                      |
//! | [`pods`]     | from what a user types (id, prefix, name) to a sandbox                     |
//! | [`run`]      | `podvisor run`: one container in a pod of its own, from pull to removal    |
//! | [`logs`]     | follows a CRI log file and gives back the bytes the container wrote        |
//! | [`ps`]       | `podvisor ps`                                                              |
//! | [`console`]  | `podvisor console`: the guest's kernel log                                 |
//! | [`check`]    | `podvisor check`: what this machine lacks to run pods                      |
//! | [`memory`]   | what a pod's processes take of the host's memory, by proc(5)              |
//! | [`bench`]    | `podvisor bench`: times and memory of pods, pulls against another runtime  |
//! | [`inspect`]  | `podvisor inspect`: what podvisord and the monitor know of a pod           |
//! | [`timeline`] | the phases of a pod's start                                                |
//! | [`text`]     | tables, colours, units, and guest text made safe for a terminal            |
//!
//! Only a container's bytes, a table or JSON go to standard output; everything said about them goes
//! to standard error.

mod bench;
mod check;
mod client;
mod console;
mod image;
mod inspect;
mod logs;
mod memory;
mod pod;
mod pods;
mod ps;
mod run;
mod signals;
mod text;
mod timeline;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand, ValueEnum};
use podvisor_node::config::{Config, ConfigError};

/// Exit code of a failure of podvisor itself, as docker and podman have it, so that it can be told
/// from a container's.
const EXIT_PODVISOR_FAILED: u8 = 125;

/// Runs each pod in its own virtual machine: the command line.
#[derive(Debug, Parser)]
#[command(name = "podvisor", version, max_term_width = 100)]
struct Cli {
    #[command(flatten)]
    global: GlobalArgs,
    #[command(subcommand)]
    command: Command,
}

/// Options of every command.
#[derive(Debug, Args)]
struct GlobalArgs {
    /// podvisord's configuration file [default: /etc/podvisor/config.toml, if it is there]
    #[arg(long, global = true, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Directory of podvisord's sockets and runtime state [default: as configured]
    #[arg(long, global = true, value_name = "DIR")]
    run_dir: Option<PathBuf>,
    /// Directory of images and state [default: as configured]
    #[arg(long, global = true, value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// podvisord's socket [default: RUN_DIR/podvisor.sock]
    #[arg(long, global = true, value_name = "FILE", env = "PODVISOR_SOCKET")]
    socket: Option<PathBuf>,
    /// How to print what a command reports
    #[arg(long, global = true, value_enum, value_name = "FORMAT", default_value_t = Output::Text)]
    output: Output,
}

/// What every command needs to know.
#[derive(Debug)]
struct Context {
    /// podvisord's configuration, with the directories that options set.
    config: Config,
    /// podvisord's socket.
    socket: PathBuf,
    /// Form of a report.
    output: Output,
}

impl GlobalArgs {
    fn context(self) -> Result<Context, ConfigError> {
        let mut config = Config::load(self.config.as_deref())?;
        if let Some(run_dir) = self.run_dir {
            config.run_dir = run_dir;
        }
        if let Some(data_dir) = self.data_dir {
            config.data_dir = data_dir;
        }
        Ok(Context {
            socket: self.socket.unwrap_or_else(|| config.socket_path()),
            output: self.output,
            config,
        })
    }
}

/// Form of a report.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Output {
    /// For people.
    Text,
    /// One JSON document.
    Json,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run a command in a new pod, show its output, remove the pod, exit with its exit code
    Run(Box<run::RunArgs>),
    /// List pods and their containers
    Ps,
    /// Check whether this machine can run pods; exit code 1 when something needed is missing
    Check(check::CheckArgs),
    /// Measure pods on this machine: times by phase, memory of their processes, pulls
    Bench(Box<bench::BenchArgs>),
    /// Show the kernel log of a pod's virtual machine
    Console(console::ConsoleArgs),
    /// Show everything known of a pod, as JSON
    Inspect(inspect::InspectArgs),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let runtime = match tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
    {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("podvisor: cannot start: {error}");
            return ExitCode::from(EXIT_PODVISOR_FAILED);
        }
    };
    let result = runtime.block_on(dispatch(cli));
    // A read of the terminal or a write to a full pipe must not hold up the end.
    runtime.shutdown_background();
    match result {
        Ok(code) => code,
        Err(error) => {
            eprintln!("podvisor: {error:#}");
            ExitCode::from(EXIT_PODVISOR_FAILED)
        }
    }
}

async fn dispatch(cli: Cli) -> anyhow::Result<ExitCode> {
    let context = &cli.global.context()?;
    match cli.command {
        Command::Run(args) => Box::pin(run::run(context, *args)).await,
        Command::Ps => ps::ps(context).await.map(|()| ExitCode::SUCCESS),
        Command::Check(args) => check::check(context, args).await,
        Command::Bench(args) => Box::pin(bench::bench(context, *args))
            .await
            .map(|()| ExitCode::SUCCESS),
        Command::Console(args) => console::console(context, args)
            .await
            .map(|()| ExitCode::SUCCESS),
        Command::Inspect(args) => inspect::inspect(context, args)
            .await
            .map(|()| ExitCode::SUCCESS),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn the_socket_is_in_the_run_directory_unless_given() {
        let context = |arguments: &[&str]| Cli::parse_from(arguments).global.context().unwrap();
        let empty = tempfile::NamedTempFile::new().unwrap();
        let config = empty.path().to_str().unwrap();
        assert_eq!(
            context(&["podvisor", "--config", config, "--run-dir", "/x", "ps"]).socket,
            PathBuf::from("/x/podvisor.sock")
        );
        assert_eq!(
            context(&["podvisor", "ps", "--config", config, "--socket", "/y.sock"]).socket,
            PathBuf::from("/y.sock")
        );
    }

    #[test]
    fn options_after_the_image_belong_to_the_container() {
        let cli = Cli::parse_from([
            "podvisor", "run", "-e", "A=1", "busybox", "ls", "-e", "--output",
        ]);
        let Command::Run(args) = cli.command else {
            panic!("not run");
        };
        assert_eq!(args.image, "busybox");
        assert_eq!(args.command, ["ls", "-e", "--output"]);
    }
}
