//! Writes the Rust of the definitions to `proto/src/generated/`: `cargo run -p podvisor-proto-generate`.
//!
//! It is kept, not made at each build: what makes it takes as long to compile as a third of podvisord's dependencies.

use std::{
    error::Error,
    path::{Path, PathBuf},
};

/// What crictl's files hold: with the feature `json`, serde reads it.
const JSON: [&str; 24] = [
    "PodSandboxConfig",
    "PodSandboxMetadata",
    "DNSConfig",
    "PortMapping",
    "LinuxPodSandboxConfig",
    "LinuxSandboxSecurityContext",
    "ContainerConfig",
    "ContainerMetadata",
    "ImageSpec",
    "KeyValue",
    "Mount",
    "Device",
    "CDIDevice",
    "LinuxContainerConfig",
    "LinuxContainerSecurityContext",
    "LinuxContainerResources",
    "HugepageLimit",
    "Capability",
    "NamespaceOption",
    "UserNamespace",
    "IDMapping",
    "SecurityProfile",
    "SELinuxOption",
    "Int64Value",
];

/// The directory of the definitions.
fn proto() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// Writes a file for each package to the directory `to`, without protoc.
fn generate(to: &Path) -> Result<(), Box<dyn Error>> {
    const FILES: [&str; 4] = [
        "cri/v1/cri.proto",
        "agent/v1/agent.proto",
        "monitor/v1/monitor.proto",
        "control/v1/control.proto",
    ];
    let descriptors = protox::compile(FILES, [proto()])?;
    let mut builder = tonic_prost_build::configure();
    for message in JSON {
        builder = builder.message_attribute(
            format!(".runtime.v1.{message}"),
            r#"#[cfg_attr(feature = "json", derive(serde::Deserialize), serde(default, deny_unknown_fields))]"#,
        );
    }
    builder
        .field_attribute(
            ".runtime.v1.KeyValue.value",
            r#"#[cfg_attr(feature = "json", serde(deserialize_with = "crate::bytes_of_text"))]"#,
        )
        .field_attribute(
            "uidMappings",
            r#"#[cfg_attr(feature = "json", serde(rename = "uidMappings"))]"#,
        )
        .field_attribute(
            "gidMappings",
            r#"#[cfg_attr(feature = "json", serde(rename = "gidMappings"))]"#,
        )
        // The CRI service implements what works today; the rest of the trait answers UNIMPLEMENTED.
        .generate_default_stubs(true)
        // Transport is the crates' own business: unix sockets and vsock.
        .build_transport(false)
        // A list of empty samples, which a guest may send, stays small.
        .boxed(".podvisor.agent.v1.ContainerSample.usage")
        // For kubelets list all day.
        .extern_path(
            ".runtime.v1.ListPodSandboxResponse",
            "crate::cri::ListPodSandboxResponse",
        )
        .extern_path(
            ".runtime.v1.ListContainersResponse",
            "crate::cri::ListContainersResponse",
        )
        .skip_debug(["runtime.v1.AuthConfig", "runtime.v1.PullImageRequest"])
        .out_dir(to)
        .compile_fds(descriptors)?;
    Ok(())
}

fn main() -> Result<(), Box<dyn Error>> {
    generate(&proto().join("src/generated"))
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, fs};

    use super::*;

    /// The names of a directory's files, and what is in them.
    fn files(directory: &Path) -> BTreeMap<String, String> {
        fs::read_dir(directory)
            .expect("a directory")
            .map(|entry| {
                let entry = entry.expect("an entry");
                let text = fs::read_to_string(entry.path()).expect("a file of text");
                (entry.file_name().into_string().expect("a name"), text)
            })
            .collect()
    }

    #[test]
    fn what_is_kept_is_what_the_definitions_say() {
        let made = tempfile::tempdir().expect("a directory");
        generate(made.path()).expect("definitions");
        assert!(
            files(made.path()) == files(&proto().join("src/generated")),
            "cargo run -p podvisor-proto-generate, and commit what it writes"
        );
    }
}
