//! Pods of the host's own: what podvisord has for them on the node. Their monitor runs an OCI runtime
//! (crate `podvisor-oci`); what it is told of a container is what an agent would be told.
//!
//! Below the sandbox's folder: `shm`, `bundles/CONTAINER/rootfs`, `bundles/CONTAINER/images/N`, all mounted in
//! the host's namespace, so that they are there whoever of us dies. Writable layers are in `scratch/SANDBOX` of
//! the data directory.
//!
//! - here: what a pod shares with the host, and its containers' root file systems
//! - [`mounts`]: volumes as the OCI runtime is to mount them

pub mod mounts;

use std::collections::HashSet;
use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::mount::MsFlags;
use podvisor_node::cgroup::hierarchy;
use podvisor_node::handlers::{self, Reason};
use podvisor_node::inventory;
use podvisor_node::mountinfo;
use podvisor_oci::rootfs::Layer;
use podvisor_proto::cri;

use crate::daemon::{Daemon, blocking};
use crate::error::{Error, Result};
use crate::pod::Pod;
use crate::store::{Phase, SandboxRecord};

/// Size of a pod's /dev/shm, as in a VM and with containerd.
const SHM: &str = "mode=1777,size=65536k";

/// Where a pod of the host's own is, and what it shares with the host.
#[derive(Debug, Clone)]
pub struct HostPod {
    /// Its network namespace; none: the host's.
    pub netns: Option<PathBuf>,
    /// It has IPC objects of its own.
    pub own_ipc: bool,
    /// It has a host name of its own.
    pub own_uts: bool,
    /// Its /dev/shm.
    pub shm: PathBuf,
    /// Its control group, from a hierarchy's root.
    pub cgroup: PathBuf,
}

/// The roots that a container needs, to be mounted.
#[derive(Debug)]
pub struct Roots {
    /// Of its image, lowest first.
    pub layers: Vec<Layer>,
    /// Of its image volumes.
    pub images: Vec<Vec<Layer>>,
}

/// An image's layers.
pub fn layers(image: &podvisor_image::Image) -> Vec<Layer> {
    let layers = image.layers.iter();
    layers
        .map(|layer| Layer {
            diff_id: layer.diff_id.clone(),
            image: layer.path.clone(),
        })
        .collect()
}

/// Whether a pod uses the host's network.
pub fn shares_network(config: &cri::PodSandboxConfig) -> bool {
    Reason::HostNetwork.applies(config)
}

impl Daemon {
    /// A pod, as its configuration says.
    ///
    /// # Errors
    /// Its `cgroup_parent` is none.
    pub fn host_pod(&self, id: &str, config: &cri::PodSandboxConfig) -> Result<HostPod> {
        let own_ipc = !Reason::HostIpc.applies(config);
        let own_network = !shares_network(config);
        let parent = hierarchy::parent_path(&self.cgroup_parent(config));
        let parent = parent.map_err(|problem| Error::Invalid {
            field: "config.linux.cgroup_parent",
            problem,
        })?;
        let leaf = inventory::cgroup_leaf(&self.config.run_dir, id);
        Ok(HostPod {
            netns: own_network.then(|| self.netns_path(id)),
            own_ipc,
            // As a node's processes see it, which use its network by its name.
            own_uts: own_network,
            shm: if own_ipc {
                self.sandbox_dir(id).join("shm")
            } else {
                "/dev/shm".into()
            },
            cgroup: Path::new("/").join(parent).join(leaf),
        })
    }

    /// Whether a pod's containers run on the host.
    pub fn is_on_host(record: &SandboxRecord) -> bool {
        !handlers::is_vm(&record.handler)
    }

    /// Mounts a container's roots.
    ///
    /// # Errors
    /// [`Self::remove_roots`] takes away what there is then.
    pub async fn mount_roots(&self, pod: &Pod, container_id: &str, roots: Roots) -> Result<()> {
        let bundle = self.bundle_dir(&pod.id, container_id);
        let writable = self.writable_dir(&pod.id).join(container_id);
        let mounts = Arc::clone(&self.layers);
        blocking(move || {
            let target = bundle.join("rootfs");
            mounts
                .mount_overlay(&roots.layers, &writable, &target)
                .map_err(Error::io("mounting the container's root"))?;
            for (number, layers) in roots.images.iter().enumerate() {
                mounts
                    .mount_read_only(layers, &image_dir(&bundle, number))
                    .map_err(Error::io("mounting an image volume"))?;
            }
            Ok(())
        })
        .await
    }

