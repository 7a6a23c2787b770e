use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::process::Command;

use proptest::prelude::*;

use super::*;
use crate::testing::{Header, TarBuilder, seal};

/// All entries, and each one's data with its holes filled.
fn read(archive: &[u8]) -> Result<Vec<(Entry, Vec<u8>)>, TarError> {
    let mut reader = TarReader::new(archive);
    let mut entries = Vec::new();
    while let Some(entry) = reader.next()? {
        let size = match entry.kind {
            Kind::File { size } => usize::try_from(size).unwrap().min(1 << 24),
            _ => 0,
        };
        let mut data = vec![0; size];
        reader.data(|offset, piece| {
            let offset = usize::try_from(offset).unwrap();
            if let Some(place) = data.get_mut(offset..offset + piece.len()) {
                place.copy_from_slice(piece);
            }
            Ok::<_, TarError>(())
        })?;
        entries.push((entry, data));
    }
    Ok(entries)
}

fn paths(archive: &[u8]) -> Vec<String> {
    let entries = read(archive).unwrap();
    entries
        .into_iter()
        .map(|(entry, _)| String::from_utf8(entry.path).unwrap())
        .collect()
}

#[test]
fn what_gnu_tar_writes_in_every_format() {
    let dir = tempfile::tempdir().unwrap();
    let long = "long-".repeat(30);
    let nested = format!("{long}/{long}");
    fs::create_dir_all(dir.path().join(&nested)).unwrap();
    fs::write(dir.path().join(&nested).join("file"), "content").unwrap();
    std::os::unix::fs::symlink("target-".repeat(30), dir.path().join("symlink")).unwrap();
    for format in ["gnu", "oldgnu", "posix"] {
        let tar = Command::new("tar")
            .args([
                "--sort=name",
                "--owner=70000:70000",
                "--group=5",
                "--mtime=@-5",
                "--format",
                format,
                "-cf",
                "-",
                ".",
            ])
            .current_dir(dir.path())
            .output()
            .unwrap();
        assert!(
            tar.status.success(),
            "{}",
            String::from_utf8_lossy(&tar.stderr)
        );
        let entries = read(&tar.stdout).unwrap();
        let names: Vec<_> = entries
            .iter()
            .map(|(entry, _)| String::from_utf8_lossy(&entry.path).into_owned())
            .collect();
        assert_eq!(
            names,
            [
                "./",
                &format!("./{long}/"),
                &format!("./{nested}/"),
                &format!("./{nested}/file"),
                "./symlink"
            ],
            "{format}"
        );
        let (file, data) = &entries[3];
        assert_eq!(
            (file.uid, file.gid, data.as_slice()),
            (70000, 5, &b"content"[..]),
            "{format}"
        );
        assert_eq!(
            file.mtime,
            Mtime {
                seconds: -5,
                nanos: 0
            },
            "{format}"
        );
        assert_eq!(
            entries[4].0.kind,
            Kind::Symlink {
                target: "target-".repeat(30).into()
            },
            "{format}"
        );
    }
}

#[test]
fn sparse_files_of_gnu_tar_in_every_format() {
    let dir = tempfile::tempdir().unwrap();
    let file = File::create(dir.path().join("sparse")).unwrap();
    // More pieces than fit in the first header and in one that extends it.
    let mut content = vec![0; 4 << 20];
    for piece in 0..40 {
        let at = piece * 100_000 / 4096 * 4096;
        let data = vec![u8::try_from(piece + 1).unwrap(); 4096 + piece];
        content[at..at + data.len()].copy_from_slice(&data);
        file.write_all_at(&data, at as u64).unwrap();
    }
    file.set_len(content.len() as u64).unwrap();
    for arguments in [
        &["--format=gnu"][..],
        &["--format=posix", "--sparse-version=0.0"],
        &["--format=posix", "--sparse-version=0.1"],
        &["--format=posix", "--sparse-version=1.0"],
    ] {
        let tar = Command::new("tar")
            .args(arguments)
            .args(["--sparse", "--hole-detection=raw", "-cf", "-", "sparse"])
            .current_dir(dir.path())
            .output()
            .unwrap();
        assert!(
            tar.stdout.len() < content.len() / 2,
            "{arguments:?}: tar found no holes"
        );
        let entries = read(&tar.stdout).unwrap();
        assert_eq!(entries[0].0.path, b"sparse", "{arguments:?}");
        assert!(entries[0].1 == content, "{arguments:?}: content differs");
    }
}

