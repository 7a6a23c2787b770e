//! Layers from tar to EROFS and back: read by erofs-rs, checked by `fsck.erofs`; and layers that must be refused.

mod malicious;
mod random;

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;

use erofs_rs::types::{DirentFileType, Inode};
use erofs_rs::{EroFS, backend::SliceImage};

use super::*;
use crate::tar::Mtime;
use crate::testing::{Header, TarBuilder, convert_blob, convert_tar, gzip, sha256};

/// A file as it is read back.
#[derive(Debug, Clone, PartialEq)]
struct Found {
    what: What,
    mode: u32,
    uid: u32,
    gid: u32,
    mtime: Mtime,
    xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    links: u32,
}

#[derive(Debug, Clone, PartialEq)]
enum What {
    File(Vec<u8>),
    Directory,
    Symlink(Vec<u8>),
    Char(u32, u32),
    Block(u32, u32),
    Fifo,
}

type Files = BTreeMap<String, Found>;

/// Every file of a finished layer by its path; the root is "/".
fn read_back(layer: &NewLayer) -> Files {
    let fsck = Command::new("fsck.erofs")
        .arg(layer.file.path())
        .output()
        .unwrap();
    let said = [fsck.stdout, fsck.stderr].concat();
    assert!(
        fsck.status.success(),
        "fsck.erofs: {}",
        String::from_utf8_lossy(&said)
    );
    let image = std::fs::read(layer.file.path()).unwrap();
    assert_eq!(image.len() as u64, layer.length);
    let fs = EroFS::new(SliceImage::new(&image)).unwrap();
    let root = fs.get_inode(fs.super_block().root_inode_id()).unwrap();
    let mut files = Files::from([(
        "/".to_owned(),
        describe(&fs, root, DirentFileType::Directory),
    )]);
    for entry in fs.walk_dir("/").unwrap() {
        let entry = entry.unwrap();
        let path = String::from_utf8(entry.dir_entry.path().into_vec()).unwrap();
        // By name too, as the kernel looks it up: a binary search that wants the names in order.
        let by_name = fs.xattrs(&path).unwrap();
        let found = describe(&fs, entry.inode, entry.dir_entry.file_type());
        assert_eq!(found.xattrs, by_name);
        files.insert(path, found);
    }
    files
}

fn describe(fs: &EroFS<SliceImage<'_>>, inode: Inode, file_type: DirentFileType) -> Found {
    let device = inode.device().unwrap_or_default();
    let what = match file_type {
        DirentFileType::RegularFile => {
            let mut content = Vec::new();
            fs.open_inode_file(inode)
                .unwrap()
                .read_to_end(&mut content)
                .unwrap();
            What::File(content)
        }
        DirentFileType::Directory => {
            assert!(inode.is_dir());
            What::Directory
        }
        DirentFileType::Symlink => What::Symlink(fs.read_link_inode(inode).unwrap().into_vec()),
        DirentFileType::CharacterDevice => What::Char(device.0, device.1),
        DirentFileType::BlockDevice => What::Block(device.0, device.1),
        DirentFileType::Fifo => What::Fifo,
        other => panic!("{other:?}"),
    };
    let (seconds, nanos) = inode.modified_unix();
    Found {
        what,
        mode: inode.permissions().mode() & 0o7777,
        uid: inode.uid(),
        gid: inode.gid(),
        mtime: Mtime { seconds, nanos },
        xattrs: fs.xattrs_inode(inode).unwrap(),
        links: inode.nlink(),
    }
}

/// Converts an archive that must be good.
fn files(tar: TarBuilder) -> Files {
    read_back(&convert_tar(&tar.end()).unwrap())
}

const OPAQUE: &[u8] = b"trusted.overlay.opaque";

fn is_opaque(found: &Found) -> bool {
    found.xattrs.get(OPAQUE).is_some_and(|value| value == b"y")
}

#[test]
fn empty_layer() {
    let files = files(TarBuilder::default());
    assert_eq!(files.len(), 1);
    assert_eq!((files["/"].mode, files["/"].links), (0o755, 2));
}

#[test]
fn paths_are_normalised_and_parents_implied() {
    let files = files(
        TarBuilder::default()
            .entry(
                &Header {
                    mode: 0o1777,
                    uid: 9,
                    ..Header::new("./", b'5')
                },
                b"",
            )
            .file("./a//b/./c", b"1")
            .file("/absolute", b"2")
            .directory("d/"),
    );
    assert_eq!(
        files.keys().collect::<Vec<_>>(),
        ["/", "/a", "/a/b", "/a/b/c", "/absolute", "/d"]
    );
    assert_eq!((files["/"].mode, files["/"].uid), (0o1777, 9));
    assert_eq!(files["/a"].mode, 0o755);
}

