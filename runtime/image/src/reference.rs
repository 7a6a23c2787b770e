//! Names of images, normalised as Docker and containerd do.
//!
//! Grammar: <https://github.com/distribution/reference/blob/main/reference.go>.

use std::fmt;
use std::str::FromStr;

/// Longest repository name, host included (distribution's `RepositoryNameTotalLengthMax`).
const MAX_REPOSITORY: usize = 255;
/// Longest tag.
const MAX_TAG: usize = 128;

/// A normalised image name: a host, a repository, and a tag or a digest.
///
/// A name with both a tag and a digest keeps the digest alone, as Docker and containerd do: the digest decides.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Reference {
    registry: String,
    repository: String,
    target: Target,
}

/// What a reference points at in its repository.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Target {
    /// A tag, without the colon.
    Tag(String),
    /// The digest of a manifest or an index.
    Digest(Digest),
}

/// A SHA-256 digest as OCI writes it: `sha256:` and 64 lower-case hex digits.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Digest(String);

/// Why a name is not an image reference.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReferenceError {
    /// The name is empty.
    #[error("empty image name")]
    Empty,
    /// The repository's path is not lower-case words joined by separators.
    #[error("invalid repository name in {0:?}")]
    Repository(String),
    /// The host's name or port is malformed.
    #[error("invalid registry host in {0:?}")]
    Registry(String),
    /// The tag has forbidden characters or is too long.
    #[error("invalid tag in {0:?}")]
    Tag(String),
    /// Not `sha256:` with 64 lower-case hex digits; other algorithms are not supported.
    #[error("invalid or unsupported digest {0:?}: sha256:<64 hex digits> wanted")]
    Digest(String),
    /// Host and repository are longer than 255 bytes.
    #[error("image name longer than {MAX_REPOSITORY} bytes")]
    TooLong,
}

impl Reference {
    /// The registry's name, with its port if one was given. `docker.io` is Docker Hub's name, not its host.
    pub fn registry(&self) -> &str {
        &self.registry
    }

    /// The path of the repository in the registry.
    pub fn repository(&self) -> &str {
        &self.repository
    }

    /// Registry and repository: `docker.io/library/busybox`.
    pub fn name(&self) -> String {
        format!("{}/{}", self.registry, self.repository)
    }

    /// Tag or digest.
    pub fn target(&self) -> &Target {
        &self.target
    }

    /// `name@digest`: how an image that was resolved to `digest` is listed in `repo_digests`.
    pub fn with_digest(&self, digest: &Digest) -> String {
        format!("{}@{digest}", self.name())
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.target {
            Target::Tag(tag) => write!(f, "{}/{}:{tag}", self.registry, self.repository),
            Target::Digest(digest) => write!(f, "{}/{}@{digest}", self.registry, self.repository),
        }
    }
}

impl FromStr for Reference {
    type Err = ReferenceError;

    fn from_str(text: &str) -> Result<Self, ReferenceError> {
        if text.is_empty() {
            return Err(ReferenceError::Empty);
        }
        let (rest, digest) = match text.split_once('@') {
            Some((rest, digest)) => (rest, Some(digest.parse::<Digest>()?)),
            None => (text, None),
        };
        // A colon after the last slash begins a tag; one before it is a port's.
        let path_start = rest.rfind('/').map_or(0, |slash| slash + 1);
        let (name, tag) = match rest[path_start..].rfind(':') {
            Some(colon) => (
                &rest[..path_start + colon],
                Some(&rest[path_start + colon + 1..]),
            ),
            None => (rest, None),
        };
        if tag.is_some_and(|tag| !is_tag(tag)) {
            return Err(ReferenceError::Tag(text.to_owned()));
        }
        let (registry, repository) = split_registry(name);
        if !is_registry(&registry) {
            return Err(ReferenceError::Registry(text.to_owned()));
        }
        // A bare 64 digit name would be mistaken for an image's id.
        if !repository.split('/').all(is_path_component) || is_sha256_hex(name) {
            return Err(ReferenceError::Repository(text.to_owned()));
        }
        if registry.len() + 1 + repository.len() > MAX_REPOSITORY {
            return Err(ReferenceError::TooLong);
        }
        let target = match digest {
            Some(digest) => Target::Digest(digest),
            None => Target::Tag(tag.unwrap_or("latest").to_owned()),
        };
        Ok(Self {
            registry,
            repository,
            target,
        })
    }
}

/// Host and repository of a name. The first component is a host if it could not be a Docker Hub user:
/// it has a dot, a port or an upper-case letter, or is `localhost`.
fn split_registry(name: &str) -> (String, String) {
    let (host, path) = match name.split_once('/') {
        Some((first, rest))
            if first.contains(['.', ':'])
                || first == "localhost"
                || first.chars().any(char::is_uppercase) =>
        {
            (first, rest)
        }
        _ => ("docker.io", name),
    };
    let host = if host == "index.docker.io" {
        "docker.io"
    } else {
        host
    };
    let path = if host == "docker.io" && !path.contains('/') {
        format!("library/{path}")
    } else {
        path.to_owned()
    };
    (host.to_owned(), path)
}

fn is_registry(host: &str) -> bool {
    let (name, port) = match host.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((address, rest)) => {
            let valid = !address.is_empty()
                && address
                    .bytes()
                    .all(|b| b.is_ascii_hexdigit() || b == b':' || b == b'.');
            if !valid {
                return false;
            }
            (
                None,
                rest.strip_prefix(':').or((!rest.is_empty()).then_some("x")),
            )
        }
        None => match host.split_once(':') {
            Some((name, port)) => (Some(name), Some(port)),
            None => (Some(host), None),
        },
    };
    let port_ok = port.is_none_or(|port| {
        port.len() <= 5 && port.parse::<u16>().is_ok_and(|p| p > 0) && !port.starts_with('+')
    });
    let name_ok = name.is_none_or(|name| name.split('.').all(is_host_label));
    port_ok && name_ok
}

