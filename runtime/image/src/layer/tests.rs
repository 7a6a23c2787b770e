use super::*;
use crate::layer::blob;

/// Converts `blob`, sent in pieces of `piece` bytes, as a pull would.
pub(crate) fn convert_blob(
    blob: &[u8],
    diff_id: &Digest,
    limits: &Limits,
) -> Result<NewLayer, LayerError> {
    let digest = Digest::from(<[u8; 32]>::from(<sha2::Sha256 as sha2::Digest>::digest(
        blob,
    )));
    let (sender, reader) = blob::channel(digest, blob.len() as u64);
    let pieces: Vec<bytes::Bytes> = blob
        .chunks(10_007)
        .map(bytes::Bytes::copy_from_slice)
        .collect();
    let sending = std::thread::spawn(move || {
        tokio::runtime::Builder::new_current_thread()
            .build()
            .unwrap()
            .block_on(async move {
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

#[test]
fn adhoc() {
    let tar = std::fs::read(std::env::var("TAR").unwrap()).unwrap();
    let digest = Digest::from(<[u8; 32]>::from(<sha2::Sha256 as sha2::Digest>::digest(
        &tar,
    )));
    let t = std::time::Instant::now();
    let layer = convert_blob(&tar, &digest, &Limits::default()).unwrap();
    eprintln!(
        "{:?} length {} disk {}",
        t.elapsed(),
        layer.length,
        layer.disk_bytes
    );
    layer.file.persist("/tmp/image/out.erofs").unwrap();
}
