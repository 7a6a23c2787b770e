//! What was asked of podvisord, on disk: sandbox and container records in redb.
//!
//! What is *true* (states, exit codes) lives in the monitors; a record only takes the last state of
//! a sandbox over when its monitor is gone. A sandbox's record is written before its first host
//! resource is made, so that a crash never leaves a resource without a record that names it.

use std::path::Path;
use std::sync::Arc;

use nix::errno::Errno;
use nix::fcntl::FallocateFlags;
use podvisor_proto::{cri, monitor};
use prost::Message;
use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};

const SANDBOXES: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("sandboxes");
const CONTAINERS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("containers");

/// Why the database failed.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Another process has it open.
    #[error("{0} is in use by another podvisord")]
    Locked(String),
    /// Not readable, not writable, corrupt.
    #[error(transparent)]
    Database(Box<redb::Error>),
    /// A record that this version cannot read.
    #[error("record {id}: {source}")]
    Record {
        /// Key of the record.
        id: String,
        /// What is wrong with it.
        source: prost::DecodeError,
    },
    /// The thread that wrote it died.
    #[error("a database write was lost: {0}")]
    Join(tokio::task::JoinError),
}

impl StoreError {
    /// The I/O error behind it, if one is.
    pub fn io(&self) -> Option<&std::io::Error> {
        match self {
            Self::Database(error) => match &**error {
                redb::Error::Io(error) => Some(error),
                _ => None,
            },
            _ => None,
        }
    }
}

impl<E: Into<redb::Error>> From<E> for StoreError {
    fn from(error: E) -> Self {
        Self::Database(Box::new(error.into()))
    }
}

/// How far a sandbox's life has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, prost::Enumeration)]
#[repr(i32)]
pub enum Phase {
    /// RunPodSandbox has not answered: after a restart everything of it is undone.
    Creating = 0,
    /// RunPodSandbox answered OK.
    Ready = 1,
    /// Its resources are gone, its record waits for RemovePodSandbox.
    Stopped = 2,
}

/// A sandbox, as asked for.
#[derive(Clone, PartialEq, Message)]
pub struct SandboxRecord {
    /// 64 hexadecimal digits.
    #[prost(string, tag = "1")]
    pub id: String,
    /// As RunPodSandbox brought it.
    #[prost(message, optional, tag = "2")]
    pub config: Option<cri::PodSandboxConfig>,
    /// As RunPodSandbox brought it; may be empty.
    #[prost(string, tag = "3")]
    pub runtime_handler: String,
    /// Nanoseconds since the epoch.
    #[prost(int64, tag = "4")]
    pub created_ns: i64,
    /// See [`Phase`].
    #[prost(enumeration = "Phase", tag = "5")]
    pub phase: i32,
    /// IP addresses, the primary one first.
    #[prost(string, repeated, tag = "6")]
    pub ips: Vec<String>,
    /// Process id of the monitor; 0: none was started.
    #[prost(uint32, tag = "7")]
    pub monitor_pid: u32,
    /// Start time of that process (`/proc/PID/stat`, field 22), against reused pids.
    #[prost(uint64, tag = "8")]
    pub monitor_start: u64,
    /// The last state, once the monitor is gone.
    #[prost(message, optional, tag = "9")]
    pub last: Option<monitor::Snapshot>,
    /// Phases of RunPodSandbox on podvisord's side.
    #[prost(message, repeated, tag = "10")]
    pub timeline: Vec<monitor::TimelineEntry>,
    /// Process id of podvisor-fs; 0: no container has had volumes.
    #[prost(uint32, tag = "11")]
    pub fs_pid: u32,
    /// Start time of that process.
    #[prost(uint64, tag = "12")]
    pub fs_start: u64,
    /// Name of the handler it has; empty: "podvisor".
    #[prost(string, tag = "13")]
    pub handler: String,
    /// Why it has that one though it asked for none: [`podvisor_node::handlers::Reason::name`].
    #[prost(string, tag = "14")]
    pub routed: String,
    /// Resources and overhead once UpdatePodSandboxResources has changed what `config` says.
    #[prost(message, optional, tag = "15")]
    pub updated: Option<cri::LinuxPodSandboxConfig>,
}

/// A container, as asked for.
#[derive(Clone, PartialEq, Message)]
pub struct ContainerRecord {
    /// 64 hexadecimal digits.
    #[prost(string, tag = "1")]
    pub id: String,
    /// Its sandbox.
    #[prost(string, tag = "2")]
    pub sandbox_id: String,
    /// As CreateContainer brought it.
    #[prost(message, optional, tag = "3")]
    pub config: Option<cri::ContainerConfig>,
    /// Id of its image.
    #[prost(string, tag = "4")]
    pub image_id: String,
    /// Nanoseconds since the epoch.
    #[prost(int64, tag = "5")]
    pub created_ns: i64,
    /// Absolute; empty: no log.
    #[prost(string, tag = "6")]
    pub log_path: String,
    /// Linux number of the signal that stops it.
    #[prost(uint32, tag = "7")]
    pub stop_signal: u32,
}

/// The database. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Store {
    database: Arc<Database>,
}

