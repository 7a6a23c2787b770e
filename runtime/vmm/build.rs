//! Compiles the system call filters in a crate's seccomp/ to BPF, for its source to include: `NAME.json`, which has a
//! filter of that name, to `NAME.bpf`. podvisor-fs uses this file too.

use std::ffi::OsStr;
use std::path::PathBuf;
use std::{env, fs};

use anyhow::Context as _;
use seccompiler::{BpfProgram, TargetArch};

fn main() -> anyhow::Result<()> {
    println!("cargo::rerun-if-changed=seccomp");
    let out = PathBuf::from(env::var("OUT_DIR")?);
    let target = TargetArch::try_from(env::var("CARGO_CFG_TARGET_ARCH")?.as_str())?;
    for source in fs::read_dir("seccomp").context("seccomp")? {
        let source = source?.path();
        let name = source.file_stem().and_then(OsStr::to_str);
        let thread = name.with_context(|| source.display().to_string())?;
        let json = fs::read(&source).with_context(|| source.display().to_string())?;
        let mut programs = seccompiler::compile_from_json(json.as_slice(), target)
            .with_context(|| source.display().to_string())?;
        let program = programs
            .remove(thread)
            .with_context(|| format!("{} has no {thread:?}", source.display()))?;
        fs::write(out.join(thread).with_extension("bpf"), bytes(&program))?;
    }
    Ok(())
}

/// `struct sock_filter`s, as the kernel takes them.
fn bytes(program: &BpfProgram) -> Vec<u8> {
    let mut bytes = Vec::new();
    for instruction in program {
        bytes.extend_from_slice(&instruction.code.to_ne_bytes());
        bytes.extend_from_slice(&[instruction.jt, instruction.jf]);
        bytes.extend_from_slice(&instruction.k.to_ne_bytes());
    }
    bytes
}
