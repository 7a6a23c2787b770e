//! Requests to one host: authentication, redirects, deadlines, retries.

use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use reqwest::header::{
    AUTHORIZATION, HeaderMap, HeaderValue, LOCATION, RETRY_AFTER, WWW_AUTHENTICATE,
};
use reqwest::{Client, Response, StatusCode, Url};
use tokio::time::{sleep, timeout};

use super::Clients;
use super::auth::{self, Challenge};
use super::error::{Failure, FailureKind, chain, kind_of, words};
use crate::hosts::Host;
use crate::limits::Limits;
use crate::pull::Credentials;
use crate::store::blocking;

/// Redirects in one request.
const MAX_REDIRECTS: usize = 5;
/// What is read of an error's body.
const ERROR_BODY: u64 = 16 << 10;

/// A host, with what it takes to talk to it.
pub(super) struct HostClient {
    host: Host,
    client: Client,
    /// For hosts that this one refers to.
    clients: Arc<Clients>,
    credentials: Option<Credentials>,
    limits: Limits,
    /// What the host wants to see. Held while a new one is fetched, so that parallel requests share it.
    authorization: tokio::sync::Mutex<Option<HeaderValue>>,
}

/// Counts the tries of a request, and waits between them.
pub(super) struct Retry {
    left: u32,
    wait: Duration,
    max_asked: Duration,
}

impl Retry {
    pub(super) fn new(limits: &Limits) -> Self {
        Self {
            left: limits.attempts.saturating_sub(1),
            wait: limits.backoff,
            max_asked: limits.retry_after_max,
        }
    }

    /// Waits before the next try, as long as was `asked` for if that is longer. False: there is no next try.
    pub(super) async fn wait(&mut self, asked: Duration) -> bool {
        if self.left == 0 {
            return false;
        }
        self.left -= 1;
        sleep(self.wait.max(asked.min(self.max_asked))).await;
        self.wait *= 2;
        true
    }
}

/// A failed try, and how long the host asked to be left alone.
struct Try {
    failure: Failure,
    retry_after: Duration,
}

impl From<Failure> for Try {
    fn from(failure: Failure) -> Self {
        Self {
            failure,
            retry_after: Duration::ZERO,
        }
    }
}

impl HostClient {
    pub(super) fn new(
        host: Host,
        client: Client,
        clients: Arc<Clients>,
        credentials: Option<Credentials>,
        limits: &Limits,
    ) -> Self {
        let authorization = tokio::sync::Mutex::default();
        Self {
            host,
            client,
            clients,
            credentials,
            limits: limits.clone(),
            authorization,
        }
    }

    pub(super) fn host(&self) -> &Host {
        &self.host
    }

    pub(super) fn failure(&self, kind: FailureKind, words: String) -> Failure {
        Failure {
            kind,
            host: self.host.base.clone(),
            words,
            retry: false,
        }
    }

    /// Asks for `path` in a repository. A response is a success; its body is still to come.
    pub(super) async fn get(
        &self,
        repository: &str,
        path: &str,
        headers: &HeaderMap,
    ) -> Result<Response, Failure> {
        let mut url = Url::parse(&format!("{}/{repository}/{path}", self.host.base))
            .map_err(|error| self.failure(FailureKind::Config, error.to_string()))?;
        if let Some(namespace) = &self.host.namespace {
            url.query_pairs_mut().append_pair("ns", namespace);
        }
        let mut retry = Retry::new(&self.limits);
        loop {
            match self.get_once(&url, repository, headers).await {
                Ok(response) => return Ok(response),
                Err(Try {
                    failure,
                    retry_after,
                }) => {
                    if !(failure.retry && retry.wait(retry_after).await) {
                        return Err(failure);
                    }
                }
            }
        }
    }

