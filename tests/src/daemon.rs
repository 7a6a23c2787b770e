//! A podvisord of one's own.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::cri::Cri;
use crate::host::Instance;
use crate::machine::{Backend, patience, slowness};
use crate::{built, eventually, finished, output_of, rig};

/// Daemons that run at the same time, each with its VMs. More do not get a machine done sooner.
fn slots() -> usize {
    thread::available_parallelism().map_or(3, |cpus| cpus.get().div_ceil(2).max(3))
}

static RUNNING: (Mutex<usize>, Condvar) = (Mutex::new(0), Condvar::new());

/// One of the [`slots`], given back when dropped.
#[derive(Debug)]
struct Slot;

impl Slot {
    fn take() -> Self {
        let mut running = lock(&RUNNING.0);
        while *running >= slots() {
            running = RUNNING
                .1
                .wait(running)
                .unwrap_or_else(PoisonError::into_inner);
        }
        *running += 1;
        Self
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        *lock(&RUNNING.0) -= 1;
        RUNNING.1.notify_one();
    }
}

/// A test that failed while it held the lock has not broken what the lock protects.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What differs from an ordinary daemon.
#[derive(Debug, Clone)]
pub struct Options {
    /// Lines for the configuration: section, then `key = value`.
    pub config: Vec<(&'static str, String)>,
    /// Folder of vmlinux and initramfs.cpio.
    pub guest_dir: PathBuf,
    /// What the CNI configuration has, if there is one.
    pub network: Option<Network>,
    /// Mount a tmpfs of so many bytes as the data directory.
    pub data_bytes: Option<u64>,
}

/// A pod network.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Network {
    /// A bridge.
    Bridge,
    /// As nodes have it: the bridge masquerades, ports are mapped, bandwidth is limited. Many processes for each pod.
    Node,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            config: Vec::new(),
            guest_dir: built("PODVISOR_GUEST_DIR", "guest"),
            network: Some(Network::Bridge),
            data_bytes: None,
        }
    }
}

/// A running podvisord. When dropped, its pods are removed, it is stopped, and the test fails if
/// anything is left on the host.
#[derive(Debug)]
pub struct Daemon {
    /// Names on the host.
    pub instance: Instance,
    process: Option<Process>,
    log: Arc<Log>,
    _slot: Slot,
}

#[derive(Debug)]
struct Process {
    child: Child,
    reader: JoinHandle<()>,
}

/// What the daemon wrote, and whether it still can.
#[derive(Debug, Default)]
struct Log {
    state: Mutex<LogState>,
    grown: Condvar,
}

#[derive(Debug, Default)]
struct LogState {
    text: String,
    lines: usize,
    ended: bool,
}

impl Daemon {
    /// An ordinary one.
    pub fn start() -> Self {
        Self::start_with(&Options::default())
    }

    /// Writes the configuration, starts the daemon and waits until it answers.
    pub fn start_with(options: &Options) -> Self {
        let slot = Slot::take();
        let instance = Instance::reserve();
        let daemon = Self {
            instance,
            process: None,
            log: Arc::default(),
            _slot: slot,
        };
        daemon.prepare(options);
        daemon.launched()
    }

    fn launched(mut self) -> Self {
        self.restart();
        self
    }

    fn prepare(&self, options: &Options) {
        let dir = self.instance.dir();
        fs::create_dir_all(self.instance.data_dir()).expect("a fresh directory");
        if let Some(bytes) = options.data_bytes {
            nix::mount::mount(
                Some("podvisor-test"),
                &self.instance.data_dir(),
                Some("tmpfs"),
                nix::mount::MsFlags::empty(),
                Some(format!("size={bytes}").as_str()),
            )
            .expect("tmpfs mounts");
        }
        fs::create_dir_all(dir.join("net.d")).expect("a fresh directory");
        fs::create_dir_all(dir.join("certs.d")).expect("a fresh directory");
        if let Some(network) = options.network {
            self.write_cni(network);
        }
        let path = |key: &str, path: &Path| format!("{key} = \"{}\"", path.display());
        let own = [
            (
                "",
                "log = \"debug,h2=info,hyper=info,tower=info,tonic=info\"".to_owned(),
            ),
            ("vm", path("guest_dir", &options.guest_dir)),
            // Machines that run tests may be slow, and busy with other things.
            ("vm", format!("boot_timeout_s = {}", 90 * slowness())),
            ("", format!("vmm = {:?}", Backend::here().name())),
            ("network", path("conf_dir", &dir.join("net.d"))),
            ("network", format!("plugin_timeout_s = {}", 30 * slowness())),
            ("image", path("certs_dir", &self.certs_dir())),
            (
                "cgroup",
                format!("parent = {:?}", self.instance.cgroup_parent()),
            ),
        ];
        fs::write(self.config(), config(own.iter().chain(&options.config)))
            .expect("a fresh directory");
        fs::write(
            self.crictl_config(),
            format!(
                "runtime-endpoint: unix://{socket}\nimage-endpoint: unix://{socket}\ntimeout: {}\n",
                patience().as_secs(),
                socket = self.socket().display()
            ),
        )
        .expect("a fresh directory");
    }

