//! Compiles the definitions without protoc.

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
    tonic_prost_build::configure()
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
