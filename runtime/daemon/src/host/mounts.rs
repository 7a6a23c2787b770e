//! Volumes of containers on the host: bind mounts that the OCI runtime makes.

use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use nix::fcntl::OFlag;
use oci_spec::runtime::{Mount, MountBuilder};
use podvisor_node::mountinfo;
use podvisor_root::in_root::Root;
use tonic::Code;

use super::image_dir;
use crate::error::{Error, Result};
use crate::volumes::{ImageVolume, Propagation, Volume};

/// Volumes of the node's files, the outer ones before the inner ones.
///
/// # Errors
/// FAILED_PRECONDITION: a path that is not there, or from which mounts cannot propagate.
pub fn of_host(volumes: &[Volume]) -> Result<Vec<Mount>> {
    let mut mounts = Vec::with_capacity(volumes.len());
    for volume in volumes {
        let refuse = |field, problem: String| Error::Element {
            list: "mounts",
            index: volume.index,
            field,
            problem,
            code: Code::FailedPrecondition,
        };
        let source = std::fs::canonicalize(&volume.host_path).map_err(|error| {
            refuse(
                "host_path",
                format!("{}: {error}", volume.host_path.display()),
            )
        })?;
        let propagation = match volume.propagation {
            Propagation::Private => "rprivate",
            Propagation::FromHost => "rslave",
            Propagation::Both => "rshared",
        };
        if volume.propagation == Propagation::Both && !is_shared(&source)? {
            let problem = format!("{} is not on a shared mount", source.display());
            return Err(refuse("propagation", problem));
        }
        let access = match (volume.read_only, volume.recursive) {
            (false, _) => "rw",
            (true, false) => "ro",
            (true, true) => "rro",
        };
        mounts.push(bind(
            &source,
            &volume.container_path,
            &[propagation, access],
        )?);
    }
    mounts.sort_by_key(|mount| mount.destination().components().count());
    Ok(mounts)
}

/// What of an image volume, mounted as number `number` of the bundle, the container is to see. Only when it is mounted.
///
/// # Errors
/// FAILED_PRECONDITION: it has no such path.
pub fn of_image(bundle: &Path, number: usize, volume: &ImageVolume) -> Result<Mount> {
    let dir = image_dir(bundle, number);
    let find = || -> std::io::Result<PathBuf> {
        // The image's links stay in it, and it does not change: its path stays what it is.
        let found = Root::new(&dir)?.open(Path::new(&volume.sub_path), OFlag::O_PATH)?;
        std::fs::read_link(format!("/proc/self/fd/{}", found.as_raw_fd()))
    };
    let source = if volume.sub_path.is_empty() {
        dir.clone()
    } else {
        find().map_err(|error| volume.failed(&format!("image_sub_path: {error}")))?
    };
    bind(&source, &volume.container_path, &["rprivate", "ro"])
}

fn bind(source: &Path, target: &Path, options: &[&str]) -> Result<Mount> {
    let options = ["rbind"]
        .iter()
        .chain(options)
        .map(|&option| option.to_owned());
    MountBuilder::default()
        .destination(target)
        .typ("bind")
        .source(source)
        .options(options.collect::<Vec<_>>())
        .build()
        .map_err(|error| Error::io("OCI spec")(std::io::Error::other(error)))
}

/// Whether mounts made at `path` reach others: it is in a peer group (mount_namespaces(7)).
fn is_shared(path: &Path) -> Result<bool> {
    let mounts = mountinfo::read().map_err(Error::io("the mount table"))?;
    let mount = mounts
        .iter()
        .rev()
        .filter(|mount| path.starts_with(&mount.point));
    let innermost = mount.max_by_key(|mount| mount.point.components().count());
    Ok(innermost.is_some_and(|mount| mount.is_shared))
}
