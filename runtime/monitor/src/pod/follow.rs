//! Follow: each state of the pod, on a stream of the caller's.

use std::fs::File;
use std::io::Read;

use podvisor_monitor::snapshots;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::relay;
use super::{Pod, PodError};

impl Pod {
    /// Tells the state on the stream that came as `token`, and every later one (changes may be merged), until the pod is
    /// finished or the caller closes its stream.
    pub fn follow(&self, token: &[u8]) -> Result<(), PodError> {
        let follower = relay::take_stream(&self.fds, token)?;
        let mut states = self.state().subscribe();
        states.mark_changed();
        let finished = self.finished().clone();
        tokio::spawn(async move {
            let mut last = false;
            while !last {
                last = tokio::select! {
                    changed = states.changed() => changed.is_err(),
                    () = finished.cancelled() => true,
                    () = gone(&follower) => return,
                };
                let message = snapshots::encode(&states.borrow_and_update());
                if relay::write_all(&follower, &message).await.is_err() {
                    return;
                }
            }
        });
        Ok(())
    }
}

/// Ends when the caller has closed its stream, on which it sends nothing.
async fn gone(follower: &AsyncFd<File>) {
    let read = |mut stream: &File| stream.read(&mut [0]);
    while let Ok(1..) = follower.async_io(Interest::READABLE, read).await {}
}
