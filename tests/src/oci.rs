//! Images made for a test, byte for byte.

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Write};
use std::sync::OnceLock;

use serde_json::{Value, json};
use sha2::{Digest, Sha256};
pub use tar::EntryType;

use crate::{output_of, rig};

/// `sha256:` and 64 digits.
pub fn digest(bytes: &[u8]) -> String {
    let mut text = String::from("sha256:");
    for byte in Sha256::digest(bytes) {
        text.push_str(&format!("{byte:02x}"));
    }
    text
}

/// The media types of a manifest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// OCI image specification 1.
    Oci,
    /// Docker image manifest, version 2, schema 2.
    Docker,
}

impl Format {
    /// Of an image manifest.
    pub fn manifest(self) -> &'static str {
        match self {
            Self::Oci => "application/vnd.oci.image.manifest.v1+json",
            Self::Docker => "application/vnd.docker.distribution.manifest.v2+json",
        }
    }

    /// Of a list of manifests.
    pub fn index(self) -> &'static str {
        match self {
            Self::Oci => "application/vnd.oci.image.index.v1+json",
            Self::Docker => "application/vnd.docker.distribution.manifest.list.v2+json",
        }
    }

    fn config(self) -> &'static str {
        match self {
            Self::Oci => "application/vnd.oci.image.config.v1+json",
            Self::Docker => "application/vnd.docker.container.image.v1+json",
        }
    }

    fn layer(self, compression: Compression) -> &'static str {
        match (self, compression) {
            (Self::Oci, Compression::None) => "application/vnd.oci.image.layer.v1.tar",
            (Self::Oci, Compression::Gzip) => "application/vnd.oci.image.layer.v1.tar+gzip",
            (Self::Oci, Compression::Zstd) => "application/vnd.oci.image.layer.v1.tar+zstd",
            (Self::Docker, Compression::None) => "application/vnd.docker.image.rootfs.diff.tar",
            (Self::Docker, Compression::Gzip) => {
                "application/vnd.docker.image.rootfs.diff.tar.gzip"
            }
            (Self::Docker, Compression::Zstd) => {
                "application/vnd.docker.image.rootfs.diff.tar.zstd"
            }
        }
    }
}

/// How a layer travels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// As it is.
    None,
    /// RFC 1952.
    Gzip,
    /// RFC 8878.
    Zstd,
}

/// A layer in the making: a tar file.
pub struct Layer(tar::Builder<Vec<u8>>);

impl Default for Layer {
    fn default() -> Self {
        Self::new()
    }
}

impl Layer {
    /// Without entries.
    pub fn new() -> Self {
        Self(tar::Builder::new(Vec::new()))
    }

    /// Any entry.
    pub fn entry(
        mut self,
        path: &str,
        kind: EntryType,
        mode: u32,
        link: &str,
        data: &[u8],
    ) -> Self {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_mtime(1_000_000_000);
        header.set_size(data.len() as u64);
        let done = if link.is_empty() {
            self.0.append_data(&mut header, path, data)
        } else {
            self.0.append_link(&mut header, path, link)
        };
        done.expect("memory can be written");
        self
    }

    /// A regular file, 0644.
    pub fn file(self, path: &str, data: impl AsRef<[u8]>) -> Self {
        self.entry(path, EntryType::Regular, 0o644, "", data.as_ref())
    }

    /// A directory, 0755.
    pub fn dir(self, path: &str) -> Self {
        self.entry(path, EntryType::Directory, 0o755, "", &[])
    }

    /// A symbolic link.
    pub fn symlink(self, path: &str, target: &str) -> Self {
        self.entry(path, EntryType::Symlink, 0o777, target, &[])
    }

    /// A hard link.
    pub fn link(self, path: &str, target: &str) -> Self {
        self.entry(path, EntryType::Link, 0o644, target, &[])
    }

    /// Extended attributes of the next entry, as a PAX header.
    pub fn xattr(mut self, name: &str, value: &[u8]) -> Self {
        let key = format!("SCHILY.xattr.{name}");
        self.0
            .append_pax_extensions([(key.as_str(), value)])
            .expect("memory can be written");
        self
    }

    /// An entry whose name tar's own checks would refuse.
    pub fn hostile(mut self, path: &str, kind: EntryType, link: &str, data: &[u8]) -> Self {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(0o644);
        header.set_size(data.len() as u64);
        let fields = header.as_gnu_mut().expect("made as GNU");
        fields.name[..path.len()].copy_from_slice(path.as_bytes());
        fields.linkname[..link.len()].copy_from_slice(link.as_bytes());
        header.set_cksum();
        self.0.append(&header, data).expect("memory can be written");
        self
    }

    /// The tar file.
    pub fn tar(self) -> Vec<u8> {
        self.0.into_inner().expect("memory can be written")
    }
}

