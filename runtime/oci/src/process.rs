//! A process that an OCI runtime has left to us.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use tokio::io::unix::AsyncFd;

/// Exit code of what signal 0 would have ended: 128 + n for signal n.
const SIGNALLED: u32 = 128;

/// A child of this process. Its number is its own until [`Process::exited`] has returned.
#[derive(Debug)]
pub struct Process {
    pid: u32,
    fd: AsyncFd<OwnedFd>,
}

impl Process {
    /// Of a child, which may have ended already.
    ///
    /// # Errors
    /// There is no such process.
    pub fn of(pid: u32) -> io::Result<Self> {
        // SAFETY: two numbers.
        let fd = Errno::result(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) })?;
        // SAFETY: the kernel has just made it, nobody else has it.
        let fd = unsafe { OwnedFd::from_raw_fd(fd as i32) };
        // SAFETY: the AsyncFd owns the descriptor: it stays open for as long as it is registered.
        let fd = unsafe { AsyncFd::register(fd) }?;
        Ok(Self { pid, fd })
    }

    /// Its number on the host.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Waits for its end and takes its exit code, once: 0 to 255, 128 + n when signal n ended it.
    ///
    /// # Errors
    /// It is no child of this process.
    pub async fn exited(&self) -> io::Result<u32> {
        loop {
            let mut ready = self.fd.readable().await?;
            match exit_code(self.fd.get_ref())? {
                Some(code) => return Ok(code),
                None => ready.clear_ready(),
            }
        }
    }

    /// Sends it a signal. One that has ended is no error.
    ///
    /// # Errors
    /// The number is no signal.
    pub fn signal(&self, signal: u32) -> io::Result<()> {
        // SAFETY: a descriptor, numbers, and no siginfo.
        let sent = unsafe {
            libc::syscall(
                libc::SYS_pidfd_send_signal,
                self.fd.get_ref().as_raw_fd(),
                signal,
                std::ptr::null::<libc::siginfo_t>(),
                0,
            )
        };
        match Errno::result(sent) {
            Ok(_) | Err(Errno::ESRCH) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Kills it and its process group. Not to be called after [`Process::exited`] has returned.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn kill_group(&self) -> io::Result<()> {
        self.signal(libc::SIGKILL as u32)?;
        match killpg(Pid::from_raw(self.pid as i32), Signal::SIGKILL) {
            Ok(()) | Err(Errno::ESRCH) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

/// Reaps a child that has ended. nix's wrapper knows no real-time signals.
fn exit_code(pidfd: &OwnedFd) -> io::Result<Option<u32>> {
    // SAFETY: all zeros is a valid siginfo_t.
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    let flags = libc::WEXITED | libc::WNOHANG;
    // SAFETY: a descriptor, a structure that lives through the call, flags.
    let result = unsafe {
        libc::waitid(
            libc::P_PIDFD,
            pidfd.as_raw_fd() as u32,
            &raw mut info,
            flags,
        )
    };
    Errno::result(result)?;
    // SAFETY: waitid has filled in what belongs to SIGCHLD, or left zeros.
    let (pid, status) = unsafe { (info.si_pid(), info.si_status()) };
    Ok(match (pid, info.si_code) {
        (0, _) => None,
        (_, libc::CLD_EXITED) => Some(status as u32 & 0xff),
        _ => Some(SIGNALLED + status as u32),
    })
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    // Children are reaped by their numbers.
    #[allow(clippy::zombie_processes)]
    #[tokio::test]
    async fn exits_have_codes() {
        for (script, code) in [("exit 3", 3), ("kill -9 $$", 137), ("kill -40 $$", 168)] {
            let child = Command::new("sh").args(["-c", script]).spawn().unwrap();
            let process = Process::of(child.id()).unwrap();
            assert_eq!(process.exited().await.unwrap(), code, "{script}");
            process.signal(9).unwrap();
        }
    }

    #[allow(clippy::zombie_processes)]
    #[tokio::test]
    async fn a_group_is_killed() {
        use std::os::unix::process::CommandExt;
        let mut command = Command::new("sh");
        command
            .args(["-c", "sleep 1000 & echo $!; wait"])
            .process_group(0);
        let mut child = command
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        let stdout = child.stdout.take().unwrap();
        io::BufRead::read_line(&mut io::BufReader::new(stdout), &mut line).unwrap();
        let grandchild = Process::of(line.trim().parse().unwrap()).unwrap();
        let process = Process::of(child.id()).unwrap();
        process.kill_group().unwrap();
        assert_eq!(process.exited().await.unwrap(), 137);
        // Nobody's child of ours: only its end can be seen.
        grandchild.fd.readable().await.unwrap().clear_ready();
    }
}
