//! Tokens: each stands for one request, is good for one use, and not for long.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ring::rand::{SecureRandom, SystemRandom};
use subtle::ConstantTimeEq;
use thiserror::Error;
use tokio::time::Instant;

/// Tokens that wait to be used, at most (as in the kubelet's own server).
pub const LIMIT: usize = 1000;

/// How long a token is good for.
pub const LIFE: Duration = Duration::from_mins(1);

/// Random bytes of a token.
const BYTES: usize = 16;

/// See [`LIMIT`]; or the kernel gave no random bytes.
#[derive(Debug, Error)]
#[error("too many streaming requests wait for their client")]
pub struct TooMany;

/// The table of tokens.
#[derive(Debug)]
pub struct Tokens<T>(Mutex<Vec<Entry<T>>>);

#[derive(Debug)]
struct Entry<T> {
    token: String,
    expires: Instant,
    request: T,
}

impl<T> Default for Tokens<T> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<T> Tokens<T> {
    /// A new token for `request`.
    ///
    /// # Errors
    /// [`LIMIT`] tokens wait already.
    pub fn issue(&self, request: T) -> Result<String, TooMany> {
        let mut bytes = [0; BYTES];
        SystemRandom::new().fill(&mut bytes).map_err(|_| TooMany)?;
        let token = URL_SAFE_NO_PAD.encode(bytes);
        let now = Instant::now();
        let mut entries = self.lock();
        entries.retain(|entry| entry.expires > now);
        if entries.len() >= LIMIT {
            return Err(TooMany);
        }
        entries.push(Entry {
            token: token.clone(),
            expires: now + LIFE,
            request,
        });
        Ok(token)
    }

    /// What `token` stands for, once. Takes as long for any wrong token as for any other.
    pub fn redeem(&self, token: &str) -> Option<T> {
        let now = Instant::now();
        let mut entries = self.lock();
        entries.retain(|entry| entry.expires > now);
        let mut found = None;
        for (index, entry) in entries.iter().enumerate() {
            if bool::from(entry.token.as_bytes().ct_eq(token.as_bytes())) {
                found = Some(index);
            }
        }
        found.map(|index| entries.swap_remove(index).request)
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Entry<T>>> {
        // Whole entries come and go: a panic elsewhere leaves the table sound.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_token_is_good_once_and_not_for_long() {
        let tokens = Tokens::default();
        let first = tokens.issue(1).unwrap();
        let second = tokens.issue(2).unwrap();
        assert_ne!(first, second);
        assert_eq!(tokens.redeem(&first[1..]), None);
        assert_eq!(tokens.redeem(""), None);
        assert_eq!(tokens.redeem(&first), Some(1));
        assert_eq!(tokens.redeem(&first), None);
        tokio::time::advance(LIFE).await;
        assert_eq!(tokens.redeem(&second), None);
    }

    #[tokio::test(start_paused = true)]
    async fn the_table_is_bounded_and_empties_itself() {
        let tokens = Tokens::default();
        for number in 0..LIMIT {
            tokens.issue(number).unwrap();
        }
        assert!(tokens.issue(0).is_err());
        tokio::time::advance(LIFE).await;
        assert!(tokens.issue(0).is_ok());
    }
}
