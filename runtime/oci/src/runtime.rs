//! The commands of an OCI runtime, as runc, crun and runsc have them.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use oci_spec::runtime::{LinuxResources, Process as ProcessSpec};
use runc::Runc;
use runc::options::{CreateOpts, DeleteOpts, ExecOpts, GlobalOpts, KillOpts};
use thiserror::Error;
use tokio::time::timeout;

use crate::children::{Awaited, Children};
use crate::process::Process;
use crate::stdio::{Stdio, Streams, Wanted};

/// How long a command may take. On a busy machine a start can take seconds.
const DEADLINE: Duration = Duration::from_secs(30);

/// Longest message of a runtime's that is passed on, bytes.
const MAX_MESSAGE: usize = 2048;

/// Why a command failed.
#[derive(Debug, Error)]
pub enum RuntimeError {
    /// The runtime's own words.
    #[error("{0}")]
    Failed(String),
    /// It did not end.
    #[error("{runtime} {command} took longer than {DEADLINE:?}")]
    Deadline {
        /// Name of the binary.
        runtime: String,
        /// Which command.
        command: &'static str,
    },
    /// Pipes, files, processes.
    #[error("{0}: {1}")]
    Io(&'static str, #[source] io::Error),
}

fn io(what: &'static str) -> impl FnOnce(io::Error) -> RuntimeError {
    move |error| RuntimeError::Io(what, error)
}

/// A process that was started.
#[derive(Debug)]
pub struct Started {
    /// A child of this process's.
    pub process: Process,
    /// Ours to wait for.
    pub awaited: Awaited,
    /// Our ends of its streams.
    pub streams: Streams,
}

/// An OCI runtime with its state in a folder of its own.
#[derive(Debug)]
pub struct Runtime {
    binary: PathBuf,
    /// Its state, its logs, pid files.
    dir: PathBuf,
    children: Children,
}

impl Runtime {
    /// `dir` is made.
    ///
    /// # Errors
    /// The folder cannot be made.
    pub fn new(binary: PathBuf, dir: PathBuf, children: Children) -> io::Result<Self> {
        fs::create_dir_all(dir.join("state"))?;
        Ok(Self {
            binary,
            dir,
            children,
        })
    }

    /// Makes a container from its bundle and starts its process.
    ///
    /// # Errors
    /// See [`RuntimeError`]. Nothing is left then.
    pub async fn run(
        &self,
        id: &str,
        bundle: &Path,
        wanted: Wanted,
    ) -> Result<Started, RuntimeError> {
        let stdio = Stdio::new(wanted, &self.dir, id).map_err(io("streams"))?;
        let pid_file = self.dir.join(format!("{id}.pid"));
        let options = CreateOpts {
            io: stdio.io(),
            pid_file: Some(pid_file.clone()),
            console_socket: stdio.console_socket(),
            detach: true,
            ..CreateOpts::default()
        };
        let _starting = self.children.starting();
        let started = async {
            self.call("run", id, async |runc: Runc| {
                runc.run(id, bundle, Some(&options)).await.map(drop)
            })
            .await?;
            drop(options);
            self.take(&pid_file, stdio).await
        }
        .await;
        if started.is_err() {
            // Whatever it got to; most often nothing.
            let _ = self.delete(id).await;
        }
        started
    }

    /// Starts one more process in a running container. `name` is unique.
    ///
    /// # Errors
    /// See [`RuntimeError`].
    pub async fn exec(
        &self,
        id: &str,
        name: &str,
        process: &ProcessSpec,
        wanted: Wanted,
    ) -> Result<Started, RuntimeError> {
        let stdio = Stdio::new(wanted, &self.dir, name).map_err(io("streams"))?;
        let pid_file = self.dir.join(format!("{name}.pid"));
        let options = ExecOpts {
            io: stdio.io(),
            pid_file: Some(pid_file.clone()),
            console_socket: stdio.console_socket(),
            detach: true,
        };
        let _starting = self.children.starting();
        self.call("exec", name, async |runc: Runc| {
            runc.exec(id, process, Some(&options)).await
        })
        .await?;
        drop(options);
        self.take(&pid_file, stdio).await
    }

