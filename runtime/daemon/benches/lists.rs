//! How long podvisord takes for lists with 1,000 containers in 250 pods, over its socket, while samples of them come in:
//! podvisord itself, in a process of its own, with a database that is filled for this and monitors that only tell a state and
//! samples.
//!
//! Needs root, as podvisord does. Prints the median and the slowest of [`ROUNDS`] rounds, the answer's size, and how many
//! samples came in meanwhile, for which no list waits: lists one right after the other cause as many as there ever are, two
//! a second of each pod.
//!
//! `-- --at SOCKET --image IMAGE`: the same of another runtime, which is given as many pods, in the node's network, and
//! containers that sleep, and has them removed again.

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, bind, socket};
use podvisor_daemon::server;
use podvisor_daemon::store::{ContainerRecord, Phase, SandboxRecord, Store};
use podvisor_monitor::fd_table::FdTable;
use podvisor_monitor::snapshots;
use podvisor_node::config::{Config, Vmm};
use podvisor_node::pidfd;
use podvisor_proto::agent::{self, SampleRequest, SampleResponse, Usage};
use podvisor_proto::cri::{self, runtime_service_client::RuntimeServiceClient};
use podvisor_proto::monitor::monitor_server::{Monitor, MonitorServer};
use podvisor_proto::monitor::{self, FollowRequest, FollowResponse, Snapshot};
use prost::Message;
use tokio::net::UnixListener;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::{Channel, Endpoint, Server};
use tonic::{Request, Response, Status};

const PODS: usize = 250;
const CONTAINERS: usize = 4;
const ROUNDS: usize = 200;
const MAX_MESSAGE: usize = 16 << 20;

#[tokio::main]
async fn main() {
    let args: Vec<String> = std::env::args().collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    match args[1..] {
        [SERVE, dir] => server::run(config(Path::new(dir))).await.unwrap(),
        [.., "--at", socket, "--image", image] => Box::pin(other(Path::new(socket), image)).await,
        _ => podvisor().await,
    }
}

/// The argument of the process that is podvisord.
const SERVE: &str = "--serve";

fn config(dir: &Path) -> Config {
    Config {
        run_dir: dir.join("run"),
        data_dir: dir.join("data"),
        vmm: Vmm::Qemu,
        ..Config::default()
    }
}

