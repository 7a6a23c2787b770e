//! The streams of a process: pipes, or a terminal.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::errno::Errno;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use tokio::net::{UnixListener, UnixStream};

/// Which streams a process has. Standard output and error it has always.
#[derive(Clone, Copy, Debug)]
pub struct Wanted {
    /// Standard input; /dev/null otherwise.
    pub stdin: bool,
    /// A terminal for all of them.
    pub terminal: bool,
}

/// Our ends of the streams of a process.
#[derive(Debug, Default)]
pub struct Streams {
    /// Standard input; none with a terminal.
    pub stdin: Option<OwnedFd>,
    /// Standard output, or the terminal, both ways.
    pub stdout: Option<OwnedFd>,
    /// Standard error; none with a terminal.
    pub stderr: Option<OwnedFd>,
}

/// Reads what is there from our end of a stream. EIO is the end of a terminal.
///
/// # Errors
/// As read(2).
pub fn read(stream: &File, buffer: &mut [u8]) -> io::Result<usize> {
    Ok(past_first_eio(|| nix::unistd::read(stream, &mut *buffer))?)
}

/// The first EIO of a terminal whose last user closed it may come before its last bytes: the kernel looks for bytes and
/// then for the end (Linux, `n_tty_read`), so who writes and closes in between is overtaken. A second one comes after all.
fn past_first_eio(mut read: impl FnMut() -> nix::Result<usize>) -> nix::Result<usize> {
    match read() {
        Err(Errno::EIO) => read(),
        result => result,
    }
}

/// A terminal whose size can be set; open for as long as this is.
#[derive(Debug)]
pub struct Terminal(OwnedFd);

impl Terminal {
    /// The one that a process's stream belongs to.
    ///
    /// # Errors
    /// Out of descriptors.
    pub fn of(stream: &OwnedFd) -> io::Result<Self> {
        stream.try_clone().map(Self)
    }

    /// Sets the size, in characters (`TIOCSWINSZ`, ioctl_tty(2)).
    ///
    /// # Errors
    /// More than 65535, or the kernel refuses.
    pub fn resize(&self, columns: u32, rows: u32) -> io::Result<()> {
        let number = |number: u32| u16::try_from(number).map_err(io::Error::other);
        let size = libc::winsize {
            ws_row: number(rows)?,
            ws_col: number(columns)?,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        // SAFETY: a descriptor, and a structure that lives through the call.
        let set = unsafe { libc::ioctl(self.0.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) };
        Errno::result(set)?;
        Ok(())
    }
}

/// The process's ends, for the runtime's command to inherit.
#[derive(Debug, Default)]
struct Pipes {
    stdin: Option<File>,
    stdout: Option<File>,
    stderr: Option<File>,
}

#[async_trait::async_trait]
impl runc::asynchronous::Io for Pipes {
    async fn set(&self, command: &mut runc::Command) -> io::Result<()> {
        if let Some(stdin) = &self.stdin {
            command.stdin(stdin.try_clone()?);
        }
        if let (Some(stdout), Some(stderr)) = (&self.stdout, &self.stderr) {
            command.stdout(stdout.try_clone()?);
            command.stderr(stderr.try_clone()?);
        }
        Ok(())
    }

    /// They are closed when this is dropped.
    async fn close_after_start(&self) {}
}

/// Streams of a process that is about to be started.
pub(crate) enum Stdio {
    Pipes {
        theirs: Arc<dyn runc::asynchronous::Io>,
        ours: Streams,
    },
    Terminal(ConsoleSocket),
}

impl Stdio {
    /// `name` is unique among the processes that are being started in `dir`.
    pub fn new(wanted: Wanted, dir: &Path, name: &str) -> io::Result<Self> {
        if wanted.terminal {
            return ConsoleSocket::bind(dir, name).map(Self::Terminal);
        }
        let stdin = wanted.stdin.then(pipe).transpose()?;
        let (stdout, stderr) = (pipe()?, pipe()?);
        let (stdin_theirs, stdin_ours) = stdin.unzip();
        let theirs = Pipes {
            stdin: stdin_theirs.map(File::from),
            stdout: Some(stdout.1.into()),
            stderr: Some(stderr.1.into()),
        };
        Ok(Self::Pipes {
            theirs: Arc::new(theirs),
            ours: Streams {
                stdin: stdin_ours,
                stdout: Some(stdout.0),
                stderr: Some(stderr.0),
            },
        })
    }

