//! The real crictl, and what it is given. What must succeed, and is not what a test is about, is asked by
//! gRPC of the same configurations: where this machine is emulated, each crictl takes a third of a second.

use std::fs;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;

use podvisor_proto::cri;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::daemon::Daemon;
use crate::registry::busybox;
use crate::{finished, output_of, rig};

/// The binary, built when it is not there.
pub fn binary() -> &'static PathBuf {
    static BINARY: OnceLock<PathBuf> = OnceLock::new();
    BINARY.get_or_init(|| output_of(rig("cri-tool.sh").arg("crictl")).trim().into())
}

/// How a run of crictl ended.
#[derive(Debug)]
pub struct Ran {
    /// Its exit code.
    pub code: i32,
    /// Its standard output.
    pub stdout: String,
    /// Its standard error.
    pub stderr: String,
}

impl Ran {
    /// Standard output of a run that must have succeeded.
    pub fn ok(self) -> String {
        assert_eq!(self.code, 0, "{}{}", self.stdout, self.stderr);
        self.stdout
    }

    /// Standard output of a run that must have succeeded, as JSON.
    pub fn json(self) -> Value {
        let text = self.ok();
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"))
    }

    /// The one id that a run printed, which must have succeeded.
    pub fn id(self) -> String {
        let output = self.ok();
        let id = output.trim();
        assert!(
            id.len() == 64 && id.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')),
            "not an id: {output:?}"
        );
        id.into()
    }

    /// Standard error of a run that must have failed, with the gRPC code `code` ("NotFound").
    pub fn failed(self, code: &str) -> String {
        assert_ne!(self.code, 0, "{} instead of {code}", self.stdout);
        assert!(
            self.stderr.contains(&format!("code = {code} ")),
            "not {code}: {}",
            self.stderr
        );
        self.stderr
    }
}

/// A daemon with the busybox image and a pod, and the pod's id.
pub fn with_pod(name: &str) -> (Daemon, Pod, String) {
    with_such_pod(name, &json!({}))
}

/// [`with_pod`], with a `linux` configuration.
pub fn with_such_pod(name: &str, linux: &Value) -> (Daemon, Pod, String) {
    let daemon = Daemon::start();
    daemon.pull(&busybox());
    let pod = daemon.pod(name).with("linux", linux.clone());
    let id = daemon.run_pod(&pod);
    (daemon, pod, id)
}

