//! Signals, terminal sizes, the end of it all.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::signal::Signal;
use podvisor_proto::agent::{PortForwardRequest, ResizeRequest, SignalRequest};

use super::{ContainerError, Pod, State, What, kernel};
use crate::cgroup::Cgroup;
use crate::kmsg;
use crate::port_forward;
use crate::streams::Token;

/// From killing all containers to the guest's end.
const SHUTDOWN_DEADLINE: Duration = Duration::from_secs(5);

impl Pod {
    /// Sends a signal to a process, or to all of a container or an exec. A process that is gone has got it.
    pub async fn signal(&self, request: &SignalRequest) -> Result<(), ContainerError> {
        let signal = i32::try_from(request.signal)
            .ok()
            .and_then(|number| Signal::try_from(number).ok())
            .ok_or_else(|| ContainerError::Invalid(format!("no signal {}", request.signal)))?;
        let Some((pidfd, cgroup)) = self.target(&request.container_id, &request.exec_id, signal)?
        else {
            return Ok(());
        };
        if request.all {
            let sent = tokio::task::spawn_blocking(move || cgroup.signal(signal)).await?;
            return sent.map_err(kernel("signalling a control group"));
        }
        match pidfd {
            Some(pidfd) => send(&pidfd, signal).map_err(kernel("signalling a process")),
            None => Ok(()),
        }
    }

    /// Connects a stream to a port of the pod's loopback interface.
    pub async fn port_forward(&self, request: &PortForwardRequest) -> Result<(), ContainerError> {
        let port = request.port;
        let invalid = || ContainerError::Invalid(format!("{port} is no port"));
        let port = u16::try_from(port).ok().filter(|&port| port > 0);
        let port = port.ok_or_else(invalid)?;
        let token = Token::parse(&request.stream)?;
        let token = token.ok_or_else(|| ContainerError::Invalid("no stream".to_owned()))?;
        let place = Arc::clone(&self.0.forwards).try_acquire_owned();
        let place = place.map_err(|_| ContainerError::TooMany("forwarded connections"))?;
        let host = self.0.streams.claim(token).await?;
        let namespace = self.network_namespace();
        let namespace = namespace.map_err(kernel("the pod's network namespace"))?;
        let connected = port_forward::dial(port, namespace).await;
        let connected = connected.map_err(|source| ContainerError::Port { port, source })?;
        port_forward::forward(connected, host, place);
        Ok(())
    }

    /// Sets the size of a terminal.
    pub fn resize(&self, request: &ResizeRequest) -> Result<(), ContainerError> {
        let size = |number: u32| {
            u16::try_from(number)
                .map_err(|_| ContainerError::Invalid(format!("{number} is no terminal size")))
        };
        let (columns, rows) = (size(request.columns)?, size(request.rows)?);
        let container = self.find(&request.container_id)?;
        let (what, resized) = if request.exec_id.is_empty() {
            let resized = match &*container.state() {
                State::Started(started) => started.relays.resize(columns, rows),
                State::Created | State::Removing => {
                    return Err(container.wrong_state("is not running"));
                }
            };
            (container.what(), resized)
        } else {
            let what = What::Exec(request.exec_id.clone());
            let execs = container.execs();
            let Some(exec) = execs.get(&request.exec_id) else {
                return Err(ContainerError::NotFound(what));
            };
            (what, exec.relays.resize(columns, rows))
        };
        match resized {
            Ok(true) => Ok(()),
            Ok(false) => Err(ContainerError::State {
                what,
                state: "has no terminal",
            }),
            Err(error) => Err(kernel("setting the size of a terminal")(error)),
        }
    }

    /// Kills all containers and writes everything to the disks: the VM may be ended as it is then, which takes less time
    /// than the kernel's own way to an end.
    pub async fn shut_down(&self) -> Result<(), ContainerError> {
        tokio::task::spawn_blocking(|| {
            if let Err(error) = Cgroup::all_containers().kill_and_wait(SHUTDOWN_DEADLINE) {
                kmsg::error!("shutting down with processes left: {error}");
            }
            nix::unistd::sync();
        })
        .await?;
        Ok(())
    }

    /// What a signal is for: the process unless it has ended, and its group. None when there never was
    /// one, or nobody remembers.
    #[expect(clippy::type_complexity, reason = "a pair, used once")]
    fn target(
        &self,
        container_id: &str,
        exec_id: &str,
        signal: Signal,
    ) -> Result<Option<(Option<Arc<OwnedFd>>, Cgroup)>, ContainerError> {
        let container = self.find(container_id)?;
        if exec_id.is_empty() {
            return match &*container.state() {
                State::Started(started) => {
                    Ok(Some((started.pidfd.clone(), started.cgroup.clone())))
                }
                State::Created => Err(container.wrong_state("is not started")),
                State::Removing => Ok(None),
            };
        }
        let mut execs = container.execs();
        if let Some(pending) = execs.starting.get_mut(exec_id) {
            // It gets the signal as soon as it runs.
            *pending = Some(signal);
            return Ok(None);
        }
        Ok(execs
            .get(exec_id)
            .map(|exec| (exec.pidfd.clone(), exec.cgroup.clone())))
    }
}

fn send(pidfd: &OwnedFd, signal: Signal) -> io::Result<()> {
    // SAFETY: a descriptor, numbers and null.
    let result = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd.as_raw_fd(),
            signal as libc::c_int,
            std::ptr::null::<libc::siginfo_t>(),
            0,
        )
    };
    match Errno::result(result) {
        Ok(_) | Err(Errno::ESRCH) => Ok(()),
        Err(error) => Err(error.into()),
    }
}
