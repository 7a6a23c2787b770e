//! Create and remove: layers, root, bundle.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use podvisor_proto::agent::{BlockDevice, CreateContainerRequest, ResolvedUser, Segment, User};
use podvisor_root::in_root::Root;
use podvisor_root::user;

use super::{
    Assembly, CONTAINER_LIMIT, Container, ContainerError, Execs, Pod, SPEC, State, bundle,
    check_id, fingerprint, kernel, lock,
};
use crate::disk::{DiskError, Range};
use crate::guest_devices;
use crate::image_volume;
use crate::oci::NamespaceKind;
use crate::resources;
use crate::rootfs::Rootfs;
use crate::sandbox::files;
use crate::seccomp::StoredFilter;
use crate::spec::{CompleteSpec, ContainerSpec};
use crate::user_namespace::IdMap;

/// From `cgroup.kill` to the end of a container's last process.
const KILL_DEADLINE: Duration = Duration::from_secs(10);

impl Pod {
    /// Assembles the root, resolves the user, writes the bundle. The same request again gets the same
    /// answer.
    pub async fn create(
        &self,
        request: CreateContainerRequest,
    ) -> Result<ResolvedUser, ContainerError> {
        check_id(&request.id)?;
        let fingerprint = fingerprint(&request);
        let mut assembly = Arc::clone(&self.0.assembly).lock_owned().await;
        if let Some(container) = self.table().get(&request.id) {
            return if container.fingerprint == fingerprint {
                Ok(container.user.clone())
            } else {
                Err(ContainerError::Exists(container.what()))
            };
        }
        if self.table().len() >= CONTAINER_LIMIT {
            return Err(ContainerError::TooMany("containers"));
        }
        let assembled = tokio::task::spawn_blocking(move || {
            let container = assemble(&mut assembly, request, fingerprint);
            (container, assembly)
        });
        // The assembly stays locked until the container is in the table.
        let (container, _assembly) = assembled.await?;
        let container = container?;
        let user = container.user.clone();
        self.table()
            .insert(container.id.clone(), Arc::new(container));
        Ok(user)
    }

    /// Kills what is left of the container and takes everything away that was made for it. Returns the
    /// segments that no container uses any more. A container that is not there is removed.
    pub async fn remove(&self, id: &str) -> Result<Vec<Segment>, ContainerError> {
        let Ok(container) = self.find(id) else {
            return Ok(Vec::new());
        };
        let _turn = container.turn.lock().await;
        let started = match std::mem::replace(&mut *container.state(), State::Removing) {
            State::Started(started) => Some(started),
            State::Created | State::Removing => None,
        };
        if let Some(started) = started {
            let cgroup = started.cgroup.clone();
            let destroyed =
                tokio::task::spawn_blocking(move || cgroup.destroy(KILL_DEADLINE)).await?;
            if let Err(error) = destroyed {
                *container.state() = State::Started(started);
                return Err(kernel("ending the container's processes")(error));
            }
            started.relays.end();
            self.0.watch.forget(&started.memory);
        }
        container.end_execs();

        let mut assembly = Arc::clone(&self.0.assembly).lock_owned().await;
        let (disassembled, _assembly) = tokio::task::spawn_blocking({
            let container = Arc::clone(&container);
            move || (disassemble(&mut assembly, &container), assembly)
        })
        .await?;
        let released = disassembled.map_err(kernel("removing the container's files"))?;
        self.table().remove(id);
        Ok(released)
    }
}

impl Container {
    /// Forgets all execs; their processes have ended with the container's control group.
    fn end_execs(&self) {
        let execs = std::mem::take(&mut *lock(&self.execs));
        let ended = execs.ended.into_iter().map(|(_, exec)| exec);
        for exec in execs.running.into_values().chain(ended) {
            exec.relays.end();
        }
    }
}

/// Makes the container; when this fails, nothing stays of it. Blocks.
fn assemble(
    assembly: &mut Assembly,
    request: CreateContainerRequest,
    fingerprint: u64,
) -> Result<Container, ContainerError> {
    let mut spec = ContainerSpec::parse(&request.spec)?;
    if request.guest_devices {
        let devices = guest_devices::all().map_err(kernel("reading the guest's devices"))?;
        spec.add_devices(devices);
    }
    let hostname = assembly.sandbox.hostname()?.to_owned();
    let ids = assembly.sandbox.user_namespace().map(|own| own.ids);
    if ids.is_some() != spec.shares(NamespaceKind::User) {
        return Err(ContainerError::Invalid(
            "spec and sandbox disagree about a user namespace".to_owned(),
        ));
    }
    let layers = without_covered(ranges(&request.layers)?);
    let volumes = request.image_volumes.iter();
    let volumes = volumes
        .map(|volume| Ok(without_covered(ranges(&volume.layers)?)))
        .collect::<Result<Vec<_>, DiskError>>()?;
    let rootfs = Rootfs::new(
        bundle(&request.id).join("rootfs"),
        files::scratch().join(&request.id),
        ids.map_or(0, IdMap::root),
    );
    if spec.has_volumes() {
        assembly.sandbox.mount_volumes()?;
    }
    let all: Vec<Range> = layers
        .iter()
        .chain(volumes.iter().flatten())
        .copied()
        .collect();
    let directories = assembly.disk.acquire(&request.id, &all)?;
    for device in &request.block_devices {
        let added = add_device(assembly, &request.id, device, &mut spec);
        if let Err(error) = added {
            assembly.disk.release(&request.id);
            return Err(error);
        }
    }
    let (root, mut rest) = directories.split_at(layers.len());
    let mut mount_volumes = || {
        for (number, (asked, layers)) in request.image_volumes.iter().zip(&volumes).enumerate() {
            let (directories, others) = rest.split_at(layers.len());
            rest = others;
            let sub_path = Path::new(&asked.sub_path);
            let place = image_volumes(&request.id);
            image_volume::mount(directories, sub_path, &place, &number.to_string())?;
        }
        Ok(())
    };
    rootfs
        .mount(root)
        .map_err(ContainerError::from)
        .and_then(|()| mount_volumes())
        .and_then(|()| write_bundle(spec, &request, &hostname, ids, fingerprint, &rootfs))
        .inspect_err(|_| {
            let _ = clean_up(&request.id);
            assembly.disk.release(&request.id);
        })
}

