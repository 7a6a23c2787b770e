//! What the tests build layers from.

use std::io::Write;

use sha2::{Digest as _, Sha256};
use tempfile::NamedTempFile;

use crate::layer::{LayerError, NewLayer, blob, convert};
use crate::limits::Limits;
use crate::reference::Digest;

/// A tar archive in the making, byte by byte where a test needs it.
#[derive(Default, Clone)]
pub(crate) struct TarBuilder {
    pub(crate) bytes: Vec<u8>,
}

/// The fields of a header that tests change.
#[derive(Clone)]
pub(crate) struct Header {
    pub(crate) name: Vec<u8>,
    pub(crate) flag: u8,
    pub(crate) size: u64,
    pub(crate) link: Vec<u8>,
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) mtime: u64,
    pub(crate) device: (u32, u32),
}

impl Header {
    pub(crate) fn new(name: &str, flag: u8) -> Self {
        let (name, link) = (name.into(), Vec::new());
        Self {
            name,
            flag,
            size: 0,
            link,
            mode: 0o644,
            uid: 0,
            gid: 0,
            mtime: 0,
            device: (0, 0),
        }
    }

    pub(crate) fn block(&self) -> [u8; 512] {
        let mut block = [0; 512];
        let mut put = |at: usize, bytes: &[u8]| block[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &self.name);
        put(100, format!("{:07o}", self.mode).as_bytes());
        put(108, &base256::<8>(self.uid.into()));
        put(116, &base256::<8>(self.gid.into()));
        put(124, &base256::<12>(self.size));
        put(136, format!("{:011o}", self.mtime).as_bytes());
        put(156, &[self.flag]);
        put(157, &self.link);
        put(257, b"ustar\x0000");
        put(329, format!("{:07o}", self.device.0).as_bytes());
        put(337, format!("{:07o}", self.device.1).as_bytes());
        seal(&mut block);
        block
    }
}

/// Sets a header's checksum.
pub(crate) fn seal(block: &mut [u8; 512]) {
    block[148..156].fill(b' ');
    let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
    block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
}

fn base256<const N: usize>(number: u64) -> [u8; N] {
    let mut field = [0; N];
    let bytes = number.to_be_bytes();
    let count = bytes.len().min(N - 1);
    field[N - count..].copy_from_slice(&bytes[8 - count..]);
    field[0] |= 0x80;
    field
}

impl TarBuilder {
    pub(crate) fn raw(mut self, bytes: &[u8]) -> Self {
        self.bytes.extend_from_slice(bytes);
        self
    }

    pub(crate) fn entry(self, header: &Header, data: &[u8]) -> Self {
        let padding = data.len().next_multiple_of(512) - data.len();
        let header = Header {
            size: data.len() as u64,
            ..header.clone()
        };
        self.raw(&header.block()).raw(data).raw(&vec![0; padding])
    }

    pub(crate) fn file(self, name: &str, data: &[u8]) -> Self {
        self.entry(&Header::new(name, b'0'), data)
    }

    pub(crate) fn directory(self, name: &str) -> Self {
        self.entry(
            &Header {
                mode: 0o755,
                ..Header::new(name, b'5')
            },
            &[],
        )
    }

    pub(crate) fn symlink(self, name: &str, target: &str) -> Self {
        self.entry(
            &Header {
                link: target.into(),
                ..Header::new(name, b'2')
            },
            &[],
        )
    }

    pub(crate) fn hard_link(self, name: &str, target: &str) -> Self {
        self.entry(
            &Header {
                link: target.into(),
                ..Header::new(name, b'1')
            },
            &[],
        )
    }

    /// An extended header for the next entry.
    pub(crate) fn pax(self, records: &[(&[u8], &[u8])]) -> Self {
        let mut content = Vec::new();
        for (key, value) in records {
            let rest = key.len() + value.len() + 3;
            let mut length = rest + 1;
            while length != rest + length.to_string().len() {
                length = rest + length.to_string().len();
            }
            content.extend_from_slice(format!("{length} ").as_bytes());
            content.extend_from_slice(&[key, &b"="[..], value, b"\n"].concat());
        }
        self.entry(&Header::new("pax", b'x'), &content)
    }

    /// The whole archive.
    pub(crate) fn end(self) -> Vec<u8> {
        self.raw(&[0; 1024]).bytes
    }
}

pub(crate) fn sha256(bytes: &[u8]) -> Digest {
    Digest::from(<[u8; 32]>::from(Sha256::digest(bytes)))
}

pub(crate) fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// Converts a blob that comes in pieces of some bytes, as from a registry.
pub(crate) fn convert_blob(
    blob: &[u8],
    diff_id: &Digest,
    limits: &Limits,
) -> Result<NewLayer, LayerError> {
    let (sender, reader) = blob::channel(sha256(blob), blob.len() as u64, None, 0);
    let pieces: Vec<bytes::Bytes> = blob
        .chunks(10_007)
        .map(bytes::Bytes::copy_from_slice)
        .collect();
    let sending = std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .build()
            .unwrap();
        runtime.block_on(async move {
            for piece in pieces {
                if !sender.send(piece).await {
                    return;
                }
            }
            sender.finish().await;
        });
    });
    let result = convert(reader, diff_id, NamedTempFile::new().unwrap(), limits);
    sending.join().unwrap();
    result
}

/// Converts an uncompressed layer.
pub(crate) fn convert_tar(tar: &[u8]) -> Result<NewLayer, LayerError> {
    convert_blob(tar, &sha256(tar), &Limits::default())
}