#[test]
fn later_entries_replace_earlier_ones() {
    let files = files(
        TarBuilder::default()
            .file("file", b"old")
            .file("file", b"new")
            .file("tree/a/b", b"1")
            .symlink("tree", "elsewhere")
            .file("dir/kept", b"2")
            .entry(
                &Header {
                    mode: 0o700,
                    ..Header::new("dir", b'5')
                },
                b"",
            )
            .symlink("link", "x")
            .directory("link"),
    );
    assert_eq!(files["/file"].what, What::File(b"new".into()));
    assert_eq!(files["/tree"].what, What::Symlink(b"elsewhere".into()));
    assert_eq!(files["/dir"].mode, 0o700);
    assert!(files.contains_key("/dir/kept"));
    assert_eq!(files["/link"].what, What::Directory);
    assert_eq!(files.len(), 6);
}

#[test]
fn whiteouts() {
    let files = files(
        TarBuilder::default()
            .file("gone/.wh.file", b"")
            .file("opaque/.wh..wh..opq", b"")
            .file("opaque/new", b"")
            // What the layer itself has is not hidden by its whiteouts, in either order.
            .file("d1/f", b"")
            .file(".wh.d1", b"")
            .file(".wh.d2", b"")
            .directory("d2")
            .file(".wh.d3", b"")
            .file("d3/f", b"")
            .file(".wh.f", b"")
            .file("f", b"x")
            .file(".wh..wh.plnk", b""),
    );
    assert_eq!(files["/gone/file"].what, What::Char(0, 0));
    for path in ["/opaque", "/d1", "/d2", "/d3"] {
        assert!(is_opaque(&files[path]), "{path}");
    }
    assert!(!is_opaque(&files["/gone"]));
    assert!(files.contains_key("/d1/f") && files.contains_key("/d3/f"));
    assert_eq!(files["/f"].what, What::File(b"x".into()));
    assert!(files.keys().all(|path| !path.contains(".wh.")));
}

#[test]
fn an_opaque_root() {
    assert!(is_opaque(
        &files(TarBuilder::default().file(".wh..wh..opq", b""))["/"]
    ));
}

#[test]
fn hard_links() {
    let files = files(
        TarBuilder::default()
            .file("a", b"data")
            .hard_link("b", "./a")
            .hard_link("dir/c", "/b")
            .hard_link("a", "a")
            .symlink("s", "a")
            .hard_link("t", "s")
            .file("replaced", b"1")
            .hard_link("other", "replaced")
            .file("replaced", b"2"),
    );
    for path in ["/a", "/b", "/dir/c"] {
        assert_eq!(
            (&files[path].what, files[path].links),
            (&What::File(b"data".into()), 3),
            "{path}"
        );
    }
    assert_eq!(
        (&files["/t"].what, files["/t"].links),
        (&What::Symlink(b"a".into()), 2)
    );
    assert_eq!(
        (&files["/other"].what, files["/other"].links),
        (&What::File(b"1".into()), 1)
    );
}

#[test]
fn symbolic_links_on_the_way_stay_in_the_layer() {
    let files = files(
        TarBuilder::default()
            .directory("real/sub")
            .symlink("absolute", "/real")
            .file("absolute/one", b"1")
            .symlink("real/up", "../../../..//real/sub")
            .file("real/up/two", b"2")
            .symlink("dangling", "missing/dir")
            .file("dangling/three", b"3")
            .hard_link("four", "absolute/one"),
    );
    assert_eq!(files["/real/one"].what, What::File(b"1".into()));
    assert_eq!(files["/real/sub/two"].what, What::File(b"2".into()));
    assert_eq!(files["/missing/dir/three"].what, What::File(b"3".into()));
    assert_eq!(files["/four"].links, 2);
}

