//! What the guest knows of files: a number for each, by which it names them from then on.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;

/// The number of the root (FUSE_ROOT_ID).
pub const ROOT: u64 = 1;

/// Bits of a host's file number that stay as they are; above them is the number of its file system.
const FILE_BITS: u32 = 48;

/// A file of the host, whatever names it has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Identity {
    /// File system, as `stx_dev_major` and `stx_dev_minor`.
    pub device: (u32, u32),
    /// Number in it.
    pub number: u64,
    /// For a directory, its mount: what is below depends on it. Anything else is one by all of its mounts, so that
    /// containers that have a volume each have one file: its locks, its pages.
    pub mount: Option<u64>,
}

/// How a file that the guest knows is found again.
#[derive(Clone, Debug)]
pub enum Place {
    /// It is held open, with `O_PATH`.
    Held(Arc<OwnedFd>),
    /// By its path from a directory that is. Files of mounts *below* a volume are not held: the node could not unmount
    /// them, for a guest remembers files for a long time. Nor are more files than this process may have open.
    Below {
        /// Where the path begins.
        directory: Arc<OwnedFd>,
        /// From there.
        path: PathBuf,
    },
}

impl Place {
    fn is_held(&self) -> bool {
        matches!(self, Self::Held(_))
    }
}

/// A file that the guest knows.
#[derive(Clone, Debug)]
pub struct Node {
    /// Where.
    pub place: Place,
    /// Which.
    pub identity: Identity,
    /// `S_IFMT` of its mode.
    pub kind: libc::mode_t,
    /// The mount that it was found in.
    pub mount: u64,
}

/// What changes when a file's contents do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stamp {
    /// Bytes.
    pub size: i64,
    /// Seconds and nanoseconds.
    pub modified: (i64, i64),
    /// Seconds and nanoseconds. Nobody can set it.
    pub changed: (i64, i64),
}

struct Known {
    node: Node,
    /// The file's when it was opened last, if any later change shows.
    opened: Option<Stamp>,
    /// How often the guest was told of it and has not said that it forgot.
    lookups: u64,
}

/// All that the guest knows.
pub struct Nodes {
    known: HashMap<u64, Known>,
    numbers: HashMap<Identity, u64>,
    /// How many are held open.
    held: usize,
    next: u64,
    devices: HashMap<(u32, u32), u16>,
}

impl Nodes {
    /// Nothing but `root`. Other numbers begin at `first`.
    pub fn new(root: Node, first: u64) -> Self {
        let mut nodes = Self {
            known: HashMap::new(),
            numbers: HashMap::new(),
            held: 0,
            next: ROOT,
            devices: HashMap::new(),
        };
        nodes.add(root);
        nodes.next = first.max(ROOT + 1);
        nodes
    }

    /// What a number stands for.
    pub fn get(&self, number: u64) -> Option<&Node> {
        self.known.get(&number).map(|known| &known.node)
    }

    /// The number of a file that is known, which the guest is told once more, and the file as it is known.
    pub fn look_up(&mut self, identity: Identity) -> Option<(u64, &Node)> {
        let number = *self.numbers.get(&identity)?;
        let known = self.known.get_mut(&number)?;
        known.lookups = known.lookups.saturating_add(1);
        Some((number, &known.node))
    }

    /// The number of a file that is known in that mount and held open, which the guest is told once more. While it is
    /// held, no other file can have its identity.
    pub fn look_up_held(&mut self, identity: Identity, mount: u64) -> Option<u64> {
        let number = *self.numbers.get(&identity)?;
        let known = self.known.get_mut(&number)?;
        if known.node.mount != mount || !known.node.place.is_held() {
            return None;
        }
        known.lookups = known.lookups.saturating_add(1);
        Some(number)
    }

    /// A file is opened that has this stamp, of which a later change will differ if it `is_settled`. Returns whether its
    /// contents are certainly those that it had when it was opened before.
    pub fn open(&mut self, number: u64, stamp: Stamp, is_settled: bool) -> bool {
        let Some(known) = self.known.get_mut(&number) else {
            return false;
        };
        let same = known.opened == Some(stamp);
        known.opened = is_settled.then_some(stamp);
        same
    }

    /// From now on a file is found at another place, of another mount.
    pub fn set_place(&mut self, number: u64, place: Place, mount: u64) {
        if let Some(known) = self.known.get_mut(&number) {
            self.held -= usize::from(known.node.place.is_held());
            self.held += usize::from(place.is_held());
            known.node.place = place;
            known.node.mount = mount;
        }
    }

