//! Pods one after the other, and many at a time.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::Context as _;
use futures_util::{StreamExt, TryStreamExt, stream};
use podvisor_proto::cri;

use super::stats::{Samples, Unit};
use super::throughput;
use crate::client::{self, Daemon};
use crate::memory;
use crate::pod::{self, Pod};
use crate::timeline;

/// Group of the pods that come one after the other.
pub const SERIAL: &str = "one by one";
/// Group of the other podvisord's pods, which take turns with those.
pub const AGAINST: &str = "one by one, the other";
/// What each pod takes of the host's MemAvailable, all in.
pub const HOST_MEMORY: &str = "taken of the host's MemAvailable";
/// The metric of the VM's boot.
pub const BOOT: &str = "VMM's start to agent ready";
/// What the server of a pod's volumes takes.
pub const VOLUMES: &str = "podvisor-fs: PSS";
/// Group of what processes take.
pub const MEMORY: &str = "memory";

/// ExecSync calls per pod.
const EXECS: usize = 5;
/// Seconds for each.
const EXEC_TIMEOUT_S: i64 = 60;
/// Seconds that the container may take to end; it does so at once.
const STOP_GRACE_S: i64 = 10;
/// A process that ends at SIGTERM, which PID 1 does only with a handler.
const COMMAND: [&str; 3] = [
    "sh",
    "-c",
    "trap 'exit 0' TERM; while :; do sleep 3600 & wait; done",
];
const MIB: f64 = 1024.0 * 1024.0;

/// Makes the pods that are measured.
#[derive(Debug)]
pub struct Bench {
    /// podvisord.
    pub daemon: Daemon,
    /// Its socket, to ask the kernel who listens.
    pub socket: PathBuf,
    /// Its run directory.
    pub run_dir: PathBuf,
    /// Of all pods, so that they can be removed together.
    pub label: String,
    /// Id of an image with a shell.
    pub image: String,
}

/// A pod with one running container.
pub struct Running {
    pod: Pod,
    container: String,
}

impl Running {
    /// What a command that must succeed writes.
    pub async fn exec(&self, command: &[&str]) -> anyhow::Result<Vec<u8>> {
        let response = self
            .pod
            .exec(&self.container, command, EXEC_TIMEOUT_S)
            .await?;
        let code = response.exit_code;
        anyhow::ensure!(code == 0, "{command:?} ended with {code} in the container");
        Ok(response.stdout)
    }

    /// The pod's first address.
    pub async fn ip(&self) -> anyhow::Result<IpAddr> {
        let ip = self.pod.ip().await?;
        ip.parse()
            .with_context(|| format!("the pod's address {ip:?}"))
    }
}

impl Bench {
    /// A pod that is not counted. Returns what its VM runs on.
    pub async fn warm_up(&self) -> anyhow::Result<String> {
        let (running, _) = self.start(SERIAL).await?;
        let backend = running.pod.vm_stats().await?.backend;
        remove(SERIAL, running).await?;
        Ok(backend)
    }

    /// A pod from its start to its removal, perhaps with what it moves meanwhile.
    pub async fn one(&self, group: &str, with_throughput: bool) -> anyhow::Result<Samples> {
        let (running, mut all) = self.start(group).await?;
        for exit in running.pod.vm_stats().await?.exits {
            let name = format!("{group}/VM exits until it runs: {}", exit.name);
            all.add(name, Unit::Count, exit.count as f64);
        }
        for _ in 0..EXECS {
            let begin = Instant::now();
            running.exec(&["true"]).await?;
            time(&mut all, group, "ExecSync true", begin);
        }
        if with_throughput {
            all.append(throughput::measure(&running, group).await?);
        }
        all.append(remove(group, running).await?);
        Ok(all)
    }

