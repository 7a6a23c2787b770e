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
//! - [`id_map`]: files that have other owners in the pod
//! - [`block`]: block devices of the node
//! - [`server`]: podvisor-fs, and what is mounted there
//! - [`mount`]: system calls

mod block;
mod id_map;
mod lifecycle;
mod mount;
mod server;
mod source;

use std::path::{Component, Path, PathBuf};

use oci_spec::runtime::{Mount, MountBuilder};
use podvisor_proto::cri;
use tonic::Code;

use crate::error::{Error, Result};

pub use block::{BlockDevice, open_devices};
pub use id_map::IdMap;
pub use lifecycle::open;
pub use server::FsServer;
pub use source::Source;

/// Most mounts of a container. Each is a file descriptor of podvisord's for a moment.
const MAX_VOLUMES: usize = 1024;

/// Types of mounts in the spec (agent.proto, CreateContainer): the source is below the root of the volumes, or the number
/// of an image volume.
const SPEC_TYPE: &str = "volume";
const SPEC_TYPE_IMAGE: &str = "image";

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
    /// Of what is mounted below it later.
    pub propagation: Propagation,
    /// Its files have other owners than on the host, if so.
    pub ids: Option<IdMap>,
}

/// Who sees what is mounted below a volume later.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Propagation {
    /// Who has mounted it.
    Private,
    /// The container what the host mounts.
    FromHost,
    /// The host what the container mounts, too: in no VM.
    Both,
}

/// An image that CreateContainer asks for as a volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageVolume {
    /// Its place in `config.mounts`.
    pub index: usize,
    /// Absolute, without `..`.
    pub container_path: PathBuf,
    /// The image, by reference or id.
    pub image: String,
    /// What of it is mounted; empty: all.
    pub sub_path: String,
}

impl ImageVolume {
    /// It cannot be mounted. How the message begins is the CRI's to say.
    pub fn failed(&self, problem: &str) -> Error {
        Error::Precondition(format!(
            "ImageVolumeMountFailed: config.mounts[{}].image: {problem}",
            self.index
        ))
    }
}

/// All volumes that a container asks for.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Volumes {
    /// Of the node's files.
    pub host: Vec<Volume>,
    /// Of images.
    pub images: Vec<ImageVolume>,
}

/// The volumes that a container asks for. `users`: the map of its pod's user namespace, if it has one.
///
/// # Errors
/// What contradicts the CRI, or cannot be `in_vm`, with the field's path.
pub fn parse(
    mounts: &[cri::Mount],
    in_vm: bool,
    users: Option<&cri::IdMapping>,
) -> Result<Volumes> {
    if mounts.len() > MAX_VOLUMES {
        return Err(Error::Invalid {
            field: "config.mounts",
            problem: format!("{}: at most {MAX_VOLUMES}", mounts.len()),
        });
    }
    let mut volumes = Volumes::default();
    for (index, mount) in mounts.iter().enumerate() {
        match &mount.image {
            Some(image) => {
                let volume = parse_image(index, mount, image, users)?;
                volumes.images.push(volume);
            }
            None => volumes.host.push(parse_host(index, mount, in_vm)?),
        }
    }
    Ok(volumes)
}

fn refuse<T>(index: usize, code: Code, field: &'static str, problem: &str) -> Result<T> {
    Err(Error::Element {
        list: "mounts",
        index,
        field,
        problem: problem.to_owned(),
        code,
    })
}

/// Where in the container.
fn container_path(index: usize, mount: &cri::Mount) -> Result<PathBuf> {
    let invalid = |problem| refuse(index, Code::InvalidArgument, "container_path", problem);
    match absolute(&mount.container_path) {
        Err(problem) => invalid(problem),
        Ok(path) if path == Path::new("/") => invalid("is the container's root"),
        Ok(path) if path.starts_with("/proc") => invalid("is in /proc"),
        Ok(path) => Ok(path),
    }
}

