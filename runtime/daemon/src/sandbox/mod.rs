//! RunPodSandbox, StopPodSandbox, RemovePodSandbox: the life of a pod's VM and of everything the
//! host keeps for it. Here is its beginning; its end is in `end`, what may be asked for in `request`.

mod end;
mod request;

use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use opentelemetry::trace::FutureExt;
use podvisor_network::{Attachment, Bandwidth, INTERFACE, PodIdentity, TAP, netns, tap};
use podvisor_node::cgroup::PodCgroup;
use podvisor_node::{handlers, inventory};
use podvisor_proto::{cri, monitor};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tonic::Code;
use tracing::{Instrument, info, warn};

use crate::confinement::{self, Confinement};
use crate::daemon::{Daemon, now_ns, within};
use crate::error::{Error, Result};
use crate::ids::{self, Reservation};
use crate::monitor::{LaunchFds, Monitor};
use crate::pod::Pod;
use crate::store::{Phase, SandboxRecord};
use crate::{guest_config, host, trace, user_namespace, vm_size};
use request::{for_a_vm, for_the_host, port_mappings, validate};

/// On top of the boot's own deadline, for what comes after the agent's call.
const CONFIGURE_MARGIN: Duration = Duration::from_secs(10);

impl Daemon {
    /// Creates and starts a sandbox. When the caller goes away first, all of it is undone.
    ///
    /// # Errors
    /// INVALID_ARGUMENT, ALREADY_EXISTS, FAILED_PRECONDITION (no network, host namespaces), what the
    /// boot of the VM ended with.
    pub async fn run_pod_sandbox(
        self: &Arc<Self>,
        config: cri::PodSandboxConfig,
        runtime_handler: String,
    ) -> Result<String> {
        validate(&config)?;
        let decision = handlers::decide(&self.config, &config, &runtime_handler)?;
        let in_vm = handlers::is_vm(&decision.handler);
        if in_vm {
            for_a_vm(&config)?;
        } else {
            for_the_host(&config)?;
        }
        if in_vm || !host::shares_network(&config) {
            self.cni.status().await?;
        }
        let id = ids::new_id()?;
        let metadata = config.metadata.clone().unwrap_or_default();
        let name = self
            .sandbox_names
            .reserve("sandbox", ids::sandbox_name(&metadata), &id)?;
        let record = SandboxRecord {
            id: id.clone(),
            config: Some(config),
            runtime_handler,
            routed: decision
                .routed
                .map(|r| r.name().to_owned())
                .unwrap_or_default(),
            handler: decision.handler,
            created_ns: now_ns() as i64,
            phase: Phase::Creating as i32,
            ..Default::default()
        };
        if let Some(because) = decision.routed {
            self.metrics.routed(because);
            info!(
                sandbox = id,
                handler = record.handler,
                because = because.name(),
                "routed: a VM cannot give the pod what it asks for"
            );
        }
        // A task of its own: dropping this future, as tonic does when the client goes away, cancels
        // the creation in an orderly way instead of abandoning it half done.
        let cancel = CancellationToken::new();
        let guard = cancel.clone().drop_guard();
        let daemon = Arc::clone(self);
        let task = tokio::spawn(
            async move { Box::pin(daemon.create_or_undo(record, name, cancel)).await }
                .with_current_context()
                .in_current_span(),
        );
        let result = task.await.map_err(|_| Error::Cancelled)?;
        guard.disarm();
        result.map(|()| id)
    }

    async fn create_or_undo(
        self: &Arc<Self>,
        mut record: SandboxRecord,
        name: Reservation,
        cancel: CancellationToken,
    ) -> Result<()> {
        self.store.put_sandbox(record.clone()).await?;
        let created = self.create(&mut record, &cancel).await;
        let created = match created {
            Ok(_) if cancel.is_cancelled() => Err(Error::Cancelled),
            other => other,
        };
        match created {
            Ok((monitor, snapshot)) => {
                record.phase = Phase::Ready as i32;
                self.metrics
                    .started(record.timeline.iter().chain(&snapshot.timeline));
                trace::phases("boot", record.created_ns as u64, &snapshot.timeline);
                self.store.put_sandbox(record.clone()).await?;
                let pod = Arc::new(Pod::new(record, name, snapshot, Some(Arc::new(monitor))));
                self.pods.insert(&pod);
                self.watch(&pod);
                Ok(())
            }
            Err(error) => {
                info!(sandbox = record.id, %error, "sandbox could not be created, undoing");
                if let Err(undo) = self.release(&record).await {
                    warn!(sandbox = record.id, error = %undo, "undo is not complete, the reconcile goes on");
                    return Err(error);
                }
                self.store.remove_sandbox(record.id, Vec::new()).await?;
                Err(error)
            }
        }
    }

