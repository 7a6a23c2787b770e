//! Random layers: what is read back must be what a simple model of the rules says.

use proptest::prelude::*;

use super::*;

/// One entry of a layer.
#[derive(Debug, Clone)]
enum Op {
    Put(String, New, Attributes),
    HardLink(String, prop::sample::Index),
    Whiteout(String),
}

#[derive(Debug, Clone)]
enum New {
    File(usize, u8),
    Directory,
    Symlink(usize),
    Char(u32, u32),
    Block(u32, u32),
    Fifo,
}

#[derive(Debug, Clone)]
struct Attributes {
    mode: u32,
    uid: u32,
    gid: u32,
    seconds: i64,
    nanos: u32,
    xattr: Option<(String, Vec<u8>)>,
}

/// Directories have few names, so that entries meet.
fn path() -> impl Strategy<Value = String> {
    let directory = prop::sample::select(vec!["d", "e", "!", "long-directory-name"]);
    let name = prop_oneof![
        3 => "[a-d]{1,2}",
        1 => "[a-zA-Z0-9_-]{1,40}",
        1 => (200..=255usize, "[a-z]").prop_map(|(length, letter)| letter.repeat(length)),
        1 => prop::sample::select(vec!["d".to_owned(), "e".to_owned()]),
    ];
    (prop::collection::vec(directory, 0..4), name)
        .prop_map(|(directories, name)| [directories, vec![&name]].concat().join("/"))
}

fn new() -> impl Strategy<Value = New> {
    // Around the ends of blocks, of the data writer's buffer, and of an inode's room for content.
    let around = |size: usize| (size.saturating_sub(2)..=size + 2).boxed();
    let size = prop_oneof![
        4 => 0..200usize,
        2 => around(4096),
        1 => around(8192),
        1 => around((1 << 20) - 4096),
    ];
    let target = prop_oneof![3 => 1..100usize, 1 => 3900..4096usize];
    prop_oneof![
        5 => (size, any::<u8>()).prop_map(|(size, seed)| New::File(size, seed)),
        2 => Just(New::Directory),
        2 => target.prop_map(New::Symlink),
        1 => (1..4096u32, 0..(1u32 << 20)).prop_map(|(major, minor)| New::Char(major, minor)),
        1 => (0..4096u32, 1..(1u32 << 20)).prop_map(|(major, minor)| New::Block(major, minor)),
        1 => Just(New::Fifo),
    ]
}

fn attributes() -> impl Strategy<Value = Attributes> {
    let id = || prop_oneof![Just(0), Just(65_535), Just(65_536), any::<u32>()];
    let seconds =
        prop_oneof![3 => Just(1_700_000_000), 1 => -1_000_000_000_000..1_000_000_000_000i64];
    let nanos = prop_oneof![2 => Just(0), 1 => 0..1_000_000_000u32];
    let prefix = prop::sample::select(vec!["user", "trusted", "security"]);
    let value = prop_oneof![3 => prop::collection::vec(any::<u8>(), 0..50), 1 => prop::collection::vec(any::<u8>(), 3900..4200)];
    let xattr = prop::option::of((prefix, "[a-z]{1,20}", value));
    (0..=0o7777u32, id(), id(), seconds, nanos, xattr).prop_map(
        |(mode, uid, gid, seconds, nanos, xattr)| {
            let xattr = xattr.map(|(prefix, name, value)| (format!("{prefix}.{name}"), value));
            Attributes {
                mode,
                uid,
                gid,
                seconds,
                nanos,
                xattr,
            }
        },
    )
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        8 => (path(), new(), attributes()).prop_map(|(path, new, attributes)| Op::Put(path, new, attributes)),
        1 => (path(), any::<prop::sample::Index>()).prop_map(|(path, index)| Op::HardLink(path, index)),
        1 => path().prop_map(Op::Whiteout),
    ]
}

fn content(size: usize, seed: u8) -> Vec<u8> {
    (0..size)
        .map(|i| seed.wrapping_mul(31).wrapping_add((i / 7) as u8))
        .collect()
}

/// The rules once more, over a plain map of paths.
#[derive(Default)]
struct Model {
    inodes: Vec<Found>,
    paths: BTreeMap<String, usize>,
}

impl Model {
    fn is_directory(&self, path: &str) -> bool {
        self.paths
            .get(path)
            .is_some_and(|inode| self.inodes[*inode].what == What::Directory)
    }