    /// Gives the instance its pod network.
    pub fn write_cni(&self, network: Network) {
        let instance = &self.instance;
        output_of(
            rig("cni.sh")
                .arg(instance.dir())
                .arg(instance.bridge())
                .arg(instance.number().to_string())
                .args((network == Network::Bridge).then_some("bridge")),
        );
    }

    /// The configuration file.
    pub fn config(&self) -> PathBuf {
        self.instance.dir().join("config.toml")
    }

    /// crictl's configuration file: where the socket is.
    pub fn crictl_config(&self) -> PathBuf {
        self.instance.dir().join("crictl.yaml")
    }

    /// Folder of hosts.toml folders.
    pub fn certs_dir(&self) -> PathBuf {
        self.instance.dir().join("certs.d")
    }

    /// The CRI socket.
    pub fn socket(&self) -> PathBuf {
        self.instance.run_dir().join("podvisor.sock")
    }

    /// One of podvisor's binaries.
    pub fn binary(name: &str) -> PathBuf {
        let path = built("PODVISOR_BIN_DIR", "release").join(name);
        assert!(path.exists(), "{}: not built: make build", path.display());
        path
    }

    /// podvisord, to be started on this instance's directories.
    pub fn command(&self) -> Command {
        let mut command = Command::new(Self::binary("podvisord"));
        command
            .arg("--config")
            .arg(self.config())
            .arg("--run-dir")
            .arg(self.instance.run_dir())
            .arg("--data-dir")
            .arg(self.instance.data_dir())
            .env(Instance::MARK, self.instance.number().to_string())
            .env_remove("RUST_LOG")
            .env("NO_COLOR", "1")
            .stdin(Stdio::null());
        command
    }

    /// The CLI, to be run against this instance.
    pub fn cli(&self) -> Command {
        let mut command = Command::new(Self::binary("podvisor"));
        command
            .arg("--config")
            .arg(self.config())
            .arg("--run-dir")
            .arg(self.instance.run_dir())
            .arg("--data-dir")
            .arg(self.instance.data_dir())
            .stdin(Stdio::null());
        command
    }

    /// Starts the daemon, again or for the first time, and waits until it answers.
    pub fn restart(&mut self) {
        assert!(self.process.is_none(), "it runs");
        let mut child = self
            .command()
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("podvisord can be executed");
        let stderr = child.stderr.take().expect("piped");
        lock(&self.log.state).ended = false;
        let log = self.log.clone();
        let reader = thread::spawn(move || log.fill(BufReader::new(stderr)));
        self.process = Some(Process { child, reader });
        self.wait_until_it_serves();
    }

    /// Tries to connect now and whenever the daemon has said something more.
    fn wait_until_it_serves(&self) {
        let deadline = Instant::now() + patience();
        let mut state = lock(&self.log.state);
        loop {
            let seen = state.lines;
            drop(state);
            if UnixStream::connect(self.socket()).is_ok() {
                return;
            }
            state = lock(&self.log.state);
            while state.lines == seen && !state.ended {
                let left = deadline.saturating_duration_since(Instant::now());
                assert!(!left.is_zero(), "podvisord does not serve:\n{}", state.text);
                state = self
                    .log
                    .grown
                    .wait_timeout(state, left)
                    .unwrap_or_else(PoisonError::into_inner)
                    .0;
            }
            assert!(
                !state.ended || state.lines != seen,
                "podvisord ended:\n{}",
                state.text
            );
        }
    }

    /// Process id of the daemon.
    pub fn pid(&self) -> Pid {
        let process = self.process.as_ref().expect("it runs");
        Pid::from_raw(process.child.id() as i32)
    }

    /// SIGKILL: no goodbye.
    pub fn kill(&mut self) {
        let status = self.end(Signal::SIGKILL);
        assert_eq!(status.signal(), Some(Signal::SIGKILL as i32), "{status}");
    }

    /// SIGTERM, as systemd does. Pods go on.
    pub fn stop(&mut self) {
        let status = self.end(Signal::SIGTERM);
        assert!(status.success(), "podvisord stopped with {status}");
    }

    fn end(&mut self, signal: Signal) -> ExitStatus {
        let pid = self.pid();
        let mut process = self.process.take().expect("it runs");
        kill(pid, signal).expect("our own child");
        let status = eventually("podvisord ends", || {
            process.child.try_wait().expect("our own child")
        });
        process.reader.join().expect("the reader does not panic");
        status
    }

    /// What the daemon has logged.
    pub fn log(&self) -> String {
        lock(&self.log.state).text.clone()
    }

    /// A gRPC client.
    pub fn cri(&self) -> Cri {
        Cri::connect(&self.socket())
    }

    /// Pulls an image, which must succeed.
    pub fn pull(&self, image: &str) {
        let pulled = self.cri().pull(image);
        pulled.unwrap_or_else(|status| panic!("PullImage {image}: {status}"));
    }