    /// A VM boots while CNI works: the guest needs its addresses only when its agent is up.
    async fn create(
        self: &Arc<Self>,
        record: &mut SandboxRecord,
        cancel: &CancellationToken,
    ) -> Result<(Monitor, monitor::Snapshot)> {
        let id = record.id.clone();
        let config = record.config.clone().unwrap_or_default();
        let mut timeline = Timeline::new(record.created_ns as u64);
        let runtime = handlers::runtime(&self.config, &record.handler)?;
        let in_vm = runtime.is_none();
        let prepare = async {
            match runtime {
                None => self.prepare_vm(&id, &config).await,
                Some(runtime) => self.prepare_host(&id, &config, &runtime).await,
            }
        };
        let Prepared {
            cgroup,
            fds,
            confinement,
            mut launch,
            huge_pages,
        } = timeline.phase("host resources", prepare).await?;
        launch.sandbox_id.clone_from(&id);
        launch.requested_ns = record.created_ns as u64;
        launch.log_filter.clone_from(&self.config.log);
        let monitor = timeline
            .phase(
                "monitor spawn",
                Monitor::launch(
                    &self.config.monitor_path().map_err(Error::io("monitor"))?,
                    &self.sandbox_dir(&id),
                    &cgroup,
                    &confinement,
                    launch,
                    fds,
                ),
            )
            .await?;
        record.monitor_pid = monitor.pid();
        record.monitor_start = monitor.start();
        self.store.put_sandbox(record.clone()).await?;

        let attached = timeline
            .phase("CNI", async {
                if !in_vm && host::shares_network(&config) {
                    return Ok(None);
                }
                let network = self.cni.add(&self.attachment(&id, &config)?).await?;
                if in_vm {
                    podvisor_network::tc::mirror(&self.netns_path(&id), INTERFACE, TAP).await?;
                }
                Ok::<_, Error>(Some(network))
            })
            .await;
        let network = match attached {
            Ok(network) => network,
            Err(error) => {
                // A VM that failed at once took its tap along: then that is the reason.
                let error = self.why(&id, &monitor, error).await;
                monitor.kill();
                return Err(error);
            }
        };
        let request = match &network {
            Some(network) => monitor::ConfigureRequest {
                sandbox: Some(guest_config::sandbox(
                    &id,
                    &config,
                    &network.ips,
                    huge_pages,
                    user_namespace::of_pod(&config)?,
                )),
                network: Some(guest_config::network(network)),
            },
            None => monitor::ConfigureRequest {
                sandbox: Some(guest_config::host_network_sandbox(&config)),
                network: None,
            },
        };
        let ips = network.map(|network| network.ips).unwrap_or_default();
        record.ips = ips.iter().map(ToString::to_string).collect();
        let mut client = monitor.client();
        let configured = timeline
            .phase("wait for the guest", async {
                let limit = self.config.boot_timeout() + CONFIGURE_MARGIN;
                tokio::select! {
                    answer = within(limit, "Configure", client.configure(request)) => answer,
                    () = cancel.cancelled() => Err(Error::Cancelled),
                    () = monitor.died() => Err(Error::MonitorUnreachable(
                        self.monitor_log_tail(&id),
                    )),
                }
            })
            .await;
        record.timeline = timeline.entries;
        match configured {
            Ok(answer) => Ok((monitor, answer.snapshot.unwrap_or_default())),
            Err(error) => {
                // No word of the monitor's, but the end of its connection.
                let broken = matches!(
                    &error,
                    Error::Monitor(status)
                        if matches!(status.code(), Code::Unknown | Code::Unavailable)
                );
                let error = if broken {
                    self.why(&id, &monitor, error).await
                } else {
                    error
                };
                monitor.kill();
                Err(error)
            }
        }
    }

