//! Exec, Attach and PortForward: the CRI's calls answer with URLs, and the streaming server asks here for what a URL
//! stands for.
//!
//! Each stream is a socket pair: one end is the client's session here, the other is the pod's monitor's, which connects
//! it to the process.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use podvisor_monitor::fd_socket::Token;
use podvisor_network::netns;
use podvisor_proto::{cri, monitor};
use podvisor_streaming::{
    Attach, Backend, Config, Duplex, Exec, PortForward, Server, Session, Size, Streams,
};
use rustls::ServerConfig;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio::net::{TcpListener, TcpSocket, TcpStream, UnixStream};
use tokio::sync::watch;
use tokio::time::timeout;
use tracing::{debug, info};

use crate::container::running_monitor;
use crate::daemon::{Daemon, within};
use crate::error::{Error, Result};
use crate::monitor::{Client, Monitor};
use crate::pod::Pod;
use crate::trace;

/// Longer than the monitor's own deadlines for a guest.
const CALL: Duration = Duration::from_mins(1);

/// The server of exec, attach and port-forward.
pub type StreamingServer = Server<Processes>;

/// Listens where the configuration says, and serves from now on.
///
/// # Errors
/// The address is not this node's, or its port is taken.
pub async fn listen(daemon: &Arc<Daemon>) -> anyhow::Result<StreamingServer> {
    let config = &daemon.config.streaming;
    let listener = TcpListener::bind(config.address).await;
    let listener = listener.with_context(|| format!("streaming.address {}", config.address))?;
    let address = listener.local_addr()?;
    let timeouts = Config {
        idle_timeout: Duration::from_secs(config.idle_timeout_s),
        creation_timeout: Duration::from_secs(config.creation_timeout_s),
        tls: tls(&config.tls_certificate, &config.tls_key)?,
    };
    let server = Server::new(Processes(Arc::clone(daemon)), address, timeouts);
    info!(%address, "streaming");
    tokio::spawn(server.clone().serve(listener));
    Ok(server)
}

/// How clients are to connect: TLS, if there is a certificate.
fn tls(certificate: &Path, key: &Path) -> anyhow::Result<Option<Arc<ServerConfig>>> {
    if certificate.as_os_str().is_empty() && key.as_os_str().is_empty() {
        return Ok(None);
    }
    let chain = CertificateDer::pem_file_iter(certificate)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .with_context(|| format!("streaming.tls_certificate {}", certificate.display()))?;
    let key = PrivateKeyDer::from_pem_file(key)
        .with_context(|| format!("streaming.tls_key {}", key.display()))?;
    let config = ServerConfig::builder()
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .context("streaming.tls_certificate, streaming.tls_key")?;
    Ok(Some(Arc::new(config)))
}

impl Daemon {
    /// What an Exec asks for, when it can be had.
    ///
    /// # Errors
    /// INVALID_ARGUMENT; NOT_FOUND; FAILED_PRECONDITION when the container does not run.
    pub fn check_exec(&self, request: cri::ExecRequest) -> Result<Exec> {
        if request.cmd.is_empty() {
            return Err(Error::Invalid {
                field: "cmd",
                problem: "must not be empty".into(),
            });
        }
        let streams = streams([request.stdin, request.stdout, request.stderr], request.tty)?;
        let container = self.pods.find_container(&request.container_id)?;
        running_monitor(&container)?;
        Ok(Exec {
            container_id: container.record.id.clone(),
            args: request.cmd,
            streams,
        })
    }

    /// What an Attach asks for, when it can be had.
    ///
    /// # Errors
    /// INVALID_ARGUMENT, also when the container's terminal is not what the client takes it for; NOT_FOUND;
    /// FAILED_PRECONDITION when the container does not run.
    pub fn check_attach(&self, request: cri::AttachRequest) -> Result<Attach> {
        let streams = streams([request.stdin, request.stdout, request.stderr], request.tty)?;
        let container = self.pods.find_container(&request.container_id)?;
        running_monitor(&container)?;
        let has_terminal = container
            .record
            .config
            .as_ref()
            .is_some_and(|config| config.tty);
        if has_terminal != request.tty {
            return Err(Error::Invalid {
                field: "tty",
                problem: format!("the container's is {has_terminal}"),
            });
        }
        Ok(Attach {
            container_id: container.record.id.clone(),
            streams,
        })
    }

