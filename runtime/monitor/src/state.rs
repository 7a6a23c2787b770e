//! What the monitor knows, in one place: a [`Snapshot`] that every change replaces, that watchers
//! see at once and that is written to the file `state` in the sandbox's folder.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nix::fcntl::{OFlag, openat, renameat};
use nix::sys::stat::Mode;
use podvisor_proto::monitor::{Container, ContainerState, SandboxState, Snapshot};
use prost::Message;
use tokio::sync::watch;
use tokio::time::timeout;
use tracing::error;

/// The state file, and the one that becomes it.
const FILE: &str = "state";
const TEMPORARY_FILE: &str = "state.tmp";

/// How long [`State::saved`] waits for a disk.
const SAVE_DEADLINE: Duration = Duration::from_secs(5);

/// Nanoseconds since the epoch, host clock.
pub fn now_ns() -> u64 {
    let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH);
    since_epoch.map_or(0, |duration| duration.as_nanos() as u64)
}

/// The state. A cheap handle.
#[derive(Clone)]
pub struct State {
    current: Arc<watch::Sender<Snapshot>>,
    /// None until the first write.
    saved: watch::Receiver<Option<Saved>>,
}

/// How the last write of the file ended.
#[derive(Clone, Debug)]
struct Saved {
    revision: u64,
    error: Option<Arc<io::Error>>,
}

impl State {
    /// Starts with `initial`, and starts to keep the file in the folder `dir` up to date.
    /// Must be called in a tokio runtime.
    pub fn new(initial: Snapshot, dir: OwnedFd) -> Self {
        let (current, changes) = watch::channel(initial);
        let (report, saved) = watch::channel(None);
        tokio::spawn(keep_file(changes, dir, report));
        Self {
            current: Arc::new(current),
            saved,
        }
    }

    /// A copy of the whole state.
    pub fn snapshot(&self) -> Snapshot {
        self.current.borrow().clone()
    }

    /// Looks at the state. `look` must not call back.
    pub fn read<R>(&self, look: impl FnOnce(&Snapshot) -> R) -> R {
        look(&self.current.borrow())
    }

    /// Changes the state. `change` must not call back.
    pub fn update(&self, change: impl FnOnce(&mut Snapshot)) {
        self.current.send_modify(|snapshot| {
            change(snapshot);
            snapshot.revision += 1;
        });
    }

    /// Changes one container, if it is there and `change` wants to (returns true).
    pub fn update_container(&self, id: &str, change: impl FnOnce(&mut Container) -> bool) {
        self.current.send_if_modified(|snapshot| {
            let container = snapshot.containers.iter_mut().find(|c| c.id == id);
            let changed = container.is_some_and(change);
            snapshot.revision += u64::from(changed);
            changed
        });
    }

    /// State of a container; `None` when there is none of that id.
    pub fn container_state(&self, id: &str) -> Option<ContainerState> {
        self.read(|snapshot| container_state(snapshot, id))
    }

    /// State of the sandbox.
    pub fn sandbox_state(&self) -> SandboxState {
        self.read(Snapshot::state)
    }

    /// Sees the current state and every later one (changes may be merged).
    pub fn subscribe(&self) -> watch::Receiver<Snapshot> {
        self.current.subscribe()
    }

    /// Waits until `condition` holds.
    pub async fn wait_for(&self, condition: impl FnMut(&Snapshot) -> bool) {
        // Fails only when the sender is gone, and `self` holds it.
        let _ = self.current.subscribe().wait_for(condition).await;
    }

    /// Waits until container `id` has ended or is no more.
    pub async fn wait_exited(&self, id: &str) {
        self.wait_for(|snapshot| {
            matches!(
                container_state(snapshot, id),
                None | Some(ContainerState::Exited)
            )
        })
        .await;
    }

    /// Waits until the file holds the current state or a later one.
    ///
    /// # Errors
    /// The last write failed, or it takes too long.
    pub async fn saved(&self) -> io::Result<()> {
        let revision = self.read(|snapshot| snapshot.revision);
        let mut saved = self.saved.clone();
        let wait = saved.wait_for(|saved| saved.as_ref().is_some_and(|s| s.revision >= revision));
        match timeout(SAVE_DEADLINE, wait).await {
            Err(_) => Err(io::ErrorKind::TimedOut.into()),
            Ok(Err(_)) => Err(io::ErrorKind::BrokenPipe.into()),
            Ok(Ok(saved)) => match saved.as_ref().and_then(|saved| saved.error.as_ref()) {
                Some(error) => Err(io::Error::new(error.kind(), Arc::clone(error))),
                None => Ok(()),
            },
        }
    }
}

