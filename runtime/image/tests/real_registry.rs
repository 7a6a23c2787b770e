//! Pulls from Debian's docker-registry, filled by skopeo: formats as real tools write them.

use std::fs;
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use podvisor_image::reference::Digest;
use podvisor_image::{ImageStore, Limits, PullError, Registries};
use sha2::{Digest as _, Sha256};
use tempfile::TempDir;

/// A registry that ends with the test.
struct Registry {
    address: String,
    server: Child,
    dir: TempDir,
}

impl Drop for Registry {
    fn drop(&mut self) {
        // It may have ended by itself, which the test then has told already.
        let _ = self.server.kill();
        let _ = self.server.wait();
    }
}

impl Registry {
    fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let free = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = free.local_addr().unwrap().to_string();
        drop(free);
        let root = dir.path().join("root");
        let config = format!(
            "version: 0.1\nlog: {{level: error}}\nhttp: {{addr: \"{address}\"}}\n\
             storage: {{filesystem: {{rootdirectory: {}}}}}\n",
            root.display()
        );
        let path = dir.path().join("config.yml");
        fs::write(&path, config).unwrap();
        let server = Command::new("docker-registry")
            .arg("serve")
            .arg(&path)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("docker-registry (Debian package of that name)");
        let registry = Self {
            address,
            server,
            dir,
        };
        for _ in 0..500 {
            if TcpStream::connect(&registry.address).is_ok() {
                return registry;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        panic!("docker-registry does not listen on {}", registry.address);
    }

    /// Copies the image in a directory to `name`, with more options of skopeo's.
    fn fill(&self, layout: &Path, name: &str, options: &[&str]) {
        let output = Command::new("skopeo")
            .args([
                "copy",
                "--quiet",
                "--insecure-policy",
                "--dest-tls-verify=false",
            ])
            .args(options)
            .arg(format!("dir:{}", layout.display()))
            .arg(format!("docker://{}/{name}", self.address))
            .output()
            .expect("skopeo (Debian package of that name)");
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
}

/// An image with one layer in skopeo's own format: files by digest and a manifest.
fn image(dir: &Path) {
    let mut tar = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_size(5);
    header.set_mode(0o755);
    header.set_cksum();
    tar.append_data(&mut header, "bin/hello", &b"hello"[..])
        .unwrap();
    let tar = tar.into_inner().unwrap();
    let layer = put(dir, &tar);
    let architecture = match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    };
    let config = serde_json::json!({
        "architecture": architecture, "os": "linux", "config": {"Entrypoint": ["/bin/hello"]},
        "rootfs": {"type": "layers", "diff_ids": [format!("sha256:{layer}")]},
    })
    .to_string();
    let config_digest = put(dir, config.as_bytes());
    let manifest = serde_json::json!({
        "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": {
            "mediaType": "application/vnd.oci.image.config.v1+json",
            "digest": format!("sha256:{config_digest}"), "size": config.len(),
        },
        "layers": [{
            "mediaType": "application/vnd.oci.image.layer.v1.tar",
            "digest": format!("sha256:{layer}"), "size": tar.len(),
        }],
    });
    fs::write(dir.join("version"), "Directory Transport Version: 1.1\n").unwrap();
    fs::write(dir.join("manifest.json"), manifest.to_string()).unwrap();
}

/// Writes a file under its digest.
fn put(dir: &Path, content: &[u8]) -> String {
    let digest = Digest::from(<[u8; 32]>::from(Sha256::digest(content)));
    let hex = digest.hex().to_owned();
    fs::write(dir.join(&hex), content).unwrap();
    hex
}

#[tokio::test]
async fn what_skopeo_writes() {
    // Only a second call could fail.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let registry = Registry::start();
    let layout = tempfile::tempdir().unwrap();
    image(layout.path());
    let formats: [(&str, &[&str]); 4] = [
        ("oci", &["--format=oci"]),
        ("docker", &["--format=v2s2"]),
        ("zstd", &["--format=oci", "--dest-compress-format=zstd"]),
        (
            "gzip",
            &[
                "--format=oci",
                "--dest-compress-format=gzip",
                "--dest-compress-level=1",
            ],
        ),
    ];
    let mut ids = Vec::new();
    for (tag, options) in formats {
        let name = format!("test/image:{tag}");
        registry.fill(layout.path(), &name, options);
        // A store each: a layer that is there would not be downloaded again.
        let dir = registry.dir.path().join(tag);
        fs::create_dir(&dir).unwrap();
        let database = Arc::new(redb::Database::create(dir.join("db")).unwrap());
        let registries = Registries::new(dir.join("certs.d"));
        let store =
            ImageStore::open(database, &dir.join("images"), registries, Limits::default()).unwrap();
        let reference = format!("{}/{name}", registry.address);
        let image = store.pull(&reference, None, &|_| {}).await.unwrap();
        assert_eq!(image.repo_tags, [reference], "{tag}");
        ids.push(image.layers[0].diff_id.clone());
        let missing = format!("{}/test/image:missing", registry.address);
        let error = store.pull(&missing, None, &|_| {}).await.unwrap_err();
        assert!(matches!(&error, PullError::NotFound(words) if words.contains("manifest unknown")));
    }
    // The same layer in every coat.
    ids.dedup();
    assert_eq!(ids.len(), 1);
}
