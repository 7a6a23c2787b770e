//! PID 1's life. Only what the connection to the host needs comes before it: what the first calls need is
//! made while the host answers, the rest when they are through.

use std::io;
use std::path::PathBuf;

use nix::sys::signal::{SigHandler, Signal, signal};

use crate::container::Pod;
use crate::events::Events;
use crate::guest;
use crate::kmsg;
use crate::reaper::Reaper;
use crate::server::{self, CONTROL_PORT, STREAM_PORT};
use crate::service::{Service, boot_clock};
use crate::socket::{Address, Listener, Socket};
use crate::streams::Streams;
use crate::watch::Watch;

/// The pod's disk.
const DISK: &str = "/dev/vda";

/// Why PID 1 cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum InitError {
    /// A step of the set-up.
    #[error("{action}: {source}")]
    Step {
        /// What was tried.
        action: String,
        /// The kernel's reason.
        source: io::Error,
    },
    /// Not an argument.
    #[error("unknown argument {0:?}; usage: podvisor-agent [--listen unix:PATH] [--disk DEVICE]")]
    Argument(String),
}

/// Wraps a failure with what was tried.
pub fn step<E: Into<io::Error>>(action: impl Into<String>) -> impl FnOnce(E) -> InitError {
    move |error| InitError::Step {
        action: action.into(),
        source: error.into(),
    }
}

/// How to run outside of a VM, for development: in new pid, mount, network, ipc and uts namespaces, as
/// their first process. The API is at a unix socket, streams at the same path with `.streams`.
#[derive(Debug)]
struct Options {
    listen: Option<PathBuf>,
    disk: PathBuf,
}

impl Options {
    fn parse(arguments: &[String]) -> Result<Self, InitError> {
        let mut options = Self {
            listen: None,
            disk: PathBuf::from(DISK),
        };
        let mut arguments = arguments.iter();
        while let Some(argument) = arguments.next() {
            let unknown = || InitError::Argument(argument.clone());
            let value = arguments.next().ok_or_else(unknown)?;
            match argument.as_str() {
                "--listen" => {
                    let path = value.strip_prefix("unix:").ok_or_else(unknown)?;
                    options.listen = Some(PathBuf::from(path));
                }
                "--disk" => options.disk = PathBuf::from(value),
                _ => return Err(unknown()),
            }
        }
        Ok(options)
    }
}

/// PID 1's life. Returns only when it cannot go on; in the guest, the kernel panics then.
pub fn run(arguments: &[String]) -> libc::c_int {
    let init_started = boot_clock();
    kmsg::end_on_panic();
    let result = Options::parse(arguments).and_then(|options| {
        if options.listen.is_none() {
            guest::prepare_devices()?;
        }
        kmsg::open();
        guest::make_room_for_descriptors();
        // SAFETY: "ignore" runs no code of ours.
        unsafe { signal(Signal::SIGPIPE, SigHandler::SigIgn) }.map_err(step("signals"))?;
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(step("the runtime"))?
            .block_on(serve(options, init_started))
    });
    match result {
        Ok(()) => 0,
        Err(error) => {
            kmsg::write(2, format_args!("{error}"));
            1
        }
    }
}

async fn serve(options: Options, init_started: u64) -> Result<(), InitError> {
    let reaper = Reaper::start().map_err(step("the reaper"))?;
    let streams = Streams::default();
    let events = Events::default();
    let watch = Watch::start(events.clone()).map_err(step("inotify"))?;
    let pod = Pod::new(options.disk, reaper, streams.clone(), events, watch);
    let service = Service::new(pod.clone(), init_started);
    let stream_address = match &options.listen {
        None => Address::Vsock(STREAM_PORT),
        Some(path) => Address::Unix(path.with_added_extension("streams")),
    };
    let stream_listener = Listener::bind(&stream_address).map_err(step("listening for streams"))?;
    tokio::spawn(streams.serve(stream_listener));

    if let Some(path) = options.listen {
        guest::mount_for_calls()?;
        let listener = Listener::bind(&Address::Unix(path)).map_err(step("listening"))?;
        let serving = server::listen(service, listener);
        return tokio::select! {
            served = serving => served.map_err(step("accepting")),
            error = prepare_for_containers(pod, false) => Err(error),
        };
    }
    // The host's answer takes a moment; the mounts fill it.
    let dialling = tokio::spawn({
        let service = service.clone();
        async move {
            let socket = Socket::connect_to_host(CONTROL_PORT).await?;
            service.mark_ready();
            Ok(socket)
        }
    });
    tokio::task::yield_now().await;
    guest::move_root()?;
    guest::mount_for_calls()?;
    let first = async { dialling.await.map_err(io::Error::other)? };
    tokio::select! {
        () = server::dial(service, first) => Ok(()),
        error = prepare_for_containers(pod, true) => Err(error),
    }
}

/// What the first container needs and no call before it: begins when the sandbox is configured, so that it
/// does not take the CPU from the calls that a pod's start waits for. Returns only when it fails.
async fn prepare_for_containers(pod: Pod, tune: bool) -> InitError {
    pod.configured().await;
    let prepared = tokio::task::spawn_blocking(move || {
        guest::prepare_for_containers()?;
        if tune {
            guest::tune_kernel();
        }
        Ok(())
    });
    match prepared.await {
        Ok(Ok(())) => match pod.start_launcher() {
            Ok(()) => std::future::pending().await,
            Err(error) => step("the launcher")(error),
        },
        Ok(Err(error)) => error,
        Err(error) => step("preparing for containers")(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    fn parse(arguments: &[&str]) -> Result<Options, InitError> {
        let arguments: Vec<String> = arguments.iter().map(|a| (*a).to_owned()).collect();
        Options::parse(&arguments)
    }

    #[test]
    fn arguments() {
        let none = parse(&[]).unwrap();
        assert!(none.listen.is_none());
        assert_eq!(none.disk, Path::new(DISK));
        let both = parse(&["--listen", "unix:/a", "--disk", "/dev/loop0"]).unwrap();
        assert_eq!(both.listen.as_deref(), Some(Path::new("/a")));
        assert_eq!(both.disk, Path::new("/dev/loop0"));
        for wrong in [&["--listen"][..], &["--listen", "/a"], &["-x", "y"], &["x"]] {
            assert!(parse(wrong).is_err(), "{wrong:?}");
        }
    }
}