fn container_state(snapshot: &Snapshot, id: &str) -> Option<ContainerState> {
    let container = snapshot.containers.iter().find(|c| c.id == id);
    container.map(Container::state)
}

/// Writes every state, in order; those that come while one is written are merged.
async fn keep_file(
    mut changes: watch::Receiver<Snapshot>,
    dir: OwnedFd,
    report: watch::Sender<Option<Saved>>,
) {
    let dir = Arc::new(dir);
    changes.mark_changed(); // The initial state is written, too.
    while changes.changed().await.is_ok() {
        let (revision, bytes) = {
            let snapshot = changes.borrow_and_update();
            (snapshot.revision, snapshot.encode_to_vec())
        };
        let target = Arc::clone(&dir);
        let write = tokio::task::spawn_blocking(move || write_file(&target, &bytes));
        let result = write
            .await
            .unwrap_or_else(|panic| Err(io::Error::other(panic)));
        if let Err(error) = &result {
            // The next change tries again.
            error!(%error, revision, "the state file cannot be written");
        }
        report.send_replace(Some(Saved {
            revision,
            error: result.err().map(Arc::new),
        }));
    }
}

/// Replaces the file, so that a reader at any time, also after a crash, sees a whole state.
fn write_file(dir: &OwnedFd, bytes: &[u8]) -> io::Result<()> {
    let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_TRUNC | OFlag::O_CLOEXEC;
    let mode = Mode::S_IRUSR | Mode::S_IWUSR;
    let mut file = File::from(openat(dir, TEMPORARY_FILE, flags, mode)?);
    file.write_all(bytes)?;
    file.sync_all()?;
    renameat(dir, TEMPORARY_FILE, dir, FILE)?;
    nix::unistd::fsync(dir)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rig() -> (tempfile::TempDir, State) {
        let dir = tempfile::tempdir().expect("temporary directory");
        let fd = File::open(dir.path()).expect("directory").into();
        let state = State::new(Snapshot::default(), fd);
        (dir, state)
    }

    #[tokio::test]
    async fn the_file_follows_the_state() {
        let (dir, state) = rig();
        let read = || {
            let bytes = std::fs::read(dir.path().join(FILE)).expect("state file");
            Snapshot::decode(bytes.as_slice()).expect("a snapshot")
        };
        state.saved().await.expect("saved");
        assert_eq!(read().revision, 0);

        state.update(|snapshot| snapshot.containers.push(container("a")));
        state.update_container("a", |container| {
            container.exit_code = 7;
            true
        });
        state.update_container("b", |_| true);
        state.saved().await.expect("saved");
        assert_eq!(read().revision, 2);
        assert_eq!(read().containers[0].exit_code, 7);
        assert!(!dir.path().join(TEMPORARY_FILE).exists());
    }

    #[tokio::test]
    async fn a_failed_write_is_told_and_the_next_change_tries_again() {
        let (dir, state) = rig();
        state.saved().await.expect("saved");
        let obstacle = dir.path().join(TEMPORARY_FILE);
        std::fs::create_dir(&obstacle).expect("a folder in the way");
        state.update(|_| ());
        assert!(state.saved().await.is_err());
        std::fs::remove_dir(&obstacle).expect("way free");
        state.update(|_| ());
        state.saved().await.expect("saved");
    }

    #[tokio::test]
    async fn waiting_for_an_exit() {
        let (_dir, state) = rig();
        state.wait_exited("never there").await;
        state.update(|snapshot| snapshot.containers.push(container("a")));
        let waiter = state.clone();
        let waiting = tokio::spawn(async move { waiter.wait_exited("a").await });
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished());
        state.update_container("a", |container| {
            container.set_state(ContainerState::Exited);
            true
        });
        waiting.await.expect("exit seen");
    }

    fn container(id: &str) -> Container {
        Container {
            id: id.to_owned(),
            ..Container::default()
        }
    }
}