    /// `count` pods, `at_once` at a time; their memory when all of them run, and with `containers` in each; and
    /// their removal.
    pub async fn parallel(
        &self,
        count: usize,
        at_once: usize,
        containers: usize,
    ) -> anyhow::Result<Samples> {
        let group = &format!("{at_once} at a time");
        let mut all = Samples::default();
        let available_before = available_on_host()?;

        let begin = Instant::now();
        let started: Vec<(Running, Samples)> = stream::iter(0..count)
            .map(|_| self.start(group))
            .buffer_unordered(at_once)
            .try_collect()
            .await?;
        let wall = milliseconds(begin) / count as f64;
        let mut pods = Vec::with_capacity(count);
        for (running, samples) in started {
            pods.push(running);
            all.append(samples);
        }
        all.add(format!("{group}/a pod every"), Unit::Milliseconds, wall);

        let mut memory = Samples::default();
        let taken = available_before.saturating_sub(available_on_host()?) as f64;
        let per_pod = taken / count as f64 / MIB;
        memory.add(format!("{MEMORY}/{HOST_MEMORY}"), Unit::Mebibytes, per_pod);
        for running in &pods {
            memory.append(memory_of_pod(running).await?);
        }
        if containers > 1 {
            for running in &mut pods {
                for number in 1..containers {
                    self.add_container(running, number).await?;
                }
                let own = memory_of_own_processes(running).await?;
                let name = format!("{MEMORY}/podvisor's own with {containers} containers: PSS");
                memory.add(name, Unit::Mebibytes, own as f64 / MIB);
            }
        }
        for running in &mut pods {
            self.add_volume(running).await?;
        }
        for running in &pods {
            let server = memory::volume_server(&running.pod.folder())?.context("no podvisor-fs")?;
            let pss = server.usage.pss as f64 / MIB;
            memory.add(format!("{MEMORY}/{VOLUMES}"), Unit::Mebibytes, pss);
        }
        memory.append(memory_of_podvisord(&self.socket).await?);

        let begin = Instant::now();
        let removed: Vec<Samples> = stream::iter(pods)
            .map(|running| remove(group, running))
            .buffer_unordered(at_once)
            .try_collect()
            .await?;
        let wall = milliseconds(begin) / count as f64;
        for samples in removed {
            all.append(samples);
        }
        all.add(format!("{group}/a removal every"), Unit::Milliseconds, wall);
        all.append(memory);
        Ok(all)
    }

    /// A pod and its container, with the times of each call and of the phases within.
    async fn start(&self, group: &str) -> anyhow::Result<(Running, Samples)> {
        let mut samples = Samples::default();
        let mut pod = Pod::new(
            self.daemon.clone(),
            self.run_dir.clone(),
            self.label.clone(),
        );
        let sandbox = sandbox_config()?;

        let begin = Instant::now();
        pod.run(sandbox.clone(), "").await?;
        time(&mut samples, group, "RunPodSandbox", begin);
        let phases = timeline::from_info(&pod.info().await?);
        if let Some(boot) = timeline::boot_ms(&phases) {
            samples.add(format!("{group}/{BOOT}"), Unit::Milliseconds, boot);
        }
        for phase in phases {
            samples.add(
                format!("{group}/RunPodSandbox: {}", phase.name),
                Unit::Milliseconds,
                phase.duration_ms(),
            );
        }

        let begin = Instant::now();
        let create = pod.create(container_config(&self.image), sandbox);
        let container = Box::pin(create).await?;
        time(&mut samples, group, "CreateContainer", begin);
        let begin_start = Instant::now();
        if let Some(exit) = pod.start(&container).await? {
            anyhow::bail!("the container does not start: {}", exit.message);
        }
        time(&mut samples, group, "StartContainer", begin_start);
        time(&mut samples, group, "Create + Start", begin);
        Ok((Running { pod, container }, samples))
    }

    /// One container more in a pod that runs, which has a volume and has looked at it.
    async fn add_volume(&self, running: &mut Running) -> anyhow::Result<()> {
        let mut config = container_config(&self.image);
        config.mounts = vec![cri::Mount {
            // A directory that every host has, and that none changes.
            host_path: "/usr".to_owned(),
            container_path: "/volume".to_owned(),
            readonly: true,
            ..Default::default()
        }];
        let container = self.add(running, config, "volume").await?;
        let listing = ["ls", "-l", "/volume"];
        let listed = running.pod.exec(&container, &listing, EXEC_TIMEOUT_S);
        anyhow::ensure!(listed.await?.exit_code == 0, "the volume is not there");
        Ok(())
    }

    /// One container more in a pod that runs.
    async fn add_container(&self, running: &mut Running, number: usize) -> anyhow::Result<()> {
        let config = container_config(&self.image);
        self.add(running, config, &number.to_string()).await?;
        Ok(())
    }

    /// Adds such a container, with `name` in its name. Returns its id.
    async fn add(
        &self,
        running: &mut Running,
        mut config: cri::ContainerConfig,
        name: &str,
    ) -> anyhow::Result<String> {
        if let Some(metadata) = &mut config.metadata {
            metadata.name = format!("{}-{name}", metadata.name);
        }
        let container = Box::pin(running.pod.create(config, sandbox_config()?)).await?;
        let exit = running.pod.start(&container).await?;
        anyhow::ensure!(exit.is_none(), "the container does not start");
        Ok(container)
    }
}

