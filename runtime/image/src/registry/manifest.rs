//! Manifests and indexes: OCI's and Docker's.

use serde::Deserialize;

use crate::reference::Digest;

const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
const DOCKER_LIST: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
const OCI_CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const DOCKER_CONFIG: &str = "application/vnd.docker.container.image.v1+json";

/// What is asked for.
pub(super) const ACCEPT: &str = "application/vnd.oci.image.index.v1+json, application/vnd.oci.image.manifest.v1+json, \
     application/vnd.docker.distribution.manifest.list.v2+json, application/vnd.docker.distribution.manifest.v2+json";

/// Why a document is not an image that runs here.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ManifestError {
    #[error("malformed manifest: {0}")]
    Malformed(String),
    #[error("{0} is not a container image's")]
    NotAnImage(String),
    #[error("no image for {platform} among: {offered}")]
    NoPlatform { platform: String, offered: String },
    #[error("layer of type {0} cannot be used")]
    LayerType(String),
}

/// A blob or a manifest, as another document points at it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Descriptor {
    pub(crate) digest: Digest,
    /// Bytes.
    pub(crate) size: u64,
}

/// What a reference led to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Resolved {
    /// The manifest for this platform is another document, with this digest.
    Index(Digest),
    Manifest(Manifest),
}

/// An image for one platform.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Manifest {
    pub(crate) config: Descriptor,
    /// Bottom first.
    pub(crate) layers: Vec<Descriptor>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawDocument {
    schema_version: u64,
    #[serde(default)]
    media_type: String,
    config: Option<RawDescriptor>,
    layers: Option<Vec<RawDescriptor>>,
    manifests: Option<Vec<RawDescriptor>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawDescriptor {
    #[serde(default)]
    media_type: String,
    digest: String,
    size: u64,
    platform: Option<RawPlatform>,
}

#[derive(Deserialize, Default, Clone)]
struct RawPlatform {
    #[serde(default)]
    os: String,
    #[serde(default)]
    architecture: String,
    #[serde(default)]
    variant: String,
}

/// The platform of images that run on this node, in the image specification's words.
pub(crate) const ARCHITECTURE: &str = if cfg!(target_arch = "x86_64") {
    "amd64"
} else if cfg!(target_arch = "aarch64") {
    "arm64"
} else {
    std::env::consts::ARCH
};

/// Reads a manifest or an index. `media_type` is what the registry called it; the document itself may know better.
pub(crate) fn parse(bytes: &[u8], media_type: &str) -> Result<Resolved, ManifestError> {
    let document: RawDocument = serde_json::from_slice(bytes).map_err(|error| malformed(&error))?;
    if document.schema_version != 2 {
        return Err(ManifestError::NotAnImage(format!(
            "schema version {}",
            document.schema_version
        )));
    }
    let media_type = if document.media_type.is_empty() {
        media_type
    } else {
        &document.media_type
    };
    match (
        media_type,
        document.manifests,
        document.config,
        document.layers,
    ) {
        // A document with the fields of both could be read in two ways.
        (_, Some(_), Some(_), _) | (_, Some(_), _, Some(_)) => {
            Err(malformed(&"manifest and index in one"))
        }
        (OCI_MANIFEST | DOCKER_MANIFEST, None, Some(config), Some(layers)) => {
            manifest(&config, &layers)
        }
        (OCI_INDEX | DOCKER_LIST, Some(manifests), None, None) => index(&manifests),
        (OCI_MANIFEST | DOCKER_MANIFEST | OCI_INDEX | DOCKER_LIST, ..) => {
            Err(malformed(&"fields are missing"))
        }
        // No or a general type (application/json): the fields tell.
        (_, Some(manifests), None, None) => index(&manifests),
        (_, None, Some(config), Some(layers)) => manifest(&config, &layers),
        (other, ..) => Err(ManifestError::NotAnImage(format!("media type {other:?}"))),
    }
}

fn manifest(config: &RawDescriptor, layers: &[RawDescriptor]) -> Result<Resolved, ManifestError> {
    if !matches!(config.media_type.as_str(), OCI_CONFIG | DOCKER_CONFIG) {
        return Err(ManifestError::NotAnImage(format!(
            "configuration of type {:?}",
            config.media_type
        )));
    }
    let layers = layers.iter().map(|layer| {
        let usable = layer
            .media_type
            .starts_with("application/vnd.oci.image.layer.v1.tar")
            || layer
                .media_type
                .starts_with("application/vnd.docker.image.rootfs.diff.tar");
        // Foreign layers are not in the registry; encrypted ones need keys.
        if !usable || layer.media_type.contains("+encrypted") {
            return Err(ManifestError::LayerType(layer.media_type.clone()));
        }
        descriptor(layer)
    });
    Ok(Resolved::Manifest(Manifest {
        config: descriptor(config)?,
        layers: layers.collect::<Result<_, _>>()?,
    }))
}

/// Chooses the manifest for this node.
fn index(manifests: &[RawDescriptor]) -> Result<Resolved, ManifestError> {
    let image = |entry: &&RawDescriptor| {
        matches!(
            entry.media_type.as_str(),
            OCI_MANIFEST | DOCKER_MANIFEST | OCI_INDEX | DOCKER_LIST
        )
    };
    let mut best: Option<(u32, &RawDescriptor)> = None;
    for entry in manifests.iter().filter(image) {
        // An entry that does not tell may be for any platform: its configuration will.
        let score = match &entry.platform {
            None => Some(0),
            Some(platform) => suits(platform),
        };
        if let Some(score) = score
            && best.is_none_or(|(known, _)| score > known)
        {
            best = Some((score, entry));
        }
    }
    if let Some((_, entry)) = best {
        Ok(Resolved::Index(descriptor(entry)?.digest))
    } else {
        let offered = manifests.iter().map(|entry| {
            let platform = entry.platform.clone().unwrap_or_default();
            format!("{}/{}", platform.os, platform.architecture)
        });
        let offered = offered.take(20).collect::<Vec<_>>().join(", ");
        Err(ManifestError::NoPlatform {
            platform: format!("linux/{ARCHITECTURE}"),
            offered,
        })
    }
}

/// How well a platform suits this node; the larger the better. Variants: any arm64 has v8; of amd64's levels only the
/// first is sure to run in every virtual machine.
fn suits(platform: &RawPlatform) -> Option<u32> {
    if platform.os != "linux" || platform.architecture != ARCHITECTURE {
        return None;
    }
    match (ARCHITECTURE, platform.variant.as_str()) {
        ("amd64", "" | "v1") | ("arm64", "v8") => Some(2),
        (_, "") => Some(1),
        _ => None,
    }
}

fn descriptor(raw: &RawDescriptor) -> Result<Descriptor, ManifestError> {
    let digest = raw.digest.parse().map_err(|error| malformed(&error))?;
    Ok(Descriptor {
        digest,
        size: raw.size,
    })
}

fn malformed(reason: &dyn std::fmt::Display) -> ManifestError {
    ManifestError::Malformed(reason.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: &str = "sha256:aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa";
    const B: &str = "sha256:bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb";

    fn entry(digest: &str, platform: &str) -> String {
        format!(r#"{{"mediaType":"{OCI_MANIFEST}","digest":"{digest}","size":1{platform}}}"#)
    }

    fn platform(os: &str, architecture: &str, variant: &str) -> String {
        format!(
            r#","platform":{{"os":"{os}","architecture":"{architecture}","variant":"{variant}"}}"#
        )
    }

    fn choose(entries: &[String]) -> Result<Resolved, ManifestError> {
        let json = format!(
            r#"{{"schemaVersion":2,"mediaType":"{OCI_INDEX}","manifests":[{}]}}"#,
            entries.join(",")
        );
        parse(json.as_bytes(), "")
    }

    fn manifest_of(layer_type: &str, config_type: &str) -> Result<Resolved, ManifestError> {
        let json = format!(
            r#"{{"schemaVersion":2,"config":{{"mediaType":"{config_type}","digest":"{A}","size":7}},
                "layers":[{{"mediaType":"{layer_type}","digest":"{B}","size":9}}]}}"#
        );
        parse(json.as_bytes(), OCI_MANIFEST)
    }

    #[test]
    fn index_by_platform() {
        let chosen = |digest: &str| Ok(Resolved::Index(digest.parse().unwrap()));
        let here = platform("linux", ARCHITECTURE, "");
        assert_eq!(
            choose(&[
                entry(A, &platform("windows", ARCHITECTURE, "")),
                entry(B, &here)
            ]),
            chosen(B)
        );
        assert_eq!(choose(&[entry(A, &here), entry(B, &here)]), chosen(A));
        assert_eq!(choose(&[entry(A, ""), entry(B, &here)]), chosen(B));
        assert_eq!(
            choose(&[entry(A, ""), entry(B, &platform("linux", "s390x", ""))]),
            chosen(A)
        );
        let error = choose(&[entry(A, &platform("unknown", "unknown", ""))]).unwrap_err();
        assert!(error.to_string().contains("unknown/unknown"), "{error}");
    }

    #[test]
    fn manifests() {
        let Ok(Resolved::Manifest(manifest)) =
            manifest_of("application/vnd.oci.image.layer.v1.tar+zstd", OCI_CONFIG)
        else {
            panic!("not a manifest");
        };
        assert_eq!((manifest.config.size, manifest.layers[0].size), (7, 9));
        assert_eq!(manifest.layers[0].digest.as_str(), B);
        assert!(
            manifest_of(
                "application/vnd.docker.image.rootfs.diff.tar.gzip",
                DOCKER_CONFIG
            )
            .is_ok()
        );
    }

    #[test]
    fn what_is_not_an_image() {
        for layer in [
            "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip",
            "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip",
            "application/vnd.oci.image.layer.v1.tar+gzip+encrypted",
        ] {
            assert_eq!(
                manifest_of(layer, OCI_CONFIG),
                Err(ManifestError::LayerType(layer.to_owned()))
            );
        }
        let chart = manifest_of(
            "application/tar",
            "application/vnd.cncf.helm.config.v1+json",
        );
        assert!(matches!(chart, Err(ManifestError::NotAnImage(_))));
        for json in [
            "",
            "{}",
            r#"{"schemaVersion":1}"#,
            r#"{"schemaVersion":2}"#,
            r#"{"schemaVersion":2,"mediaType":"application/vnd.oci.image.index.v1+json"}"#,
            r#"{"schemaVersion":2,"manifests":[],"layers":[]}"#,
            r#"{"schemaVersion":2,"manifests":[{"digest":"sha256:1","size":-1}]}"#,
        ] {
            assert!(
                parse(json.as_bytes(), "application/json").is_err(),
                "{json}"
            );
        }
    }
}
