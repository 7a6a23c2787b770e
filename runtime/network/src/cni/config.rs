//! Network configurations: the files of the conf folder.
//!
//! The folder belongs to others (a DaemonSet of the cluster's network writes there at any time), so
//! it is looked at again for every question; files are parsed again only when one of them changed.

use std::fs;
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::error::CniError;

/// Extensions that other runtimes read as well.
const EXTENSIONS: [&str; 3] = ["conf", "conflist", "json"];

/// No real configuration comes near it.
const MAX_FILE_BYTES: u64 = 1 << 20;

/// A version of the CNI spec.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Version {
    #[serde(rename = "0.1.0")]
    V0_1_0,
    #[serde(rename = "0.2.0")]
    V0_2_0,
    #[serde(rename = "0.3.0")]
    V0_3_0,
    #[serde(rename = "0.3.1")]
    V0_3_1,
    #[serde(rename = "0.4.0")]
    V0_4_0,
    #[serde(rename = "1.0.0")]
    V1_0_0,
    #[serde(rename = "1.1.0")]
    V1_1_0,
}

impl Version {
    const ALL: [(Self, &str); 7] = [
        (Self::V0_1_0, "0.1.0"),
        (Self::V0_2_0, "0.2.0"),
        (Self::V0_3_0, "0.3.0"),
        (Self::V0_3_1, "0.3.1"),
        (Self::V0_4_0, "0.4.0"),
        (Self::V1_0_0, "1.0.0"),
        (Self::V1_1_0, "1.1.0"),
    ];

    fn parse(text: &str) -> Option<Self> {
        Self::ALL.iter().find(|(_, t)| *t == text).map(|(v, _)| *v)
    }

    /// As plugins read it.
    pub fn as_str(self) -> &'static str {
        Self::ALL[self as usize].1
    }

    /// CHECK exists, and DEL is told the previous result.
    pub fn has_check(self) -> bool {
        self >= Self::V0_4_0
    }
}

/// A network: plugins that are run one after the other.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Network {
    pub name: String,
    pub version: Version,
    pub disable_check: bool,
    pub plugins: Vec<Plugin>,
}

/// One plugin of a network.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Plugin {
    /// Name of the binary.
    pub kind: String,
    /// The plugin's configuration as the file has it.
    pub config: Map<String, Value>,
}

impl Plugin {
    /// The plugin declares that it takes this piece of `runtimeConfig`.
    pub fn has_capability(&self, name: &str) -> bool {
        let declared = self.config.get("capabilities").and_then(|c| c.get(name));
        declared == Some(&Value::Bool(true))
    }
}

impl Network {
    /// Reads a configuration list, or a single plugin's configuration as a list of one. The
    /// content decides which it is, not the file's extension.
    ///
    /// # Errors
    /// What is wrong, in words for the administrator.
    pub fn parse(text: &[u8]) -> Result<Self, String> {
        let value: Value = serde_json::from_slice(text).map_err(|e| format!("not JSON: {e}"))?;
        let Value::Object(top) = value else {
            return Err("not a JSON object".into());
        };
        let name = string(&top, "name")?.ok_or("no network name")?;
        if !is_identifier(&name) {
            return Err(format!(
                "network name {name:?} is not made of letters, digits, '_', '.', '-'"
            ));
        }
        let version = version(&top)?;
        let disable_check = flag(&top, "disableCheck")?;
        let plugins = match top.get("plugins") {
            None => vec![plugin(&Value::Object(top))?],
            Some(Value::Array(list)) => list.iter().map(plugin).collect::<Result<_, _>>()?,
            Some(_) => return Err("\"plugins\" is not a list".into()),
        };
        if plugins.is_empty() {
            return Err("no plugins".into());
        }
        Ok(Self {
            name,
            version,
            disable_check,
            plugins,
        })
    }
}