    /// The whole body of a response.
    pub(super) async fn body(&self, mut response: Response, limit: u64) -> Result<Bytes, Failure> {
        let mut body = BytesMut::new();
        while let Some(piece) = self.piece(&mut response).await? {
            if (body.len() + piece.len()) as u64 > limit {
                return Err(self.failure(
                    FailureKind::TooLarge,
                    format!("answer larger than {limit} bytes"),
                ));
            }
            body.extend_from_slice(&piece);
        }
        Ok(body.freeze())
    }

    /// The next piece of a response's body.
    pub(super) async fn piece(&self, response: &mut Response) -> Result<Option<Bytes>, Failure> {
        match timeout(self.limits.stall_timeout, response.chunk()).await {
            Ok(Ok(piece)) => Ok(piece),
            Ok(Err(error)) => {
                let failure = self.failure(FailureKind::Unavailable, chain(&error));
                Err(Failure {
                    retry: true,
                    ..failure
                })
            }
            Err(_) => Err(self.stalled("data")),
        }
    }

    fn stalled(&self, what: &str) -> Failure {
        let seconds = self.limits.stall_timeout.as_secs_f32();
        self.failure(
            FailureKind::Unavailable,
            format!("no {what} for {seconds} s"),
        )
    }

    async fn get_once(
        &self,
        url: &Url,
        repository: &str,
        headers: &HeaderMap,
    ) -> Result<Response, Try> {
        let shown = self.authorization.lock().await.clone();
        let response = self.follow(url, headers, shown.as_ref()).await?;
        if response.status() != StatusCode::UNAUTHORIZED {
            return self.check(response).await;
        }
        let challenges = auth::challenges(response.headers().get_all(WWW_AUTHENTICATE));
        let refusal = self.refusal(response).await;
        let Some(authorization) = self
            .authorize(&challenges, repository, shown.as_ref())
            .await?
        else {
            return Err(refusal.into());
        };
        let response = self.follow(url, headers, Some(&authorization)).await?;
        self.check(response).await
    }

    /// Sends a request, and follows redirects. This host's headers and credentials go to this host alone.
    async fn follow(
        &self,
        url: &Url,
        headers: &HeaderMap,
        authorization: Option<&HeaderValue>,
    ) -> Result<Response, Failure> {
        let origin = url.origin();
        let mut url = url.clone();
        for _ in 0..=MAX_REDIRECTS {
            let same_origin = url.origin() == origin;
            let mut request = if same_origin {
                self.client
                    .get(url.clone())
                    .headers(self.host.headers.clone())
            } else {
                self.client_for(&url).await?.get(url.clone())
            };
            request = request.headers(headers.clone());
            if let Some(authorization) = authorization.filter(|_| same_origin) {
                request = request.header(AUTHORIZATION, authorization);
            }
            let response = self.send(request).await?;
            if !response.status().is_redirection() {
                return Ok(response);
            }
            let location = response
                .headers()
                .get(LOCATION)
                .and_then(|location| location.to_str().ok());
            let next = location.and_then(|location| url.join(location).ok());
            let next = next.filter(|next| {
                next.scheme() == "https" || (next.scheme() == "http" && url.scheme() == "http")
            });
            let Some(next) = next else {
                let words = format!("{} without a usable location", response.status());
                return Err(self.failure(FailureKind::Corrupt, words));
            };
            url = next;
        }
        Err(self.failure(
            FailureKind::Corrupt,
            format!("more than {MAX_REDIRECTS} redirects"),
        ))
    }

    async fn client_for(&self, url: &Url) -> Result<Client, Failure> {
        let (clients, url, connect_timeout) = (
            Arc::clone(&self.clients),
            url.clone(),
            self.limits.connect_timeout,
        );
        let client = blocking(move || clients.for_url(&url, connect_timeout)).await;
        client.map_err(|error| self.failure(FailureKind::Config, error.to_string()))
    }