fn parse_image(
    index: usize,
    mount: &cri::Mount,
    image: &cri::ImageSpec,
    users: Option<&cri::IdMapping>,
) -> Result<ImageVolume> {
    let invalid = |field, problem| refuse(index, Code::InvalidArgument, field, problem);
    if !mount.host_path.is_empty() {
        return invalid("host_path", "set together with image");
    }
    if image.image.is_empty() {
        return invalid("image", "names none");
    }
    if !mount.readonly {
        return invalid("readonly", "not set: an image cannot be written to");
    }
    if mount.propagation() != cri::MountPropagation::PropagationPrivate {
        return invalid("propagation", "of an image");
    }
    for (field, mappings) in [
        ("uidMappings", &mount.uid_mappings),
        ("gidMappings", &mount.gid_mappings),
    ] {
        // An image's layers are mounted once for all containers of a pod.
        if !mappings.is_empty() && mappings.iter().ne(users) {
            return invalid(field, "of an image: other ids than the pod's");
        }
    }
    let sub_path = Path::new(&mount.image_sub_path);
    let is_inside = sub_path
        .components()
        .all(|part| matches!(part, Component::Normal(_) | Component::CurDir));
    if !is_inside {
        return invalid("image_sub_path", "is not a path in the image");
    }
    Ok(ImageVolume {
        index,
        container_path: container_path(index, mount)?,
        image: image.image.clone(),
        sub_path: mount.image_sub_path.clone(),
    })
}

fn parse_host(index: usize, mount: &cri::Mount, in_vm: bool) -> Result<Volume> {
    let refuse = |code, field, problem: &str| refuse(index, code, field, problem);
    let invalid = |field, problem: &str| refuse(Code::InvalidArgument, field, problem);
    let ids = match IdMap::parse(mount) {
        Ok(ids) => ids,
        Err((field, problem)) => return invalid(field, problem),
    };
    if ids.is_some() && !in_vm {
        return refuse(Code::Unimplemented, "uidMappings", "of a pod on the host");
    }
    let container_path = container_path(index, mount)?;
    let host_path = match absolute(&mount.host_path) {
        Ok(path) => path,
        Err(problem) => return invalid("host_path", problem),
    };
    let propagation = match mount.propagation() {
        cri::MountPropagation::PropagationPrivate => Propagation::Private,
        cri::MountPropagation::PropagationHostToContainer => Propagation::FromHost,
        cri::MountPropagation::PropagationBidirectional if in_vm => {
            return refuse(
                Code::FailedPrecondition,
                "propagation",
                "Bidirectional: a VM's mounts do not reach the host",
            );
        }
        cri::MountPropagation::PropagationBidirectional => Propagation::Both,
    };
    if mount.recursive_read_only {
        if !mount.readonly {
            return invalid("recursive_read_only", "set without readonly");
        }
        if propagation != Propagation::Private {
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
        propagation,
        ids,
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
pub fn spec_mounts(
    container_id: &str,
    volumes: &[(Volume, Source)],
    images: &[ImageVolume],
) -> Result<Vec<Mount>> {
    let mut mounts = Vec::new();
    let mut add = |kind, destination: PathBuf, source: PathBuf, read_only: bool| {
        let access = if read_only { "ro" } else { "rw" };
        let mount = MountBuilder::default()
            .destination(destination)
            .typ(kind)
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
            SPEC_TYPE,
            volume.container_path.clone(),
            share.clone(),
            volume.read_only,
        )?;
        // The guest sees one file system where the host has several: what is read-only by itself says so on the host.
        for below in &source.writable_below {
            let destination = volume.container_path.join(below);
            add(SPEC_TYPE, destination, share.join(below), false)?;
        }
    }
    for (number, volume) in images.iter().enumerate() {
        let source = number.to_string().into();
        add(SPEC_TYPE_IMAGE, volume.container_path.clone(), source, true)?;
    }
    mounts.sort_by_key(|mount| mount.destination().components().count());
    Ok(mounts)
}

#[cfg(test)]
mod tests;