#[test]
fn attributes_of_every_size() {
    let pax: &[(&[u8], &[u8])] = &[
        (b"mtime", b"-3.75"),
        (b"SCHILY.xattr.security.capability", &[1; 20]),
        (b"SCHILY.xattr.user.large", &[2; 5000]),
        (b"SCHILY.xattr.user.empty", b""),
        (b"SCHILY.xattr.user.twice", b"1"),
        (b"SCHILY.xattr.user.twice", b"2"),
        (b"SCHILY.xattr.system.posix_acl_access", &[2, 0, 0, 0]),
        // Has no place in EROFS; and an order to overlayfs that only a whiteout may give.
        (b"SCHILY.xattr.com.apple.provenance", b"x"),
        (b"SCHILY.xattr.trusted.overlay.redirect", b"/etc/shadow"),
    ];
    let big = Header {
        uid: 70_000,
        gid: u32::MAX - 1,
        mode: 0o6755,
        ..Header::new("f", b'0')
    };
    let files = files(
        TarBuilder::default()
            .pax(pax)
            .entry(&big, b"x")
            .pax(pax)
            .directory("d")
            .pax(&[pax, &[(b"linkpath", &[b't'; 4000])]].concat())
            .symlink("s", "x"),
    );
    let f = &files["/f"];
    assert_eq!(
        (f.uid, f.gid, f.mode, f.mtime),
        (
            70_000,
            u32::MAX - 1,
            0o6755,
            Mtime {
                seconds: -4,
                nanos: 250_000_000
            }
        )
    );
    let names: Vec<_> = f
        .xattrs
        .keys()
        .map(|name| String::from_utf8_lossy(name).into_owned())
        .collect();
    assert_eq!(
        names,
        [
            "security.capability",
            "system.posix_acl_access",
            "user.empty",
            "user.large",
            "user.twice"
        ]
    );
    assert_eq!(f.xattrs[&b"user.twice"[..]], b"2");
    assert_eq!(f.xattrs[&b"user.large"[..]], [2; 5000]);
    assert_eq!(f.xattrs, files["/d"].xattrs);
    assert_eq!(f.xattrs, files["/s"].xattrs);
    assert_eq!(files["/s"].what, What::Symlink(vec![b't'; 4000]));
}

/// fsck.erofs reads on behind an inode without attributes.
#[test]
fn the_last_inode_may_end_with_its_block() {
    let extended = Header {
        uid: 70_000,
        ..Header::new("z", b'0')
    };
    // A step is an inode's alignment: one of them puts the last inode at its block's end.
    for target in (3_800..4_000).step_by(32) {
        let tar = TarBuilder::default()
            .pax(&[(b"linkpath", &vec![b't'; target])])
            .symlink("a", "x")
            .entry(&extended, b"");
        assert_eq!(files(tar)["/z"].uid, 70_000);
    }
}

#[test]
fn directories_of_many_blocks() {
    for length in [1, 100, 250] {
        let mut tar = TarBuilder::default();
        for i in 0..400 {
            tar = tar
                .pax(&[(
                    b"path",
                    format!("d/{i:03}{}", "n".repeat(length)).as_bytes(),
                )])
                .file("x", b"");
        }
        // Sorts before "." and "..".
        let files = files(tar.file("d/!first", b"").file("d/-second", b""));
        assert_eq!(files.len(), 2 + 400 + 2);
        assert_eq!(files["/d"].links, 2);
    }
}

#[test]
fn zeroes_take_no_space_on_disk() {
    let mut content = vec![0; 8 << 20];
    content[5 << 20] = 1;
    let layer = convert_tar(&TarBuilder::default().file("f", &content).end()).unwrap();
    assert!(layer.length > 8 << 20);
    assert!(layer.disk_bytes < 64 << 10, "{}", layer.disk_bytes);
    assert!(read_back(&layer)["/f"].what == What::File(content));
}

#[test]
fn every_compression_and_the_diff_id() {
    let tar = TarBuilder::default().file("a", &vec![7; 100_000]).end();
    // Padding behind the archive, as tar writes it, is part of the layer's digest.
    let tar = [tar, vec![0; 8192]].concat();
    let zstd = zstd::encode_all(tar.as_slice(), 3).unwrap();
    let skippable = [
        &[0x50, 0x2a, 0x4d, 0x18, 4, 0, 0, 0, 1, 2, 3, 4],
        zstd.as_slice(),
    ]
    .concat();
    let (first, second) = tar.split_at(50_000);
    let members = [gzip(first), gzip(second)].concat();
    for blob in [tar.clone(), gzip(&tar), members, zstd, skippable] {
        let layer = convert_blob(&blob, &sha256(&tar), &Limits::default()).unwrap();
        assert_eq!(read_back(&layer)["/a"].what, What::File(vec![7; 100_000]));
        let other = convert_blob(&blob, &sha256(b"other"), &Limits::default());
        assert!(matches!(other, Err(LayerError::DiffId { .. })));
    }
}
