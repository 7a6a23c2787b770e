//! How podvisord is linked.

fn main() {
    // Addresses to be fixed at start take 24 bytes each in the file, and are all read; packed, they take almost none.
    println!("cargo::rustc-link-arg-bins=-Wl,-z,pack-relative-relocs");
    println!("cargo::rerun-if-changed=build.rs");
}