    /// Kills all processes of a container, also those of one whose first process has ended.
    ///
    /// # Errors
    /// See [`RuntimeError`].
    pub async fn kill_all(&self, id: &str) -> Result<(), RuntimeError> {
        let options = KillOpts { all: true };
        self.call("kill", id, async |runc: Runc| {
            runc.kill(id, libc::SIGKILL as u32, Some(&options)).await
        })
        .await
    }

    /// Sets limits of a running container.
    ///
    /// # Errors
    /// See [`RuntimeError`].
    pub async fn update(&self, id: &str, resources: &LinuxResources) -> Result<(), RuntimeError> {
        self.call("update", id, async |runc: Runc| {
            runc.update(id, resources).await
        })
        .await
    }

    /// Kills what is left of a container and forgets it.
    ///
    /// # Errors
    /// See [`RuntimeError`].
    pub async fn delete(&self, id: &str) -> Result<(), RuntimeError> {
        let options = DeleteOpts { force: true };
        self.call("delete", id, async |runc: Runc| {
            runc.delete(id, Some(&options)).await
        })
        .await
    }

    /// Runs one command. `name`: for its log, from which the reason of a failure is read, as standard error may
    /// be the container's.
    async fn call(
        &self,
        command: &'static str,
        name: &str,
        run: impl AsyncFnOnce(Runc) -> runc::Result<()>,
    ) -> Result<(), RuntimeError> {
        let log = self.dir.join(format!("{name}.{command}.log"));
        let mut options = GlobalOpts::new()
            .command(&self.binary)
            .root(self.dir.join("state"))
            .log(&log)
            .log_json();
        options.custom_spawner(std::sync::Arc::new(self.children.clone()));
        let runc = options
            .build()
            .map_err(|error| RuntimeError::Failed(format!("{}: {error}", self.binary.display())))?;
        let result = timeout(DEADLINE, run(runc)).await;
        let failed = match result {
            Ok(Ok(())) => None,
            Ok(Err(error)) => Some(RuntimeError::Failed(reason(&log, &error))),
            Err(_) => Some(RuntimeError::Deadline {
                runtime: self.binary.display().to_string(),
                command,
            }),
        };
        let _ = fs::remove_file(&log);
        failed.map_or(Ok(()), Err)
    }

    /// Takes over the process that a command has left.
    async fn take(&self, pid_file: &Path, stdio: Stdio) -> Result<Started, RuntimeError> {
        let text = fs::read_to_string(pid_file);
        let _ = fs::remove_file(pid_file);
        let text = text.map_err(io("the pid file"))?;
        let pid = text.trim().parse().map_err(|_| {
            let error = io::Error::new(io::ErrorKind::InvalidData, format!("{text:?}"));
            RuntimeError::Io("the pid file", error)
        })?;
        let awaited = self.children.awaited(pid);
        let process = Process::of(pid).map_err(io("the process"))?;
        let streams = timeout(DEADLINE, stdio.into_streams()).await;
        let streams = streams.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
        Ok(Started {
            process,
            awaited,
            streams: streams.map_err(io("the terminal"))?,
        })
    }
}

/// The last error in a runtime's log, or else what the command's error says.
fn reason(log: &Path, error: &runc::error::Error) -> String {
    let text = fs::read_to_string(log).unwrap_or_default();
    let message = text.lines().rev().find_map(|line| {
        let entry: serde_json::Value = serde_json::from_str(line).ok()?;
        let message = entry.get("msg")?.as_str()?;
        (entry.get("level")?.as_str()? != "warning").then(|| message.to_owned())
    });
    let mut message = message.unwrap_or_else(|| match error {
        runc::error::Error::CommandFailed { stderr, .. } if !stderr.is_empty() => {
            stderr.trim().to_owned()
        }
        other => other.to_string(),
    });
    message.truncate(message.floor_char_boundary(MAX_MESSAGE));
    message
}