    /// The reason behind `error`: the VM's end or the monitor's own, if it was that.
    async fn why(&self, id: &str, monitor: &Monitor, error: Error) -> Error {
        /// Its sockets are closed a moment before a process has ended.
        const DEATH: Duration = Duration::from_secs(1);
        match monitor.first_state().await {
            Some(snapshot) => vm_failure(&snapshot).unwrap_or(error),
            None if timeout(DEATH, monitor.died()).await.is_ok() => {
                Error::MonitorUnreachable(self.monitor_log_tail(id))
            }
            None => error,
        }
    }

    /// What a VM's monitor needs to start: folder, cgroup, namespace, tap, disk.
    async fn prepare_vm(&self, id: &str, config: &cri::PodSandboxConfig) -> Result<Prepared> {
        let size = vm_size::of(config, &self.config.vm)?;
        let dir = self.sandbox_dir(id);
        let netns_path = self.netns_path(id);
        let scratch_path = self.scratch_path(id);
        let scratch_bytes = self.config.vm.scratch_mib << 20;
        let parent = self.cgroup_parent(config);
        let leaf = inventory::cgroup_leaf(&self.config.run_dir, id);
        let kernel = self.config.kernel_path();
        let initramfs = self.config.initramfs_path();
        let network = async {
            netns::create(&netns_path).await?;
            Ok::<OwnedFd, Error>(tap::open(&netns_path, TAP).await?)
        };
        let files = tokio::task::spawn_blocking(move || -> Result<_> {
            std::fs::create_dir(&dir).map_err(Error::io(dir.display().to_string()))?;
            let open = |path: &Path| {
                std::fs::File::open(path)
                    .map(OwnedFd::from)
                    .map_err(Error::io(format!("guest image {}", path.display())))
            };
            let cgroup = PodCgroup::create(&parent, &leaf)?;
            let scratch = podvisor_image::scratch::create(&scratch_path, scratch_bytes)
                .map_err(Error::io("the pod's writable disk"))?;
            Ok((open(&kernel)?, open(&initramfs)?, cgroup, scratch))
        });
        // Both are awaited whatever happens: nothing may be made after an undo has begun.
        let (network, files) = tokio::join!(network, files);
        let tap = network?;
        let (kernel, initramfs, cgroup, scratch) = files.map_err(|_| Error::Cancelled)??;
        Ok(Prepared {
            cgroup,
            fds: Some(LaunchFds {
                kernel,
                initramfs,
                tap,
                scratch: scratch.into(),
            }),
            confinement: confinement::of_vm(config)?,
            launch: monitor::Launch {
                vm: Some(monitor::VmSpec {
                    vcpus: size.vcpus,
                    memory_bytes: size.memory_bytes,
                    max_memory_bytes: vm_size::max_memory(
                        &self.config.vm,
                        self.vmm.backend,
                        size.memory_bytes,
                        vm_size::node_memory(),
                    ),
                    cmdline: self.config.vm.kernel_args.clone(),
                    mac: START_MAC.into(),
                    backend: self.vmm.backend.into(),
                    qemu: self.config.qemu.binary.display().to_string(),
                    accel: self.vmm.accel.into(),
                    ..Default::default()
                }),
                scratch_bytes,
                boot_timeout_ms: self.config.boot_timeout().as_millis() as u64,
                ..Default::default()
            },
            huge_pages: size.huge_pages,
        })
    }

    /// What the monitor of a pod of the host's own needs to start: folder, cgroup, namespace, /dev/shm.
    async fn prepare_host(
        &self,
        id: &str,
        config: &cri::PodSandboxConfig,
        runtime: &Path,
    ) -> Result<Prepared> {
        let host_pod = self.host_pod(id, config)?;
        let (dir, writable) = (self.sandbox_dir(id), self.writable_dir(id));
        let host = monitor::HostSpec {
            runtime: runtime.display().to_string(),
            dir: dir.display().to_string(),
            own_uts: host_pod.own_uts,
            own_ipc: host_pod.own_ipc,
            writable_dir: writable.display().to_string(),
        };
        let parent = self.cgroup_parent(config);
        let leaf = inventory::cgroup_leaf(&self.config.run_dir, id);
        let netns_path = host_pod.netns.clone();
        let network = async {
            match netns_path {
                Some(path) => Ok(netns::create(&path).await?),
                None => Ok::<_, Error>(()),
            }
        };
        let files = tokio::task::spawn_blocking(move || -> Result<_> {
            std::fs::create_dir(&dir).map_err(Error::io(dir.display().to_string()))?;
            host::prepare(&host_pod, &dir, &writable).map_err(Error::io("the pod's folders"))?;
            // A group of its own: the containers' are beside it, and on cgroup v2 a group has processes or groups.
            Ok(PodCgroup::create(&parent, &leaf)?.child("monitor")?)
        });
        let (network, cgroup) = tokio::join!(network, files);
        network?;
        Ok(Prepared {
            cgroup: cgroup.map_err(|_| Error::Cancelled)??,
            fds: None,
            confinement: Confinement::default(),
            launch: monitor::Launch {
                host: Some(host),
                ..Default::default()
            },
            huge_pages: 0,
        })
    }