    pub fn io(&self) -> Option<Arc<dyn runc::asynchronous::Io>> {
        match self {
            Self::Pipes { theirs, .. } => Some(Arc::clone(theirs)),
            Self::Terminal(_) => None,
        }
    }

    pub fn console_socket(&self) -> Option<PathBuf> {
        match self {
            Self::Pipes { .. } => None,
            Self::Terminal(socket) => Some(socket.address()),
        }
    }

    /// Our ends, once the process runs.
    pub async fn into_streams(self) -> io::Result<Streams> {
        match self {
            Self::Pipes { ours, .. } => Ok(ours),
            Self::Terminal(socket) => Ok(Streams {
                stdout: Some(socket.receive().await?),
                ..Streams::default()
            }),
        }
    }
}

/// The read end and the write end, close-on-exec.
fn pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC)?)
}

/// Where the runtime sends the terminal that it has made (OCI runtimes' `--console-socket`).
pub(crate) struct ConsoleSocket {
    listener: UnixListener,
    dir: File,
    name: String,
}

impl ConsoleSocket {
    fn bind(dir: &Path, name: &str) -> io::Result<Self> {
        let dir = File::open(dir)?;
        let name = format!("{name}.tty");
        let short = format!("/proc/self/fd/{}/{name}", dir.as_raw_fd());
        Ok(Self {
            listener: UnixListener::bind(short)?,
            dir,
            name,
        })
    }

    /// Good in other processes of the same pid namespace, and short: a socket's address holds 108 bytes (unix(7)).
    fn address(&self) -> PathBuf {
        let (pid, dir) = (std::process::id(), self.dir.as_raw_fd());
        format!("/proc/{pid}/fd/{dir}/{}", self.name).into()
    }

    async fn receive(self) -> io::Result<OwnedFd> {
        let (stream, _) = self.listener.accept().await?;
        loop {
            stream.readable().await?;
            match stream.try_io(tokio::io::Interest::READABLE, || receive_fd(&stream)) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                result => return result,
            }
        }
    }
}

impl Drop for ConsoleSocket {
    fn drop(&mut self) {
        let flags = nix::unistd::UnlinkatFlags::NoRemoveDir;
        let _ = nix::unistd::unlinkat(self.dir.as_fd(), self.name.as_str(), flags);
    }
}

fn receive_fd(stream: &UnixStream) -> io::Result<OwnedFd> {
    use std::os::fd::FromRawFd;
    // The message is the terminal's name; nobody needs it.
    let mut text = [0; 4096];
    let mut buffers = [io::IoSliceMut::new(&mut text)];
    let mut control = nix::cmsg_space!([i32; 1]);
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let message = recvmsg::<()>(stream.as_raw_fd(), &mut buffers, Some(&mut control), flags)?;
    let fds = message.cmsgs()?.filter_map(|message| match message {
        ControlMessageOwned::ScmRights(fds) => Some(fds),
        _ => None,
    });
    let received = fds.flatten().next();
    // SAFETY: the kernel has just made it, nobody else has it.
    let fd = received.map(|fd| unsafe { OwnedFd::from_raw_fd(fd) });
    fd.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "the runtime sent no terminal"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_that_the_end_overtook_are_read() {
        let mut results = [Err(Errno::EIO), Ok(3), Err(Errno::EIO), Err(Errno::EIO)].into_iter();
        let mut read = || past_first_eio(|| results.next().expect("no more reads"));
        assert_eq!(read(), Ok(3));
        assert_eq!(read(), Err(Errno::EIO));
    }
}
