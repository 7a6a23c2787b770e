//! What is remembered of each attachment, one file per sandbox.
//!
//! The file is there before the first plugin runs and goes after the last one has undone its work.
//! So whatever happens between (we are killed, the conf folder changes, the node restarts), DEL
//! runs the plugins that ADD ran, with the same configuration, and what has no file was never
//! attached. The folder is the list of attachments.

use std::fs::{self, DirBuilder, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::config::Network;
use super::error::CniError;

/// One attachment.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Record {
    pub sandbox_id: String,
    pub netns: PathBuf,
    pub interface: String,
    /// `CNI_ARGS`.
    pub args: String,
    /// By capability: what goes into `runtimeConfig` of the plugins that declare it.
    pub capabilities: Map<String, Value>,
    pub network: Network,
    /// The last plugin's. `None` until ADD has succeeded.
    pub result: Option<Map<String, Value>>,
}

/// What a sandbox's file says.
#[derive(Debug)]
pub enum Entry {
    /// There is none: never attached, or detached already.
    Absent,
    Present(Box<Record>),
    /// There is one, and it cannot be read: by its kind of writing only a failing disk, another
    /// program or another version of ours can make this.
    Unreadable(String),
}

/// The folder. Blocking.
#[derive(Debug, Clone)]
pub struct Cache {
    dir: PathBuf,
}

impl Cache {
    pub fn new(dir: PathBuf) -> Self {
        Self { dir }
    }

    /// Writes a sandbox's file, durably, whole or not at all.
    pub fn write(&self, record: &Record) -> Result<(), CniError> {
        let path = self.path(&record.sandbox_id);
        let temporary = self.dir.join(format!(".{}.tmp", record.sandbox_id));
        let write = || -> io::Result<()> {
            DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(&self.dir)?;
            let mut file = OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(true)
                .mode(0o600)
                .open(&temporary)?;
            file.write_all(&serde_json::to_vec(record)?)?;
            file.sync_data()?;
            fs::rename(&temporary, &path)
        };
        write().map_err(|source| {
            let _ = fs::remove_file(&temporary);
            CniError::Cache { path, source }
        })
    }

    pub fn read(&self, sandbox_id: &str) -> Result<Entry, CniError> {
        let path = self.path(sandbox_id);
        match fs::read(&path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(Entry::Absent),
            Err(source) => Err(CniError::Cache { path, source }),
            Ok(text) => Ok(match serde_json::from_slice::<Record>(&text) {
                Ok(record) if record.sandbox_id == sandbox_id => Entry::Present(Box::new(record)),
                Ok(record) => Entry::Unreadable(format!("it is about {:?}", record.sandbox_id)),
                Err(e) => Entry::Unreadable(e.to_string()),
            }),
        }
    }

    /// Forgets a sandbox; one that is not there is fine.
    pub fn remove(&self, sandbox_id: &str) -> Result<(), CniError> {
        let path = self.path(sandbox_id);
        match fs::remove_file(&path) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                Err(CniError::Cache { path, source })
            }
            _ => Ok(()),
        }
    }

    /// Sandboxes that have a file.
    pub fn list(&self) -> Result<Vec<String>, CniError> {
        let list = || -> io::Result<Vec<String>> {
            let mut ids = Vec::new();
            for entry in fs::read_dir(&self.dir)? {
                let name = entry?.file_name();
                let id = name.to_str().and_then(|n| n.strip_suffix(".json"));
                ids.extend(id.map(str::to_owned));
            }
            Ok(ids)
        };
        match list() {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
            result => result.map_err(|source| CniError::Cache {
                path: self.dir.clone(),
                source,
            }),
        }
    }

    /// The caller has checked that the id is no path.
    fn path(&self, sandbox_id: &str) -> PathBuf {
        debug_assert!(Path::new(sandbox_id).components().count() == 1);
        self.dir.join(format!("{sandbox_id}.json"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(id: &str) -> Record {
        Record {
            sandbox_id: id.into(),
            netns: "/run/n".into(),
            interface: "eth0".into(),
            args: "IgnoreUnknown=1".into(),
            capabilities: Map::new(),
            network: Network::parse(br#"{"name":"n","type":"bridge","x":{"y":[1]}}"#).unwrap(),
            result: None,
        }
    }

    #[test]
    fn what_is_written_is_read() {
        let temp = tempfile::tempdir().unwrap();
        let cache = Cache::new(temp.path().join("cni"));
        assert!(matches!(cache.read("a").unwrap(), Entry::Absent));
        assert!(cache.list().unwrap().is_empty());
        cache.remove("a").unwrap();

        let mut record = record("a");
        cache.write(&record).unwrap();
        record.result = Some(Map::from_iter([("cniVersion".into(), "1.0.0".into())]));
        cache.write(&record).unwrap();
        let Entry::Present(read) = cache.read("a").unwrap() else {
            panic!()
        };
        assert_eq!(*read, record);
        assert_eq!(cache.list().unwrap(), ["a"]);
        // Nothing beside it.
        assert_eq!(fs::read_dir(temp.path().join("cni")).unwrap().count(), 1);

        cache.remove("a").unwrap();
        assert!(matches!(cache.read("a").unwrap(), Entry::Absent));
    }

    #[test]
    fn files_of_others_are_unreadable() {
        let temp = tempfile::tempdir().unwrap();
        let cache = Cache::new(temp.path().to_owned());
        for text in ["", "{}", "\0\0\0"] {
            fs::write(temp.path().join("a.json"), text).unwrap();
            assert!(
                matches!(cache.read("a").unwrap(), Entry::Unreadable(_)),
                "{text:?}"
            );
        }
        cache.write(&record("b")).unwrap();
        fs::rename(temp.path().join("b.json"), temp.path().join("a.json")).unwrap();
        assert!(matches!(cache.read("a").unwrap(), Entry::Unreadable(_)));
    }
}
