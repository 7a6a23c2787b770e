//! Volumes: what of the node's files a container sees.
//!
//! podvisor-fs answers the guest's requests; its mount namespace holds what a pod may see, and nothing else: a bind mount
//! for each volume of each container at `/<container>/<number>`. These mounts are in no other namespace, and end with
//! the process: none is left behind on the node, whatever dies. Of the host's path a volume is named by, only one lookup
//! is made; what it led to is what is mounted.
//!
//! - here: what CreateContainer asks for, checked
//! - [`source`]: the host's file, opened and cloned as a mount
//! - [`lifecycle`]: when all of this happens
//! - [`server`]: podvisor-fs, and what is mounted there
//! - [`mount`]: system calls

mod lifecycle;
mod mount;
mod server;
mod source;

use std::path::{Component, Path, PathBuf};

use oci_spec::runtime::{Mount, MountBuilder};
use podvisor_proto::cri;
use tonic::Code;

use crate::error::{Error, Result};

pub use lifecycle::open;
pub use server::FsServer;
pub use source::Source;

/// Most mounts of a container. Each is a file descriptor of podvisord's for a moment.
const MAX_VOLUMES: usize = 1024;

/// Type of a mount in the spec whose source is below the root of the volumes (agent.proto, CreateContainer).
const SPEC_TYPE: &str = "volume";

/// A volume that CreateContainer asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Volume {
    /// Its place in `config.mounts`.
    pub index: usize,
    /// Absolute, without `..`.
    pub container_path: PathBuf,
    /// Absolute, without `..`. Links in it are followed.
    pub host_path: PathBuf,
    /// The container may not write to it.
    pub read_only: bool,
    /// Nor to what is mounted below it.
    pub recursive: bool,
    /// What the host mounts below it later is seen as well.
    pub follows_host: bool,
}

/// The volumes that a container asks for.
///
/// # Errors
/// What contradicts the CRI, or cannot be in a VM, with the field's path.
pub fn parse(mounts: &[cri::Mount]) -> Result<Vec<Volume>> {
    if mounts.len() > MAX_VOLUMES {
        return Err(Error::Invalid {
            field: "config.mounts",
            problem: format!("{}: at most {MAX_VOLUMES}", mounts.len()),
        });
    }
    mounts
        .iter()
        .enumerate()
        .map(|(index, mount)| parse_one(index, mount))
        .collect()
}

fn parse_one(index: usize, mount: &cri::Mount) -> Result<Volume> {
    let refuse = |code, field, problem: &str| {
        Err(Error::Mount {
            index,
            field,
            problem: problem.to_owned(),
            code,
        })
    };
    let invalid = |field, problem: &str| refuse(Code::InvalidArgument, field, problem);
    if mount.image.is_some() {
        return refuse(Code::Unimplemented, "image", "an image volume in a VM");
    }
    if !mount.uid_mappings.is_empty() || !mount.gid_mappings.is_empty() {
        return refuse(Code::Unimplemented, "uidMappings", "an id-mapped volume");
    }
    let container_path = match absolute(&mount.container_path) {
        Ok(path) => path,
        Err(problem) => return invalid("container_path", problem),
    };
    if container_path == Path::new("/") {
        return invalid("container_path", "is the container's root");
    }
    if container_path.starts_with("/proc") {
        return invalid("container_path", "is in /proc");
    }
    let host_path = match absolute(&mount.host_path) {
        Ok(path) => path,
        Err(problem) => return invalid("host_path", problem),
    };
    let propagation = mount.propagation();
    if propagation == cri::MountPropagation::PropagationBidirectional {
        return refuse(
            Code::FailedPrecondition,
            "propagation",
            "Bidirectional: a VM's mounts do not reach the host",
        );
    }
    if mount.recursive_read_only {
        if !mount.readonly {
            return invalid("recursive_read_only", "set without readonly");
        }
        if propagation != cri::MountPropagation::PropagationPrivate {
            return invalid(
                "recursive_read_only",
                "set with a propagation that is not private",
            );
        }
    }
    Ok(Volume {
        index,
        container_path,
        host_path,
        read_only: mount.readonly,
        recursive: mount.recursive_read_only,
        follows_host: propagation == cri::MountPropagation::PropagationHostToContainer,
    })
}

/// An absolute path without `..`, and without what means nothing in it.
fn absolute(path: &str) -> Result<PathBuf, &'static str> {
    if path.is_empty() {
        return Err("missing");
    }
    if !path.starts_with('/') {
        return Err("is not absolute");
    }
    if path.contains('\0') {
        return Err("contains a NUL byte");
    }
    let path: PathBuf = Path::new(path).components().collect();
    if path.components().any(|part| part == Component::ParentDir) {
        return Err("contains ..");
    }
    Ok(path)
}

/// The mounts of the spec for a container's volumes, the outer ones before the inner ones.
///
/// # Errors
/// None that a caller could cause.
pub fn spec_mounts(container_id: &str, volumes: &[(Volume, Source)]) -> Result<Vec<Mount>> {
    let mut mounts = Vec::new();
    let mut add = |destination: PathBuf, source: PathBuf, read_only: bool| {
        let access = if read_only { "ro" } else { "rw" };
        let mount = MountBuilder::default()
            .destination(destination)
            .typ(SPEC_TYPE)
            .source(source)
            .options(["rbind", "rprivate", access].map(str::to_owned))
            .build()
            .map_err(|error| Error::io("OCI spec")(std::io::Error::other(error)))?;
        mounts.push(mount);
        Ok::<_, Error>(())
    };
    for (volume, source) in volumes {
        let share = Path::new(container_id).join(volume.index.to_string());
        add(
            volume.container_path.clone(),
            share.clone(),
            volume.read_only,
        )?;
        // The guest sees one file system where the host has several: what is read-only by itself says so on the host.
        for below in &source.writable_below {
            add(volume.container_path.join(below), share.join(below), false)?;
        }
    }
    mounts.sort_by_key(|mount| mount.destination().components().count());
    Ok(mounts)
}

#[cfg(test)]
mod tests;