    /// What a PortForward asks for, when it can be had.
    ///
    /// # Errors
    /// INVALID_ARGUMENT; NOT_FOUND; FAILED_PRECONDITION when the sandbox is not ready.
    pub fn check_port_forward(&self, request: cri::PortForwardRequest) -> Result<PortForward> {
        let pod = self.pods.find(&request.pod_sandbox_id)?;
        pod.ready_monitor()?;
        let ports = request.port.iter().map(|&port| match u16::try_from(port) {
            Ok(port @ 1..) => Ok(port),
            _ => Err(Error::Invalid {
                field: "port",
                problem: format!("{port} is no port"),
            }),
        });
        Ok(PortForward {
            sandbox_id: pod.id.clone(),
            ports: ports.collect::<Result<_>>()?,
        })
    }
}

/// Those that a client asks for.
fn streams([stdin, stdout, stderr]: [bool; 3], terminal: bool) -> Result<Streams> {
    let invalid = |field, problem: &str| {
        let problem = problem.into();
        Err(Error::Invalid { field, problem })
    };
    if !(stdin || stdout || stderr) {
        return invalid("stdin, stdout, stderr", "one of them must be set");
    }
    if terminal && stderr {
        return invalid("stderr", "a terminal has no standard error of its own");
    }
    Ok(Streams {
        stdin,
        stdout,
        stderr,
        terminal,
    })
}

/// The processes of all pods, for the streaming server.
#[derive(Debug)]
pub struct Processes(Arc<Daemon>);

impl Backend for Processes {
    async fn exec(&self, exec: Exec) -> Result<Session, String> {
        self.start_exec(exec)
            .await
            .map_err(|error| error.to_string())
    }

    async fn attach(&self, attach: Attach) -> Result<Session, String> {
        let started = self.start_attach(attach).await;
        started.map_err(|error| error.to_string())
    }

    async fn port_forward(&self, sandbox_id: &str, port: u16) -> Result<Box<dyn Duplex>, String> {
        let connected = self.connect_port(sandbox_id, port).await;
        connected.map_err(|error| error.to_string())
    }
}

impl Processes {
    async fn start_exec(&self, exec: Exec) -> Result<Session> {
        let container = self.0.pods.find_container(&exec.container_id)?;
        let monitor = running_monitor(&container)?;
        let (ours, streams) = Ends::send(&monitor, exec.streams).await?;
        let exec_id = format!("{:?}", Token::random());
        let request = monitor::ExecRequest {
            container_id: exec.container_id.clone(),
            exec_id: exec_id.clone(),
            args: exec.args,
            terminal: exec.streams.terminal,
            streams: Some(streams),
        };
        let mut client = monitor.client();
        let mut answer = within(CALL, "Exec", client.exec(request)).await?;
        let ended = async move {
            match answer.message().await {
                Ok(Some(response)) => Ok(response.exit_code),
                Ok(None) => Err("the pod's monitor gave no exit code".to_owned()),
                Err(status) => Err(status.message().to_owned()),
            }
        };
        let terminal = Terminal {
            client,
            container_id: exec.container_id,
            exec_id,
        };
        Ok(ours.into_session(terminal, ended))
    }

    async fn start_attach(&self, attach: Attach) -> Result<Session> {
        let container = self.0.pods.find_container(&attach.container_id)?;
        let monitor = running_monitor(&container)?;
        let (ours, streams) = Ends::send(&monitor, attach.streams).await?;
        let request = monitor::AttachRequest {
            container_id: attach.container_id.clone(),
            streams: Some(streams),
        };
        let mut client = monitor.client();
        let mut answer = within(CALL, "Attach", client.attach(request)).await?;
        let ended = async move {
            match answer.message().await {
                Ok(_) => Ok(0),
                Err(status) => Err(status.message().to_owned()),
            }
        };
        let terminal = Terminal {
            client,
            container_id: attach.container_id,
            exec_id: String::new(),
        };
        Ok(ours.into_session(terminal, ended))
    }

    async fn connect_port(&self, sandbox_id: &str, port: u16) -> Result<Box<dyn Duplex>> {
        let pod = self.0.pods.find(sandbox_id)?;
        let monitor = pod.ready_monitor()?;
        if Daemon::is_on_host(&pod.record()) {
            let stream = self.connect_on_host(&pod, port).await?;
            return Ok(Box::new(stream));
        }
        let (ours, theirs) = UnixStream::pair().map_err(Error::io("socketpair"))?;
        let request = monitor::PortForwardRequest {
            port: port.into(),
            fd_token: monitor.send_fd(theirs).await?,
        };
        let mut client = monitor.client();
        within(CALL, "PortForward", client.port_forward(request)).await?;
        Ok(Box::new(ours))
    }

