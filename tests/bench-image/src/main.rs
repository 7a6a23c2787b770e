//! Writes the image that `make bench` pulls: `podvisor-bench-image DIR` makes an OCI layout in DIR, tag
//! "latest", of 5 layers with 40 MB of files each, the same bytes every time.
//!
//! What matters for a pull is how many files there are, how large they are and how well they
//! compress, so these follow what distribution images have: most files of some KiB, most
//! bytes in few large ones, half text and half machine code, gzip to half.

use std::error::Error;
use std::fs;
use std::path::Path;

use flate2::Compression;
use flate2::write::GzEncoder;
use serde_json::json;
use sha2::{Digest, Sha256};

const LAYERS: u64 = 5;
const LAYER_BYTES: usize = 40_000_000;
/// Files below a layer's directories, at most.
const FILES_PER_DIRECTORY: usize = 64;
/// One file in so many is large.
const LARGE_ONE_IN: u64 = 200;

type Result<T> = std::result::Result<T, Box<dyn Error>>;

fn main() -> Result<()> {
    let dir = std::env::args()
        .nth(1)
        .ok_or("usage: podvisor-bench-image DIR")?;
    let dir = Path::new(&dir);
    fs::create_dir_all(dir.join("blobs/sha256"))?;

    let mut layers = Vec::new();
    let mut diff_ids = Vec::new();
    for index in 0..LAYERS {
        let tar = layer(index)?;
        diff_ids.push(digest(&tar));
        let mut gzip = GzEncoder::new(Vec::new(), Compression::default());
        std::io::copy(&mut tar.as_slice(), &mut gzip)?;
        let media_type = "application/vnd.oci.image.layer.v1.tar+gzip";
        layers.push(blob(dir, media_type, &gzip.finish()?)?);
    }
    let config = json!({
        "architecture": "amd64",
        "os": "linux",
        "config": {"Cmd": ["/nothing"]},
        "rootfs": {"type": "layers", "diff_ids": diff_ids},
    });
    let media_type = "application/vnd.oci.image.config.v1+json";
    let config = blob(dir, media_type, config.to_string().as_bytes())?;
    let media_type = "application/vnd.oci.image.manifest.v1+json";
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": media_type,
        "config": config,
        "layers": layers,
    });
    let mut manifest = blob(dir, media_type, manifest.to_string().as_bytes())?;
    manifest["annotations"] = json!({"org.opencontainers.image.ref.name": "latest"});
    fs::write(
        dir.join("oci-layout"),
        json!({"imageLayoutVersion": "1.0.0"}).to_string(),
    )?;
    let index = json!({"schemaVersion": 2, "manifests": [manifest]});
    fs::write(dir.join("index.json"), index.to_string())?;
    Ok(())
}

/// Stores a blob; its descriptor.
fn blob(dir: &Path, media_type: &str, bytes: &[u8]) -> Result<serde_json::Value> {
    let digest = digest(bytes);
    let hex = digest.trim_start_matches("sha256:");
    fs::write(dir.join("blobs/sha256").join(hex), bytes)?;
    Ok(json!({"mediaType": media_type, "digest": digest, "size": bytes.len()}))
}

fn digest(bytes: &[u8]) -> String {
    Sha256::digest(bytes)
        .iter()
        .fold("sha256:".to_owned(), |text, byte| {
            text + &format!("{byte:02x}")
        })
}

/// The tar archive of a layer.
fn layer(index: u64) -> Result<Vec<u8>> {
    let mut random = Random(index + 1);
    let words: Vec<String> = (0..4096).map(|_| random.word()).collect();
    let mut archive = tar::Builder::new(Vec::with_capacity(LAYER_BYTES * 11 / 10));
    let (mut bytes, mut files) = (0, 0);
    while bytes < LAYER_BYTES {
        let directory = format!("layer{index}/dir{}", files / FILES_PER_DIRECTORY);
        if files % FILES_PER_DIRECTORY == 0 {
            let mut header = header(tar::EntryType::Directory, 0o755, 0);
            archive.append_data(&mut header, format!("{directory}/"), std::io::empty())?;
        }
        let length = random.file_length().min(LAYER_BYTES - bytes);
        let content = if random.below(2) == 0 {
            random.text(&words, length)
        } else {
            random.code(length)
        };
        let mut header = header(tar::EntryType::Regular, 0o644, length as u64);
        archive.append_data(
            &mut header,
            format!("{directory}/file{files}"),
            content.as_slice(),
        )?;
        bytes += length;
        files += 1;
    }
    Ok(archive.into_inner()?)
}

fn header(kind: tar::EntryType, mode: u32, size: u64) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_size(size);
    header.set_mtime(0);
    header.set_uid(0);
    header.set_gid(0);
    header
}

/// splitmix64, <https://prng.di.unimi.it/splitmix64.c>: the same numbers on every machine.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    /// From 256 bytes to 32 KiB, each size as often as its half; now and then some MB.
    fn file_length(&mut self) -> usize {
        let length = if self.below(LARGE_ONE_IN) == 0 {
            1_000_000 + self.below(4_000_000)
        } else {
            let scale = 256 << self.below(7);
            scale + self.below(scale)
        };
        length as usize
    }

    fn word(&mut self) -> String {
        let length = 2 + self.below(9);
        (0..length)
            .map(|_| char::from(b'a' + self.below(26) as u8))
            .collect()
    }

    fn text(&mut self, words: &[String], length: usize) -> Vec<u8> {
        let mut text = Vec::with_capacity(length + 16);
        while text.len() < length {
            // Squared: some words come often, as in any language.
            let rank = self.below(64) * self.below(64);
            text.extend_from_slice(words[rank as usize].as_bytes());
            text.push(if self.below(12) == 0 { b'\n' } else { b' ' });
        }
        text.truncate(length);
        text
    }

    /// Instructions of which some come often, with operands that are often small.
    fn code(&mut self, length: usize) -> Vec<u8> {
        let mut code = Vec::with_capacity(length + 8);
        while code.len() < length {
            let random = self.next();
            let opcode = (random & 0x7) as u8;
            let small = (random >> 8 & 0x1f) as u8;
            match random >> 16 & 3 {
                0 => code.extend_from_slice(&[0x48, 0x89 ^ opcode, small]),
                1 => code.extend_from_slice(&[0x0f, 0x84, small, 0, 0, 0]),
                2 => code.extend_from_slice(&(random >> 24).to_le_bytes()[..4]),
                _ => code.extend_from_slice(&[0, 0, small, 0]),
            }
        }
        code.truncate(length);
        code
    }
}
