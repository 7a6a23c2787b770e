//! More processes in a running container.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use nix::sys::signal::Signal;
use podvisor_proto::agent::ExecRequest;
use tokio::sync::oneshot;

use super::{
    Container, ContainerError, ENDED_EXEC_LIMIT, Exec, Pod, RUNNING_EXEC_LIMIT, State, What,
    check_id, fingerprint, kernel, open_pidfd,
};
use crate::cgroup::Cgroup;
use crate::launcher::{ExecRequest as LaunchRequest, Launched, Request};
use crate::oci::Process;
use crate::reaper::Exit;
use crate::stdio::{self, Wiring};

impl Pod {
    /// Starts a process in a running container; returns its pid. The same call again gets the same answer.
    pub async fn exec(&self, request: ExecRequest) -> Result<i32, ContainerError> {
        check_id(&request.exec_id)?;
        if request.args.is_empty() {
            return Err(ContainerError::Invalid(
                "the exec has no command".to_owned(),
            ));
        }
        let container = self.find(&request.container_id)?;
        let fingerprint = fingerprint(&request);
        let Some(place) = Place::take(&container, &request.exec_id, fingerprint)? else {
            return container.pid_of(&request.exec_id);
        };
        let stdio = request.stdio.clone().unwrap_or_default();
        let (uid, gid) = container.owner();
        let wiring = stdio::claim(&self.0.streams, &stdio)
            .await?
            .connect(uid, gid)
            .map_err(kernel("making the standard streams"))?;
        let (first_process, container_cgroup) = container.first_process()?;
        let cgroup = container_cgroup
            .create_for_exec(&request.exec_id)
            .map_err(kernel("making the control group"))?;
        let launched = self
            .launch_exec(&container, &request, wiring, &cgroup, &first_process)
            .await;
        let (mut exec, exit) = match launched {
            Ok(launched) => launched,
            Err(error) => {
                let _ = cgroup.kill();
                self.0.watch.remove_when_empty(cgroup);
                return Err(error);
            }
        };
        exec.fingerprint = fingerprint;
        let pid = exec.pid;
        let signal = place.fill(exec);
        tokio::spawn(self.clone().await_exec(
            Arc::clone(&container),
            request.exec_id.clone(),
            exit,
        ));
        if let Some(signal) = signal {
            cgroup
                .signal(signal)
                .map_err(kernel("signalling a control group"))?;
        }
        Ok(pid)
    }

    async fn launch_exec(
        &self,
        container: &Container,
        request: &ExecRequest,
        wiring: Wiring,
        cgroup: &Cgroup,
        first_process: &OwnedFd,
    ) -> Result<(Exec, oneshot::Receiver<Exit>), ContainerError> {
        let Wiring {
            process_side,
            relays,
        } = wiring;
        let directory = cgroup.open().map_err(kernel("opening the control group"))?;
        let message = Request::Exec(Box::new(LaunchRequest {
            process: container.exec_process(request),
            seccomp: container.seccomp.clone(),
            user_namespace: container.ids.is_some(),
        }));
        let expectation = self.0.reaper.expect();
        let Launched { pid, console } = self
            .0
            .launcher
            .launch(
                &message,
                process_side,
                &[directory.as_fd(), first_process.as_fd()],
            )
            .await?;
        let exit = expectation.claim(pid);
        let relays = relays
            .begin(console)
            .map_err(kernel("connecting the standard streams"))?;
        let exec = Exec {
            fingerprint: 0,
            pid,
            cgroup: cgroup.clone(),
            relays,
            pidfd: open_pidfd(pid),
        };
        Ok((exec, exit))
    }

    async fn await_exec(
        self,
        container: Arc<Container>,
        id: String,
        exit: oneshot::Receiver<Exit>,
    ) {
        let Ok(exit) = exit.await else { return };
        {
            let mut execs = container.execs();
            if let Some(mut exec) = execs.running.remove(&id) {
                exec.pidfd = None;
                exec.relays.end_input();
                // What the exec left running goes on, and its group stays until it is empty.
                self.0.watch.remove_when_empty(exec.cgroup.clone());
                execs.ended.push_back((id.clone(), exec));
                if execs.ended.len() > ENDED_EXEC_LIMIT {
                    execs.ended.pop_front();
                }
            }
        }
        if let State::Started(started) = &*container.state() {
            started.memory.look();
        }
        self.0.events.exited(&container.id, &id, exit);
    }
}

impl Container {
    /// The process of an exec: the container's own, with what the request changes.
    fn exec_process(&self, request: &ExecRequest) -> Process {
        let mut process = self.process.clone();
        process.args.clone_from(&request.args);
        process.terminal = request.stdio.as_ref().is_some_and(|stdio| stdio.terminal);
        if !request.env.is_empty() {
            process.env.clone_from(&request.env);
        }
        if process.terminal && !process.env.iter().any(|entry| entry.starts_with("TERM=")) {
            process.env.push("TERM=xterm".to_owned());
        }
        if !request.cwd.is_empty() {
            process.cwd = request.cwd.clone().into();
        }
        process
    }

    /// The first process, and the group that everything of the container is in.
    pub(super) fn first_process(&self) -> Result<(Arc<OwnedFd>, Cgroup), ContainerError> {
        match &*self.state() {
            State::Started(started) => match &started.pidfd {
                Some(pidfd) => Ok((Arc::clone(pidfd), started.cgroup.clone())),
                None => Err(self.wrong_state("has ended")),
            },
            State::Created => Err(self.wrong_state("is not started")),
            State::Removing => Err(self.wrong_state("is being removed")),
        }
    }

    fn pid_of(&self, exec_id: &str) -> Result<i32, ContainerError> {
        self.execs()
            .get(exec_id)
            .map(|exec| exec.pid)
            .ok_or_else(|| ContainerError::NotFound(What::Exec(exec_id.to_owned())))
    }
}

/// The right to start one more exec, given back when the call ends.
struct Place<'a> {
    container: &'a Container,
    id: &'a str,
}

impl<'a> Place<'a> {
    /// None when the same exec is there already.
    fn take(
        container: &'a Container,
        id: &'a str,
        fingerprint: u64,
    ) -> Result<Option<Self>, ContainerError> {
        let mut execs = container.execs();
        if let Some(exec) = execs.get(id) {
            return if exec.fingerprint == fingerprint {
                Ok(None)
            } else {
                Err(ContainerError::Exists(What::Exec(id.to_owned())))
            };
        }
        if execs.running.len() + execs.starting.len() >= RUNNING_EXEC_LIMIT {
            return Err(ContainerError::TooMany("running execs"));
        }
        if execs.starting.contains_key(id) {
            return Err(ContainerError::State {
                what: What::Exec(id.to_owned()),
                state: "is being started",
            });
        }
        execs.starting.insert(id.to_owned(), None);
        Ok(Some(Self { container, id }))
    }

    /// The exec runs. Returns the signal that came before it did.
    fn fill(self, exec: Exec) -> Option<Signal> {
        let mut execs = self.container.execs();
        execs.running.insert(self.id.to_owned(), exec);
        execs.starting.remove(self.id).flatten()
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.container.execs().starting.remove(self.id);
    }
}