    fn is_whiteout(&self, path: &str) -> bool {
        self.paths
            .get(path)
            .is_some_and(|inode| self.inodes[*inode].what == What::Char(0, 0))
    }

    /// False if a parent is neither a directory nor missing: such an entry is an error, or goes through a link.
    fn make_parents(&mut self, path: &str) -> bool {
        let parents: Vec<&str> = path
            .match_indices('/')
            .map(|(end, _)| &path[..end])
            .filter(|parent| !parent.is_empty())
            .collect();
        let usable = |parent: &&&str| {
            self.is_directory(parent)
                || self.is_whiteout(parent)
                || !self.paths.contains_key(**parent)
        };
        if parents.iter().filter(usable).count() < parents.len() {
            return false;
        }
        for parent in parents {
            if !self.is_directory(parent) {
                self.put(parent, found(What::Directory, 0o755));
            }
        }
        true
    }

    fn put(&mut self, path: &str, mut found: Found) {
        let was_whiteout = self.is_whiteout(path);
        if found.what == What::Directory {
            if self.is_directory(path) {
                let opaque = is_opaque(&self.inodes[self.paths[path]]);
                if opaque {
                    found.xattrs.insert(OPAQUE.into(), b"y".into());
                }
                let inode = self.paths[path];
                self.inodes[inode] = found;
                return;
            }
            if was_whiteout {
                found.xattrs.insert(OPAQUE.into(), b"y".into());
            }
        }
        self.remove(path);
        self.inodes.push(found);
        self.paths.insert(path.to_owned(), self.inodes.len() - 1);
    }

    fn remove(&mut self, path: &str) {
        let below = format!("{path}/");
        self.paths
            .retain(|known, _| known != path && !known.starts_with(&below));
    }

    fn files(self) -> Files {
        let mut files = Files::new();
        for (path, inode) in &self.paths {
            let mut found = self.inodes[*inode].clone();
            found.links = if found.what == What::Directory {
                let below = if path == "/" {
                    "/".to_owned()
                } else {
                    format!("{path}/")
                };
                let is_child = |other: &&String| {
                    other.len() > below.len()
                        && other.starts_with(&below)
                        && !other[below.len()..].contains('/')
                };
                2 + self
                    .paths
                    .keys()
                    .filter(is_child)
                    .filter(|child| self.is_directory(child))
                    .count() as u32
            } else {
                self.paths.values().filter(|other| *other == inode).count() as u32
            };
            files.insert(path.clone(), found);
        }
        files
    }
}

fn found(what: What, mode: u32) -> Found {
    Found {
        what,
        mode,
        uid: 0,
        gid: 0,
        mtime: Mtime::default(),
        xattrs: BTreeMap::new(),
        links: 0,
    }
}

/// The layer's archive and what must come back from it.
fn layer(ops: Vec<Op>) -> (Vec<u8>, Files) {
    let mut model = Model::default();
    model.put("/", found(What::Directory, 0o755));
    let mut tar = TarBuilder::default();
    for op in ops {
        let path = match &op {
            Op::Put(path, ..) | Op::HardLink(path, _) | Op::Whiteout(path) => format!("/{path}"),
        };
        // A link's target must be there before the link's parents are.
        let targets: Vec<String> = model
            .paths
            .keys()
            .filter(|target| !model.is_directory(target))
            .cloned()
            .collect();
        let below = format!("{path}/");
        let target = match &op {
            Op::HardLink(_, index) if !targets.is_empty() => {
                Some(&targets[index.index(targets.len())])
            }
            Op::HardLink(..) => continue,
            _ => None,
        };
        if target.is_some_and(|target| {
            *target == path || target.starts_with(&below) || path.starts_with(&format!("{target}/"))
        }) {
            continue;
        }
        if !model.make_parents(&path) {
            continue;
        }
        tar = match op {
            Op::Put(name, new, attributes) => {
                let (tar, found) = put(tar, &name, &new, attributes);
                model.put(&path, found);
                tar
            }
            Op::HardLink(name, _) => {
                let target = target.map_or("", String::as_str);
                let inode = model.paths[target];
                model.remove(&path);
                model.paths.insert(path, inode);
                let records = [
                    (&b"path"[..], name.as_bytes()),
                    (&b"linkpath"[..], target.as_bytes()),
                ];
                tar.pax(&records).hard_link("x", "y")
            }
            Op::Whiteout(name) => {
                if let Some(inode) = model.paths.get(&path) {
                    if model.is_directory(&path) {
                        model.inodes[*inode]
                            .xattrs
                            .insert(OPAQUE.into(), b"y".into());
                    }
                } else {
                    model.put(&path, found(What::Char(0, 0), 0));
                }
                let (directory, name) = name
                    .rsplit_once('/')
                    .map_or(("", name.as_str()), |(directory, name)| (directory, name));
                let whiteout = format!("{directory}/.wh.{name}");
                tar.pax(&[(b"path", whiteout.trim_start_matches('/').as_bytes())])
                    .file("x", b"")
            }
        };
    }
    (tar.end(), model.files())
}

