//! podvisor-fs: a plain FUSE server for one pod's volumes.
//!
//! `podvisor-fs SHARES`, started by podvisord, serves the files below the folder SHARES, and what podvisord mounts there in
//! this process's mount namespace, on a `SOCK_SEQPACKET` that is its standard input: a message is a request or an answer.
//! It ends when the other end, the device in the pod's monitor, is closed.
//!
//! - [`jail`]: what this process gives up before it reads a request
//! - [`serve`]: requests from the socket, answers to it
//! - [`passthrough`]: the file system

mod jail;
mod passthrough;
mod serve;

use std::io::Write as _;
use std::os::fd::AsFd as _;
use std::path::Path;

use anyhow::Context as _;

use passthrough::Passthrough;

fn main() -> anyhow::Result<()> {
    let mut arguments = std::env::args_os().skip(1);
    let (Some(shares), None) = (arguments.next(), arguments.next()) else {
        anyhow::bail!("usage: podvisor-fs SHARES");
    };
    let socket = std::io::stdin().as_fd().try_clone_to_owned()?;
    let descriptors = jail::enter(Path::new(&shares)).context("the jail")?;
    let files = Passthrough::new(Path::new("/"), descriptors).context("the shares")?;
    // podvisord waits for this before it mounts anything here.
    std::io::stdout().write_all(b"\n").context("saying so")?;
    std::io::stdout().flush().context("saying so")?;
    serve::serve(files, socket).context("the socket")
}