fn plugin(value: &Value) -> Result<Plugin, String> {
    let Value::Object(config) = value else {
        return Err("a plugin is not a JSON object".into());
    };
    let kind = string(config, "type")?.ok_or("a plugin has no \"type\"")?;
    // It becomes a path below the plugin folders.
    if kind.is_empty() || kind.contains('/') || kind == "." || kind == ".." {
        return Err(format!("plugin type {kind:?} is not a file name"));
    }
    Ok(Plugin {
        kind,
        config: config.clone(),
    })
}

/// `cniVersion`, or the newest of `cniVersions` that we know; the first of all when neither is there.
fn version(top: &Map<String, Value>) -> Result<Version, String> {
    let newest = top
        .get("cniVersions")
        .and_then(Value::as_array)
        .and_then(|list| {
            list.iter()
                .filter_map(Value::as_str)
                .filter_map(Version::parse)
                .max()
        });
    match (newest, string(top, "cniVersion")?.as_deref()) {
        (Some(version), _) => Ok(version),
        (None, None | Some("")) => Ok(Version::V0_1_0),
        (None, Some(text)) => {
            Version::parse(text).ok_or_else(|| format!("unknown cniVersion {text:?}"))
        }
    }
}

fn string(object: &Map<String, Value>, key: &str) -> Result<Option<String>, String> {
    match object.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text.clone())),
        Some(_) => Err(format!("{key:?} is not a string")),
    }
}

/// libcni takes a bool or its name.
fn flag(object: &Map<String, Value>, key: &str) -> Result<bool, String> {
    match object.get(key) {
        None => Ok(false),
        Some(Value::Bool(flag)) => Ok(*flag),
        Some(Value::String(text)) if text.eq_ignore_ascii_case("true") => Ok(true),
        Some(Value::String(text)) if text.eq_ignore_ascii_case("false") => Ok(false),
        Some(_) => Err(format!("{key:?} is not a boolean")),
    }
}

/// The spec's rule for network names and container ids.
pub(super) fn is_identifier(text: &str) -> bool {
    text.starts_with(|c: char| c.is_ascii_alphanumeric())
        && text
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || "_.-".contains(c))
}

/// The network in force, and the files that were passed over to find it.
#[derive(Debug, Clone, PartialEq)]
pub struct Chosen {
    pub network: Arc<Network>,
    pub file: PathBuf,
    pub ignored: Vec<String>,
}

/// The conf folder. Blocking; cheap when nothing changed.
#[derive(Debug)]
pub struct ConfDir {
    dir: PathBuf,
    last: Mutex<Option<Look>>,
}

/// What the folder was at the last look, and what came of it.
#[derive(Debug)]
struct Look {
    stamps: Vec<Stamp>,
    chosen: Result<Chosen, String>,
}

/// Tells one content of a file from another.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Stamp {
    file: PathBuf,
    inode: u64,
    size: u64,
    mtime: (i64, i64),
    /// Changes also when mtime is set back, as copying tools do.
    ctime: (i64, i64),
}

impl ConfDir {
    pub fn new(dir: PathBuf) -> Self {
        Self {
            dir,
            last: Mutex::new(None),
        }
    }

    /// The first valid configuration by name of file.
    ///
    /// # Errors
    /// [`CniError::NoNetwork`].
    pub fn current(&self) -> Result<Chosen, CniError> {
        let none = |reason| CniError::NoNetwork {
            dir: self.dir.clone(),
            reason,
        };
        let stamps = match self.stamps() {
            Ok(stamps) => stamps,
            Err(e) if e.kind() == io::ErrorKind::NotFound => Vec::new(),
            Err(e) => return Err(none(e.to_string())),
        };
        // A panic while it was held leaves a whole value: it is only ever replaced.
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        match &*last {
            Some(look) if look.stamps == stamps => look.chosen.clone(),
            _ => {
                let chosen = choose(&stamps);
                *last = Some(Look {
                    stamps,
                    chosen: chosen.clone(),
                });
                chosen
            }
        }
        .map_err(none)
    }

