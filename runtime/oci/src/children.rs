//! The children of this process: the runtime's commands, which [`Children`] runs; the processes that
//! they leave to us ([`crate::process`]); and orphans, which the processes of a pod without a pid
//! namespace of its own leave.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;
use runc::error::Error;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::Notify;

/// Who waits for which child. A cheap handle.
#[derive(Clone, Debug, Default)]
pub struct Children {
    known: Arc<Mutex<Known>>,
    /// The last command that may leave a child to us has ended.
    settled: Arc<Notify>,
}

#[derive(Debug, Default)]
struct Known {
    awaited: HashSet<u32>,
    /// Commands under way whose children are not known yet.
    starting: usize,
}

/// A command that leaves a child to us is under way.
#[derive(Debug)]
pub struct Starting(Children);

impl Drop for Starting {
    fn drop(&mut self) {
        let mut known = self.0.lock();
        known.starting -= 1;
        if known.starting == 0 {
            self.0.settled.notify_one();
        }
    }
}

/// A child somebody waits for, as long as this lives.
#[derive(Debug)]
pub struct Awaited {
    children: Children,
    pid: u32,
}

impl Drop for Awaited {
    fn drop(&mut self) {
        self.children.lock().awaited.remove(&self.pid);
    }
}

impl Children {
    /// Makes this process the parent of what its descendants leave behind.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn adopt() -> io::Result<Self> {
        nix::sys::prctl::set_child_subreaper(true)?;
        Ok(Self::default())
    }

    /// Says that somebody waits for this child, so that it is not reaped as an orphan. To be called
    /// before the thread that runs [`Children::reap_orphans`] can run, or while [`Starting`] lives.
    pub fn awaited(&self, pid: u32) -> Awaited {
        self.lock().awaited.insert(pid);
        Awaited {
            children: self.clone(),
            pid,
        }
    }

    /// Says that a child will come that somebody will wait for: no child is taken for an orphan as long as
    /// this lives.
    pub fn starting(&self) -> Starting {
        self.lock().starting += 1;
        Starting(self.clone())
    }

    /// Reaps the children that nobody waits for, for ever.
    ///
    /// # Errors
    /// SIGCHLD cannot be received.
    pub async fn reap_orphans(self) -> io::Result<()> {
        let mut ended = signal(SignalKind::child())?;
        loop {
            // Also before the first signal: a child may have ended when nobody listened yet.
            self.reap_ended()?;
            tokio::select! {
                more = ended.recv() => if more.is_none() { return Ok(()) },
                () = self.settled.notified() => {}
            }
        }
    }

    fn reap_ended(&self) -> io::Result<()> {
        if self.lock().starting > 0 {
            return Ok(());
        }
        for pid in children()? {
            if !self.lock().awaited.contains(&pid) {
                // One that lives stays, one that is gone was reaped by its owner.
                let _ = waitpid(Pid::from_raw(pid as i32), Some(WaitPidFlag::WNOHANG));
            }
        }
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        // Single values change: a panic elsewhere leaves it sound.
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Children of all threads of this process (proc_pid_children(5)).
fn children() -> io::Result<Vec<u32>> {
    let mut pids = Vec::new();
    for task in fs::read_dir("/proc/self/task")? {
        let list = fs::read_to_string(task?.path().join("children")).unwrap_or_default();
        pids.extend(
            list.split_whitespace()
                .filter_map(|pid| pid.parse::<u32>().ok()),
        );
    }
    Ok(pids)
}

#[async_trait::async_trait]
impl runc::Spawner for Children {
    /// Runs a command of the runtime's. Dropped, it kills it.
    async fn execute(
        &self,
        mut command: runc::Command,
    ) -> runc::Result<(ExitStatus, u32, String, String)> {
        command.kill_on_drop(true);
        // SAFETY: only system calls between fork and exec.
        unsafe { command.pre_exec(default_signals) };
        let child = command.spawn().map_err(Error::ProcessSpawnFailed)?;
        let pid = child.id().unwrap_or_default();
        let _awaited = self.awaited(pid);
        let done = child.wait_with_output().await;
        let done = done.map_err(Error::InvalidCommand)?;
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        let status = ExitStatus::from_raw(done.status.into_raw());
        Ok((status, pid, text(done.stdout), text(done.stderr)))
    }
}

/// What this process ignores, a container must not: it would inherit it.
fn default_signals() -> io::Result<()> {
    use nix::sys::signal::{SigHandler, Signal, signal};
    for ignored in [Signal::SIGHUP, Signal::SIGINT, Signal::SIGPIPE] {
        // SAFETY: no handler is installed.
        unsafe { signal(ignored, SigHandler::SigDfl) }?;
    }
    Ok(())
}
