//! Pulls one image into a store of its own and tells how long it took: to compare with other runtimes.
//!
//! `cargo run --release -p podvisor-image --example pull -- STORE CERTS_D REFERENCE`

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use podvisor_image::{ImageStore, Limits, Registries};

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [store, certs_d, reference] = arguments.as_slice() else {
        return Err("STORE CERTS_D REFERENCE expected".into());
    };
    // Only a second call could fail.
    let _ = rustls::crypto::ring::default_provider().install_default();
    std::fs::create_dir_all(store)?;
    let database = Arc::new(redb::Database::create(Path::new(store).join("state.redb"))?);
    let images = Path::new(store).join("images");
    let store = ImageStore::open(
        database,
        &images,
        Registries::new(certs_d),
        Limits::default(),
    )?;
    let start = Instant::now();
    let image = store.pull(reference, None, &|_| {}).await?;
    let elapsed = start.elapsed();
    println!("{} in {} ms", image.id, elapsed.as_millis());
    for layer in &image.layers {
        println!("{} {}", layer.length, layer.path.display());
    }
    println!("{:?}", store.usage());
    Ok(())
}
