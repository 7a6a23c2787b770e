//! Log lines, to the kernel's log: the guest has no other place, and the host reads it on the console.

use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::sync::OnceLock;

static LOG: OnceLock<File> = OnceLock::new();

/// Opens the log. Until then, and when the guest has no `/dev/kmsg`, lines go to stderr.
pub fn open() {
    if let Ok(file) = File::options().write(true).open("/dev/kmsg") {
        let _ = LOG.set(file);
    }
}

/// Writes one line at the kernel's level "error" (`<3>`) or "info" (`<6>`).
pub fn write(level: u8, line: std::fmt::Arguments<'_>) {
    // One record of the kernel's log is one write(2).
    let record = format!("<{level}>podvisor-agent: {line}\n");
    match LOG.get() {
        Some(mut file) => drop(file.write_all(record.as_bytes())),
        None => drop(std::io::stderr().write_all(record.as_bytes())),
    }
}

/// Something worth knowing.
macro_rules! info {
    ($($argument:tt)*) => { $crate::kmsg::write(6, format_args!($($argument)*)) };
}

/// Something went wrong.
macro_rules! error {
    ($($argument:tt)*) => { $crate::kmsg::write(3, format_args!($($argument)*)) };
}

pub(crate) use {error, info};

/// Makes a panic visible and final: the message on the log, then the end of the process. When that is
/// PID 1, the kernel panics, and the VM ends.
pub fn end_on_panic() {
    std::panic::set_hook(Box::new(|panic| {
        write(2, format_args!("{panic}"));
        if let Some(log) = LOG.get() {
            // SAFETY: a file descriptor of ours, nothing else.
            unsafe { libc::fsync(log.as_raw_fd()) };
        }
        // SAFETY: ends the process at once; nothing runs afterwards.
        unsafe { libc::_exit(101) }
    }));
}
