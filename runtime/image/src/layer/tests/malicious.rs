//! Layers that must be refused, with the reason; none of them may take much memory or time.

use super::*;

fn refused(tar: TarBuilder) -> String {
    refused_with(tar, &Limits::default())
}

fn refused_with(tar: TarBuilder, limits: &Limits) -> String {
    let tar = tar.end();
    match convert_blob(&tar, &sha256(&tar), limits) {
        Ok(layer) => panic!("accepted: {:?}", read_back(&layer).keys()),
        Err(error) => error.to_string(),
    }
}

#[test]
fn names_that_leave_the_layer() {
    for name in ["..", "../x", "a/../../x", "a/../b", "/../x", "a/.."] {
        let reason = refused(TarBuilder::default().file(name, b""));
        assert!(reason.contains("leaves the layer"), "{name}: {reason}");
    }
    for whiteout in [".wh...", ".wh..", ".wh.", "a/.wh..."] {
        let reason = refused(TarBuilder::default().file(whiteout, b""));
        assert!(reason.contains("leaves the layer"), "{whiteout}: {reason}");
    }
}

#[test]
fn hard_links_out_of_the_layer() {
    for (target, reason) in [
        ("../../etc/shadow", "leaves the layer"),
        ("/etc/shadow", "not in the layer"),
        ("later", "not in the layer"),
        ("dir", "is a directory"),
        ("/", "is a directory"),
        ("out/shadow", "not in the layer"),
    ] {
        let tar = TarBuilder::default()
            .directory("dir")
            .symlink("out", "../../etc")
            .hard_link("link", target);
        let said = refused(tar.file("later", b""));
        assert!(said.contains(reason), "{target}: {said}");
    }
}

#[test]
fn a_file_as_a_parent() {
    for parent in [b'0', b'3', b'6'] {
        let tar = TarBuilder::default().entry(
            &Header {
                device: (1, 3),
                ..Header::new("a", parent)
            },
            b"",
        );
        assert!(refused(tar.file("a/b", b"")).contains("not a directory"));
    }
}

#[test]
fn symbolic_links_in_circles() {
    let tar = TarBuilder::default()
        .symlink("a", "b")
        .symlink("b", "a")
        .file("a/f", b"");
    assert!(refused(tar).contains("too many symbolic links"));
    // Each link doubles the length of the path.
    let mut tar = TarBuilder::default().directory("0");
    for i in 1..39 {
        tar = tar.symlink(&i.to_string(), &format!("{}/../{}", i - 1, i - 1));
    }
    assert!(refused(tar.file("38/f", b"")).contains("too many symbolic links"));
}

#[test]
fn names_and_paths_too_long() {
    let long = |name: String| {
        TarBuilder::default()
            .pax(&[(b"path", name.as_bytes())])
            .file("x", b"")
    };
    assert!(refused(long("n".repeat(256))).contains("longer than 255"));
    assert!(refused(long(format!("{}/x", "n".repeat(256)))).contains("longer than 255"));
    assert!(refused(long("a/".repeat(2048))).contains("path"));
    let tar = TarBuilder::default()
        .pax(&[(b"linkpath", "t".repeat(4096).as_bytes())])
        .symlink("s", "x");
    assert!(refused(tar).contains("target"));
    let tar = TarBuilder::default()
        .file("a", b"")
        .pax(&[(b"linkpath", "t".repeat(5000).as_bytes())]);
    assert!(refused(tar.hard_link("s", "x")).contains("target"));
}

#[test]
fn attributes_too_large() {
    let xattr = |name: &str, size: usize| {
        let key = format!("SCHILY.xattr.{name}");
        TarBuilder::default()
            .pax(&[(key.as_bytes(), &vec![0; size])])
            .file("f", b"")
    };
    assert!(refused(xattr("user.x", 65_536)).contains("extended attributes"));
    assert!(refused(xattr(&format!("user.{}", "n".repeat(256)), 1)).contains("invalid name"));
}

#[test]
fn bombs() {
    let limits = Limits {
        max_entries: 100,
        max_metadata_bytes: 5_000,
        max_layer_bytes: 1 << 20,
        max_path_bytes: 1000,
        ..Limits::default()
    };
    let mut many = TarBuilder::default();
    let mut deep = TarBuilder::default();
    let mut links = TarBuilder::default().file("f", b"");
    for i in 0..101 {
        many = many.file("same", b"");
        deep = deep.file(&format!("{i}/a/b/c/d/e/f/g/h/i/j/k/l/m/n/o/p"), b"");
        links = links.hard_link(&i.to_string(), "f");
    }
    for tar in [many, deep, links] {
        assert!(refused_with(tar, &limits).contains("more than 100 entries"));
    }
    let mut names = TarBuilder::default();
    for i in 0..45 {
        names = names
            .file(&format!("{i}{}", "n".repeat(97)), b"")
            .symlink(&format!("s{i}"), &"t".repeat(90));
    }
    assert!(refused_with(names, &limits).contains("take more than 5000 bytes"));

    // 10 MiB of zeroes in some KiB.
    let tar = TarBuilder::default().file("f", &vec![0; 10 << 20]).end();
    let error = convert_blob(&gzip(&tar), &sha256(&tar), &limits)
        .map(drop)
        .unwrap_err();
    assert!(matches!(error, LayerError::TooLarge(1_048_576)), "{error}");
    // The same behind the end of the archive.
    let tar = [TarBuilder::default().end(), vec![0; 10 << 20]].concat();
    let error = convert_blob(&gzip(&tar), &sha256(&tar), &limits)
        .map(drop)
        .unwrap_err();
    assert!(matches!(error, LayerError::TooLarge(1_048_576)), "{error}");
    // A sparse file whose size is a lie that costs nothing to tell.
    let size = (1u64 << 62).to_string();
    let tar = TarBuilder::default().pax(&[
        (b"GNU.sparse.map", b""),
        (b"GNU.sparse.size", size.as_bytes()),
    ]);
    assert!(refused(tar.file("f", b"")).contains("larger than"));
}

#[test]
fn archives_that_are_none() {
    for bytes in [
        &b"not an archive"[..],
        &[b'x'; 512],
        &[0x1f, 0x8b, 0, 0, 0, 0],
        &[0x28, 0xb5, 0x2f, 0xfd, 0xff],
    ] {
        assert!(convert_blob(bytes, &sha256(bytes), &Limits::default()).is_err());
    }
    let tar = TarBuilder::default().file("a", &[1; 10_000]).end();
    let cut = &gzip(&tar)[..50];
    assert!(matches!(
        convert_blob(cut, &sha256(&tar), &Limits::default()),
        Err(LayerError::Decompress(_))
    ));
    let garbage = [gzip(&tar), b"garbage".to_vec()].concat();
    assert!(convert_blob(&garbage, &sha256(&tar), &Limits::default()).is_err());
}

#[test]
fn a_device_number_out_of_range() {
    let tar = TarBuilder::default().entry(
        &Header {
            device: (0, 0o7_777_777),
            ..Header::new("d", b'4')
        },
        b"",
    );
    assert!(refused(tar).contains("device number"));
}
