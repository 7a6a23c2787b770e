//! Compiles the definitions without protoc.

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

fn main() -> Result<(), Box<dyn std::error::Error>> {
    const FILES: [&str; 4] = [
        "cri/v1/cri.proto",
        "agent/v1/agent.proto",
        "monitor/v1/monitor.proto",
        "control/v1/control.proto",
    ];
    for file in FILES {
        println!("cargo:rerun-if-changed={file}");
    }
    let descriptors = protox::compile(FILES, ["."])?;
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
        .compile_fds(descriptors)?;
    Ok(())
}
