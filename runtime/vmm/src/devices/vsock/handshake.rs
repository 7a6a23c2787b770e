//! The line by which a local process dials through the pod's socket: `CONNECT port\n`.

use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::net::UnixStream;

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recv};

/// Longest line, its end included: `CONNECT 4294967295\r\n`, and some air.
const MAX_LINE_BYTES: usize = 32;

/// Reads the line once it is there, and not a byte more: what follows belongs to the guest. `None`: not all there yet.
///
/// # Errors
/// The line is too long, is no such line, or the peer is gone.
pub(super) fn read_port(stream: &UnixStream) -> io::Result<Option<u32>> {
    let mut line = [0; MAX_LINE_BYTES];
    let there = match receive(stream, &mut line, MsgFlags::MSG_PEEK) {
        Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
        Ok(count) => count,
        Err(Errno::EAGAIN) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let Some(end) = line[..there].iter().position(|byte| *byte == b'\n') else {
        return if there == MAX_LINE_BYTES {
            Err(io::ErrorKind::InvalidData.into())
        } else {
            Ok(None)
        };
    };
    receive(stream, &mut line[..=end], MsgFlags::empty())?;
    parse(&line[..end])
        .map(Some)
        .ok_or_else(|| io::ErrorKind::InvalidData.into())
}

fn receive(stream: &UnixStream, buffer: &mut [u8], flags: MsgFlags) -> nix::Result<usize> {
    loop {
        match recv(stream.as_raw_fd(), buffer, flags | MsgFlags::MSG_DONTWAIT) {
            Err(Errno::EINTR) => {}
            result => return result,
        }
    }
}

fn parse(line: &[u8]) -> Option<u32> {
    let port = str::from_utf8(line)
        .ok()?
        .trim_end()
        .strip_prefix("CONNECT ")?;
    // `parse` alone would take a plus sign.
    if port.bytes().all(|byte| byte.is_ascii_digit()) {
        port.parse().ok()
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};

    use super::*;

    #[test]
    fn parses() {
        assert_eq!(parse(b"CONNECT 1025"), Some(1025));
        assert_eq!(parse(b"CONNECT 4294967295\r"), Some(u32::MAX));
        for line in [
            "",
            "CONNECT",
            "CONNECT ",
            "CONNECT +1",
            "CONNECT -1",
            "CONNECT 4294967296",
            "connect 1",
            "CONNECT 1 2",
        ] {
            assert_eq!(parse(line.as_bytes()), None, "{line:?}");
        }
        assert_eq!(parse(b"CONNECT \xff"), None);
    }

    #[test]
    fn takes_the_line_and_nothing_after_it() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        assert_eq!(read_port(&ours).unwrap(), None);
        theirs.write_all(b"CONNECT 10").unwrap();
        assert_eq!(read_port(&ours).unwrap(), None);
        theirs.write_all(b"25\nearly").unwrap();
        assert_eq!(read_port(&ours).unwrap(), Some(1025));
        let mut rest = [0; 5];
        (&ours).read_exact(&mut rest).unwrap();
        assert_eq!(&rest, b"early");
    }

    #[test]
    fn gives_up() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(&[b'x'; MAX_LINE_BYTES]).unwrap();
        assert_eq!(
            read_port(&ours).unwrap_err().kind(),
            io::ErrorKind::InvalidData
        );
        let (ours, theirs) = UnixStream::pair().unwrap();
        drop(theirs);
        assert_eq!(
            read_port(&ours).unwrap_err().kind(),
            io::ErrorKind::UnexpectedEof
        );
    }
}
