//! A container's first process, by libcontainer.

use std::io::IoSliceMut;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixListener;
use std::path::Path;

use libcontainer::container::builder::ContainerBuilder;
use libcontainer::syscall::syscall::SyscallType;
use libcontainer::workload::{
    Executor, ExecutorError, ExecutorSetEnvsError, ExecutorValidationError,
};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use oci_spec::runtime::Spec;

use super::executable;
use super::message::{CreateRequest, Report, Reporter};
use super::process::Failure;

/// Where libcontainer keeps what it knows of a container: a directory named after it.
pub const STATE: &str = "/run/podvisor/libcontainer";
/// In the bundle: where libcontainer sends the master side of a container's terminal.
const CONSOLE_SOCKET: &str = "console.sock";

/// Creates the container and starts its program.
pub fn run(request: CreateRequest, reporter: Reporter) -> Result<(), Failure> {
    let failed = |error: &dyn std::fmt::Display| Failure::other("creating the container", error);
    let console = request.bundle.join(CONSOLE_SOCKET);
    let listener = request
        .terminal
        .then(|| {
            let _ = std::fs::remove_file(&console);
            UnixListener::bind(&console)
        })
        .transpose()
        .map_err(|error| failed(&error))?;
    let mut container = ContainerBuilder::new(request.id, SyscallType::default())
        .with_root_path(Path::new(STATE))
        .map_err(|error| failed(&error))?
        .with_executor(Program { reporter })
        .with_console_socket(listener.as_ref().map(|_| console.clone()))
        .as_init(&request.bundle)
        .with_systemd(false)
        .with_detach(true)
        .build()
        .map_err(|error| failed(&causes(&error)))?;
    let pid = container
        .pid()
        .ok_or_else(|| failed(&"it has no process"))?;
    reporter.send(&Report::Process(pid.as_raw()));
    if let Some(listener) = listener {
        let master = receive_console(&listener).map_err(|error| failed(&error))?;
        reporter
            .send_console(master.as_fd())
            .map_err(|error| failed(&error))?;
        let _ = std::fs::remove_file(console);
    }
    container
        .start()
        .map_err(|error| Failure::other("starting the container", &causes(&error)))
}

/// libcontainer has connected and sent it before `build` returned.
fn receive_console(listener: &UnixListener) -> std::io::Result<OwnedFd> {
    let (stream, _) = listener.accept()?;
    let mut bytes = [0; 4096];
    let mut slices = [IoSliceMut::new(&mut bytes)];
    let mut space = nix::cmsg_space!(RawFd);
    let received = recvmsg::<()>(
        stream.as_raw_fd(),
        &mut slices,
        Some(&mut space),
        MsgFlags::MSG_CMSG_CLOEXEC,
    )?;
    for message in received.cmsgs()? {
        if let ControlMessageOwned::ScmRights(fds) = message
            && let Some(fd) = fds.first()
        {
            // SAFETY: the kernel has just made this descriptor for us.
            return Ok(unsafe { OwnedFd::from_raw_fd(*fd) });
        }
    }
    Err(std::io::ErrorKind::UnexpectedEof.into())
}

/// The error with its causes: libcontainer's own texts name only the step.
fn causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.ends_with(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text
}

/// Executes the container's program. libcontainer's own executor refuses programs that only their owner
/// may execute, and has no way to tell of an `execve` that fails.
#[derive(Clone)]
struct Program {
    reporter: Reporter,
}

impl Executor for Program {
    fn exec(&self, spec: &Spec) -> Result<(), ExecutorError> {
        let process = spec.process().as_ref().ok_or(ExecutorError::InvalidArg)?;
        let failure = executable::execute(
            process.args().as_deref().unwrap_or_default(),
            process.env().as_deref().unwrap_or_default(),
        );
        self.reporter.fail(failure.kind, &failure.message);
        Err(ExecutorError::Other(failure.message))
    }

    fn validate(&self, _spec: &Spec) -> Result<(), ExecutorValidationError> {
        // `exec` follows at once, and says what is wrong in the program's own environment.
        Ok(())
    }

    fn setup_envs(
        &self,
        _environment: std::collections::HashMap<String, String>,
    ) -> Result<(), ExecutorSetEnvsError> {
        // `exec` hands the spec's environment over, in its order.
        Ok(())
    }
}
