//! A certificate authority of one's own, made with openssl(1).

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::output_of;

/// An authority, whose files are in a folder of its own.
#[derive(Debug)]
pub struct Authority {
    dir: tempfile::TempDir,
    own: Certificate,
}

/// PEM files.
#[derive(Debug, Clone)]
pub struct Certificate {
    /// Who it is.
    pub certificate: PathBuf,
    /// Its proof.
    pub key: PathBuf,
}

impl Authority {
    /// A new one, which nobody trusts yet.
    pub fn new() -> Self {
        let dir = tempfile::tempdir().expect("a folder");
        let own = make(
            dir.path(),
            "authority",
            &["-addext", "keyUsage=keyCertSign"],
        );
        Self { dir, own }
    }

    /// What who trusts it has to have.
    pub fn certificate(&self) -> &Path {
        &self.own.certificate
    }

    /// A certificate for `names`, as openssl writes them: "DNS:a.test", "IP:127.0.0.1".
    pub fn issue(&self, file: &str, names: &str) -> Certificate {
        let path = |path: &Path| path.display().to_string();
        let args = [
            "-CA",
            &path(&self.own.certificate),
            "-CAkey",
            &path(&self.own.key),
            "-addext",
            "basicConstraints=critical,CA:FALSE",
            "-addext",
            &format!("subjectAltName={names}"),
        ];
        make(self.dir.path(), file, &args)
    }
}

impl Default for Authority {
    fn default() -> Self {
        Self::new()
    }
}

fn make(dir: &Path, name: &str, more: &[&str]) -> Certificate {
    let made = Certificate {
        certificate: dir.join(format!("{name}.pem")),
        key: dir.join(format!("{name}.key")),
    };
    let curve = "ec_paramgen_curve:P-256";
    output_of(
        Command::new("openssl")
            .args(["req", "-x509", "-nodes", "-days", "2"])
            .args(["-newkey", "ec", "-pkeyopt", curve, "-subj"])
            .arg(format!("/CN=podvisor test {name}"))
            .args(more)
            .arg("-out")
            .arg(&made.certificate)
            .arg("-keyout")
            .arg(&made.key),
    );
    made
}
