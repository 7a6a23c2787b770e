//! A pod that a command makes for itself: every call about it, and its removal in every ending.

use std::collections::HashMap;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use podvisor_proto::{cri, monitor};

use crate::client::{self, ClientError, Daemon};

/// Label of the pods that the CLI makes; its value is the run's own, so that a run finds its pods
/// even when the answer to RunPodSandbox was lost.
const LABEL: &str = "podvisor.cli/run";

/// What each call of the removal may take.
const REMOVE: Duration = Duration::from_mins(1);
/// What StopContainer may take beyond its grace, as the kubelet has it.
const STOP: Duration = client::CALL;

/// How a container ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exit {
    /// Its exit code.
    pub code: i32,
    /// One word: `Completed`, `Error`, `OOMKilled`, `StartError` …
    pub reason: String,
    /// A sentence, or nothing.
    pub message: String,
}

/// Why it is not known how a container ended.
#[derive(Debug, thiserror::Error)]
pub enum ExitError {
    /// The VM or its monitor ended under the container.
    #[error("the pod ended under its container: {0}")]
    PodEnded(String),
    /// podvisord or the monitor did not answer.
    #[error(transparent)]
    Client(#[from] ClientError),
}

/// A pod that may not exist yet, or in part.
#[derive(Debug)]
pub struct Pod {
    daemon: Daemon,
    run_dir: PathBuf,
    /// The value of [`LABEL`].
    label: String,
    /// Whether podvisord was asked to make it.
    requested: bool,
    id: Option<String>,
}

impl Pod {
    /// A pod that is not asked for yet; `label` is the run's own.
    pub fn new(daemon: Daemon, run_dir: PathBuf, label: String) -> Self {
        Self {
            daemon,
            run_dir,
            label,
            requested: false,
            id: None,
        }
    }

    /// The sandbox's id, when podvisord has told it.
    pub fn id(&self) -> Option<&str> {
        self.id.as_deref()
    }

    /// Its folder.
    pub fn folder(&self) -> PathBuf {
        client::sandbox_dir(&self.run_dir, self.id().unwrap_or_default())
    }

    /// RunPodSandbox.
    pub async fn run(
        &mut self,
        mut config: cri::PodSandboxConfig,
        handler: &str,
    ) -> Result<(), ClientError> {
        config.labels.insert(LABEL.to_owned(), self.label.clone());
        self.requested = true;
        let request = cri::RunPodSandboxRequest {
            config: Some(config),
            runtime_handler: handler.to_owned(),
        };
        let response = self
            .daemon
            .runtime
            .run_pod_sandbox(client::within(client::RUN_POD_SANDBOX, request))
            .await
            .map_err(client::failed("RunPodSandbox"))?;
        self.id = Some(response.into_inner().pod_sandbox_id);
        Ok(())
    }

    /// CreateContainer; its id.
    pub async fn create(
        &mut self,
        config: cri::ContainerConfig,
        sandbox_config: cri::PodSandboxConfig,
    ) -> Result<String, ClientError> {
        let request = cri::CreateContainerRequest {
            pod_sandbox_id: self.id.clone().unwrap_or_default(),
            config: Some(config),
            sandbox_config: Some(sandbox_config),
        };
        let response = self
            .daemon
            .runtime
            .create_container(client::within(client::CALL, request))
            .await
            .map_err(client::failed("CreateContainer"))?;
        Ok(response.into_inner().container_id)
    }

    /// StartContainer. When it fails because the command cannot be started, the container has ended
    /// and tells why: that is an `Ok(Some(exit))`.
    pub async fn start(&mut self, container: &str) -> Result<Option<Exit>, ClientError> {
        let request = cri::StartContainerRequest {
            container_id: container.to_owned(),
        };
        let started = self
            .daemon
            .runtime
            .start_container(client::within(client::CALL, request))
            .await;
        match started {
            Ok(_) => Ok(None),
            Err(status) => match self.recorded_exit(container).await {
                Ok(Some(exit)) => Ok(Some(exit)),
                _ => Err(client::failed("StartContainer")(status)),
            },
        }
    }

    /// What PodSandboxStatus(verbose) adds.
    pub async fn info(&self) -> Result<HashMap<String, String>, ClientError> {
        Ok(self.status(true).await?.info)
    }

    /// The pod's first address.
    pub async fn ip(&self) -> Result<String, ClientError> {
        let status = self.status(false).await?.status.unwrap_or_default();
        Ok(status.network.unwrap_or_default().ip)
    }