/// Makes a segment a block device of the container's.
fn add_device(
    assembly: &mut Assembly,
    id: &str,
    device: &BlockDevice,
    spec: &mut ContainerSpec,
) -> Result<(), ContainerError> {
    let path = PathBuf::from(&device.path);
    if !path.is_absolute() {
        return Err(ContainerError::Invalid(format!(
            "{:?} is no device's path",
            device.path
        )));
    }
    let segment = Range::try_from(device.segment.unwrap_or_default())?;
    let number = assembly.disk.add_device(id, segment)?;
    spec.add_block_device(path, number, device.read_only);
    Ok(())
}

fn ranges(segments: &[Segment]) -> Result<Vec<Range>, DiskError> {
    segments
        .iter()
        .map(|segment| Range::try_from(*segment))
        .collect()
}

/// Where a container's image volumes are.
fn image_volumes(id: &str) -> PathBuf {
    bundle(id).join("images")
}

/// Layers without those that appear again further up: overlayfs refuses a directory that is there twice,
/// and the upper one says all that the lower one did.
fn without_covered(layers: Vec<Range>) -> Vec<Range> {
    let mut kept: Vec<Range> = Vec::with_capacity(layers.len());
    for layer in layers.into_iter().rev() {
        if !kept.contains(&layer) {
            kept.push(layer);
        }
    }
    kept.reverse();
    kept
}

fn write_bundle(
    spec: ContainerSpec,
    request: &CreateContainerRequest,
    hostname: &str,
    ids: Option<IdMap>,
    fingerprint: u64,
    rootfs: &Rootfs,
) -> Result<Container, ContainerError> {
    let root = Root::new(rootfs.path()).map_err(kernel("opening the root file system"))?;
    let account = user::resolve(&root, request.user.as_ref().unwrap_or(&User::default()))?;
    if let Some(ids) = ids {
        check_ids(&account.ids, ids)?;
    } else {
        // As other runtimes do: a working directory that the image lacks is made. In a user namespace by the container's
        // root, when it starts.
        root.directory(spec.cwd())
            .map_err(kernel("making the working directory"))?;
    }
    let manages_cgroup = spec.manages_cgroup();
    let pod_pids = spec.shares(NamespaceKind::Pid);
    let pid_target = spec.pid_target().map(str::to_owned);
    let CompleteSpec { spec, devices } = spec.complete(
        rootfs.path(),
        &image_volumes(&request.id),
        &account,
        hostname,
    )?;

    let bundle = bundle(&request.id);
    resources::check(&spec.linux.resources)?;
    let seccomp = request
        .seccomp
        .as_ref()
        .map(|filter| StoredFilter::store(filter, bundle.join("seccomp.bpf")))
        .transpose()?;
    serde_json::to_vec(&spec)
        .map_err(io::Error::from)
        .and_then(|content| fs::write(bundle.join(SPEC), content))
        .map_err(kernel("writing the bundle"))?;
    Ok(Container {
        id: request.id.clone(),
        fingerprint,
        user: account.ids,
        ids,
        manages_cgroup,
        bundle,
        pod_pids,
        pid_target,
        process: spec.process,
        seccomp,
        devices,
        turn: tokio::sync::Mutex::default(),
        state: State::Created.into(),
        execs: Execs::default().into(),
    })
}

/// Refuses users and groups that the pod's user namespace does not have.
fn check_ids(user: &ResolvedUser, ids: IdMap) -> Result<(), ContainerError> {
    let ResolvedUser {
        uid,
        gid,
        supplemental_groups,
    } = user;
    let mut all = [uid, gid].into_iter().chain(supplemental_groups);
    match all.find(|id| ids.outside(**id).is_none()) {
        Some(id) => Err(ContainerError::Invalid(format!(
            "the pod's user namespace has no id {id}"
        ))),
        None => Ok(()),
    }
}

/// Blocks.
fn disassemble(assembly: &mut Assembly, container: &Container) -> io::Result<Vec<Segment>> {
    clean_up(&container.id)?;
    Ok(assembly.disk.release(&container.id))
}

/// Takes away what the container has in the file system. What is not there is not an error.
fn clean_up(id: &str) -> io::Result<()> {
    // The host has taken the container's volumes away. To see so is to forget what was known of files in them, which
    // the host keeps open until then. There may be none.
    let _ = fs::symlink_metadata(files::volumes().join(id));
    image_volume::remove_all(&image_volumes(id))?;
    let bundle = bundle(id);
    Rootfs::new(bundle.join("rootfs"), files::scratch().join(id), 0).remove()?;
    match fs::remove_dir_all(bundle) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_repeated_layer_counts_where_it_is_highest() {
        let range = |start: u64| {
            Range::try_from(Segment {
                start: start * 4096,
                length: 4096,
            })
            .unwrap()
        };
        let layers: Vec<Range> = [1, 2, 1, 3, 2].into_iter().map(range).collect();
        let expected: Vec<Range> = [1, 3, 2].into_iter().map(range).collect();
        assert_eq!(without_covered(layers), expected);
    }
}
