//! Authentication: challenges, and tokens from a token service.
//!
//! <https://distribution.github.io/distribution/spec/auth/token/> and `/oauth/`.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use reqwest::header::{AUTHORIZATION, CONTENT_TYPE, GetAll, HeaderValue};
use reqwest::{Client, RequestBuilder, Url};
use serde::Deserialize;

use crate::pull::Credentials;

/// Who we say we are to a token service.
const CLIENT_ID: &str = "podvisor";

/// What a host wants before it answers.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Challenge {
    Basic,
    Bearer {
        realm: String,
        service: Option<String>,
        scope: Option<String>,
    },
}

/// The challenges of a 401, as far as they are known here, in their order.
pub(super) fn challenges(headers: GetAll<'_, HeaderValue>) -> Vec<Challenge> {
    headers
        .iter()
        .filter_map(|header| header.to_str().ok())
        .filter_map(challenge)
        .collect()
}

/// One `WWW-Authenticate` header: a scheme and `key="value"` parameters.
fn challenge(header: &str) -> Option<Challenge> {
    let (scheme, parameters) = header.trim().split_once(' ').unwrap_or((header.trim(), ""));
    if scheme.eq_ignore_ascii_case("basic") {
        return Some(Challenge::Basic);
    }
    if !scheme.eq_ignore_ascii_case("bearer") {
        return None;
    }
    let (mut realm, mut service, mut scope) = (None, None, None);
    let mut rest = parameters.trim_start_matches([',', ' ']);
    while let Some((key, after)) = rest.split_once('=') {
        let (value, after) = parameter(after)?;
        match key.trim().to_ascii_lowercase().as_str() {
            "realm" => realm = Some(value),
            "service" => service = Some(value),
            "scope" => scope = Some(value),
            _ => {}
        }
        rest = after.trim_start_matches([',', ' ']);
    }
    Some(Challenge::Bearer {
        realm: realm?,
        service,
        scope,
    })
}

/// A value, with quotes or without, and what follows it.
fn parameter(text: &str) -> Option<(String, &str)> {
    let Some(quoted) = text.strip_prefix('"') else {
        let end = text.find([',', ' ']).unwrap_or(text.len());
        return Some((text[..end].to_owned(), &text[end..]));
    };
    let mut value = String::new();
    let mut characters = quoted.char_indices();
    while let Some((at, character)) = characters.next() {
        match character {
            '"' => return Some((value, &quoted[at + 1..])),
            '\\' => value.push(characters.next()?.1),
            other => value.push(other),
        }
    }
    None
}

pub(super) fn basic(username: &str, password: &str) -> HeaderValue {
    let encoded = STANDARD.encode(format!("{username}:{password}"));
    // Base64 has no character that a header could not have.
    let mut value = HeaderValue::try_from(format!("Basic {encoded}"))
        .unwrap_or(HeaderValue::from_static("Basic"));
    value.set_sensitive(true);
    value
}

/// `None` if the token cannot stand in a header.
pub(super) fn bearer(token: &str) -> Option<HeaderValue> {
    let mut value = HeaderValue::try_from(format!("Bearer {token}")).ok()?;
    value.set_sensitive(true);
    Some(value)
}

/// The request for a token that opens `scope`.
pub(super) fn token_request(
    client: &Client,
    mut realm: Url,
    service: Option<&str>,
    scope: &str,
    credentials: Option<&Credentials>,
) -> RequestBuilder {
    if let Some(Credentials::IdentityToken(refresh_token)) = credentials {
        // A Url of its own, for its form encoding.
        let mut form = Url::parse("http://form/").unwrap_or_else(|_| realm.clone());
        form.query_pairs_mut()
            .append_pair("grant_type", "refresh_token")
            .append_pair("service", service.unwrap_or_default())
            .append_pair("client_id", CLIENT_ID)
            .append_pair("scope", scope)
            .append_pair("refresh_token", refresh_token);
        let body = form.query().unwrap_or_default().to_owned();
        return client
            .post(realm)
            .header(CONTENT_TYPE, "application/x-www-form-urlencoded")
            .body(body);
    }
    {
        let mut query = realm.query_pairs_mut();
        if let Some(service) = service {
            query.append_pair("service", service);
        }
        // Several scopes come as one parameter with spaces.
        for scope in scope.split(' ') {
            query.append_pair("scope", scope);
        }
    }
    let request = client.get(realm);
    match credentials {
        Some(Credentials::Password { username, password }) => {
            request.header(AUTHORIZATION, basic(username, password))
        }
        _ => request,
    }
}

/// The token in a token service's answer.
pub(super) fn token(body: &[u8]) -> Option<HeaderValue> {
    #[derive(Deserialize)]
    struct Answer {
        token: Option<String>,
        access_token: Option<String>,
    }
    let answer: Answer = serde_json::from_slice(body).ok()?;
    let token = answer
        .token
        .filter(|token| !token.is_empty())
        .or(answer.access_token)?;
    bearer(&token)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parsed(realm: &str, service: Option<&str>, scope: Option<&str>) -> Challenge {
        let owned = |text: Option<&str>| text.map(str::to_owned);
        Challenge::Bearer {
            realm: realm.to_owned(),
            service: owned(service),
            scope: owned(scope),
        }
    }

    #[test]
    fn challenges_of_real_registries() {
        assert_eq!(
            challenge(
                r#"Bearer realm="https://auth.docker.io/token",service="registry.docker.io",scope="repository:library/busybox:pull""#
            ),
            Some(parsed(
                "https://auth.docker.io/token",
                Some("registry.docker.io"),
                Some("repository:library/busybox:pull")
            ))
        );
        assert_eq!(
            challenge(r#"bearer REALM="https://a/t" , service=b"#),
            Some(parsed("https://a/t", Some("b"), None))
        );
        assert_eq!(
            challenge(r#"Bearer realm="a\"b,c",x="y""#),
            Some(parsed("a\"b,c", None, None))
        );
        assert_eq!(
            challenge(r#"Basic realm="Registry""#),
            Some(Challenge::Basic)
        );
        assert_eq!(challenge("Basic"), Some(Challenge::Basic));
        assert_eq!(challenge("Negotiate"), None);
        assert_eq!(challenge(r#"Bearer service="b""#), None);
        assert_eq!(challenge(r#"Bearer realm="open"#), None);
    }

    proptest! {
        #[test]
        fn challenge_never_panics(header in "\\PC*", parameters in "[ ,=a\"\\\\é]*") {
            let _ = challenge(&header);
            let _ = challenge(&format!("Bearer {parameters}"));
        }
    }
}