    async fn status(&self, verbose: bool) -> Result<cri::PodSandboxStatusResponse, ClientError> {
        let request = cri::PodSandboxStatusRequest {
            pod_sandbox_id: self.id.clone().unwrap_or_default(),
            verbose,
        };
        let mut runtime = self.daemon.runtime.clone();
        let response = runtime
            .pod_sandbox_status(client::within(client::CALL, request))
            .await
            .map_err(client::failed("PodSandboxStatus"))?;
        Ok(response.into_inner())
    }

    /// Waits for the end of a container, for as long as it takes.
    ///
    /// The monitor's word comes first. If the pod ends, podvisord is asked what it has recorded.
    pub async fn exit_of(&self, container: &str) -> Result<Exit, ExitError> {
        let why = match self.watch_for_exit(container).await {
            Ok(Ok(exit)) => return Ok(exit),
            Ok(Err(why)) => why,
            Err(error) => error.to_string(),
        };
        match self.recorded_exit(container).await? {
            Some(exit) => Ok(exit),
            None => Err(ExitError::PodEnded(why)),
        }
    }

    /// The exit, or why the pod ended before it was told.
    async fn watch_for_exit(&self, container: &str) -> Result<Result<Exit, String>, ClientError> {
        let id = self.id.as_deref().unwrap_or_default();
        let mut snapshots = client::monitor(&self.run_dir, id)
            .await?
            .watch(monitor::WatchRequest {})
            .await
            .map_err(client::failed("Watch"))?
            .into_inner();
        while let Some(snapshot) = snapshots.message().await.map_err(client::failed("Watch"))? {
            if let Some(exit) = exit_in(&snapshot, container) {
                return Ok(Ok(exit));
            }
            if snapshot.state() == monitor::SandboxState::Stopped {
                return Ok(Err(format!("{} {}", snapshot.reason, snapshot.message)));
            }
        }
        Ok(Err("its monitor has ended".to_owned()))
    }

    /// What podvisord has recorded of a container's end.
    async fn recorded_exit(&self, container: &str) -> Result<Option<Exit>, ClientError> {
        let request = cri::ContainerStatusRequest {
            container_id: container.to_owned(),
            verbose: false,
        };
        let status = self
            .daemon
            .runtime
            .clone()
            .container_status(client::within(client::CALL, request))
            .await
            .map_err(client::failed("ContainerStatus"))?
            .into_inner()
            .status
            .unwrap_or_default();
        Ok(
            (status.state() == cri::ContainerState::ContainerExited).then_some(Exit {
                code: status.exit_code,
                reason: status.reason,
                message: status.message,
            }),
        )
    }

    /// StopContainer.
    pub async fn stop(&self, container: &str, grace_s: i64) -> Result<(), ClientError> {
        stop_container(self.daemon.clone(), container.to_owned(), grace_s).await
    }

    /// StopContainer, without waiting for it: its effect is the container's exit.
    pub fn stop_in_background(&self, container: &str, grace_s: i64) {
        let stop = stop_container(self.daemon.clone(), container.to_owned(), grace_s);
        tokio::spawn(async move {
            if let Err(error) = stop.await {
                eprintln!("podvisor: {error}");
            }
        });
    }

    /// ExecSync: runs a command in a container to its end, at most `timeout_s` seconds.
    pub async fn exec(
        &self,
        container: &str,
        command: &[&str],
        timeout_s: i64,
    ) -> Result<cri::ExecSyncResponse, ClientError> {
        let request = cri::ExecSyncRequest {
            container_id: container.to_owned(),
            cmd: command.iter().map(|&word| word.to_owned()).collect(),
            timeout: timeout_s,
        };
        let deadline = client::CALL + Duration::from_secs(timeout_s.unsigned_abs());
        let mut runtime = self.daemon.runtime.clone();
        let response = runtime.exec_sync(client::within(deadline, request)).await;
        Ok(response.map_err(client::failed("ExecSync"))?.into_inner())
    }

    /// What the monitor knows now.
    pub async fn snapshot(&self) -> Result<monitor::Snapshot, ClientError> {
        let id = self.id.as_deref().unwrap_or_default();
        client::snapshot(&self.run_dir, id).await
    }

    /// Counters of its VM.
    pub async fn vm_stats(&self) -> Result<monitor::VmStatsResponse, ClientError> {
        let id = self.id.as_deref().unwrap_or_default();
        client::vm_stats(&self.run_dir, id).await
    }

