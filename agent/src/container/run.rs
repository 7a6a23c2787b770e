//! Start, and what happens when a container's first process ends.

use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use podvisor_proto::agent::{StartContainerRequest, Stdio};
use tokio::sync::oneshot;

use super::{Container, ContainerError, Pod, SPEC, Started, State, kernel, open_pidfd, wait_for};
use crate::cgroup::Cgroup;
use crate::fd::null;
use crate::kmsg;
use crate::launcher::{CreateRequest, Launched, Request};
use crate::reaper::Exit;
use crate::stdio::{self, Wiring};
use crate::watch::MemoryWatch;

/// From `cgroup.kill` to the end of a process that could not be started.
const KILL_DEADLINE: Duration = Duration::from_secs(10);

impl Pod {
    /// Executes the container's first process; returns its pid. The same call again gets the same answer.
    pub async fn start(&self, request: StartContainerRequest) -> Result<i32, ContainerError> {
        let container = self.find(&request.id)?;
        let stdio = request.stdio.unwrap_or_default();
        let _turn = container.turn.lock().await;
        match &*container.state() {
            State::Created => {}
            State::Started(started) if started.stdio == stdio => return Ok(started.pid),
            State::Started(_) => return Err(container.wrong_state("is started already")),
            State::Removing => return Err(container.wrong_state("is being removed")),
        }
        if stdio.terminal != container.process.terminal {
            return Err(ContainerError::Invalid(
                "spec and standard streams disagree about a terminal".to_owned(),
            ));
        }
        let claimed = stdio::claim(&self.0.streams, &stdio).await?;
        let (uid, gid) = container.owner();
        let wiring = claimed
            .connect(uid, gid)
            .map_err(kernel("making the standard streams"))?;
        wait_for(&self.0.prepared).await;
        if container.pod_pids {
            self.ensure_pid_namespace(container.ids.is_some()).await?;
        }
        let cgroup = Cgroup::create_for_container(&container.id)
            .map_err(kernel("making the control group"))?;
        if container.ids.is_some() && container.manages_cgroup {
            cgroup
                .delegate_to(uid)
                .map_err(kernel("delegating the control group"))?;
        }
        if let Some(devices) = &container.devices {
            devices
                .attach(&cgroup)
                .map_err(kernel("restricting the use of devices"))?;
        }
        let memory = self.0.watch.memory(&container.id, &cgroup);
        match self
            .launch(&container, stdio, wiring, &cgroup, Arc::clone(&memory))
            .await
        {
            Ok((started, exit)) => {
                let pid = started.pid;
                *container.state() = State::Started(started);
                tokio::spawn(self.clone().await_exit(Arc::clone(&container), exit));
                Ok(pid)
            }
            Err(error) => {
                let id = container.id.clone();
                tokio::task::spawn_blocking(move || {
                    if let Err(error) = cgroup.destroy(KILL_DEADLINE) {
                        kmsg::error!("cannot remove the control group of container {id}: {error}");
                    }
                })
                .await?;
                self.0.watch.forget(&memory);
                Err(error)
            }
        }
    }

    async fn launch(
        &self,
        container: &Container,
        stdio: Stdio,
        wiring: Wiring,
        cgroup: &Cgroup,
        memory: Arc<MemoryWatch>,
    ) -> Result<(Started, oneshot::Receiver<Exit>), ContainerError> {
        let Wiring {
            process_side,
            relays,
        } = wiring;
        let directory = cgroup.open().map_err(kernel("opening the control group"))?;
        let target = container
            .pid_target
            .as_ref()
            .map(|id| self.find(id)?.first_process())
            .transpose()?
            .map(|(process, _)| process);
        let mut fds = vec![directory.as_fd()];
        fds.extend(target.as_ref().map(|process| process.as_fd()));
        let request = Request::Create(CreateRequest {
            spec: container.bundle.join(SPEC),
            seccomp: container.seccomp.clone(),
            ids: container.ids,
        });
        let expectation = self.0.reaper.expect();
        let Launched { pid, console } =
            self.0.launcher.launch(&request, process_side, &fds).await?;
        let exit = expectation.claim(pid);
        let relays = relays
            .begin(console)
            .map_err(kernel("connecting the standard streams"))?;
        let started = Started {
            stdio,
            pid,
            cgroup: cgroup.clone(),
            memory,
            relays,
            pidfd: open_pidfd(pid),
        };
        Ok((started, exit))
    }

    /// Waits for the end of the container's first process, which is the end of all of them.
    async fn await_exit(self, container: Arc<Container>, exit: oneshot::Receiver<Exit>) {
        let Ok(exit) = exit.await else { return };
        if let State::Started(started) = &mut *container.state() {
            started.pidfd = None;
            started.relays.end_input();
            // In a pid namespace of its own nothing is left; in the pod's, there may be.
            if let Err(error) = started.cgroup.kill() {
                kmsg::error!(
                    "cannot kill the rest of container {}: {error}",
                    container.id
                );
            }
            started.memory.look();
        }
        self.0.events.exited(&container.id, "", exit);
    }

    /// Makes the pid namespace that the pod's containers share, with the process that holds it.
    async fn ensure_pid_namespace(&self, user_namespace: bool) -> Result<(), ContainerError> {
        let mut present = self.0.pid_namespace.lock().await;
        if *present {
            return Ok(());
        }
        let streams = || null().map_err(kernel("opening /dev/null"));
        let stdio = [streams()?, streams()?, streams()?];
        let request = Request::Pause { user_namespace };
        let pause = self.0.launcher.launch(&request, stdio, &[]).await?;
        let namespaces = format!("/proc/{}/ns", pause.pid);
        crate::sandbox::keep_namespace(Path::new(&namespaces), "pid")
            .map_err(kernel("keeping the pod's pid namespace"))?;
        *present = true;
        Ok(())
    }
}
