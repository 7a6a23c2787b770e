//! CreateContainer to RemoveContainer, ExecSync, ReopenContainerLog.
//!
//! - `assembly`: what a container is made of, for a guest and for the host

mod assembly;

use std::fs::File;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use opentelemetry::trace::FutureExt;
use podvisor_proto::{cri, monitor};
use tokio::sync::oneshot;
use tracing::{Instrument, warn};

use crate::daemon::{Daemon, now_ns, within};
use crate::error::{Error, Result, if_there};
use crate::ids;
use crate::monitor::Monitor;
use crate::pod::{Container, Pod, START_ERROR};
use crate::resources::check_cpus;
use crate::services::MAX_MESSAGE;
use crate::spec;
use crate::store::ContainerRecord;
use crate::user_namespace;
use crate::volumes;
use assembly::{Assembly, devices_of, open_file};

/// For calls that the guest answers quickly when it answers at all. Longer than the monitor's own
/// deadlines for the agent, so that its answer, which knows more, comes first.
const CALL: Duration = Duration::from_mins(1);

/// On top of what a caller allows for itself.
const MARGIN: Duration = Duration::from_secs(30);

/// What ExecSync keeps of both streams together: what fits in a message, with room for its frame.
const EXEC_OUTPUT: usize = MAX_MESSAGE - 4096;

impl Daemon {
    /// Creates a container in a ready sandbox and runs nothing yet.
    ///
    /// # Errors
    /// INVALID_ARGUMENT, NOT_FOUND (sandbox, image), ALREADY_EXISTS, FAILED_PRECONDITION, UNIMPLEMENTED.
    pub async fn create_container(
        self: &Arc<Self>,
        request: cri::CreateContainerRequest,
    ) -> Result<String> {
        let pod = self.pods.find(&request.pod_sandbox_id)?;
        let monitor = pod.ready_monitor()?;
        let mut config = request.config.ok_or(Error::Invalid {
            field: "config",
            problem: "missing".into(),
        })?;
        let metadata = config.metadata.clone().unwrap_or_default();
        if metadata.name.is_empty() {
            return Err(Error::Invalid {
                field: "config.metadata.name",
                problem: "must not be empty".into(),
            });
        }
        let sandbox_config = pod.record().config.unwrap_or_default();
        let image_name = config
            .image
            .as_ref()
            .map_or("", |image| image.image.as_str());
        let image = self.find_image(image_name)?;
        let linux = config.linux.clone().unwrap_or_default();
        check_cpus(&linux.resources.unwrap_or_default())?;
        let security = spec::security(&config);
        let target = self.target(&pod, &security)?;
        let host_pod = if Self::is_on_host(&pod.record()) {
            Some(self.host_pod(&pod.id, &sandbox_config)?)
        } else {
            None
        };
        let surroundings = spec::Surroundings {
            sandbox: &sandbox_config,
            image: &image.config,
            seccomp: spec::seccomp::profile(&security).await?,
            devices: devices_of(&config, host_pod.is_some()).await?,
            target: target.as_deref(),
            host_pod: host_pod.as_ref(),
        };
        let users = user_namespace::of_pod(&sandbox_config)?;
        let built = spec::build(&config, surroundings)?;
        let volumes = volumes::parse(&config.mounts, host_pod.is_none(), users.as_ref())?;
        let volume_images = self.volume_images(&mut config, &volumes)?;
        let id = ids::new_id()?;
        let name = self.container_names.reserve(
            "container",
            ids::container_name(&pod.id, &metadata),
            &id,
        )?;
        let record = ContainerRecord {
            id: id.clone(),
            sandbox_id: pod.id.clone(),
            image_id: image.id.clone(),
            created_ns: now_ns() as i64,
            log_path: log_path(&sandbox_config, &config),
            stop_signal: spec::signal::stop(&config, &image.config),
            config: Some(config.clone()),
        };
        let assembly = Assembly {
            id: id.clone(),
            built,
            image,
            volumes,
            volume_images,
        };
        let prepared = match host_pod {
            None => assembly.for_guest(&monitor, &config).await?,
            Some(host_pod) => assembly.for_host(host_pod).await?,
        };
        let (mut request, files) = prepared;
        request.stdin = config.stdin;
        request.stdin_once = config.stdin_once;
        request.terminal = config.tty;
        request.log_fd_token = send_log(&monitor, &record.log_path).await?;
        // A task of its own, as with sandboxes: a caller that goes away leaves nothing half made.
        let daemon = Arc::clone(self);
        let (gone, caller) = oneshot::channel::<()>();
        let task = tokio::spawn(
            async move {
                let mut client = monitor.client();
                let result = async {
                    daemon
                        .add_files(&pod, &monitor, files, &mut request)
                        .await?;
                    // The disk does not wait for the guest, nor the guest for the disk.
                    let create = client.create_container(request);
                    let (answer, stored) = tokio::join!(
                        within(CALL, "CreateContainer", create),
                        daemon.store.put_container(record.clone())
                    );
                    daemon.pods.apply(&pod, answer?.snapshot);
                    daemon.confirm_volumes(&pod).await;
                    Ok(stored?)
                }
                .await;
                let abandoned = gone.is_closed();
                if result.is_err() || abandoned {
                    let request = monitor::RemoveContainerRequest {
                        id: record.id.clone(),
                    };
                    let remove = client.remove_container(request);
                    if let Ok(answer) = within(CALL, "RemoveContainer", remove).await {
                        daemon.pods.apply(&pod, answer.snapshot);
                    }
                    if let Err(error) = daemon.remove_files(&pod, &record.id).await {
                        warn!(container = record.id, %error, "files are left for the pod's end");
                    }
                    daemon.store.remove_container(record.id).await?;
                    return result.and(if abandoned {
                        Err(Error::Cancelled)
                    } else {
                        Ok(())
                    });
                }
                let container = Container::new(record, Arc::clone(&pod), name);
                daemon.pods.insert_container(Arc::new(container));
                if let Err(error) = daemon.place(&pod).await {
                    // Better on CPUs of others than not at all.
                    warn!(sandbox = pod.id, %error, "the VM stays on the CPUs it has");
                }
                result
            }
            .with_current_context()
            .in_current_span(),
        );
        let result = task.await.map_err(|_| Error::Cancelled)?;
        drop(caller);
        result.map(|()| id)
    }

