//! How podvisord is linked.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    // Addresses to be fixed at start take 24 bytes each in the file, and are all read; packed, they take almost none.
    println!("cargo::rustc-link-arg-bins=-Wl,-z,pack-relative-relocs");
    // Cargo does not apply a profile's `strip` to a package with an opt-level of its own.
    if std::env::var("PROFILE").is_ok_and(|profile| profile == "release") {
        println!("cargo::rustc-link-arg-bins=-Wl,--strip-all");
    }
}