    /// How many files are held open.
    pub fn held(&self) -> usize {
        self.held
    }

    /// A new number for a file that is not known, which the guest is told.
    pub fn add(&mut self, node: Node) -> u64 {
        let number = self.next;
        self.next += 1;
        self.held += usize::from(node.place.is_held());
        self.numbers.insert(node.identity, number);
        let known = Known {
            node,
            opened: None,
            lookups: 1,
        };
        self.known.insert(number, known);
        number
    }

    /// The guest has forgotten a number as often as it was told.
    pub fn forget(&mut self, number: u64, lookups: u64) {
        if number == ROOT {
            return;
        }
        let Some(known) = self.known.get_mut(&number) else {
            return;
        };
        known.lookups = known.lookups.saturating_sub(lookups);
        if known.lookups == 0 {
            let identity = known.node.identity;
            self.held -= usize::from(known.node.place.is_held());
            self.known.remove(&number);
            self.numbers.remove(&identity);
        }
    }

    /// Forgets all but the root.
    pub fn clear(&mut self) {
        let root = self.known.remove(&ROOT);
        self.known.clear();
        self.numbers.clear();
        self.held = 0;
        if let Some(root) = root {
            self.held = 1;
            self.numbers.insert(root.node.identity, ROOT);
            self.known.insert(ROOT, root);
        }
    }

    /// What `stat` shows as the file's number. All volumes are one file system to the guest, and many of the host's: two
    /// files with one number would be one file to `cp` and `tar`.
    pub fn shown_number(&mut self, device: (u32, u32), number: u64) -> u64 {
        let next = self.devices.len() as u16;
        // After 65536 file systems, they share.
        let index = *self.devices.entry(device).or_insert(next);
        number ^ u64::from(index) << FILE_BITS
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(number: u64) -> Node {
        Node {
            place: Place::Held(Arc::new(std::fs::File::open("/").unwrap().into())),
            identity: Identity {
                device: (8, 1),
                number,
                mount: None,
            },
            kind: libc::S_IFDIR,
            mount: 7,
        }
    }

    fn found(nodes: &mut Nodes, number: u64) -> Option<u64> {
        Some(nodes.look_up(node(number).identity)?.0)
    }

    #[test]
    fn a_file_is_known_until_it_is_forgotten_as_often() {
        let mut nodes = Nodes::new(node(1), 0);
        let number = nodes.add(node(2));
        assert_ne!(number, ROOT);
        assert_eq!(nodes.held(), 2);
        assert_eq!(found(&mut nodes, 2), Some(number));
        nodes.forget(number, 1);
        assert!(nodes.get(number).is_some());
        nodes.forget(number, 1);
        assert!(nodes.get(number).is_none());
        assert_eq!(nodes.held(), 1);
        assert_eq!(found(&mut nodes, 2), None);
        // Never the same number for another file.
        assert_ne!(nodes.add(node(3)), number);
    }

    #[test]
    fn contents_are_the_same_if_no_stamp_can_have_been_missed() {
        let mut nodes = Nodes::new(node(1), 0);
        let number = nodes.add(node(2));
        let old = Stamp {
            size: 1,
            modified: (5, 0),
            changed: (5, 0),
        };
        assert!(!nodes.open(number, old, false), "never opened before");
        assert!(
            !nodes.open(number, old, true),
            "may have changed after that"
        );
        assert!(nodes.open(number, old, true));
        let new = Stamp {
            changed: (5, 1),
            ..old
        };
        assert!(!nodes.open(number, new, true));
        assert!(!nodes.open(number, old, true));
        nodes.forget(number, 1);
        assert!(!nodes.open(number, old, true));
    }

    #[test]
    fn the_root_stays() {
        let mut nodes = Nodes::new(node(1), 0);
        nodes.forget(ROOT, u64::MAX);
        assert!(nodes.get(ROOT).is_some());
        let number = nodes.add(node(2));
        nodes.clear();
        assert!(nodes.get(number).is_none());
        assert_eq!(found(&mut nodes, 1), Some(ROOT));
    }

    #[test]
    fn numbers_of_different_file_systems_differ() {
        let mut nodes = Nodes::new(node(1), 0);
        let first = nodes.shown_number((0, 31), 2);
        assert_eq!(first, 2);
        assert_ne!(nodes.shown_number((0, 32), 2), first);
        assert_eq!(nodes.shown_number((0, 31), 2), first);
    }
}
