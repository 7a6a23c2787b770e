//! What a container is made of: layers, volumes, devices, and the request to its pod's monitor.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use oci_spec::runtime::Mount;
use podvisor_image::Image;
use podvisor_proto::{cri, monitor};

use crate::daemon::{Daemon, blocking};
use crate::error::{Error, Result};
use crate::host::{self, HostPod, Roots};
use crate::monitor::Monitor;
use crate::pod::Pod;
use crate::spec::{self, ContainerSpec};
use crate::volumes::{self, ImageVolume, Source, Volume, Volumes};

/// A container that is to be created, checked.
pub struct Assembly {
    pub id: String,
    pub built: ContainerSpec,
    pub image: Arc<Image>,
    pub volumes: Volumes,
    /// The images of `volumes.images`.
    pub volume_images: Vec<Arc<Image>>,
}

/// What of a container is yet to be mounted on the host before its monitor is asked.
pub enum Files {
    /// Volumes that podvisor-fs serves to the guest.
    Guest(Vec<(Volume, Source)>),
    /// Its roots, and its image volumes, which are mounts in its spec only once they are mounted.
    Host(Roots, Box<ContainerSpec>, Vec<ImageVolume>),
}

impl Assembly {
    /// Opens what a guest gets.
    ///
    /// # Errors
    /// FAILED_PRECONDITION: it is not there.
    pub async fn for_guest(
        mut self,
        monitor: &Monitor,
        config: &cri::ContainerConfig,
    ) -> Result<(monitor::CreateContainerRequest, Files)> {
        let volumes = volumes::open(self.volumes.host).await?;
        let devices = config.devices.clone();
        let devices = blocking(move || volumes::open_devices(&devices)).await?;
        let more = volumes::spec_mounts(&self.id, &volumes, &self.volumes.images)?;
        add_mounts(&mut self.built, more);
        let seccomp = spec::seccomp::take_filter(&mut self.built.spec).await?;

        let layers = send_layers(monitor, &self.image).await?;
        let mut image_volumes = Vec::with_capacity(self.volume_images.len());
        for (volume, image) in self.volumes.images.into_iter().zip(self.volume_images) {
            image_volumes.push(monitor::ImageVolume {
                layers: send_layers(monitor, &image).await?,
                sub_path: volume.sub_path,
            });
        }
        let mut block_devices = Vec::with_capacity(devices.len());
        for device in devices {
            block_devices.push(monitor::BlockDevice {
                fd_token: monitor.send_fd(device.file).await?,
                length: device.length,
                read_only: device.read_only,
                path: device.container_path,
            });
        }
        let request = monitor::CreateContainerRequest {
            id: self.id,
            layers,
            spec: to_json(&self.built)?,
            user: Some(self.built.user),
            guest_devices: self.built.guest_devices,
            image_volumes,
            block_devices,
            seccomp,
            ..Default::default()
        };
        Ok((request, Files::Guest(volumes)))
    }

    /// Names what an OCI runtime on the host is to mount.
    ///
    /// # Errors
    /// FAILED_PRECONDITION: it is not there.
    pub async fn for_host(
        mut self,
        host_pod: HostPod,
    ) -> Result<(monitor::CreateContainerRequest, Files)> {
        let volumes = self.volumes.host;
        let mounts = blocking(move || host::mounts::of_host(&volumes)).await?;
        add_mounts(&mut self.built, mounts);
        if let Some(linux) = self.built.spec.linux_mut() {
            linux.set_cgroups_path(Some(host_pod.cgroup.join(&self.id)));
        }
        let roots = Roots {
            layers: host::layers(&self.image),
            images: self
                .volume_images
                .iter()
                .map(|image| host::layers(image))
                .collect(),
        };
        let request = monitor::CreateContainerRequest {
            id: self.id,
            user: Some(self.built.user.clone()),
            ..Default::default()
        };
        let files = Files::Host(roots, Box::new(self.built), self.volumes.images);
        Ok((request, files))
    }
}

impl Daemon {
    /// The images that a container has as volumes; notes in `config` which they are.
    pub(super) fn volume_images(
        &self,
        config: &mut cri::ContainerConfig,
        volumes: &Volumes,
    ) -> Result<Vec<Arc<Image>>> {
        let mut images = Vec::with_capacity(volumes.images.len());
        for volume in &volumes.images {
            let found = self.images.resolve(&volume.image);
            let image = found.ok_or_else(|| volume.failed("the node does not have it"))?;
            if let Some(spec) = &mut config.mounts[volume.index].image {
                spec.image_ref.clone_from(&image.id);
            }
            images.push(image);
        }
        Ok(images)
    }

    /// Mounts a container's files where its pod sees them, and completes the request.
    ///
    /// # Errors
    /// [`Self::remove_files`] takes away what there is then.
    pub(super) async fn add_files(
        &self,
        pod: &Pod,
        monitor: &Monitor,
        files: Files,
        request: &mut monitor::CreateContainerRequest,
    ) -> Result<()> {
        match files {
            Files::Guest(volumes) => {
                let token = self.add_volumes(pod, monitor, &request.id, volumes).await?;
                request.volumes_fd_token = token;
            }
            Files::Host(roots, mut built, images) => {
                self.mount_roots(pod, &request.id, roots).await?;
                let bundle = self.bundle_dir(&pod.id, &request.id);
                let mounts = images.iter().enumerate();
                let mounts = mounts
                    .map(|(number, volume)| host::mounts::of_image(&bundle, number, volume))
                    .collect::<Result<_>>()?;
                add_mounts(&mut built, mounts);
                request.spec = to_json(&built)?;
            }
        }
        Ok(())
    }

    /// Takes away what [`Self::add_files`] has mounted.
    ///
    /// # Errors
    /// Something is left.
    pub(super) async fn remove_files(&self, pod: &Pod, container_id: &str) -> Result<()> {
        if Self::is_on_host(&pod.record()) {
            self.remove_roots(pod, container_id).await
        } else {
            self.remove_volumes(pod, container_id).await
        }
    }
}

/// The devices that a container asks for.
pub async fn devices_of(
    config: &cri::ContainerConfig,
    on_host: bool,
) -> Result<spec::devices::Devices> {
    if !on_host {
        return spec::devices::of(config).await;
    }
    let config = config.clone();
    blocking(move || spec::devices::on_host(&config)).await
}

/// Opens a file where opening may take its time.
pub async fn open_file(
    path: PathBuf,
    open: impl FnOnce(&Path) -> std::io::Result<File> + Send + 'static,
) -> Result<File> {
    blocking(move || open(&path).map_err(Error::io(path.display().to_string()))).await
}

/// Opens an image's layers and hands them to the monitor.
async fn send_layers(monitor: &Monitor, image: &Image) -> Result<Vec<monitor::Layer>> {
    let mut layers = Vec::with_capacity(image.layers.len());
    for layer in &image.layers {
        let file = open_file(layer.path.clone(), |path| File::open(path)).await?;
        layers.push(monitor::Layer {
            diff_id: layer.diff_id.clone(),
            length: layer.length,
            fd_token: monitor.send_fd(file).await?,
        });
    }
    Ok(layers)
}

fn add_mounts(built: &mut ContainerSpec, more: Vec<Mount>) {
    let mut mounts = built.spec.mounts().clone().unwrap_or_default();
    mounts.extend(more);
    built.spec.set_mounts(Some(mounts));
}

fn to_json(built: &ContainerSpec) -> Result<Vec<u8>> {
    serde_json::to_vec(&built.spec)
        .map_err(|error| Error::io("OCI spec")(std::io::Error::other(error)))
}
