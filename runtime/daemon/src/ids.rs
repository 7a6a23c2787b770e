//! Ids, and names that only one object may hold.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::io::Read;
use std::sync::{Arc, Mutex, PoisonError};

use podvisor_proto::cri;

use crate::error::{Error, Result};

/// A new id: 64 hexadecimal digits from the kernel's random source.
///
/// # Errors
/// `/dev/urandom` cannot be read.
pub fn new_id() -> Result<String> {
    let mut bytes = [0u8; 32];
    std::fs::File::open("/dev/urandom")
        .and_then(|mut file| file.read_exact(&mut bytes))
        .map_err(Error::io("/dev/urandom"))?;
    Ok(hex(&bytes))
}

fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// Finds the id that `wanted` is, or is the only possible beginning of.
///
/// # Errors
/// NOT_FOUND, or INVALID_ARGUMENT for an empty or ambiguous one.
pub fn resolve<'a>(
    kind: &'static str,
    wanted: &str,
    mut ids: impl Iterator<Item = &'a str>,
) -> Result<&'a str> {
    if wanted.is_empty() {
        return Err(Error::Invalid {
            field: if kind == "sandbox" {
                "pod_sandbox_id"
            } else {
                "container_id"
            },
            problem: "must not be empty".into(),
        });
    }
    let mut found: Option<&str> = None;
    let mut count = 0;
    for id in ids.by_ref() {
        if id == wanted {
            return Ok(id);
        }
        if id.starts_with(wanted) {
            found = Some(id);
            count += 1;
        }
    }
    match (found, count) {
        (Some(id), 1) => Ok(id),
        (None, _) => Err(Error::NotFound {
            kind,
            id: wanted.into(),
        }),
        (Some(_), count) => Err(Error::Ambiguous {
            kind,
            id: wanted.into(),
            count,
        }),
    }
}

/// The name that makes a sandbox unique: pod, namespace, uid and attempt.
pub fn sandbox_name(metadata: &cri::PodSandboxMetadata) -> String {
    format!(
        "{}_{}_{}_{}",
        metadata.name, metadata.namespace, metadata.uid, metadata.attempt
    )
}

/// The name that makes a container unique in its sandbox.
pub fn container_name(sandbox_id: &str, metadata: &cri::ContainerMetadata) -> String {
    format!("{}_{}_{sandbox_id}", metadata.name, metadata.attempt)
}

/// Names in use. A name is taken before anything else is done and given back by dropping the
/// [`Reservation`], so that two requests for one name can never both go on.
#[derive(Debug, Clone, Default)]
pub struct Names {
    taken: Arc<Mutex<HashMap<String, String>>>,
}

/// Holds a name while it lives.
#[derive(Debug)]
pub struct Reservation {
    names: Names,
    name: String,
}

impl Names {
    /// Takes `name` for `owner`.
    ///
    /// # Errors
    /// ALREADY_EXISTS when somebody has it.
    pub fn reserve(&self, kind: &'static str, name: String, owner: &str) -> Result<Reservation> {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        match taken.entry(name.clone()) {
            Entry::Occupied(entry) => Err(Error::NameTaken {
                kind,
                name,
                owner: entry.get().clone(),
            }),
            Entry::Vacant(entry) => {
                entry.insert(owner.to_owned());
                drop(taken);
                Ok(Reservation {
                    names: self.clone(),
                    name,
                })
            }
        }
    }
}

impl Names {
    /// Ids that hold a name: everything that exists or is being made.
    pub fn owners(&self) -> std::collections::HashSet<String> {
        let taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        taken.values().cloned().collect()
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.names
            .taken
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&self.name);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_unique_hex() {
        let (a, b) = (new_id().unwrap(), new_id().unwrap());
        assert_ne!(a, b);
        assert_eq!(a.len(), 64);
        assert!(a.bytes().all(|b| b.is_ascii_hexdigit()));
    }

    #[test]
    fn prefixes_resolve_when_unique() {
        let ids = ["abc1", "abc2", "abd3", "ab"];
        let find = |wanted| resolve("sandbox", wanted, ids.iter().copied());
        assert_eq!(find("abd").unwrap(), "abd3");
        assert_eq!(find("abc1").unwrap(), "abc1");
        // A whole id wins over being a prefix of others.
        assert_eq!(find("ab").unwrap(), "ab");
        assert!(matches!(
            find("abc"),
            Err(Error::Ambiguous { count: 2, .. })
        ));
        assert!(matches!(find("x"), Err(Error::NotFound { .. })));
        assert!(matches!(find(""), Err(Error::Invalid { .. })));
    }

    #[test]
    fn a_name_is_free_again_when_its_reservation_ends() {
        let names = Names::default();
        let held = names.reserve("sandbox", "n".into(), "1").unwrap();
        let error = names.reserve("sandbox", "n".into(), "2").unwrap_err();
        assert!(error.to_string().contains("reserved for 1"), "{error}");
        drop(held);
        names.reserve("sandbox", "n".into(), "2").unwrap();
    }
}