#[test]
fn pax_overrides_and_xattrs() {
    let archive = TarBuilder::default()
        .pax(&[
            (b"path", b"a/long/name"),
            (b"uid", b"4000000000"),
            (b"mtime", b"1.25"),
            (b"SCHILY.xattr.security.capability", b"\x01\0\n="),
        ])
        .file("short", b"x")
        .file("next", b"")
        .end();
    let entries = read(&archive).unwrap();
    let entry = &entries[0].0;
    assert_eq!(
        (entry.path.as_slice(), entry.uid),
        (&b"a/long/name"[..], 4_000_000_000)
    );
    assert_eq!(
        entry.mtime,
        Mtime {
            seconds: 1,
            nanos: 250_000_000
        }
    );
    assert_eq!(
        entry.xattrs,
        [(b"security.capability".to_vec(), b"\x01\0\n=".to_vec())]
    );
    assert_eq!(entries[1].0.path, b"next");
    assert!(entries[1].0.xattrs.is_empty());
}

#[test]
fn ends() {
    let one = TarBuilder::default().file("a", b"abc");
    assert_eq!(paths(&one.clone().end()), ["a"]);
    // Without the two blocks of zeroes, and with one.
    assert_eq!(paths(&one.bytes), ["a"]);
    assert_eq!(paths(&one.clone().raw(&[0; 512]).bytes), ["a"]);
    // What follows the end is not read.
    assert_eq!(
        paths(&one.clone().raw(&[0; 1024]).raw(&[7; 512]).bytes),
        ["a"]
    );
    assert!(matches!(
        read(&one.clone().raw(&[0; 512]).file("b", b"").end()),
        Err(TarError::Header { .. })
    ));
    assert!(matches!(
        read(&one.bytes[..600]),
        Err(TarError::Truncated { .. })
    ));
    assert!(matches!(
        read(&one.bytes[..300]),
        Err(TarError::Truncated { .. })
    ));
    assert!(matches!(
        read(&one.raw(&[b'x'; 512]).bytes),
        Err(TarError::Checksum { at: 1024 })
    ));
}

#[test]
fn a_size_beyond_the_stream() {
    for size in [4, 1 << 40, i64::MAX as u64] {
        let archive = TarBuilder::default()
            .raw(
                &Header {
                    size,
                    ..Header::new("a", b'0')
                }
                .block(),
            )
            .raw(b"abc")
            .bytes;
        assert!(read(&archive).is_err(), "{size}");
    }
    let archive = TarBuilder::default()
        .pax(&[(b"size", b"18446744073709551615")])
        .file("a", b"")
        .end();
    assert!(matches!(
        read(&archive),
        Err(TarError::Header { what: "size", .. })
    ));
}

#[test]
fn headers_that_want_too_much_memory() {
    for flag in [b'x', b'g', b'L', b'K'] {
        let header = Header {
            size: MAX_SPECIAL + 1,
            ..Header::new("a", flag)
        };
        let archive = TarBuilder::default()
            .raw(&header.block())
            .raw(&[b'0'; 4096])
            .bytes;
        assert!(
            matches!(read(&archive), Err(TarError::TooLarge { .. })),
            "{flag}"
        );
    }
    let chain = TarBuilder::default()
        .entry(&Header::new("a", b'g'), b"")
        .bytes
        .repeat(20);
    assert!(matches!(
        read(&chain),
        Err(TarError::TooLarge {
            what: "chain of extended headers",
            ..
        })
    ));
}

fn gnu_sparse(segments: &[(u64, u64)], real_size: u64, stored: u64, extended: bool) -> [u8; 512] {
    let mut block = Header {
        size: stored,
        ..Header::new("a", b'S')
    }
    .block();
    block[257..265].copy_from_slice(b"ustar  \0");
    block[345..500].fill(0);
    for (i, (offset, length)) in segments.iter().enumerate() {
        block[386 + 24 * i..][..24]
            .copy_from_slice(format!("{offset:011o}\0{length:011o}\0").as_bytes());
    }
    block[482] = u8::from(extended);
    block[483..495].copy_from_slice(format!("{real_size:011o}\0").as_bytes());
    seal(&mut block);
    block
}

