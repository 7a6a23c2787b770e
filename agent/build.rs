//! Links the static agent at a fixed address.
//!
//! rustc makes a static executable position independent, and such a one relocates itself each time it is
//! executed: 34,000 places on 130 pages. In the guest that is a third of the agent's time to "ready"
//! without KVM, and 3 MiB that PID 1 and the launcher do not share with the page cache. What it would
//! give, an unknown address, protects little here: nothing but the host and image files talk to the agent.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    let features = std::env::var("CARGO_CFG_TARGET_FEATURE").unwrap_or_default();
    if features.split(',').any(|feature| feature == "crt-static") {
        // The last of gcc's options of this kind counts: these follow rustc's own "-static-pie".
        for argument in ["-no-pie", "-static"] {
            println!("cargo:rustc-link-arg-bins={argument}");
        }
    }
}