fn is_host_label(label: &str) -> bool {
    !label.is_empty()
        && !label.starts_with('-')
        && !label.ends_with('-')
        && label
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b == b'-')
}

/// Lower-case letters and digits, joined by `.`, `_`, `__` or any number of `-`.
fn is_path_component(component: &str) -> bool {
    let alphanumeric = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let bytes = component.as_bytes();
    let (Some(first), Some(last)) = (bytes.first(), bytes.last()) else {
        return false;
    };
    alphanumeric(*first)
        && alphanumeric(*last)
        && bytes.split(|b| alphanumeric(*b)).all(|separator| {
            matches!(separator, b"" | b"." | b"_" | b"__") || separator.iter().all(|b| *b == b'-')
        })
}

fn is_tag(tag: &str) -> bool {
    let word = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    tag.len() <= MAX_TAG
        && tag.bytes().next().is_some_and(word)
        && tag.bytes().all(|b| word(b) || b == b'.' || b == b'-')
}

impl Digest {
    /// The 64 hex digits.
    pub fn hex(&self) -> &str {
        &self.0["sha256:".len()..]
    }

    /// The whole digest, algorithm first.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl From<[u8; 32]> for Digest {
    fn from(hash: [u8; 32]) -> Self {
        use fmt::Write;
        let mut text = String::with_capacity("sha256:".len() + 64);
        text.push_str("sha256:");
        for byte in hash {
            // Writing to a String cannot fail.
            let _ = write!(text, "{byte:02x}");
        }
        Self(text)
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for Digest {
    type Err = ReferenceError;

    fn from_str(text: &str) -> Result<Self, ReferenceError> {
        match text.strip_prefix("sha256:") {
            Some(hex) if is_sha256_hex(hex) => Ok(Self(text.to_owned())),
            _ => Err(ReferenceError::Digest(text.to_owned())),
        }
    }
}

/// 64 lower-case hex digits.
pub(crate) fn is_sha256_hex(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const D: &str = "sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

    #[test]
    fn normalises_as_docker_does() {
        for (name, normal) in [
            ("busybox", "docker.io/library/busybox:latest"),
            ("busybox:1.36", "docker.io/library/busybox:1.36"),
            ("library/busybox", "docker.io/library/busybox:latest"),
            ("user/app:v1", "docker.io/user/app:v1"),
            ("docker.io/busybox", "docker.io/library/busybox:latest"),
            (
                "index.docker.io/busybox",
                "docker.io/library/busybox:latest",
            ),
            ("localhost/app", "localhost/app:latest"),
            ("localhost:5000/app", "localhost:5000/app:latest"),
            ("127.0.0.1:5000/a/b/c:x", "127.0.0.1:5000/a/b/c:x"),
            ("[::1]:5000/app", "[::1]:5000/app:latest"),
            ("registry.k8s.io/pause:3.9", "registry.k8s.io/pause:3.9"),
            ("HOST/app", "HOST/app:latest"),
            ("a__b/c---d.e_f", "docker.io/a__b/c---d.e_f:latest"),
        ] {
            assert_eq!(
                name.parse::<Reference>().unwrap().to_string(),
                normal,
                "{name}"
            );
        }
    }

    #[test]
    fn digest_wins_over_tag() {
        let reference: Reference = format!("busybox:1.36@{D}").parse().unwrap();
        assert_eq!(
            reference.to_string(),
            format!("docker.io/library/busybox@{D}")
        );
        assert_eq!(reference.target(), &Target::Digest(D.parse().unwrap()));
    }

    #[test]
    fn refuses_what_docker_refuses() {
        for name in [
            "",
            ":",
            "/",
            "a/",
            "/a",
            "a//b",
            "Busybox",
            "a:b c",
            "a:",
            "-a",
            "a-",
            "a..b",
            "a___b",
            "a@sha256:12",
            "a@md5:0123",
            "host.:5000/a",
            "host:0x10/a",
            "host:99999/a",
            "[::1/a",
            "[]:1/a",
            "[::1]5000/a",
            "a b",
            "../a",
            "a/../b",
            "a/./b",
            "é",
            "host:/a",
            "-host.x/a",
            "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef",
        ] {
            assert!(name.parse::<Reference>().is_err(), "{name:?}");
        }
        assert_eq!(
            format!("h.x/{}", "a".repeat(252)).parse::<Reference>(),
            Err(ReferenceError::TooLong)
        );
        assert!(
            format!("a:{}", "t".repeat(129))
                .parse::<Reference>()
                .is_err()
        );
        assert!(
            format!("a@{}", D.to_uppercase())
                .parse::<Reference>()
                .is_err()
        );
    }

    proptest! {
        #[test]
        fn never_panics(text in "\\PC*") {
            let _ = text.parse::<Reference>();
        }

        #[test]
        fn normal_form_is_a_fixed_point(text in "([a-zA-Z0-9.-]{1,9}(:[0-9]{1,5})?/)?[a-z0-9._/-]{1,20}(:[a-zA-Z0-9_.-]{1,9})?") {
            if let Ok(reference) = text.parse::<Reference>() {
                let normal = reference.to_string();
                prop_assert_eq!(normal.parse::<Reference>().unwrap(), reference);
            }
        }
    }
}
