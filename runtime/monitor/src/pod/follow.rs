//! Follow: each state of the pod, on a stream of the caller's.

use podvisor_monitor::snapshots;

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
                    () = relay::closed(&follower) => return,
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
