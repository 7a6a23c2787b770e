//! rtnetlink in a pod's namespace.

use std::io;
use std::path::Path;

use rtnetlink::Handle;
use rtnetlink::packet_core::ErrorMessage;
use tokio::runtime;
use tokio::task::JoinHandle;

use crate::netns::{self, NetnsError};

/// A netlink socket of one namespace. It stays the namespace's on whatever thread it is used.
pub(crate) struct Netlink {
    handle: Handle,
    driver: JoinHandle<()>,
}

impl Netlink {
    /// A socket of the namespace at `netns`. `prelude` runs in it as well, on the same thread.
    pub(crate) async fn connect(
        netns: &Path,
        prelude: impl FnOnce() + Send + 'static,
    ) -> Result<Self, NetnsError> {
        let runtime = runtime::Handle::current();
        let connection = netns::enter(netns, move || {
            prelude();
            // The socket registers itself with this runtime.
            let _guard = runtime.enter();
            rtnetlink::new_connection()
        })
        .await?;
        let (connection, handle, _notifications) = connection.map_err(|source| NetnsError::Io {
            path: netns.to_owned(),
            step: "netlink socket",
            source,
        })?;
        Ok(Self {
            handle,
            driver: tokio::spawn(connection),
        })
    }

    pub(crate) fn handle(&self) -> &Handle {
        &self.handle
    }
}

impl Drop for Netlink {
    fn drop(&mut self) {
        self.driver.abort();
    }
}

/// The kernel's answer as the errno that it is; what is none, as text.
pub(crate) fn io_error(error: rtnetlink::Error) -> io::Error {
    match error {
        rtnetlink::Error::NetlinkError(message) => errno(&message),
        other => io::Error::other(other.to_string()),
    }
}

fn errno(message: &ErrorMessage) -> io::Error {
    io::Error::from_raw_os_error(-message.raw_code())
}