/// A podvisord whose state is filled for this.
async fn podvisor() {
    let dir = tempfile::tempdir().unwrap();
    let config = config(dir.path());
    std::fs::create_dir_all(&config.data_dir).unwrap();
    let samples = Arc::new(AtomicU64::new(0));
    fill(&config, &samples).await;
    let program = std::env::current_exe().unwrap();
    let _podvisord = tokio::process::Command::new(program)
        .arg(SERVE)
        .arg(dir.path())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let mut client = connect(&config.socket_path()).await;

    // Each list shows what was asked for, and samples are there.
    loop {
        let stats = client.list_container_stats(cri::ListContainerStatsRequest::default());
        let stats = stats.await.unwrap().into_inner().stats;
        assert_eq!(stats.len(), PODS * CONTAINERS);
        let has_sample = |stats: &cri::ContainerStats| {
            let rate = stats.cpu.as_ref().and_then(|cpu| cpu.usage_nano_cores);
            rate.is_some()
        };
        if stats.iter().all(has_sample) {
            break;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    measure(&client, &samples).await;
}

/// Another runtime's.
async fn other(socket: &Path, image: &str) {
    let mut client = connect(socket).await;
    for number in 0..PODS {
        let mut config = pod_config(number);
        config.log_directory = String::new();
        config.linux = Some(in_the_nodes_network());
        let request = cri::RunPodSandboxRequest {
            config: Some(config.clone()),
            ..cri::RunPodSandboxRequest::default()
        };
        let pod = client.run_pod_sandbox(request).await.unwrap();
        for container in 1..=CONTAINERS {
            let request = cri::CreateContainerRequest {
                pod_sandbox_id: pod.get_ref().pod_sandbox_id.clone(),
                config: Some(cri::ContainerConfig {
                    image: Some(cri::ImageSpec {
                        image: image.to_owned(),
                        ..cri::ImageSpec::default()
                    }),
                    command: vec!["sleep".to_owned(), "100000".to_owned()],
                    mounts: Vec::new(),
                    ..container_config(number, container)
                }),
                sandbox_config: Some(config.clone()),
            };
            let created = client.create_container(request).await.unwrap();
            let request = cri::StartContainerRequest {
                container_id: created.into_inner().container_id,
            };
            client.start_container(request).await.unwrap();
        }
    }
    measure(&client, &AtomicU64::new(0)).await;
    let all = cri::ListPodSandboxRequest::default();
    for pod in client
        .list_pod_sandbox(all)
        .await
        .unwrap()
        .into_inner()
        .items
    {
        let request = cri::StopPodSandboxRequest {
            pod_sandbox_id: pod.id.clone(),
        };
        client.stop_pod_sandbox(request).await.unwrap();
        let request = cri::RemovePodSandboxRequest {
            pod_sandbox_id: pod.id,
        };
        client.remove_pod_sandbox(request).await.unwrap();
    }
}

fn in_the_nodes_network() -> cri::LinuxPodSandboxConfig {
    let options = cri::NamespaceOption {
        network: cri::NamespaceMode::Node as i32,
        ..cri::NamespaceOption::default()
    };
    cri::LinuxPodSandboxConfig {
        security_context: Some(cri::LinuxSandboxSecurityContext {
            namespace_options: Some(options),
            ..cri::LinuxSandboxSecurityContext::default()
        }),
        ..cri::LinuxPodSandboxConfig::default()
    }
}

async fn measure(client: &RuntimeServiceClient<Channel>, samples: &AtomicU64) {
    println!("{PODS} pods, {} containers", PODS * CONTAINERS);
    println!(
        "{:24} {:>10} {:>10} {:>10} {:>10}",
        "", "median ms", "slowest ms", "KiB", "samples"
    );
    macro_rules! measure {
        ($name:literal, $call:ident, $request:ty) => {
            let call = async |mut client: RuntimeServiceClient<Channel>| {
                let answer = client.$call(<$request>::default()).await?;
                Ok(answer.into_inner().encoded_len())
            };
            print($name, client, samples, call).await;
        };
    }
    measure!(
        "ListPodSandbox",
        list_pod_sandbox,
        cri::ListPodSandboxRequest
    );
    measure!(
        "ListContainers",
        list_containers,
        cri::ListContainersRequest
    );
    measure!(
        "ListContainerStats",
        list_container_stats,
        cri::ListContainerStatsRequest
    );
    measure!(
        "ListPodSandboxStats",
        list_pod_sandbox_stats,
        cri::ListPodSandboxStatsRequest
    );
    measure!(
        "ListPodSandboxMetrics",
        list_pod_sandbox_metrics,
        cri::ListPodSandboxMetricsRequest
    );
}

async fn print(
    name: &str,
    client: &RuntimeServiceClient<Channel>,
    samples: &AtomicU64,
    call: impl AsyncFn(RuntimeServiceClient<Channel>) -> Result<usize, Status>,
) {
    let before = samples.load(Ordering::Relaxed);
    let mut times = Vec::new();
    let mut bytes = 0;
    for _ in 0..ROUNDS {
        let begin = Instant::now();
        bytes = match call(client.clone()).await {
            Ok(bytes) => bytes,
            Err(status) => return println!("{name:24} {:?}", status.code()),
        };
        times.push(begin.elapsed());
    }
    times.sort_unstable();
    let milliseconds = |time: Duration| time.as_secs_f64() * 1e3;
    println!(
        "{name:24} {:>10.2} {:>10.2} {:>10} {:>10}",
        milliseconds(times[ROUNDS / 2]),
        milliseconds(times[ROUNDS - 1]),
        bytes >> 10,
        samples.load(Ordering::Relaxed) - before,
    );
}

async fn connect(socket: &Path) -> RuntimeServiceClient<Channel> {
    let endpoint = Endpoint::from_shared(format!("unix://{}", socket.display())).unwrap();
    loop {
        if let Ok(channel) = endpoint.connect().await {
            return RuntimeServiceClient::new(channel).max_decoding_message_size(MAX_MESSAGE);
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Records of pods and containers as kubelets make them, and a monitor for each pod.
async fn fill(config: &Config, samples: &Arc<AtomicU64>) {
    let store = Store::open(&config.data_dir.join("state.redb")).unwrap();
    let own = std::process::id();
    for number in 0..PODS {
        let pod = id(number, 0);
        let record = SandboxRecord {
            id: pod.clone(),
            config: Some(pod_config(number)),
            created_ns: number as i64 + 1,
            phase: Phase::Ready as i32,
            monitor_pid: own,
            monitor_start: pidfd::start_time(own).unwrap(),
            ..SandboxRecord::default()
        };
        store.put_sandbox(record).await.unwrap();
        for container in 1..=CONTAINERS {
            let record = ContainerRecord {
                id: id(number, container),
                sandbox_id: pod.clone(),
                config: Some(container_config(number, container)),
                image_id: format!("sha256:{}", id(0, 0)),
                created_ns: (number * CONTAINERS + container) as i64,
                ..ContainerRecord::default()
            };
            store.put_container(record).await.unwrap();
        }
        serve_monitor(config.run_dir.join("sandboxes").join(&pod), number, samples);
    }
}

fn serve_monitor(dir: PathBuf, number: usize, samples: &Arc<AtomicU64>) {
    std::fs::create_dir_all(&dir).unwrap();
    // A socket's address holds 108 bytes: the folder's own is longer.
    let folder = File::open(&dir).unwrap();
    let short = |name| format!("/proc/self/fd/{}/{name}", folder.as_raw_fd());
    let listener = UnixListener::bind(short("monitor.sock")).unwrap();
    let fds = FdTable::default();
    tokio::spawn(fds.clone().serve(seqpacket(&short("fd.sock"))));
    let service = MonitorServer::new(FakeMonitor {
        number,
        samples: Arc::clone(samples),
        fds,
        followers: Mutex::default(),
    });
    let server = Server::builder().add_service(service);
    tokio::spawn(server.serve_with_incoming(UnixListenerStream::new(listener)));
}

fn seqpacket(path: &str) -> OwnedFd {
    let (family, kind) = (AddressFamily::Unix, SockType::SeqPacket);
    let fd = socket(family, kind, SockFlag::SOCK_CLOEXEC, None).unwrap();
    bind(fd.as_raw_fd(), &UnixAddr::new(path).unwrap()).unwrap();
    fd
}

/// 64 hex digits.
fn id(pod: usize, container: usize) -> String {
    format!(
        "{:064x}",
        0xabcd_0000_0000_u64 + (pod * 16 + container) as u64
    )
}

fn pod_config(number: usize) -> cri::PodSandboxConfig {
    cri::PodSandboxConfig {
        metadata: Some(cri::PodSandboxMetadata {
            name: format!("deployment-5d78c9869d-{number}"),
            uid: format!("7f9c24e8-3b13-4f5e-b2d5-{number:012}"),
            namespace: "production".into(),
            attempt: 0,
        }),
        labels: map("label", 6),
        annotations: map("annotation", 4),
        log_directory: format!("/var/log/pods/production_{number}"),
        linux: Some(cri::LinuxPodSandboxConfig::default()),
        ..cri::PodSandboxConfig::default()
    }
}

fn container_config(pod: usize, number: usize) -> cri::ContainerConfig {
    let env = |number| cri::KeyValue {
        key: format!("SERVICE_{number}_PORT"),
        value: b"tcp://10.96.0.1:443".to_vec(),
    };
    let mount = |number| cri::Mount {
        container_path: format!("/etc/volume-{number}"),
        host_path: format!("/var/lib/kubelet/pods/{pod}/volumes/kubernetes.io~configmap/{number}"),
        ..cri::Mount::default()
    };
    cri::ContainerConfig {
        metadata: Some(cri::ContainerMetadata {
            name: format!("container-{number}"),
            attempt: 0,
        }),
        image: Some(cri::ImageSpec {
            image: "registry.example/library/application:1.2.3".into(),
            ..cri::ImageSpec::default()
        }),
        labels: map("label", 6),
        annotations: map("annotation", 8),
        envs: (0..20).map(env).collect(),
        mounts: (0..4).map(mount).collect(),
        ..cri::ContainerConfig::default()
    }
}

fn map(kind: &str, count: usize) -> std::collections::HashMap<String, String> {
    let entry = |number| {
        let key = format!("io.kubernetes.{kind}/{number}");
        (key, format!("the value of {kind} number {number}"))
    };
    (0..count).map(entry).collect()
}

/// Tells that all containers of its pod run, and that they use more from sample to sample.
struct FakeMonitor {
    number: usize,
    samples: Arc<AtomicU64>,
    fds: FdTable,
    followers: Mutex<Vec<File>>,
}

impl FakeMonitor {
    fn snapshot(&self) -> Snapshot {
        let container = |number| monitor::Container {
            id: id(self.number, number),
            state: monitor::ContainerState::Running as i32,
            created_ns: 1,
            started_ns: 2,
            ..monitor::Container::default()
        };
        Snapshot {
            sandbox_id: id(self.number, 0),
            state: monitor::SandboxState::Ready as i32,
            revision: 1,
            containers: (1..=CONTAINERS).map(container).collect(),
            ..Snapshot::default()
        }
    }
}

#[tonic::async_trait]
impl Monitor for FakeMonitor {
    async fn follow(
        &self,
        request: Request<FollowRequest>,
    ) -> Result<Response<FollowResponse>, Status> {
        let follower = self.fds.take(&request.into_inner().stream_fd_token);
        let mut follower = follower.ok_or_else(|| Status::failed_precondition("no stream"))?;
        follower.write_all(&snapshots::encode(&self.snapshot()))?;
        self.followers.lock().unwrap().push(follower);
        Ok(Response::new(FollowResponse {}))
    }

    async fn sample(
        &self,
        _request: Request<SampleRequest>,
    ) -> Result<Response<SampleResponse>, Status> {
        let count = self.samples.fetch_add(1, Ordering::Relaxed);
        let stall = agent::Stall {
            total_us: count,
            average_10: 123,
            average_60: 45,
            average_300: 6,
        };
        let pressure = agent::Pressure {
            some: Some(stall),
            full: Some(stall),
        };
        let usage = Usage {
            cpu_ns: count * 1_000_000,
            memory_bytes: 100 << 20,
            inactive_file_bytes: 10 << 20,
            anonymous_bytes: 50 << 20,
            page_faults: count,
            cpu_pressure: Some(pressure),
            memory_pressure: Some(pressure),
            io_pressure: Some(pressure),
            ..Usage::default()
        };
        let container = |number| agent::ContainerSample {
            id: id(self.number, number),
            usage: Some(usage.clone().into()),
            writable_layer: Some(agent::WritableLayer {
                used_bytes: 1 << 20,
                inodes: 100,
            }),
            ..agent::ContainerSample::default()
        };
        let interface = agent::InterfaceSample {
            name: "eth0".into(),
            ..agent::InterfaceSample::default()
        };
        Ok(Response::new(SampleResponse {
            total: Some(usage.clone()),
            containers: (1..=CONTAINERS).map(container).collect(),
            interfaces: vec![interface],
            scratch: None,
        }))
    }
}