    /// Id of the container whose processes a new one is to see (pid mode TARGET).
    fn target(
        &self,
        pod: &Pod,
        security: &cri::LinuxContainerSecurityContext,
    ) -> Result<Option<String>> {
        let options = security.namespace_options.clone().unwrap_or_default();
        if options.pid() != cri::NamespaceMode::Target {
            return Ok(None);
        }
        let target = self.pods.find_container(&options.target_id)?;
        let state = target.state().state();
        if target.pod.id != pod.id || state != monitor::ContainerState::Running {
            return Err(Error::Precondition(format!(
                "config.linux.security_context.namespace_options.target_id: container {} is {} in sandbox {}, not RUNNING in this one",
                target.record.id,
                state.as_str_name(),
                target.pod.id
            )));
        }
        Ok(Some(target.record.id.clone()))
    }

    /// The image a container names, by reference or id.
    fn find_image(&self, name: &str) -> Result<Arc<podvisor_image::Image>> {
        if name.is_empty() {
            return Err(Error::Invalid {
                field: "config.image.image",
                problem: "must not be empty".into(),
            });
        }
        self.images.resolve(name).ok_or_else(|| Error::NotFound {
            kind: "image",
            id: name.into(),
        })
    }

    /// Runs a created container's process.
    ///
    /// # Errors
    /// FAILED_PRECONDITION when it is not CREATED; when the process cannot be executed the container
    /// is EXITED with code 128, reason StartError, and the error says why.
    pub async fn start_container(&self, id: &str) -> Result<()> {
        let container = self.pods.find_container(id)?;
        let monitor = container.pod.ready_monitor()?;
        let state = container.state().state();
        if state != monitor::ContainerState::Created {
            return Err(Error::Precondition(format!(
                "container {} is {}, not CREATED",
                container.record.id,
                state.as_str_name()
            )));
        }
        self.make_room(&container.pod, None).await?;
        let request = monitor::StartContainerRequest {
            id: container.record.id.clone(),
        };
        let mut client = monitor.client();
        let answer = within(CALL, "StartContainer", client.start_container(request)).await?;
        self.pods.apply(&container.pod, answer.snapshot);
        container.pod.samples.want();
        let now = container.state();
        if now.state() == monitor::ContainerState::Exited && now.reason == START_ERROR {
            return Err(Error::Precondition(format!(
                "container {} cannot be started: {}",
                container.record.id, now.message
            )));
        }
        Ok(())
    }

    /// Stops a container: its signal, the grace period, SIGKILL. Fine when it is not running or gone.
    ///
    /// # Errors
    /// The guest does not answer.
    pub async fn stop_container(&self, id: &str, grace_s: i64) -> Result<()> {
        let Some(container) = if_there(self.pods.find_container(id))? else {
            return Ok(());
        };
        if container.state().state() != monitor::ContainerState::Running {
            return Ok(());
        }
        self.stop_running(&container, Duration::from_secs(grace_s.max(0) as u64))
            .await
    }

    async fn stop_running(&self, container: &Container, grace: Duration) -> Result<()> {
        let Some(monitor) = container.pod.monitor() else {
            return Ok(());
        };
        let request = monitor::StopContainerRequest {
            id: container.record.id.clone(),
            signal: container.record.stop_signal,
            grace_ms: grace.as_millis() as u64,
        };
        let mut client = monitor.client();
        let stop = client.stop_container(request);
        let answer = within(grace + CALL, "StopContainer", stop).await?;
        self.pods.apply(&container.pod, answer.snapshot);
        Ok(())
    }