    fn stamps(&self) -> io::Result<Vec<Stamp>> {
        let mut stamps = Vec::new();
        for entry in fs::read_dir(&self.dir)? {
            let file = entry?.path();
            let known = file
                .extension()
                .is_some_and(|e| EXTENSIONS.iter().any(|k| e == *k));
            if !known {
                continue;
            }
            // Follows links (ConfigMap volumes are made of them). A file that has just gone is
            // seen at the next look.
            if let Ok(meta) = fs::metadata(&file)
                && meta.is_file()
            {
                stamps.push(Stamp {
                    file,
                    inode: meta.ino(),
                    size: meta.size(),
                    mtime: (meta.mtime(), meta.mtime_nsec()),
                    ctime: (meta.ctime(), meta.ctime_nsec()),
                });
            }
        }
        stamps.sort();
        Ok(stamps)
    }
}

fn choose(stamps: &[Stamp]) -> Result<Chosen, String> {
    let mut ignored = Vec::new();
    for stamp in stamps {
        let read = if stamp.size > MAX_FILE_BYTES {
            Err("too large".to_owned())
        } else {
            fs::read(&stamp.file)
                .map_err(|e| e.to_string())
                .and_then(|text| Network::parse(&text))
        };
        match read {
            Ok(network) => {
                return Ok(Chosen {
                    network: Arc::new(network),
                    file: stamp.file.clone(),
                    ignored,
                });
            }
            Err(reason) => ignored.push(format!("{}: {reason}", stamp.file.display())),
        }
    }
    if ignored.is_empty() {
        Err("no *.conflist, *.conf or *.json file there".into())
    } else {
        Err(ignored.join("; "))
    }
}