/// An image and all its bytes.
#[derive(Debug, Clone)]
pub struct Image {
    /// Configuration and layers by digest.
    pub blobs: BTreeMap<String, Vec<u8>>,
    /// The manifest, or the index.
    pub manifest: Vec<u8>,
    /// Its media type.
    pub media_type: &'static str,
    /// The manifests of an index.
    pub parts: Vec<(&'static str, Vec<u8>)>,
}

impl Image {
    /// An image of tar files. `config`: the image's `config` object.
    pub fn new(format: Format, layers: &[(&[u8], Compression)], config: &Value) -> Self {
        let mut blobs = BTreeMap::new();
        let mut diff_ids = Vec::new();
        let mut descriptors = Vec::new();
        for &(tar, compression) in layers {
            diff_ids.push(digest(tar));
            let blob = compress(tar, compression);
            descriptors.push(descriptor(format.layer(compression), &blob));
            blobs.insert(digest(&blob), blob);
        }
        let config = json!({
            "architecture": "amd64",
            "os": "linux",
            "config": config,
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
        });
        let config = config.to_string().into_bytes();
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": format.manifest(),
            "config": descriptor(format.config(), &config),
            "layers": descriptors,
        });
        blobs.insert(digest(&config), config);
        Self {
            blobs,
            manifest: manifest.to_string().into_bytes(),
            media_type: format.manifest(),
            parts: Vec::new(),
        }
    }

    /// busybox and `layers` above it, gzip.
    pub fn busybox_and(layers: Vec<Layer>) -> Self {
        let tars: Vec<Vec<u8>> = layers.into_iter().map(Layer::tar).collect();
        let mut all = vec![(busybox_tar(), Compression::Gzip)];
        all.extend(tars.iter().map(|tar| (tar.as_slice(), Compression::Gzip)));
        Self::new(Format::Oci, &all, &busybox_config())
    }

    /// With another `config` object.
    pub fn with_config(mut self, config: &Value) -> Self {
        let id = self.id();
        let old = self.blobs.remove(&id).expect("it has a configuration");
        let mut whole: Value = serde_json::from_slice(&old).expect("made as JSON");
        whole["config"] = config.clone();
        let whole = whole.to_string().into_bytes();
        let mut manifest: Value = serde_json::from_slice(&self.manifest).expect("made as JSON");
        manifest["config"]["digest"] = json!(digest(&whole));
        manifest["config"]["size"] = json!(whole.len());
        self.manifest = manifest.to_string().into_bytes();
        self.blobs.insert(digest(&whole), whole);
        self
    }

    /// A list of images, each for a platform `os/architecture`.
    pub fn index(format: Format, images: &[(&str, Self)]) -> Self {
        let mut blobs = BTreeMap::new();
        let mut parts = Vec::new();
        let mut entries = Vec::new();
        for (platform, image) in images {
            let (os, architecture) = platform.split_once('/').expect("os/architecture");
            let mut entry = descriptor(image.media_type, &image.manifest);
            entry["platform"] = json!({"os": os, "architecture": architecture});
            entries.push(entry);
            blobs.extend(image.blobs.clone());
            parts.push((image.media_type, image.manifest.clone()));
        }
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": format.index(),
            "manifests": entries,
        });
        Self {
            blobs,
            manifest: manifest.to_string().into_bytes(),
            media_type: format.index(),
            parts,
        }
    }

    /// Digest of the manifest or index.
    pub fn digest(&self) -> String {
        digest(&self.manifest)
    }

    /// The image's id: the digest of its configuration.
    pub fn id(&self) -> String {
        let manifest: Value = serde_json::from_slice(&self.manifest).expect("made as JSON");
        let id = manifest["config"]["digest"].as_str();
        id.expect("not an index").into()
    }

    /// Digests of the layers as they travel, lowest first.
    pub fn layers(&self) -> Vec<String> {
        let manifest: Value = serde_json::from_slice(&self.manifest).expect("made as JSON");
        let layers = manifest["layers"].as_array().expect("not an index");
        let digests = layers.iter().map(|layer| layer["digest"].as_str());
        digests.map(|d| d.expect("made so").to_owned()).collect()
    }
}

fn descriptor(media_type: &str, blob: &[u8]) -> Value {
    json!({"mediaType": media_type, "digest": digest(blob), "size": blob.len()})
}

fn compress(tar: &[u8], compression: Compression) -> Vec<u8> {
    match compression {
        Compression::None => tar.to_vec(),
        Compression::Gzip => {
            let mut encoder =
                flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
            encoder.write_all(tar).expect("memory can be written");
            encoder.finish().expect("memory can be written")
        }
        Compression::Zstd => zstd::encode_all(tar, 3).expect("memory can be written"),
    }
}

/// The `config` object of the busybox image.
pub fn busybox_config() -> Value {
    json!({"Env": ["PATH=/bin"], "Cmd": ["sh"]})
}

/// The one layer of the rig's busybox image, a tar file.
pub fn busybox_tar() -> &'static [u8] {
    static TAR: OnceLock<Vec<u8>> = OnceLock::new();
    TAR.get_or_init(|| {
        let dir =
            std::env::temp_dir().join(format!("podvisor-test-busybox-{}", std::process::id()));
        output_of(rig("busybox-image.sh").arg(&dir));
        let blobs = fs::read_dir(dir.join("blobs/sha256")).expect("a layout");
        let layer = blobs
            .map(|blob| fs::read(blob.expect("a layout").path()).expect("a layout"))
            .find(|blob| blob.starts_with(&[0x1f, 0x8b]))
            .expect("a gzip layer");
        fs::remove_dir_all(&dir).expect("ours");
        let mut tar = Vec::new();
        flate2::read::GzDecoder::new(&layer[..])
            .read_to_end(&mut tar)
            .expect("gzip");
        tar
    })
}

/// busybox, one layer.
pub fn busybox() -> Image {
    Image::busybox_and(Vec::new())
}
