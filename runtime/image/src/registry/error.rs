//! What went wrong at a registry, in its own words.

use std::fmt;

use reqwest::StatusCode;
use serde::Deserialize;

/// Longest part of a registry's answer that is shown.
const SHOWN: usize = 300;

/// What a failure means for the caller.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum FailureKind {
    NotFound,
    Unauthorized,
    Forbidden,
    /// Unreachable, silent, or failing itself.
    Unavailable,
    /// Not what its digest or the protocol says.
    Corrupt,
    TooLarge,
    /// This node cannot ask: certificates that do not load.
    Config,
}

/// One host's failure.
#[derive(Debug, Clone)]
pub(crate) struct Failure {
    pub(crate) kind: FailureKind,
    /// `https://host/v2`
    pub(crate) host: String,
    pub(crate) words: String,
    /// The same request may succeed soon.
    pub(crate) retry: bool,
}

/// No host could help. What the last one asked said decides, for it is the registry itself; the mirrors before it
/// may well not have an image that exists.
#[derive(Debug, Clone)]
pub(crate) struct RegistryError {
    repository: String,
    failures: Vec<Failure>,
}

impl RegistryError {
    pub(super) fn new(repository: &str, failures: Vec<Failure>) -> Self {
        Self {
            repository: repository.to_owned(),
            failures,
        }
    }

    pub(crate) fn kind(&self) -> FailureKind {
        self.failures
            .last()
            .map_or(FailureKind::NotFound, |failure| failure.kind)
    }
}

impl fmt::Display for RegistryError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: ", self.repository)?;
        if self.failures.is_empty() {
            return f.write_str("no host is configured for this request");
        }
        for (i, failure) in self.failures.iter().enumerate() {
            let separator = if i > 0 { "; " } else { "" };
            write!(f, "{separator}{}: {}", failure.host, failure.words)?;
        }
        Ok(())
    }
}

impl std::error::Error for RegistryError {}

/// The error body of the distribution specification.
#[derive(Deserialize)]
struct ErrorBody {
    errors: Vec<ErrorItem>,
}

#[derive(Deserialize)]
struct ErrorItem {
    #[serde(default)]
    code: String,
    #[serde(default)]
    message: String,
}

/// A status and the words of the body that came with it, on one line and bounded.
pub(super) fn words(status: StatusCode, body: &[u8]) -> String {
    let said = match serde_json::from_slice::<ErrorBody>(body) {
        Ok(body) => {
            let items = body
                .errors
                .iter()
                .map(|item| format!("{}: {}", item.code, item.message));
            items.collect::<Vec<_>>().join(", ")
        }
        Err(_) => String::from_utf8_lossy(body).into_owned(),
    };
    let printable = |c: char| if c.is_control() { ' ' } else { c };
    let said: String = said.trim().chars().map(printable).take(SHOWN).collect();
    if said.is_empty() {
        status.to_string()
    } else {
        format!("{status}: {said}")
    }
}

pub(super) fn kind_of(status: StatusCode) -> FailureKind {
    match status {
        StatusCode::UNAUTHORIZED => FailureKind::Unauthorized,
        StatusCode::FORBIDDEN => FailureKind::Forbidden,
        StatusCode::REQUEST_TIMEOUT | StatusCode::TOO_MANY_REQUESTS => FailureKind::Unavailable,
        status if status.is_server_error() => FailureKind::Unavailable,
        status if status.is_client_error() => FailureKind::NotFound,
        _ => FailureKind::Corrupt,
    }
}

/// An error with its causes: reqwest's own text leaves out why.
pub(super) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_registrys_own_words() {
        let body = br#"{"errors":[{"code":"MANIFEST_UNKNOWN","message":"manifest unknown","detail":{"Tag":"x"}}]}"#;
        assert_eq!(
            words(StatusCode::NOT_FOUND, body),
            "404 Not Found: MANIFEST_UNKNOWN: manifest unknown"
        );
        assert_eq!(
            words(StatusCode::BAD_GATEWAY, b"<html>\x1b[31m"),
            "502 Bad Gateway: <html> [31m"
        );
        assert_eq!(words(StatusCode::BAD_GATEWAY, b" \n"), "502 Bad Gateway");
        assert!(words(StatusCode::OK, &[b'x'; 10_000]).len() < 400);
    }
}