/// Finds a plugin's binary: the first executable file of that name.
pub fn find_plugin(dirs: &[PathBuf], kind: &str) -> Option<PathBuf> {
    let executable = |path: &Path| {
        fs::metadata(path).is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0)
    };
    dirs.iter()
        .map(|dir| dir.join(kind))
        .find(|path| executable(path))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const LIST: &str = r#"{"cniVersion":"1.0.0","name":"pods","plugins":[
        {"type":"bridge","ipam":{"type":"host-local"}},
        {"type":"portmap","capabilities":{"portMappings":true,"other":false}}]}"#;

    #[test]
    fn lists_and_single_plugins() {
        let list = Network::parse(LIST.as_bytes()).unwrap();
        assert_eq!(
            (list.name.as_str(), list.version),
            ("pods", Version::V1_0_0)
        );
        assert_eq!(list.plugins.len(), 2);
        assert!(list.plugins[1].has_capability("portMappings"));
        assert!(!list.plugins[1].has_capability("other"));
        assert!(!list.plugins[0].has_capability("portMappings"));

        let single =
            Network::parse(br#"{"name":"one","type":"ptp","disableCheck":"true"}"#).unwrap();
        assert_eq!(single.version, Version::V0_1_0);
        assert_eq!(single.plugins[0].kind, "ptp");
        assert!(single.disable_check);
    }

    #[test]
    fn the_newest_of_several_versions() {
        let network = |text: &str| Network::parse(text.as_bytes()).map(|n| n.version);
        let with = |versions: &str| {
            network(&format!(
                r#"{{"name":"n","type":"t","cniVersion":"0.4.0","cniVersions":{versions}}}"#
            ))
        };
        assert_eq!(
            with(r#"["0.4.0","1.1.0","9.0.0","1.0.0"]"#),
            Ok(Version::V1_1_0)
        );
        assert_eq!(with(r#"["9.0.0"]"#), Ok(Version::V0_4_0));
        assert!(network(r#"{"name":"n","type":"t","cniVersion":"9.0.0"}"#).is_err());
    }

    #[test]
    fn what_is_wrong_is_said() {
        for (text, word) in [
            ("", "JSON"),
            ("[]", "object"),
            ("{}", "name"),
            (r#"{"name":"../x","type":"t"}"#, "../x"),
            (r#"{"name":"n"}"#, "type"),
            (r#"{"name":"n","plugins":[]}"#, "no plugins"),
            (r#"{"name":"n","plugins":{}}"#, "list"),
            (r#"{"name":"n","plugins":[1]}"#, "object"),
            (r#"{"name":"n","type":"../bin/sh"}"#, "../bin/sh"),
            (r#"{"name":"n","type":".."}"#, ".."),
            (r#"{"name":1,"type":"t"}"#, "string"),
            (
                r#"{"name":"n","type":"t","disableCheck":1}"#,
                "disableCheck",
            ),
        ] {
            let error = Network::parse(text.as_bytes()).unwrap_err();
            assert!(error.contains(word), "{text}: {error}");
        }
    }

    #[test]
    fn versions_are_their_text() {
        for (version, text) in Version::ALL {
            assert_eq!(version.as_str(), text);
            assert_eq!(serde_json::to_value(version).unwrap(), text);
        }
    }

    proptest! {
        #[test]
        fn parsing_never_panics(bytes: Vec<u8>) {
            let _ = Network::parse(&bytes);
        }
    }

    #[test]
    fn first_valid_file_by_name_and_changes_are_seen() {
        let temp = tempfile::tempdir().unwrap();
        let dir = temp.path().join("net.d");
        let conf = ConfDir::new(dir.clone());
        let reason = |conf: &ConfDir| conf.current().unwrap_err().to_string();
        assert!(reason(&conf).contains("no *.conflist"), "{}", reason(&conf));

        fs::create_dir(&dir).unwrap();
        fs::write(dir.join("10-broken.conf"), "{").unwrap();
        fs::write(dir.join("05-readme.txt"), LIST).unwrap();
        assert!(
            reason(&conf).contains("10-broken.conf"),
            "{}",
            reason(&conf)
        );

        fs::write(dir.join("20-pods.conflist"), LIST).unwrap();
        fs::write(
            dir.join("30-later.conf"),
            r#"{"name":"later","type":"ptp"}"#,
        )
        .unwrap();
        let chosen = conf.current().unwrap();
        assert_eq!(chosen.network.name, "pods");
        assert_eq!(chosen.file, dir.join("20-pods.conflist"));
        assert_eq!(chosen.ignored.len(), 1);
        // Nothing changed: the very same object.
        assert!(Arc::ptr_eq(
            &chosen.network,
            &conf.current().unwrap().network
        ));

        fs::write(
            dir.join("10-broken.conf"),
            r#"{"name":"fixed","type":"ptp"}"#,
        )
        .unwrap();
        assert_eq!(conf.current().unwrap().network.name, "fixed");
        fs::remove_file(dir.join("10-broken.conf")).unwrap();
        fs::remove_file(dir.join("20-pods.conflist")).unwrap();
        assert_eq!(conf.current().unwrap().network.name, "later");
    }

    #[test]
    fn plugins_are_executable_files_in_order() {
        let temp = tempfile::tempdir().unwrap();
        let (first, second) = (temp.path().join("a"), temp.path().join("b"));
        let dirs = vec![first.clone(), second.clone(), temp.path().join("missing")];
        fs::create_dir(&first).unwrap();
        fs::create_dir(&second).unwrap();
        let write = |path: &Path, mode| {
            fs::write(path, "").unwrap();
            fs::set_permissions(path, PermissionsExt::from_mode(mode)).unwrap();
        };
        write(&first.join("bridge"), 0o644);
        write(&second.join("bridge"), 0o755);
        assert_eq!(find_plugin(&dirs, "bridge"), Some(second.join("bridge")));
        write(&first.join("bridge"), 0o755);
        assert_eq!(find_plugin(&dirs, "bridge"), Some(first.join("bridge")));
        assert_eq!(find_plugin(&dirs, "ptp"), None);
    }
}