    /// 127.0.0.1, or else ::1, of a pod whose containers run on the host.
    async fn connect_on_host(&self, pod: &Pod, port: u16) -> Result<TcpStream> {
        let v4 = self
            .connect_in(pod, (Ipv4Addr::LOCALHOST, port).into())
            .await;
        let Err(error) = v4 else { return v4 };
        let v6 = self
            .connect_in(pod, (Ipv6Addr::LOCALHOST, port).into())
            .await;
        v6.map_err(|_| error)
    }

    /// A socket is of the network namespace that its maker was in, for ever.
    async fn connect_in(&self, pod: &Pod, address: SocketAddr) -> Result<TcpStream> {
        let make = move || match address {
            SocketAddr::V4(_) => TcpSocket::new_v4(),
            SocketAddr::V6(_) => TcpSocket::new_v6(),
        };
        let netns = self.0.netns_path(&pod.id);
        let socket = if netns::is_namespace(&netns) {
            netns::enter(&netns, make).await?
        } else {
            // The pod is in the host's.
            make()
        };
        let failed = || format!("port {}", address.port());
        let socket = socket.map_err(Error::io(failed()))?;
        match timeout(CALL, socket.connect(address)).await {
            Ok(connected) => connected.map_err(Error::io(failed())),
            Err(_) => Err(Error::io(failed())(std::io::ErrorKind::TimedOut.into())),
        }
    }
}

/// Our ends of a process's streams.
#[derive(Debug, Default)]
struct Ends {
    stdin: Option<UnixStream>,
    stdout: Option<UnixStream>,
    stderr: Option<UnixStream>,
}

impl Ends {
    /// Makes the streams that are wanted, and hands the other ends to the pod's monitor.
    async fn send(monitor: &Monitor, wanted: Streams) -> Result<(Self, monitor::Streams)> {
        let Streams {
            stdin,
            stdout,
            stderr,
            ..
        } = wanted;
        let mut theirs = Vec::new();
        let mut pair = |wanted: bool| -> Result<Option<UnixStream>> {
            if !wanted {
                return Ok(None);
            }
            let (ours, other) = StdUnixStream::pair().map_err(Error::io("socketpair"))?;
            theirs.push(other);
            ours.set_nonblocking(true)
                .map_err(Error::io("socketpair"))?;
            UnixStream::from_std(ours)
                .map(Some)
                .map_err(Error::io("socketpair"))
        };
        let ends = Self {
            stdin: pair(stdin)?,
            stdout: pair(stdout)?,
            stderr: pair(stderr)?,
        };
        let fds: Vec<BorrowedFd<'_>> = theirs.iter().map(AsFd::as_fd).collect();
        let fd_token = monitor.send_fds(&fds).await?;
        let streams = monitor::Streams {
            fd_token,
            stdin,
            stdout,
            stderr,
        };
        Ok((ends, streams))
    }

    fn into_session(
        self,
        terminal: Terminal,
        ended: impl Future<Output = Result<u32, String>> + Send + 'static,
    ) -> Session {
        let (resize, sizes) = watch::channel(Size::default());
        Session {
            stdin: self.stdin.map(|stream| Box::new(stream) as _),
            stdout: self.stdout.map(|stream| Box::new(stream) as _),
            stderr: self.stderr.map(|stream| Box::new(stream) as _),
            resize,
            ended: Box::pin(trace::span("session", async move {
                tokio::select! {
                    ended = ended => ended,
                    () = terminal.follow(sizes) => Err("no terminal".to_owned()),
                }
            })),
        }
    }
}

/// Where the sizes go that a client sets.
struct Terminal {
    client: Client,
    container_id: String,
    exec_id: String,
}

impl Terminal {
    /// Sets each size, or the last of many. Never ends.
    async fn follow(mut self, mut sizes: watch::Receiver<Size>) {
        while sizes.changed().await.is_ok() {
            let Size { width, height } = *sizes.borrow_and_update();
            let request = monitor::ResizeRequest {
                container_id: self.container_id.clone(),
                exec_id: self.exec_id.clone(),
                columns: width.into(),
                rows: height.into(),
            };
            if let Err(status) = self.client.resize(request).await {
                debug!(message = status.message(), "a terminal's size is not set");
            }
        }
        // No more sizes will come: the session goes on.
        std::future::pending::<()>().await;
    }
}