    /// Removes a container, killing it first if it runs. Fine when it is gone.
    ///
    /// # Errors
    /// The guest does not answer.
    pub async fn remove_container(&self, id: &str) -> Result<()> {
        let Some(container) = if_there(self.pods.find_container(id))? else {
            return Ok(());
        };
        if container.state().state() == monitor::ContainerState::Running {
            self.stop_running(&container, Duration::ZERO).await?;
        }
        let _removal = container.removal();
        let id = &container.record.id;
        let pod = &container.pod;
        if let Some(monitor) = pod.monitor() {
            let on_host = Self::is_on_host(&pod.record());
            if !on_host {
                // The guest forgets their files when it finds them gone.
                self.remove_files(pod, id).await?;
            }
            let request = monitor::RemoveContainerRequest { id: id.clone() };
            let mut client = monitor.client();
            let answer = within(CALL, "RemoveContainer", client.remove_container(request)).await?;
            self.pods.apply(pod, answer.snapshot);
            if on_host {
                self.remove_files(pod, id).await?;
            }
        }
        self.store.remove_container(id.clone()).await?;
        self.pods.remove_container(&container);
        Ok(())
    }

    /// Runs a command in a running container and collects what it prints.
    ///
    /// # Errors
    /// FAILED_PRECONDITION when the container does not run, DEADLINE_EXCEEDED when the command takes
    /// longer than `timeout_s` (0: no limit).
    pub async fn exec_sync(
        &self,
        request: cri::ExecSyncRequest,
    ) -> Result<monitor::ExecSyncResponse> {
        let container = self.pods.find_container(&request.container_id)?;
        let monitor = running_monitor(&container)?;
        if request.cmd.is_empty() {
            return Err(Error::Invalid {
                field: "cmd",
                problem: "must not be empty".into(),
            });
        }
        if request.timeout < 0 {
            return Err(Error::Invalid {
                field: "timeout",
                problem: "must not be negative".into(),
            });
        }
        let timeout = Duration::from_secs(request.timeout as u64);
        let call = monitor::ExecSyncRequest {
            container_id: container.record.id.clone(),
            args: request.cmd,
            timeout_ms: timeout.as_millis() as u64,
            output_limit: EXEC_OUTPUT as u64,
        };
        let mut client = monitor.client();
        let limit = if timeout.is_zero() {
            Duration::MAX
        } else {
            timeout + MARGIN
        };
        let mut done = within(limit, "ExecSync", client.exec_sync(call)).await?;
        // Each stream may have filled the message by itself: then each gets its half.
        let excess = (done.stdout.len() + done.stderr.len()).saturating_sub(EXEC_OUTPUT);
        let errors = done.stderr.len().saturating_sub(excess);
        done.stderr.truncate(errors.max(EXEC_OUTPUT / 2));
        done.stdout.truncate(EXEC_OUTPUT - done.stderr.len());
        Ok(done)
    }

    /// Goes on logging in a new file under the container's log path.
    ///
    /// # Errors
    /// FAILED_PRECONDITION when the container does not run; then no file is made.
    pub async fn reopen_container_log(&self, id: &str) -> Result<()> {
        let container = self.pods.find_container(id)?;
        let monitor = running_monitor(&container)?;
        if container.record.log_path.is_empty() {
            return Ok(());
        }
        let request = monitor::ReopenLogRequest {
            id: container.record.id.clone(),
            log_fd_token: send_log(&monitor, &container.record.log_path).await?,
        };
        let mut client = monitor.client();
        within(CALL, "ReopenLog", client.reopen_log(request)).await?;
        Ok(())
    }
}

/// The monitor of a container that runs.
pub fn running_monitor(container: &Container) -> Result<Arc<Monitor>> {
    let state = container.state().state();
    if state != monitor::ContainerState::Running {
        return Err(Error::Precondition(format!(
            "container {} is {}, not RUNNING",
            container.record.id,
            state.as_str_name()
        )));
    }
    Pod::ready_monitor(&container.pod)
}

/// Where a container's log is: absolute, or empty for none (CRI: either part empty means no log).
fn log_path(sandbox: &cri::PodSandboxConfig, config: &cri::ContainerConfig) -> String {
    if sandbox.log_directory.is_empty() || config.log_path.is_empty() {
        return String::new();
    }
    Path::new(&sandbox.log_directory)
        .join(&config.log_path)
        .display()
        .to_string()
}

/// Opens the log for append and hands it to the monitor. Empty for no log.
async fn send_log(monitor: &Monitor, path: &str) -> Result<Vec<u8>> {
    if path.is_empty() {
        return Ok(Vec::new());
    }
    let file = open_file(path.into(), |path| {
        if let Some(dir) = path.parent() {
            std::fs::create_dir_all(dir)?;
        }
        File::options()
            .append(true)
            .create(true)
            .mode(0o640)
            .open(path)
    })
    .await?;
    monitor.send_fd(file).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_log_without_both_parts() {
        let mut sandbox = cri::PodSandboxConfig::default();
        let mut config = cri::ContainerConfig::default();
        assert_eq!(log_path(&sandbox, &config), "");
        sandbox.log_directory = "/var/log/pods/x".into();
        assert_eq!(log_path(&sandbox, &config), "");
        config.log_path = "c/0.log".into();
        assert_eq!(log_path(&sandbox, &config), "/var/log/pods/x/c/0.log");
    }
}