    pub(crate) fn cgroup_parent(&self, config: &cri::PodSandboxConfig) -> String {
        config
            .linux
            .as_ref()
            .map(|linux| linux.cgroup_parent.as_str())
            .filter(|parent| !parent.is_empty())
            .unwrap_or(&self.config.cgroup.parent)
            .to_owned()
    }

    /// The pod's group on the node, whether it exists or not.
    ///
    /// # Errors
    /// There are no control groups.
    pub fn pod_cgroup(&self, record: &SandboxRecord) -> Result<PodCgroup> {
        let parent = self.cgroup_parent(&record.config.clone().unwrap_or_default());
        let leaf = inventory::cgroup_leaf(&self.config.run_dir, &record.id);
        Ok(PodCgroup::at(&parent, &leaf)?)
    }

    fn attachment(&self, id: &str, config: &cri::PodSandboxConfig) -> Result<Attachment> {
        let metadata = config.metadata.clone().unwrap_or_default();
        let annotation = |name: &str| config.annotations.get(name).map(String::as_str);
        Ok(Attachment {
            sandbox_id: id.to_owned(),
            netns: self.netns_path(id),
            pod: PodIdentity {
                name: metadata.name,
                namespace: metadata.namespace,
                uid: metadata.uid,
            },
            port_mappings: port_mappings(config)?,
            bandwidth: Bandwidth::from_annotations(annotation).map_err(|problem| {
                Error::Invalid {
                    field: "config.annotations",
                    problem,
                }
            })?,
            annotations: config.annotations.clone().into_iter().collect(),
            ..Default::default()
        })
    }

    fn monitor_log_tail(&self, id: &str) -> String {
        let text = std::fs::read_to_string(self.sandbox_dir(id).join("monitor.log"));
        match text.unwrap_or_default().trim_end().rsplit('\n').next() {
            Some(line) if !line.is_empty() => format!("it ended, its last words: {line}"),
            _ => "it ended".into(),
        }
    }
}

/// Why the VM is gone, if it is.
fn vm_failure(snapshot: &monitor::Snapshot) -> Option<Error> {
    (snapshot.state() == monitor::SandboxState::Stopped).then(|| {
        Error::Precondition(format!(
            "the VM did not boot ({}): {}",
            snapshot.reason, snapshot.message
        ))
    })
}

/// Address the guest's interface has until CNI's is set: locally administered, never on a wire.
const START_MAC: &str = "02:00:00:00:00:01";

struct Prepared {
    /// For the monitor.
    cgroup: PodCgroup,
    /// A VM's.
    fds: Option<LaunchFds>,
    confinement: Confinement,
    launch: monitor::Launch,
    huge_pages: u64,
}

/// Measures phases of RunPodSandbox.
struct Timeline {
    zero_ns: u64,
    entries: Vec<monitor::TimelineEntry>,
}

impl Timeline {
    fn new(zero_ns: u64) -> Self {
        Self {
            zero_ns,
            entries: Vec::new(),
        }
    }

    async fn phase<T>(
        &mut self,
        name: &'static str,
        work: impl Future<Output = Result<T>>,
    ) -> Result<T> {
        let start_ns = now_ns().saturating_sub(self.zero_ns);
        let result = trace::span(name, work).await;
        self.entries.push(monitor::TimelineEntry {
            phase: name.into(),
            start_ns,
            end_ns: now_ns().saturating_sub(self.zero_ns),
        });
        result
    }
}
