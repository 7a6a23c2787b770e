//! Processes by file descriptor (pidfd_open(2)): the number of a process that has ended may soon
//! be another's, its descriptor never is.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;

/// A process.
#[derive(Debug)]
pub struct PidFd(OwnedFd);

impl PidFd {
    /// The process that has this number now.
    ///
    /// # Errors
    /// `ESRCH`: none has.
    pub fn open(pid: u32) -> io::Result<Self> {
        // SAFETY: takes two integers; gives a new descriptor or -1.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid as libc::pid_t, 0) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: a descriptor that the kernel has just made for us; it fits an int as all do.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd as i32) }))
    }

    /// Sends a signal.
    ///
    /// # Errors
    /// `ESRCH`: it has ended and its parent knows.
    pub fn signal(&self, signal: Signal) -> io::Result<()> {
        let no_info = std::ptr::null::<libc::siginfo_t>();
        // SAFETY: an open descriptor, an integer, and no siginfo to be read.
        let sent = unsafe {
            libc::syscall(
                libc::SYS_pidfd_send_signal,
                self.0.as_raw_fd(),
                signal as libc::c_int,
                no_info,
                0,
            )
        };
        if sent < 0 {
            Err(io::Error::last_os_error())
        } else {
            Ok(())
        }
    }

    /// Waits until the process has ended. False when `deadline` comes first. Blocking.
    ///
    /// # Errors
    /// poll(2) fails, which it does not.
    pub fn wait(&self, deadline: Instant) -> io::Result<bool> {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let timeout =
                PollTimeout::try_from(left + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX);
            match poll(
                &mut [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)],
                timeout,
            ) {
                Ok(0) if left.is_zero() => return Ok(false),
                Ok(0) | Err(nix::errno::Errno::EINTR) => {}
                Ok(_) => return Ok(true),
                Err(e) => return Err(e.into()),
            }
        }
    }
}

impl AsFd for PidFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for PidFd {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

/// When a process was started, in clock ticks since the boot: with its number, its name for ever
/// (proc_pid_stat(5), field 22).
///
/// # Errors
/// There is no such process.
pub fn start_time(pid: u32) -> io::Result<u64> {
    let stat = fs::read(format!("/proc/{pid}/stat"))?;
    parse_start_time(&stat).ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))
}

fn parse_start_time(stat: &[u8]) -> Option<u64> {
    // The second field is a name in parentheses which may hold anything.
    let name_end = stat.iter().rposition(|b| *b == b')')?;
    let after = str::from_utf8(&stat[name_end + 1..]).ok()?;
    // The first of these is field 3.
    after.split_ascii_whitespace().nth(22 - 3)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn a_process_is_killed_and_waited_for() {
        let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
        let process = PidFd::open(child.id()).unwrap();
        assert!(start_time(child.id()).unwrap() > 0);
        assert!(!process.wait(Instant::now()).unwrap());
        process.signal(Signal::SIGKILL).unwrap();
        assert!(
            process
                .wait(Instant::now() + Duration::from_mins(1))
                .unwrap()
        );
        child.wait().unwrap();
        assert_eq!(
            process.signal(Signal::SIGKILL).unwrap_err().raw_os_error(),
            Some(libc::ESRCH)
        );
    }

    #[test]
    fn start_times() {
        let fields: Vec<String> = (3..30).map(|i| i.to_string()).collect();
        let stat = format!("12 (a) 1 (b)) {}", fields.join(" "));
        assert_eq!(parse_start_time(stat.as_bytes()), Some(22));
        assert_eq!(parse_start_time(b"12 (a) S 1"), None);
        assert_eq!(parse_start_time(b""), None);
    }
}
