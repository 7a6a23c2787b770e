//! The pod's user namespace (user_namespaces(7)), if it has one: which ids of the guest its users and groups are.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use podvisor_proto::agent::IdMapping;
use serde::{Deserialize, Serialize};

use crate::sandbox::files;

/// Ids of a user namespace, from 0 on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IdMap {
    /// The one that is 0 inside.
    first: u32,
    length: u32,
}

impl IdMap {
    /// Checks what the host asks for; none when it is no map.
    pub fn new(mapping: IdMapping) -> Option<Self> {
        let IdMapping {
            container_id,
            host_id,
            length,
        } = mapping;
        // The highest number is no id (`(uid_t) -1`, credentials(7)).
        let ends = host_id.checked_add(length).is_some();
        (container_id == 0 && length > 0 && ends).then_some(Self {
            first: host_id,
            length,
        })
    }

    /// The id that the namespace's root has outside.
    pub fn root(self) -> u32 {
        self.first
    }

    /// The id that `id` of the namespace has outside; none when there is no such id.
    pub fn outside(self, id: u32) -> Option<u32> {
        (id < self.length).then(|| self.first + id)
    }

    /// As it is written to /proc/PID/uid_map.
    pub fn line(self) -> String {
        format!("0 {} {}\n", self.first, self.length)
    }
}

/// A user namespace that is there.
#[derive(Clone, Debug)]
pub struct UserNamespace {
    /// Its users, and its groups.
    pub ids: IdMap,
    /// It.
    pub file: Arc<OwnedFd>,
}

impl UserNamespace {
    /// The pod's, which the launcher has made.
    pub fn open(ids: IdMap) -> io::Result<Self> {
        let file = Arc::new(File::open(files::namespace("user"))?.into());
        Ok(Self { ids, file })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(container_id: u32, host_id: u32, length: u32) -> Option<IdMap> {
        IdMap::new(IdMapping {
            container_id,
            host_id,
            length,
        })
    }

    #[test]
    fn ids_are_mapped_from_0_on() {
        let ids = map(0, 100_000, 65_536).unwrap();
        assert_eq!(ids.root(), 100_000);
        assert_eq!(ids.outside(65_535), Some(165_535));
        assert_eq!(ids.outside(65_536), None);
        assert_eq!(ids.line(), "0 100000 65536\n");
        assert!(map(0, u32::MAX - 1, 1).is_some());
        for (container, host, length) in [(1, 0, 1), (0, 0, 0), (0, u32::MAX, 1), (0, 1, u32::MAX)]
        {
            assert_eq!(
                map(container, host, length),
                None,
                "{container} {host} {length}"
            );
        }
    }
}