#[test]
fn lying_sparse_maps() {
    let data = [1; 1024];
    let good = gnu_sparse(&[(0, 512), (4096, 512)], 8192, 1024, false);
    assert_eq!(
        read(&TarBuilder::default().raw(&good).raw(&data).end()).unwrap()[0]
            .1
            .len(),
        8192
    );
    for (segments, real_size, stored) in [
        (&[(4096, 512), (0, 512)][..], 8192, 1024),
        (&[(0, 512), (256, 512)], 8192, 1024),
        (&[(0, 512), (4096, 512)], 4200, 1024),
        (&[(0, 512)], 8192, 1024),
        (&[(0, 512), (4096, 1024)], 8192, 1024),
        (&[(0, 1024), (u64::from(u32::MAX), 0)], 8192, 1024),
    ] {
        let archive = TarBuilder::default()
            .raw(&gnu_sparse(segments, real_size, stored, false))
            .raw(&data)
            .end();
        assert!(
            matches!(
                read(&archive),
                Err(TarError::Header {
                    what: "sparse map",
                    ..
                })
            ),
            "{segments:?}"
        );
    }
}

#[test]
fn a_sparse_map_without_end() {
    let mut extension = [0; 512];
    extension[504] = 1;
    let archive = TarBuilder::default()
        .raw(&gnu_sparse(&[], 0, 0, true))
        .raw(&extension.repeat(5000))
        .bytes;
    assert!(matches!(
        read(&archive),
        Err(TarError::TooLarge {
            what: "sparse map",
            ..
        })
    ));
    let map = "0,1,".repeat(MAX_SPECIAL as usize / 4 - 100);
    let archive = TarBuilder::default()
        .pax(&[(b"GNU.sparse.map", map.as_bytes())])
        .file("a", b"")
        .end();
    assert!(matches!(
        read(&archive),
        Err(TarError::TooLarge {
            what: "sparse map",
            ..
        })
    ));
    let version_1: [(&[u8], &[u8]); 3] = [
        (b"GNU.sparse.major", b"1"),
        (b"GNU.sparse.minor", b"0"),
        (b"GNU.sparse.realsize", b"10"),
    ];
    let archive = TarBuilder::default()
        .pax(&version_1)
        .file("a", format!("{:<512}", "99999999\n").as_bytes())
        .end();
    assert!(matches!(
        read(&archive),
        Err(TarError::TooLarge {
            what: "sparse map",
            ..
        })
    ));
    let archive = TarBuilder::default()
        .pax(&version_1)
        .file("a", &[b'1'; 600])
        .end();
    assert!(matches!(
        read(&archive),
        Err(TarError::Header {
            what: "sparse map",
            ..
        })
    ));
}

#[test]
fn entries_that_no_image_has() {
    let error =
        |header: &Header| read(&TarBuilder::default().raw(&header.block()).end()).unwrap_err();
    assert!(matches!(
        error(&Header::new("a", b'Z')),
        TarError::UnknownType { flag: 'Z', .. }
    ));
    assert!(matches!(
        error(&Header::new("", b'0')),
        TarError::Header { what: "path", .. }
    ));
    assert!(matches!(
        error(&Header::new("a", b'1')),
        TarError::Header {
            what: "link target",
            ..
        }
    ));
    let device = Header {
        device: (4096, 0),
        ..Header::new("a", b'3')
    };
    assert!(matches!(
        error(&device),
        TarError::Header {
            what: "device number",
            ..
        }
    ));
}

proptest! {
    #[test]
    fn never_panics(
        mut archive in prop::collection::vec(any::<u8>(), 0..4096),
        flags in prop::collection::vec(prop::sample::select(b"0123456xgLKSV".as_slice()), 8),
        magic in prop::sample::select(vec![&b"ustar\x0000"[..], b"ustar  \0"]),
    ) {
        // Random bytes would not get beyond the checksum.
        for (block, flag) in archive.as_chunks_mut::<512>().0.iter_mut().zip(flags) {
            block[156] = flag;
            block[257..265].copy_from_slice(magic);
            for field in [100..148, 329..345] {
                block[field].iter_mut().for_each(|byte| *byte = b'0' + *byte % 8);
            }
            block[124..134].fill(b'0');
            seal(block);
        }
        let _ = read(&archive);
    }
}