async fn remove(group: &str, running: Running) -> anyhow::Result<Samples> {
    let mut samples = Samples::default();
    let Running { mut pod, container } = running;
    let begin = Instant::now();
    pod.stop(&container, STOP_GRACE_S).await?;
    time(&mut samples, group, "StopContainer", begin);
    let begin = Instant::now();
    pod.stop_sandbox().await?;
    time(&mut samples, group, "StopPodSandbox", begin);
    let begin = Instant::now();
    pod.remove_sandbox().await?;
    time(&mut samples, group, "RemovePodSandbox", begin);
    Ok(samples)
}

/// Memory of each host process of a pod, of all of podvisor's own together, and of the guest.
async fn memory_of_pod(running: &Running) -> anyhow::Result<Samples> {
    let snapshot = running.pod.snapshot().await?;
    let stats = running.pod.vm_stats().await?;
    let processes = memory::of_pod(snapshot.monitor_pid, &stats.guest_memory)?;
    let meminfo = running.exec(&["cat", "/proc/meminfo"]).await?;

    let mut samples = Samples::default();
    let mut add = |name: &str, bytes: u64| {
        samples.add(
            format!("{MEMORY}/{name}"),
            Unit::Mebibytes,
            bytes as f64 / MIB,
        );
    };
    let (mut pss, mut private) = (0, 0);
    for process in &processes {
        add(&format!("{}: PSS", process.name), process.usage.pss);
        add(&format!("{}: private", process.name), process.usage.private);
        if process.pid != snapshot.vmm_pid {
            pss += process.usage.pss;
            private += process.usage.private;
        }
    }
    add("podvisor's own: PSS", pss);
    add("podvisor's own: private", private);
    // Each process has its share of the pages that are there.
    let guest_ram = processes.iter().map(|process| process.usage.guest_ram_pss);
    add("guest RAM on the host", guest_ram.sum());
    let available = memory::available(&String::from_utf8_lossy(&meminfo));
    if let Some(available) = available {
        // Of the VM's size: what the kernel took before it began to count is used, too.
        let used = stats.memory_bytes.saturating_sub(available);
        add("guest: used at idle", used);
    }
    Ok(samples)
}

/// PSS of podvisor's own processes of a pod, guest RAM and QEMU apart.
async fn memory_of_own_processes(running: &Running) -> anyhow::Result<u64> {
    let snapshot = running.pod.snapshot().await?;
    let stats = running.pod.vm_stats().await?;
    let processes = memory::of_pod(snapshot.monitor_pid, &stats.guest_memory)?;
    let own = processes.iter().filter(|p| p.pid != snapshot.vmm_pid);
    Ok(own.map(|process| process.usage.pss).sum())
}

fn available_on_host() -> anyhow::Result<u64> {
    let meminfo = std::fs::read_to_string("/proc/meminfo")?;
    memory::available(&meminfo).context("no MemAvailable in /proc/meminfo")
}

/// The daemon's own memory, which does not grow with each pod as the monitors' does.
async fn memory_of_podvisord(socket: &Path) -> anyhow::Result<Samples> {
    let usage = memory::process(client::listener_pid(socket).await?, &[])?.usage;
    let mut samples = Samples::default();
    for (name, bytes) in [("PSS", usage.pss), ("private", usage.private)] {
        let name = format!("{MEMORY}/podvisord, the one: {name}");
        samples.add(name, Unit::Mebibytes, bytes as f64 / MIB);
    }
    Ok(samples)
}

fn sandbox_config() -> std::io::Result<cri::PodSandboxConfig> {
    let uid = pod::uid()?;
    Ok(cri::PodSandboxConfig {
        metadata: Some(cri::PodSandboxMetadata {
            name: format!("bench-{uid}"),
            uid,
            namespace: "default".to_owned(),
            attempt: 0,
        }),
        hostname: "bench".to_owned(),
        ..Default::default()
    })
}

fn container_config(image: &str) -> cri::ContainerConfig {
    cri::ContainerConfig {
        metadata: Some(cri::ContainerMetadata {
            name: "bench".to_owned(),
            attempt: 0,
        }),
        image: Some(cri::ImageSpec {
            image: image.to_owned(),
            ..Default::default()
        }),
        command: COMMAND.map(str::to_owned).into(),
        ..Default::default()
    }
}

fn time(samples: &mut Samples, group: &str, name: &str, begin: Instant) {
    samples.add(
        format!("{group}/{name}"),
        Unit::Milliseconds,
        milliseconds(begin),
    );
}

fn milliseconds(begin: Instant) -> f64 {
    begin.elapsed().as_secs_f64() * 1e3
}