impl Store {
    /// Opens or makes the database at `path`.
    ///
    /// # Errors
    /// [`StoreError::Locked`] when another podvisord has it.
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        let database = Database::create(path).map_err(|error| match error {
            redb::DatabaseError::DatabaseAlreadyOpen => {
                StoreError::Locked(path.display().to_string())
            }
            other => other.into(),
        })?;
        reserve_disk(path)?;
        let write = database.begin_write()?;
        write.open_table(SANDBOXES)?;
        write.open_table(CONTAINERS)?;
        write.commit()?;
        Ok(Self {
            database: Arc::new(database),
        })
    }

    /// The database itself, for the image store's tables.
    pub fn database(&self) -> Arc<Database> {
        Arc::clone(&self.database)
    }

    /// Every record, at start.
    pub fn load(&self) -> Result<(Vec<SandboxRecord>, Vec<ContainerRecord>), StoreError> {
        let read = self.database.begin_read()?;
        Ok((
            decode_all(&read.open_table(SANDBOXES)?)?,
            decode_all(&read.open_table(CONTAINERS)?)?,
        ))
    }

    /// Writes a sandbox's record; on disk when this returns.
    pub async fn put_sandbox(&self, record: SandboxRecord) -> Result<(), StoreError> {
        self.write(move |write| {
            write
                .open_table(SANDBOXES)?
                .insert(record.id.as_str(), record.encode_to_vec().as_slice())?;
            Ok(())
        })
        .await
    }

    /// Forgets a sandbox and its containers.
    pub async fn remove_sandbox(
        &self,
        id: String,
        containers: Vec<String>,
    ) -> Result<(), StoreError> {
        self.write(move |write| {
            write.open_table(SANDBOXES)?.remove(id.as_str())?;
            let mut table = write.open_table(CONTAINERS)?;
            for container in &containers {
                table.remove(container.as_str())?;
            }
            Ok(())
        })
        .await
    }

    /// Writes a container's record; on disk when this returns.
    pub async fn put_container(&self, record: ContainerRecord) -> Result<(), StoreError> {
        self.write(move |write| {
            write
                .open_table(CONTAINERS)?
                .insert(record.id.as_str(), record.encode_to_vec().as_slice())?;
            Ok(())
        })
        .await
    }

    /// Forgets a container.
    pub async fn remove_container(&self, id: String) -> Result<(), StoreError> {
        self.write(move |write| {
            write.open_table(CONTAINERS)?.remove(id.as_str())?;
            Ok(())
        })
        .await
    }

    /// One transaction, on a thread that may block: a commit waits for the disk.
    async fn write(
        &self,
        change: impl FnOnce(&redb::WriteTransaction) -> Result<(), StoreError> + Send + 'static,
    ) -> Result<(), StoreError> {
        let database = Arc::clone(&self.database);
        tokio::task::spawn_blocking(move || {
            let write = database.begin_write()?;
            change(&write)?;
            write.commit()?;
            Ok(())
        })
        .await
        .map_err(StoreError::Join)?
    }
}

/// Takes disk space for the database before it is needed, beyond the end of its file. redb refuses all
/// work after one failed write, and on a full disk pods must still be stopped and forgotten.
fn reserve_disk(path: &Path) -> Result<(), StoreError> {
    const RESERVE: i64 = 8 << 20;
    let file = std::fs::File::options().write(true).open(path)?;
    match nix::fcntl::fallocate(&file, FallocateFlags::FALLOC_FL_KEEP_SIZE, 0, RESERVE) {
        // A file system that cannot is no reason not to work on it.
        Ok(()) | Err(Errno::EOPNOTSUPP) => Ok(()),
        Err(error) => Err(std::io::Error::from(error).into()),
    }
}

fn decode_all<M: Message + Default>(
    table: &impl ReadableTable<&'static str, &'static [u8]>,
) -> Result<Vec<M>, StoreError> {
    let mut records = Vec::new();
    for entry in table.iter()? {
        let (key, value) = entry?;
        records.push(
            M::decode(value.value()).map_err(|source| StoreError::Record {
                id: key.value().to_owned(),
                source,
            })?,
        );
    }
    Ok(records)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn records_come_back_and_go() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state.redb");
        let store = Store::open(&path).unwrap();
        let sandbox = SandboxRecord {
            id: "a".into(),
            phase: Phase::Ready as i32,
            ips: vec!["10.0.0.2".into()],
            ..Default::default()
        };
        let container = ContainerRecord {
            id: "c".into(),
            sandbox_id: "a".into(),
            ..Default::default()
        };
        store.put_sandbox(sandbox.clone()).await.unwrap();
        store.put_container(container.clone()).await.unwrap();
        drop(store);

        let store = Store::open(&path).unwrap();
        assert_eq!(store.load().unwrap(), (vec![sandbox], vec![container]));
        store
            .remove_sandbox("a".into(), vec!["c".into()])
            .await
            .unwrap();
        assert_eq!(store.load().unwrap(), (vec![], vec![]));
    }

    #[test]
    fn a_second_daemon_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state.redb");
        let _first = Store::open(&path).unwrap();
        assert!(matches!(Store::open(&path), Err(StoreError::Locked(_))));
    }
}