    /// Takes a container's roots away, and layers that no container needs.
    ///
    /// # Errors
    /// Something is left.
    pub async fn remove_roots(&self, pod: &Pod, container_id: &str) -> Result<()> {
        let bundle = self.bundle_dir(&pod.id, container_id);
        let writable = self.writable_dir(&pod.id).join(container_id);
        blocking(move || remove_mounted(&bundle).and_then(|()| remove_tree(&writable))).await?;
        self.drop_unused_layers(Some(container_id)).await
    }

    /// Unmounts layers that no container needs, `but` apart.
    ///
    /// # Errors
    /// The kernel refuses.
    pub async fn drop_unused_layers(&self, but: Option<&str>) -> Result<()> {
        let mut used = HashSet::new();
        for pod in self.pods.all() {
            let record = pod.record();
            if !Self::is_on_host(&record) || record.phase == Phase::Stopped as i32 {
                continue;
            }
            for container in self.pods.containers_of(&pod.id) {
                // An image that is gone: its layers live on below the container's overlay.
                let image = self.images.resolve(&container.record.image_id);
                if Some(container.record.id.as_str()) != but {
                    let layers = image.map(|image| image.layers.clone()).unwrap_or_default();
                    used.extend(layers.into_iter().map(|layer| layer.diff_id));
                }
            }
        }
        let mounts = Arc::clone(&self.layers);
        blocking(move || mounts.keep(&used).map_err(Error::io("unmounting layers"))).await
    }

    /// A container's bundle.
    pub fn bundle_dir(&self, sandbox_id: &str, container_id: &str) -> PathBuf {
        self.sandbox_dir(sandbox_id)
            .join("bundles")
            .join(container_id)
    }

    /// Where the writable layers of a pod's containers are.
    pub fn writable_dir(&self, sandbox_id: &str) -> PathBuf {
        self.config.data_dir.join("scratch").join(sandbox_id)
    }
}

/// Where the image volume `number` of a bundle is mounted.
pub fn image_dir(bundle: &Path, number: usize) -> PathBuf {
    bundle.join("images").join(number.to_string())
}

/// Makes what a pod needs before its monitor starts, in the sandbox's folder `dir` and, for writable layers, in `writable`.
/// Only root gets to what is an image's: there are set-uid programs. Blocking.
///
/// # Errors
/// The disk or the kernel refuses.
pub fn prepare(host_pod: &HostPod, dir: &Path, writable: &Path) -> io::Result<()> {
    for private in [writable, &dir.join("bundles")] {
        DirBuilder::new().mode(0o700).create(private)?;
    }
    if host_pod.own_ipc {
        fs::create_dir(&host_pod.shm)?;
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
        podvisor_oci::mount::mount(Path::new("shm"), &host_pod.shm, "tmpfs", flags, SHM)?;
    }
    Ok(())
}

/// Removes a folder after all that is mounted in it. Fine when it is gone. Blocking.
///
/// # Errors
/// Something is left; nothing that is mounted is ever deleted.
pub fn remove_mounted(dir: &Path) -> Result<()> {
    // Mounts are named by where they really are.
    let real = match fs::canonicalize(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        real => real.map_err(Error::io(dir.display().to_string()))?,
    };
    let mounts = mountinfo::read().map_err(Error::io("the mount table"))?;
    let below = mounts
        .iter()
        .rev()
        .filter(|mount| mount.point.starts_with(&real));
    for mount in below {
        podvisor_oci::mount::unmount(&mount.point)
            .map_err(Error::io(format!("unmounting {}", mount.point.display())))?;
    }
    remove_tree(dir)
}

/// Removes a folder in which nothing is mounted. Fine when it is gone. Blocking.
fn remove_tree(dir: &Path) -> Result<()> {
    let removed = inventory::remove_folder(dir);
    removed.map_err(|error| Error::io("removing a folder")(io::Error::other(error)))
}
