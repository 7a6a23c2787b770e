//! Debian's docker-registry on loopback, and pushing to it.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::sync::mpsc;
use std::thread;

use crate::certificates::Authority;
use crate::http::{self, Response};
use crate::oci::{self, Image};
use crate::repository;

/// A running registry. Ends with the process of the tests, at the latest.
#[derive(Debug)]
pub struct Registry {
    /// "127.0.0.1:PORT", the first part of its images' names.
    pub host: String,
    /// Value of the Authorization header, empty if none is wanted.
    authorization: String,
    child: Child,
    dir: PathBuf,
}

const DIR_PREFIX: &str = "podvisor-test-registry-";

impl Registry {
    /// Without authentication; one for all tests of a binary, with [`BUSYBOX`] in it.
    pub fn shared() -> &'static Self {
        static SHARED: OnceLock<Registry> = OnceLock::new();
        SHARED.get_or_init(|| {
            let registry = Self::start("shared", None);
            registry.push(BUSYBOX, &oci::busybox());
            registry
        })
    }

    /// A new one, which asks for the credentials `(user, password)`. `name`: of its directory.
    pub fn start(name: &str, credentials: Option<(&str, &str)>) -> Self {
        let mut registry = Self::launch(name, |command| {
            if let Some((user, password)) = credentials {
                command.args([user, password]);
            }
        });
        if let Some((user, password)) = credentials {
            registry.authorization = http::basic(user, password);
        }
        registry
    }

    /// A new one that has what `self` had, over TLS and only for clients with a certificate of `authority`.
    pub fn behind_tls(self, authority: &Authority) -> Self {
        let own = authority.issue("registry", "IP:127.0.0.1");
        let tls = Self::launch("tls", |command| {
            command
                .env("TLS_CERTIFICATE", &own.certificate)
                .env("TLS_KEY", &own.key)
                .env("TLS_CLIENT_CA", authority.certificate());
        });
        let storage = |registry: &Self| registry.dir.join("storage");
        fs::remove_dir_all(storage(&tls)).expect("it is ours");
        fs::rename(storage(&self), storage(&tls)).expect("on one file system");
        tls
    }

    /// `set`: adds to the command line and environment of registry.sh.
    fn launch(name: &str, set: impl FnOnce(&mut Command)) -> Self {
        remove_old();
        let dir = std::env::temp_dir().join(format!("{DIR_PREFIX}{name}-{}", std::process::id()));
        // A test that was killed cannot stop it: setpriv has the kernel do so, when the thread that
        // started it ends. Test threads end with their test, so it is a thread of its own.
        let mut command = Command::new("setpriv");
        command
            .args(["--pdeathsig", "KILL", "--"])
            .arg(repository().join("tests/rig/registry.sh"))
            .arg(&dir)
            .arg("0")
            .stdin(Stdio::null())
            .stdout(Stdio::piped());
        set(&mut command);
        let (started, child) = mpsc::channel();
        thread::spawn(move || {
            let child = command.spawn().expect("util-linux has setpriv");
            started.send(child).expect("the receiver waits");
            loop {
                thread::park();
            }
        });
        let mut child = child.recv().expect("the registry starts");
        let stdout = child.stdout.take().expect("piped");
        let mut host = String::new();
        BufReader::new(stdout).read_line(&mut host).expect("a pipe");
        let host = host.trim().to_owned();
        assert!(
            !host.is_empty(),
            "docker-registry does not start: {}",
            dir.display()
        );
        Self {
            host,
            authorization: String::new(),
            child,
            dir,
        }
    }

    /// The full name of an image here.
    pub fn name(&self, image: &str) -> String {
        format!("{}/{image}", self.host)
    }

    /// Uploads an image as "NAME:TAG".
    pub fn push(&self, name: &str, image: &Image) {
        let (name, tag) = name.split_once(':').expect("NAME:TAG");
        for (digest, blob) in &image.blobs {
            self.push_blob(name, digest, blob);
        }
        for (media_type, manifest) in &image.parts {
            self.push_manifest(name, &oci::digest(manifest), media_type, manifest);
        }
        self.push_manifest(name, tag, image.media_type, &image.manifest);
    }

    fn push_blob(&self, name: &str, digest: &str, blob: &[u8]) {
        let begun = self.send("POST", &format!("/v2/{name}/blobs/uploads/"), "", &[]);
        assert_eq!(begun.status, 202, "{begun:?}");
        let location = begun.header("location").expect("an upload has a place");
        let target = location
            .strip_prefix(&format!("http://{}", self.host))
            .unwrap_or(location);
        let joint = if target.contains('?') { '&' } else { '?' };
        let target = format!("{target}{joint}digest={digest}");
        let done = self.send("PUT", &target, "application/octet-stream", blob);
        assert_eq!(done.status, 201, "{done:?}");
    }

    fn push_manifest(&self, name: &str, reference: &str, media_type: &str, manifest: &[u8]) {
        let target = format!("/v2/{name}/manifests/{reference}");
        let done = self.send("PUT", &target, media_type, manifest);
        assert_eq!(done.status, 201, "{}", String::from_utf8_lossy(&done.body));
    }

    fn send(&self, method: &str, target: &str, media_type: &str, body: &[u8]) -> Response {
        let mut headers = vec![("Content-Type", media_type)];
        if !self.authorization.is_empty() {
            headers.push(("Authorization", &self.authorization));
        }
        http::request(&self.host, method, target, &headers, body).expect("the registry answers")
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = fs::remove_dir_all(&self.dir);
    }
}

/// Removes the directories of test processes that have ended.
fn remove_old() {
    let entries = fs::read_dir(std::env::temp_dir()).expect("it is there");
    for entry in entries.flatten() {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        let owner = name
            .strip_prefix(DIR_PREFIX)
            .and_then(|rest| rest.rsplit('-').next());
        if owner.is_some_and(|pid| !Path::new("/proc").join(pid).exists()) {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

/// Name of the busybox image in [`Registry::shared`].
pub const BUSYBOX: &str = "busybox:latest";

/// Full name of the busybox image in [`Registry::shared`].
pub fn busybox() -> String {
    Registry::shared().name(BUSYBOX)
}