impl Daemon {
    /// A run of crictl to be started.
    pub fn crictl_command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(binary());
        command
            .arg("--config")
            .arg(self.crictl_config())
            .args(args)
            .stdin(Stdio::null());
        command
    }

    /// Runs crictl, to its end.
    pub fn crictl(&self, args: &[&str]) -> Ran {
        let output = finished(&mut self.crictl_command(args));
        Ran {
            code: output.status.code().unwrap_or(-1),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }

    /// Starts crictl, its standard output in a pipe.
    pub fn crictl_spawn(&self, args: &[&str]) -> Child {
        self.crictl_command(args)
            .stdout(Stdio::piped())
            .spawn()
            .expect("crictl can be executed")
    }

    /// Writes a configuration for crictl to read.
    fn config_file(&self, kind: &str, config: &Value) -> String {
        let metadata = &config["metadata"];
        let name = metadata["name"].as_str().unwrap_or_default();
        let path = self.instance.dir().join(format!("{kind}-{name}.json"));
        fs::write(&path, config.to_string()).expect("the instance's directory is there");
        path.into_os_string()
            .into_string()
            .expect("we made it of ASCII")
    }

    /// A pod's configuration, with a log directory.
    pub fn pod(&self, name: &str) -> Pod {
        let log_dir = self.instance.dir().join("logs").join(name);
        Pod {
            config: json!({
                "metadata": {"name": name, "uid": format!("uid-{name}"), "namespace": "default", "attempt": 1},
                "log_directory": log_dir,
                "linux": {},
            }),
            handler: "podvisor",
            log_dir,
        }
    }

    /// `crictl runp`.
    pub fn try_run_pod(&self, pod: &Pod) -> Ran {
        let config = self.config_file("pod", &pod.config);
        self.crictl(&["runp", "--runtime", pod.handler, &config])
    }

    /// `RunPodSandbox` that must succeed. The pod's id.
    pub fn run_pod(&self, pod: &Pod) -> String {
        let ran = self.cri().run_pod(pod.run_request());
        ran.unwrap_or_else(|status| panic!("RunPodSandbox: {status}"))
    }

    /// `crictl create`.
    pub fn try_create(&self, id: &str, pod: &Pod, container: &Value) -> Ran {
        let (container, pod) = self.config_files(pod, container);
        self.crictl(&["create", id, &container, &pod])
    }

    /// Files with the configurations of a container and its pod, for `crictl run`.
    pub fn config_files(&self, pod: &Pod, container: &Value) -> (String, String) {
        let container = self.config_file("container", container);
        (container, self.config_file("pod", &pod.config))
    }

    /// `CreateContainer` that must succeed. The container's id.
    pub fn create(&self, id: &str, pod: &Pod, container: &Value) -> String {
        let request = pod.create_request(id, container);
        let created = self.cri().create_container(request);
        created.unwrap_or_else(|status| panic!("CreateContainer: {status}"))
    }

    /// [`Daemon::create`], and starts it. The container's id.
    pub fn create_started(&self, id: &str, pod: &Pod, container: &Value) -> String {
        let container = self.create(id, pod, container);
        let started = self.cri().start_container(&container);
        started.unwrap_or_else(|status| panic!("StartContainer: {status}"));
        container
    }

    /// `crictl inspect`, the status alone.
    pub fn inspect(&self, container: &str) -> Value {
        self.crictl(&["inspect", container]).json()["status"].take()
    }

    /// `crictl inspectp`, the status alone.
    pub fn inspect_pod(&self, pod: &str) -> Value {
        self.crictl(&["inspectp", pod]).json()["status"].take()
    }
}

/// A pod's configuration.
#[derive(Debug, Clone)]
pub struct Pod {
    /// As crictl reads it.
    pub config: Value,
    /// The handler it names; empty: none.
    pub handler: &'static str,
    /// Where its containers' logs are.
    pub log_dir: PathBuf,
}

impl Pod {
    /// With `key` set to `value`.
    pub fn with(mut self, key: &str, value: Value) -> Self {
        self.config[key] = value;
        self
    }

    /// Of a handler; empty: of none by name.
    pub fn by_handler(mut self, handler: &'static str) -> Self {
        self.handler = handler;
        self
    }

    /// What `crictl runp` would send.
    pub fn run_request(&self) -> cri::RunPodSandboxRequest {
        cri::RunPodSandboxRequest {
            config: Some(message(&self.config)),
            runtime_handler: self.handler.into(),
        }
    }

    /// What `crictl create` would send for a container in this pod, whose id is `id`.
    pub fn create_request(&self, id: &str, container: &Value) -> cri::CreateContainerRequest {
        cri::CreateContainerRequest {
            pod_sandbox_id: id.into(),
            config: Some(message(container)),
            sandbox_config: Some(message(&self.config)),
        }
    }

    /// The log of a container of [`container`].
    pub fn log(&self, container: &str) -> PathBuf {
        self.log_dir.join(format!("{container}.log"))
    }
}

/// A container's configuration, with a log NAME.log.
pub fn container(name: &str, image: &str, command: &[&str]) -> Value {
    json!({
        "metadata": {"name": name, "attempt": 1},
        "image": {"image": image},
        "command": command,
        "log_path": format!("{name}.log"),
        "linux": {},
    })
}

/// A container that runs a shell script.
pub fn shell(name: &str, image: &str, script: &str) -> Value {
    container(name, image, &["sh", "-c", script])
}

/// A configuration as the CRI has it.
fn message<T: DeserializeOwned>(config: &Value) -> T {
    T::deserialize(config).unwrap_or_else(|error| panic!("{error}: {config}"))
}
