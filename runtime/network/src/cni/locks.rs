//! One operation at a time on one sandbox.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::OwnedMutexGuard;

/// A lock per name, for as long as somebody wants it.
#[derive(Debug, Default)]
pub struct Locks {
    held: Mutex<HashMap<String, Arc<tokio::sync::Mutex<()>>>>,
}

impl Locks {
    pub async fn lock(&self, name: &str) -> OwnedMutexGuard<()> {
        let lock = {
            // Nothing panics while it is held.
            let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
            // Those that only this map knows have no holder and nobody waiting.
            held.retain(|_, lock| Arc::strong_count(lock) > 1);
            Arc::clone(held.entry(name.to_owned()).or_default())
        };
        lock.lock_owned().await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn one_holder_per_name_and_nothing_kept() {
        let locks = Locks::default();
        let first = locks.lock("a").await;
        let _other = locks.lock("b").await;
        let mut second = Box::pin(locks.lock("a"));
        assert!(futures_util::poll!(&mut second).is_pending());
        drop(first);
        drop(second.await);
        drop(locks.lock("c").await);
        drop(locks.lock("d").await);
        let names: Vec<_> = locks.held.lock().unwrap().keys().cloned().collect();
        assert_eq!(names.len(), 2, "b is held, d was the last: {names:?}");
    }
}