fn put(tar: TarBuilder, name: &str, new: &New, attributes: Attributes) -> (TarBuilder, Found) {
    let Attributes {
        mode,
        uid,
        gid,
        seconds,
        nanos,
        xattr,
    } = attributes;
    let (what, flag, data, device, target) = match new {
        New::File(size, seed) => {
            let data = content(*size, *seed);
            (What::File(data.clone()), b'0', data, (0, 0), String::new())
        }
        New::Directory => (What::Directory, b'5', Vec::new(), (0, 0), String::new()),
        New::Symlink(length) => {
            let target = "t/".repeat(*length)[..*length].to_owned();
            (
                What::Symlink(target.clone().into()),
                b'2',
                Vec::new(),
                (0, 0),
                target,
            )
        }
        New::Char(major, minor) => (
            What::Char(*major, *minor),
            b'3',
            Vec::new(),
            (*major, *minor),
            String::new(),
        ),
        New::Block(major, minor) => (
            What::Block(*major, *minor),
            b'4',
            Vec::new(),
            (*major, *minor),
            String::new(),
        ),
        New::Fifo => (What::Fifo, b'6', Vec::new(), (0, 0), String::new()),
    };
    // A negative time with a fraction is written towards zero: -1.25 is two seconds before and 750 ms after.
    let time = match (seconds, nanos) {
        (seconds, 0) => format!("{seconds}"),
        (seconds, nanos) if seconds < 0 && seconds + 1 == 0 => {
            format!("-0.{:09}", 1_000_000_000 - nanos)
        }
        (seconds, nanos) if seconds < 0 => format!("{}.{:09}", seconds + 1, 1_000_000_000 - nanos),
        (seconds, nanos) => format!("{seconds}.{nanos:09}"),
    };
    let key = xattr
        .as_ref()
        .map(|(name, _)| format!("SCHILY.xattr.{name}"));
    let mut records = vec![
        (&b"path"[..], name.as_bytes()),
        (b"mtime", time.as_bytes()),
        (b"linkpath", target.as_bytes()),
    ];
    if let (Some(key), Some((_, value))) = (&key, &xattr) {
        records.push((key.as_bytes(), value));
    }
    let header = Header {
        mode,
        uid,
        gid,
        device,
        ..Header::new("x", flag)
    };
    let tar = tar.pax(&records).entry(&header, &data);
    let xattrs = xattr
        .into_iter()
        .map(|(name, value)| (name.into_bytes(), value))
        .collect();
    (
        tar,
        Found {
            what,
            mode,
            uid,
            gid,
            mtime: Mtime { seconds, nanos },
            xattrs,
            links: 0,
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn what_goes_in_comes_out(ops in prop::collection::vec(op(), 0..60)) {
        let (tar, expected) = layer(ops);
        let layer = convert_tar(&tar).unwrap();
        let files = read_back(&layer);
        prop_assert_eq!(files.keys().collect::<Vec<_>>(), expected.keys().collect::<Vec<_>>());
        for (path, found) in &files {
            prop_assert!(*found == expected[path], "{}: {:?} for {:?}", path, summary(found), summary(&expected[path]));
        }
        // And the same bytes again.
        let again = convert_tar(&tar).unwrap();
        prop_assert!(std::fs::read(layer.file.path()).unwrap() == std::fs::read(again.file.path()).unwrap());
    }
}

/// Without a file's content, which would fill the screen.
fn summary(found: &Found) -> Found {
    let mut found = found.clone();
    if let What::File(content) = &mut found.what {
        content.truncate(10);
    }
    found
}
