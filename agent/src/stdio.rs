//! The standard streams of one process: pipes or a terminal, and the relays to the host's streams.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::unistd::{Gid, Uid, fchown, pipe2};
use podvisor_proto::agent::Stdio;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::task::AbortHandle;

use crate::fd::{null, register, set_nonblocking};
use crate::relay;
use crate::socket::Socket;
use crate::streams::{StreamError, Streams, Token};

/// The streams that a call names, all of them there.
pub struct Claimed {
    stdin: Option<Socket>,
    stdout: Option<Socket>,
    stderr: Option<Socket>,
    terminal: bool,
}

/// Waits for the streams that `stdio` names.
pub async fn claim(streams: &Streams, stdio: &Stdio) -> Result<Claimed, StreamError> {
    let one = async |bytes: &[u8]| match Token::parse(bytes)? {
        Some(token) => streams.claim(token).await.map(Some),
        None => Ok(None),
    };
    let (stdin, stdout, stderr) =
        tokio::try_join!(one(&stdio.stdin), one(&stdio.stdout), one(&stdio.stderr))?;
    Ok(Claimed {
        stdin,
        stdout,
        stderr,
        terminal: stdio.terminal,
    })
}

/// Both ends of a process's streams, before the process is there.
pub struct Wiring {
    /// What the process gets as standard streams.
    pub process_side: [OwnedFd; 3],
    /// What begins when it runs.
    pub relays: Relays,
}

/// Relays that have not begun.
pub struct Relays {
    stdin: Option<(Socket, AsyncFd<OwnedFd>)>,
    outputs: Vec<(AsyncFd<OwnedFd>, Socket)>,
    terminal: Option<Socket>,
}

/// Relays that run. Outputs run on until their end, whatever happens to this.
#[derive(Default)]
pub struct Running {
    stdin: Option<AbortHandle>,
    outputs: Vec<AbortHandle>,
    /// Master side of the terminal.
    console: Option<Arc<AsyncFd<OwnedFd>>>,
}

impl Claimed {
    /// Makes the pipes, owned by `uid` so that the process may open /dev/stdout and the like. A process
    /// with a terminal gets that from its launcher, see [`Relays::begin`].
    pub fn connect(self, uid: u32, gid: u32) -> io::Result<Wiring> {
        let mut relays = Relays {
            stdin: None,
            outputs: Vec::new(),
            terminal: None,
        };
        if self.terminal {
            relays.terminal = self.stdout;
            return Ok(Wiring {
                process_side: [null()?, null()?, null()?],
                relays,
            });
        }
        let owned_pipe = || -> io::Result<(OwnedFd, OwnedFd)> {
            let (reader, writer) = pipe2(OFlag::O_CLOEXEC)?;
            fchown(&reader, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)))?;
            Ok((reader, writer))
        };
        let stdin = match self.stdin {
            Some(socket) => {
                let (reader, writer) = owned_pipe()?;
                set_nonblocking(&writer)?;
                relays.stdin = Some((socket, register(writer, Interest::WRITABLE)?));
                reader
            }
            None => null()?,
        };
        let mut output = |socket: Option<Socket>| -> io::Result<OwnedFd> {
            let Some(socket) = socket else {
                return null();
            };
            let (reader, writer) = owned_pipe()?;
            set_nonblocking(&reader)?;
            let reader = register(reader, Interest::READABLE)?;
            relays.outputs.push((reader, socket));
            Ok(writer)
        };
        let process_side = [stdin, output(self.stdout)?, output(self.stderr)?];
        Ok(Wiring {
            process_side,
            relays,
        })
    }
}

impl Relays {
    /// Begins to move bytes. `console` is the master side of the terminal, if the process has one.
    pub fn begin(self, console: Option<OwnedFd>) -> io::Result<Running> {
        let mut running = Running::default();
        if let Some((socket, pipe)) = self.stdin {
            let task = tokio::spawn(async move {
                // The end of the stream is the end of the pipe: both close with this task.
                let _ = relay::pipe(socket.as_async_fd(), &pipe).await;
            });
            running.stdin = Some(task.abort_handle());
        }
        for (pipe, socket) in self.outputs {
            let task = tokio::spawn(async move {
                let _ = relay::pipe(&pipe, socket.as_async_fd()).await;
                socket.close_write();
            });
            running.outputs.push(task.abort_handle());
        }
        if let Some(console) = console {
            set_nonblocking(&console)?;
            let console = Arc::new(register(console, Interest::READABLE | Interest::WRITABLE)?);
            running.console = Some(Arc::clone(&console));
            if let Some(socket) = self.terminal {
                running.relay_terminal(&console, socket);
            } else {
                // Nobody looks, but the process must not block.
                let task = tokio::spawn(async move {
                    let _ = relay::discard(&console).await;
                });
                running.outputs.push(task.abort_handle());
            }
        }
        Ok(running)
    }
}

impl Running {
    fn relay_terminal(&mut self, console: &Arc<AsyncFd<OwnedFd>>, socket: Socket) {
        let socket = Arc::new(socket);
        let (to_host, from_host) = (Arc::clone(&socket), socket);
        let (output, input) = (Arc::clone(console), Arc::clone(console));
        let task = tokio::spawn(async move {
            let _ = relay::terminal(&output, to_host.as_async_fd()).await;
            to_host.close_write();
        });
        self.outputs.push(task.abort_handle());
        // The end of the host's side is not the end of the terminal: that would hang it up.
        let task = tokio::spawn(async move {
            let _ = relay::terminal(from_host.as_async_fd(), &input).await;
        });
        self.stdin = Some(task.abort_handle());
    }

    /// The process has ended: nobody reads its input any more.
    pub fn end_input(&self) {
        if let Some(stdin) = &self.stdin {
            stdin.abort();
        }
    }

    /// Ends everything, also output that the host does not read.
    pub fn end(&self) {
        self.end_input();
        for output in &self.outputs {
            output.abort();
        }
    }

    /// Sets the size of the terminal; false when there is none.
    pub fn resize(&self, columns: u16, rows: u16) -> io::Result<bool> {
        let Some(console) = &self.console else {
            return Ok(false);
        };
        let size = libc::winsize {
            ws_row: rows,
            ws_col: columns,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        // SAFETY: a descriptor and a structure that lives through the call.
        Errno::result(unsafe {
            libc::ioctl(
                console.as_fd().as_raw_fd(),
                libc::TIOCSWINSZ,
                &raw const size,
            )
        })?;
        Ok(true)
    }
}
