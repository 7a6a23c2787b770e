//! One layer: from the blob's bytes to a finished EROFS file.
//!
//! All of it runs on one blocking thread and in one pass: [`blob::BlobReader`] hands over what the network brings and
//! checks the blob's digest, the decompressor reads from it, [`hashed::Hashed`] checks the diff id of what comes out,
//! and [`unpack`] turns the tar's entries into files, whose data goes straight to disk.

pub(crate) mod blob;
mod hashed;
mod unpack;

use std::fs::File;
use std::io::{self, BufRead, Read};
use std::os::unix::fs::MetadataExt;

use flate2::bufread::MultiGzDecoder;
use tempfile::NamedTempFile;

use crate::erofs::{self, DataWriter, Tree, TreeError, XattrError};
use crate::limits::Limits;
use crate::reference::Digest;
use crate::tar::TarError;
use blob::{BlobError, BlobReader};
use hashed::Hashed;

/// A finished layer: written and synced, not yet named.
pub(crate) struct NewLayer {
    pub(crate) file: NamedTempFile,
    /// Length of the file, bytes.
    pub(crate) length: u64,
    /// What the file takes on disk, bytes.
    pub(crate) disk_bytes: u64,
}

/// Why a blob is not a layer, or could not be written.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LayerError {
    /// The blob did not come, or is not what its digest says.
    #[error(transparent)]
    Blob(#[from] BlobError),
    /// What the blob decompresses to is not what the image's configuration says.
    #[error("layer has diff id {actual}, {expected} wanted")]
    DiffId { expected: Digest, actual: Digest },
    #[error("layer cannot be decompressed: {0}")]
    Decompress(#[source] io::Error),
    #[error("bad layer: {0}")]
    Tar(#[source] TarError),
    #[error("bad layer: {0}")]
    Tree(#[from] TreeError),
    #[error("bad layer: {path}: {source}")]
    Xattr { path: String, source: XattrError },
    #[error("bad layer: {what} of {path:?} too long")]
    TooLong { what: &'static str, path: String },
    #[error("layer larger than {0} bytes")]
    TooLarge(u64),
    /// The layer's file.
    #[error("writing the layer: {0}")]
    Write(#[source] io::Error),
}

impl From<TarError> for LayerError {
    fn from(error: TarError) -> Self {
        match error {
            TarError::Input(error) => input_error(error),
            other => Self::Tar(other),
        }
    }
}

/// Converts a blob to an EROFS file in `file`, which must be empty. Blocks.
pub(crate) fn convert(
    blob: BlobReader,
    diff_id: &Digest,
    file: NamedTempFile,
    limits: &Limits,
) -> Result<NewLayer, LayerError> {
    let data = DataWriter::new(file.as_file().try_clone().map_err(LayerError::Write)?);
    let mut tree = Tree::new(limits.max_entries, limits.max_metadata_bytes);
    let mut data = Some(data);
    let mut unpack = |tar: &mut dyn BufRead| {
        // decompressed() calls this once.
        let Some(data) = data.take() else {
            return Ok(());
        };
        let data = unpack::unpack(tar, &mut tree, data, limits)?;
        erofs::finish(&tree, data)
            .map_err(LayerError::Write)
            .map(drop)
    };
    let actual = decompressed(blob, limits.max_layer_bytes, &mut unpack)?;
    if actual != *diff_id {
        return Err(LayerError::DiffId {
            expected: diff_id.clone(),
            actual,
        });
    }
    let metadata = sync(file.as_file()).map_err(LayerError::Write)?;
    Ok(NewLayer {
        file,
        length: metadata.len(),
        disk_bytes: metadata.blocks() * 512,
    })
}

/// Gives `use_tar` the decompressed blob, then reads the rest of both streams, so that both digests are of all the bytes.
/// Returns the digest of the decompressed stream; the blob's own has been checked.
fn decompressed(
    mut blob: BlobReader,
    max_bytes: u64,
    use_tar: &mut dyn FnMut(&mut dyn BufRead) -> Result<(), LayerError>,
) -> Result<Digest, LayerError> {
    // What the bytes say counts, not the media type: registries are full of layers with a wrong one, and
    // containerd does the same.
    let compression = Compression::of(blob.peek().map_err(input_error)?);
    let decoder: Box<dyn Read + '_> = match compression {
        Compression::None => Box::new(&mut blob),
        Compression::Gzip => Box::new(MultiGzDecoder::new(&mut blob)),
        Compression::Zstd => {
            let decoder = zstd::stream::read::Decoder::with_buffer(&mut blob)
                .map_err(LayerError::Decompress)?;
            Box::new(decoder)
        }
    };
    let mut tar = Hashed::new(decoder, max_bytes);
    use_tar(&mut tar)?;
    io::copy(&mut tar, &mut io::sink()).map_err(input_error)?;
    let diff_id = tar.digest();
    drop(tar);
    io::copy(&mut blob, &mut io::sink()).map_err(input_error)?;
    Ok(diff_id)
}

enum Compression {
    None,
    Gzip,
    Zstd,
}

impl Compression {
    fn of(start: &[u8]) -> Self {
        match start {
            [0x1f, 0x8b, ..] => Self::Gzip,
            // A frame, or a skippable one before it.
            [0x28, 0xb5, 0x2f, 0xfd, ..] | [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => Self::Zstd,
            _ => Self::None,
        }
    }
}

/// Sorts out what went wrong under a reader: our own errors travel inside `io::Error`.
fn input_error(error: io::Error) -> LayerError {
    match error.downcast::<BlobError>() {
        Ok(error) => LayerError::Blob(error),
        Err(error) => match error.downcast::<hashed::TooLong>() {
            Ok(hashed::TooLong(limit)) => LayerError::TooLarge(limit),
            Err(error) => LayerError::Decompress(error),
        },
    }
}

fn sync(file: &File) -> io::Result<std::fs::Metadata> {
    file.sync_all()?;
    file.metadata()
}

#[cfg(test)]
mod tests;
