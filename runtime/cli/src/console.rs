//! `podvisor console`: the kernel log of a pod's virtual machine, from its monitor.

use std::io::IsTerminal;

use podvisor_proto::monitor::ConsoleRequest;
use tokio::io::AsyncWriteExt;

use crate::{Context, client, pods, text};

/// Options of `podvisor console`.
#[derive(Debug, clap::Args)]
pub struct ConsoleArgs {
    /// Pod: its id, the beginning of its id, its name or NAMESPACE/NAME
    pod: String,
    /// Go on with what the kernel says from now on
    #[arg(short, long)]
    follow: bool,
}

/// Prints what the monitor keeps of the guest's console. Guest text is cleaned for a terminal, and
/// passed on as it is to a file or pipe.
pub async fn console(context: &Context, args: ConsoleArgs) -> anyhow::Result<()> {
    let id = pods::resolve(&context.socket, &context.config.run_dir, &args.pod).await?;
    let mut chunks = client::monitor(&context.config.run_dir, &id)
        .await?
        .console(ConsoleRequest {
            follow: args.follow,
        })
        .await
        .map_err(client::failed("Console"))?
        .into_inner();
    let clean = std::io::stdout().is_terminal();
    let mut stdout = tokio::io::stdout();
    while let Some(chunk) = chunks.message().await.map_err(client::failed("Console"))? {
        if clean {
            stdout.write_all(&text::printable(&chunk.data)).await?;
        } else {
            stdout.write_all(&chunk.data).await?;
        }
        stdout.flush().await?;
    }
    Ok(())
}
