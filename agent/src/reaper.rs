//! Collects every child of PID 1: helpers of the launcher, first processes of containers, execs, and
//! orphans that nobody knows.
//!
//! A container's first process may be dead before its pid is known: the pid comes from the helper that
//! made it. So whoever is about to learn a pid first takes an [`Expectation`]; while one exists, exits
//! that nobody has claimed are kept (a bounded number of them).

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use nix::errno::Errno;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;

/// Exits kept while their pid is not known yet. More than processes can end in the life of one helper.
const UNCLAIMED_LIMIT: usize = 1024;

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exit {
    /// 0 to 255; 128 + n when signal n ended the process.
    pub code: u32,
    /// When it was collected, guest clock.
    pub time: SystemTime,
}

/// The one place that calls `waitpid`. Cheap to clone.
#[derive(Clone, Default)]
pub struct Reaper(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    waiters: HashMap<i32, oneshot::Sender<Exit>>,
    expectations: usize,
    unclaimed: VecDeque<(i32, Exit)>,
}

impl Reaper {
    /// Starts collecting, on the current runtime.
    ///
    /// # Errors
    /// The signal handler cannot be installed.
    pub fn start() -> std::io::Result<Self> {
        let reaper = Self::default();
        let mut children = signal(SignalKind::child())?;
        let collector = reaper.clone();
        tokio::spawn(async move {
            loop {
                collector.collect();
                if children.recv().await.is_none() {
                    return;
                }
            }
        });
        Ok(reaper)
    }

    /// Keeps exits of unknown children until the expectation is dropped or claimed.
    pub fn expect(&self) -> Expectation {
        self.lock().expectations += 1;
        Expectation(self.clone())
    }

    fn collect(&self) {
        loop {
            match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::Exited(pid, code)) => self.ended(pid, code as u32 & 0xff),
                Ok(WaitStatus::Signaled(pid, signal, _)) => self.ended(pid, 128 + signal as u32),
                Ok(WaitStatus::StillAlive) | Err(Errno::ECHILD) => return,
                Ok(_) | Err(_) => {}
            }
        }
    }

    fn ended(&self, pid: Pid, code: u32) {
        let exit = Exit {
            code,
            time: SystemTime::now(),
        };
        let mut state = self.lock();
        if let Some(waiter) = state.waiters.remove(&pid.as_raw()) {
            let _ = waiter.send(exit);
        } else if state.expectations > 0 {
            if state.unclaimed.len() == UNCLAIMED_LIMIT {
                state.unclaimed.pop_front();
            }
            state.unclaimed.push_back((pid.as_raw(), exit));
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// See [`Reaper::expect`].
pub struct Expectation(Reaper);

impl Expectation {
    /// The exit of `pid`, which has happened since the expectation was made, or will.
    pub fn claim(self, pid: i32) -> oneshot::Receiver<Exit> {
        let (sender, receiver) = oneshot::channel();
        let mut state = self.0.lock();
        // The newest, should the pid have been used twice.
        let found = state.unclaimed.iter().rposition(|(known, _)| *known == pid);
        if let Some((_, exit)) = found.and_then(|index| state.unclaimed.remove(index)) {
            let _ = sender.send(exit);
        } else {
            state.waiters.insert(pid, sender);
        }
        receiver
    }
}

impl Drop for Expectation {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.expectations -= 1;
        if state.expectations == 0 {
            state.unclaimed = VecDeque::new();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn code(receiver: &mut oneshot::Receiver<Exit>) -> Option<u32> {
        receiver.try_recv().ok().map(|exit| exit.code)
    }

    #[test]
    fn an_exit_before_the_claim_is_delivered() {
        let reaper = Reaper::default();
        let expectation = reaper.expect();
        reaper.ended(Pid::from_raw(7), 3);
        assert_eq!(code(&mut expectation.claim(7)), Some(3));
    }

    #[test]
    fn an_exit_after_the_claim_is_delivered() {
        let reaper = Reaper::default();
        let mut receiver = reaper.expect().claim(7);
        assert_eq!(code(&mut receiver), None);
        reaper.ended(Pid::from_raw(7), 137);
        assert_eq!(code(&mut receiver), Some(137));
    }

    #[test]
    fn exits_that_nobody_expects_are_forgotten() {
        let reaper = Reaper::default();
        reaper.ended(Pid::from_raw(7), 1);
        let expectation = reaper.expect();
        reaper.ended(Pid::from_raw(8), 1);
        drop(expectation);
        assert!(reaper.lock().unclaimed.is_empty());
        assert_eq!(code(&mut reaper.expect().claim(7)), None);
        assert_eq!(code(&mut reaper.expect().claim(8)), None);
    }

    #[test]
    fn of_two_exits_with_one_pid_the_newest_counts() {
        let reaper = Reaper::default();
        let expectation = reaper.expect();
        reaper.ended(Pid::from_raw(7), 1);
        reaper.ended(Pid::from_raw(7), 2);
        assert_eq!(code(&mut expectation.claim(7)), Some(2));
    }

    #[test]
    fn unclaimed_exits_are_bounded() {
        let reaper = Reaper::default();
        let expectation = reaper.expect();
        for pid in 1..=(UNCLAIMED_LIMIT as i32 + 10) {
            reaper.ended(Pid::from_raw(pid), 0);
        }
        assert_eq!(reaper.lock().unclaimed.len(), UNCLAIMED_LIMIT);
        assert_eq!(
            code(&mut expectation.claim(UNCLAIMED_LIMIT as i32 + 10)),
            Some(0)
        );
    }
}