    /// StopPodSandbox.
    pub async fn stop_sandbox(&self) -> Result<(), ClientError> {
        stop_sandbox(&self.daemon, self.id.clone().unwrap_or_default()).await
    }

    /// RemovePodSandbox.
    pub async fn remove_sandbox(&mut self) -> Result<(), ClientError> {
        remove_sandbox(&self.daemon, self.id.clone().unwrap_or_default()).await?;
        self.requested = false;
        Ok(())
    }

    /// Stops and removes whatever podvisord has of the pod; nothing when it was never asked for.
    pub async fn remove(mut self) -> Result<(), ClientError> {
        if !self.requested {
            return Ok(());
        }
        match self.id.take() {
            Some(id) => {
                stop_sandbox(&self.daemon, id.clone()).await?;
                remove_sandbox(&self.daemon, id).await
            }
            // The call was cancelled or its answer was lost: podvisord undoes it, or has it.
            None => remove_all(&self.daemon, &self.label).await,
        }
    }
}

/// Removes every pod of a run.
pub async fn remove_all(daemon: &Daemon, label: &str) -> Result<(), ClientError> {
    let filter = cri::PodSandboxFilter {
        label_selector: [(LABEL.to_owned(), label.to_owned())].into(),
        ..Default::default()
    };
    let request = cri::ListPodSandboxRequest {
        filter: Some(filter),
    };
    let response = daemon
        .runtime
        .clone()
        .list_pod_sandbox(client::within(client::CALL, request))
        .await
        .map_err(client::failed("ListPodSandbox"))?;
    for pod in response.into_inner().items {
        stop_sandbox(daemon, pod.id.clone()).await?;
        remove_sandbox(daemon, pod.id).await?;
    }
    Ok(())
}

async fn stop_container(
    mut daemon: Daemon,
    container_id: String,
    grace_s: i64,
) -> Result<(), ClientError> {
    let request = cri::StopContainerRequest {
        container_id,
        timeout: grace_s,
    };
    let deadline = STOP + Duration::from_secs(grace_s.unsigned_abs());
    daemon
        .runtime
        .stop_container(client::within(deadline, request))
        .await
        .map(drop)
        .map_err(client::failed("StopContainer"))
}

async fn stop_sandbox(daemon: &Daemon, pod_sandbox_id: String) -> Result<(), ClientError> {
    let request = cri::StopPodSandboxRequest { pod_sandbox_id };
    let mut runtime = daemon.runtime.clone();
    runtime
        .stop_pod_sandbox(client::within(REMOVE, request))
        .await
        .map(drop)
        .map_err(client::failed("StopPodSandbox"))
}

async fn remove_sandbox(daemon: &Daemon, pod_sandbox_id: String) -> Result<(), ClientError> {
    let request = cri::RemovePodSandboxRequest { pod_sandbox_id };
    let mut runtime = daemon.runtime.clone();
    runtime
        .remove_pod_sandbox(client::within(REMOVE, request))
        .await
        .map(drop)
        .map_err(client::failed("RemovePodSandbox"))
}

fn exit_in(snapshot: &monitor::Snapshot, container: &str) -> Option<Exit> {
    snapshot
        .containers
        .iter()
        .find(|found| found.id == container && found.state() == monitor::ContainerState::Exited)
        .map(|found| Exit {
            code: found.exit_code as i32,
            reason: found.reason.clone(),
            message: found.message.clone(),
        })
}

/// A pod uid as Kubernetes has them: random.
pub fn uid() -> io::Result<String> {
    let uuid = std::fs::read_to_string("/proc/sys/kernel/random/uuid")?;
    Ok(uuid.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uids_differ_and_look_like_uids() {
        let (a, b) = (uid().unwrap(), uid().unwrap());
        assert_ne!(a, b);
        assert_eq!((a.len(), a.matches('-').count()), (36, 4));
    }

    #[test]
    fn only_the_exit_of_the_container_asked_for_counts() {
        let container = |id: &str, state: monitor::ContainerState| monitor::Container {
            id: id.into(),
            state: state.into(),
            exit_code: 7,
            reason: "Error".into(),
            ..Default::default()
        };
        let snapshot = monitor::Snapshot {
            containers: vec![
                container("a", monitor::ContainerState::Exited),
                container("b", monitor::ContainerState::Running),
            ],
            ..Default::default()
        };
        assert_eq!(exit_in(&snapshot, "a").map(|exit| exit.code), Some(7));
        assert_eq!(exit_in(&snapshot, "b"), None);
        assert_eq!(exit_in(&snapshot, "c"), None);
    }
}