    /// Runs a command in a container, which must succeed: what it wrote.
    pub fn exec(&self, container: &str, command: &[&str]) -> String {
        let ran = self.cri().exec(container, command, Duration::ZERO);
        let ran = ran.unwrap_or_else(|status| panic!("ExecSync {command:?}: {status}"));
        let [stdout, stderr] =
            [&ran.stdout, &ran.stderr].map(|output| String::from_utf8_lossy(output));
        assert_eq!(ran.exit_code, 0, "{command:?}: {stdout}{stderr}");
        stdout.trim_end().to_owned()
    }

    /// What `podvisor check --leaks` prints.
    pub fn leaks(&self) -> String {
        let output = finished(self.cli().args(["check", "--leaks"]));
        let mut said = String::from_utf8_lossy(&output.stdout).into_owned();
        said.push_str(&String::from_utf8_lossy(&output.stderr));
        if said.is_empty() {
            assert!(output.status.success(), "check --leaks: {}", output.status);
        }
        said
    }

    /// Fails if anything is on the host that no pod owns, or that belongs to one: for tests that have
    /// removed all of theirs.
    pub fn assert_nothing_left(&self) {
        self.assert_nothing_left_but(&[]);
    }

    /// What pods have on the host, seen without asking podvisor.
    pub fn pod_resources(&self) -> Vec<String> {
        let daemon = self.process.is_some().then(|| self.pid());
        self.instance.pod_resources(daemon)
    }

    /// [`Daemon::assert_nothing_left`], but for resources of some kinds.
    pub fn assert_nothing_left_but(&self, kinds: &[&str]) {
        assert_eq!(self.leaks(), "", "podvisor check --leaks");
        // What ends with a process or a namespace is gone a moment after it.
        let mut left = Vec::new();
        let gone = (0..100).any(|_| {
            left = self.pod_resources();
            left.retain(|line| !kinds.iter().any(|kind| line.starts_with(kind)));
            let none = left.is_empty();
            if !none {
                thread::sleep(Duration::from_millis(20));
            }
            none
        });
        assert!(gone, "left on the host:\n{}", left.join("\n"));
    }

    /// Removes all pods through the API.
    pub fn remove_pods(&self) {
        let cri = self.cri();
        for pod in cri.pods() {
            cri.remove_pod(&pod.id);
        }
    }

    /// The end of a test that went well so far.
    fn finish(&mut self) {
        if self.process.is_some() {
            self.remove_pods();
            self.assert_nothing_left();
            self.stop();
        }
        let log = self.log();
        let panicked = log.lines().find(|line| line.contains("panicked at"));
        assert_eq!(panicked, None, "podvisord panicked");
    }

    /// For the reader of a failed test.
    fn report(&self) {
        let mut err = std::io::stderr().lock();
        let _ = writeln!(err, "--- podvisord ---\n{}", self.log());
        let sandboxes = self.instance.run_dir().join("sandboxes");
        for sandbox in fs::read_dir(sandboxes).into_iter().flatten().flatten() {
            let path = sandbox.path().join("monitor.log");
            let log = fs::read_to_string(&path).unwrap_or_default();
            let _ = writeln!(err, "--- {} ---\n{log}", path.display());
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let end = std::panic::AssertUnwindSafe(|| {
            if !thread::panicking() {
                self.finish();
            }
        });
        let end = std::panic::catch_unwind(end);
        if end.is_err() || thread::panicking() {
            self.report();
        }
        self.instance.clear();
        if let Err(failure) = end {
            std::panic::resume_unwind(failure);
        }
    }
}

impl Log {
    fn fill(&self, mut stderr: impl BufRead) {
        let mut line = String::new();
        while stderr.read_line(&mut line).is_ok_and(|read| read > 0) {
            let mut state = lock(&self.state);
            state.text.push_str(&line);
            state.lines += 1;
            line.clear();
            self.grown.notify_all();
        }
        lock(&self.state).ended = true;
        self.grown.notify_all();
    }
}

/// A configuration file: sections in one piece each, later values of a key instead of earlier ones.
fn config<'a>(lines: impl Iterator<Item = &'a (&'static str, String)>) -> String {
    let mut sections: Vec<(&str, Vec<&str>)> = vec![("", Vec::new())];
    for (name, line) in lines {
        let key = line.split('=').next().unwrap_or_default().trim();
        let at = sections.iter().position(|(section, _)| section == name);
        let section = if let Some(at) = at {
            &mut sections[at]
        } else {
            sections.push((name, Vec::new()));
            sections.last_mut().expect("just pushed")
        };
        section
            .1
            .retain(|old| old.split('=').next().unwrap_or_default().trim() != key);
        section.1.push(line);
    }
    let mut text = String::new();
    for (name, lines) in sections {
        if !name.is_empty() {
            text.push_str(&format!("\n[{name}]\n"));
        }
        for line in lines {
            text.push_str(line);
            text.push('\n');
        }
    }
    text
}