    async fn send(&self, request: reqwest::RequestBuilder) -> Result<Response, Failure> {
        match timeout(self.limits.stall_timeout, request.send()).await {
            Ok(Ok(response)) => Ok(response),
            Ok(Err(error)) => {
                let retry = !error.is_timeout() && !error.is_builder();
                // Without the URL: a redirect's may have a signature in it.
                let error = error.without_url();
                Err(Failure {
                    retry,
                    ..self.failure(FailureKind::Unavailable, chain(&error))
                })
            }
            Err(_) => Err(self.stalled("answer")),
        }
    }

    async fn check(&self, response: Response) -> Result<Response, Try> {
        if response.status().is_success() {
            return Ok(response);
        }
        let seconds = response
            .headers()
            .get(RETRY_AFTER)
            .and_then(|value| value.to_str().ok()?.parse().ok());
        let retry_after = Duration::from_secs(seconds.unwrap_or(0));
        Err(Try {
            failure: self.refusal(response).await,
            retry_after,
        })
    }

    /// What the host said with an error.
    async fn refusal(&self, response: Response) -> Failure {
        let status = response.status();
        let body = self.body(response, ERROR_BODY).await.unwrap_or_default();
        let retry = status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS;
        Failure {
            retry,
            ..self.failure(kind_of(status), words(status, &body))
        }
    }

    /// What to show after a request with `shown` was refused; `None` if there is nothing that the host would take.
    async fn authorize(
        &self,
        challenges: &[Challenge],
        repository: &str,
        shown: Option<&HeaderValue>,
    ) -> Result<Option<HeaderValue>, Failure> {
        let mut known = self.authorization.lock().await;
        if known.as_ref() != shown {
            // Another request was faster.
            return Ok(known.clone());
        }
        for challenge in challenges {
            let authorization = match (challenge, &self.credentials) {
                (Challenge::Basic, Some(Credentials::Password { username, password })) => {
                    Some(auth::basic(username, password))
                }
                (Challenge::Basic, _) => None,
                (Challenge::Bearer { .. }, Some(Credentials::RegistryToken(token))) => {
                    auth::bearer(token)
                }
                (
                    Challenge::Bearer {
                        realm,
                        service,
                        scope,
                    },
                    credentials,
                ) => {
                    let scope = scope
                        .clone()
                        .unwrap_or_else(|| format!("repository:{repository}:pull"));
                    self.token(realm, service.as_deref(), &scope, credentials.as_ref())
                        .await?
                }
            };
            // The same thing again would be refused again.
            if authorization.is_some() && authorization.as_ref() != shown {
                known.clone_from(&authorization);
                return Ok(authorization);
            }
        }
        Ok(None)
    }

    /// Asks the token service that the registry named.
    async fn token(
        &self,
        realm: &str,
        service: Option<&str>,
        scope: &str,
        credentials: Option<&Credentials>,
    ) -> Result<Option<HeaderValue>, Failure> {
        let bad_realm = || {
            self.failure(
                FailureKind::Corrupt,
                format!("unusable token service {realm:?}"),
            )
        };
        let realm = Url::parse(realm).map_err(|_| bad_realm())?;
        // A registry with TLS must not have passwords sent in clear.
        if realm.scheme() != "https"
            && !(realm.scheme() == "http" && self.host.base.starts_with("http:"))
        {
            return Err(bad_realm());
        }
        // Many registries give out their own tokens, with the same certificate.
        let own = Url::parse(&self.host.base).is_ok_and(|base| base.origin() == realm.origin());
        let client = if own {
            self.client.clone()
        } else {
            self.client_for(&realm).await?
        };
        let request = auth::token_request(&client, realm, service, scope, credentials);
        let response = self.send(request).await?;
        if !response.status().is_success() {
            let refusal = self.refusal(response).await;
            return Err(Failure {
                words: format!("token service: {}", refusal.words),
                ..refusal
            });
        }
        let body = self.body(response, self.limits.max_manifest_bytes).await?;
        let token = auth::token(&body);
        token.map(Some).ok_or_else(|| {
            self.failure(
                FailureKind::Corrupt,
                "token service: no token in its answer".to_owned(),
            )
        })
    }
}
