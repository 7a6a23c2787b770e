//! Who asks, and how it is proved.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

use super::*;
use crate::Credentials;

fn password(username: &str, password: &str) -> Credentials {
    Credentials::Password {
        username: username.to_owned(),
        password: password.to_owned(),
    }
}

fn basic(text: &str) -> String {
    format!("Basic {}", STANDARD.encode(text))
}

/// A registry that wants the token `good`, and its token service, which wants `user:right` and gives `good`.
async fn with_tokens(fixture: &Fixture, anonymous: bool) -> FakeRegistry {
    let fixture = fixture.clone();
    let address = Arc::new(Mutex::new(String::new()));
    let own = Arc::clone(&address);
    let registry = FakeRegistry::start(move |request| {
        let authorization = request.headers.get("authorization").map(String::as_str);
        if request.path.starts_with("/token") {
            let scope = "repository%3Ateam%2Fapp%3Apull";
            let (query, refreshed) = match request.method.as_str() {
                "POST" => (
                    &request.body,
                    request.body.contains("refresh_token=identity"),
                ),
                _ => (&request.path, false),
            };
            assert!(
                query.contains("service=test") && query.contains(scope),
                "{query}"
            );
            return if refreshed || anonymous || authorization == Some(&basic("user:right")) {
                Reply::ok(
                    "application/json",
                    br#"{"access_token":"good","expires_in":60}"#,
                )
            } else {
                Reply::error(401, "UNAUTHORIZED", "incorrect username or password")
            };
        }
        if authorization == Some("Bearer good") {
            return fixture.answer(request);
        }
        let realm = own.lock().unwrap().clone();
        let challenge = format!(
            r#"Bearer realm="http://{realm}/token",service="test",scope="repository:team/app:pull""#
        );
        Reply::error(401, "UNAUTHORIZED", "authentication required")
            .header("WWW-Authenticate", &challenge)
    })
    .await;
    *address.lock().unwrap() = registry.address.clone();
    registry
}

async fn pull(
    registry: &FakeRegistry,
    credentials: Option<Credentials>,
) -> Result<Arc<Image>, PullError> {
    let node = Node::new();
    let result = node
        .store
        .pull(
            &format!("{}/team/app", registry.address),
            credentials,
            &|_| {},
        )
        .await;
    if result.is_err() {
        node.becomes_empty().await;
    }
    result
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens() {
    let fixture = Fixture::new(&[b"a", b"b", b"c"]);
    let registry = with_tokens(&fixture, false).await;
    assert_eq!(
        pull(&registry, Some(password("user", "right")))
            .await
            .unwrap()
            .id,
        fixture.id()
    );
    // One token for all requests.
    assert_eq!(registry.count("/token"), 1);
    assert!(
        pull(
            &registry,
            Some(Credentials::IdentityToken("identity".to_owned()))
        )
        .await
        .is_ok()
    );
    assert!(
        pull(
            &registry,
            Some(Credentials::RegistryToken("good".to_owned()))
        )
        .await
        .is_ok()
    );
    let anonymous = with_tokens(&fixture, true).await;
    assert!(pull(&anonymous, None).await.is_ok());
}

#[tokio::test(flavor = "multi_thread")]
async fn refused() {
    let fixture = Fixture::new(&[b"a"]);
    let registry = with_tokens(&fixture, false).await;
    let wrong = pull(&registry, Some(password("user", "wrong")))
        .await
        .unwrap_err();
    assert!(
        matches!(&wrong, PullError::Unauthorized(words) if words.contains("incorrect username or password")),
        "{wrong}"
    );
    assert!(matches!(
        pull(&registry, None).await,
        Err(PullError::Unauthorized(_))
    ));
    let token = pull(
        &registry,
        Some(Credentials::RegistryToken("bad".to_owned())),
    )
    .await
    .unwrap_err();
    assert!(
        matches!(&token, PullError::Unauthorized(words) if words.contains("authentication required")),
        "{token}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_that_expires_during_the_pull() {
    let fixture = Fixture::new(&[b"a", b"b"]);
    let honest = fixture.clone();
    let issued = Mutex::new(0);
    let address = Arc::new(Mutex::new(String::new()));
    let own = Arc::clone(&address);
    let registry = FakeRegistry::start(move |request| {
        let mut issued = issued.lock().unwrap();
        if request.path.starts_with("/token") {
            *issued += 1;
            return Reply::ok(
                "application/json",
                format!(r#"{{"token":"t{issued}"}}"#).as_bytes(),
            );
        }
        // The first token is good for the manifest alone.
        let wanted = if request.path.contains("manifests") {
            1
        } else {
            2
        };
        if request.headers.get("authorization") == Some(&format!("Bearer t{wanted}")) {
            return honest.answer(request);
        }
        let realm = own.lock().unwrap().clone();
        Reply::error(401, "", "").header(
            "WWW-Authenticate",
            &format!("Bearer realm=\"http://{realm}/token\""),
        )
    })
    .await;
    *address.lock().unwrap() = registry.address.clone();
    assert!(pull(&registry, None).await.is_ok());
    assert_eq!(registry.count("/token"), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn basic_authentication() {
    let fixture = Fixture::new(&[b"a"]);
    let honest = fixture.clone();
    let registry = FakeRegistry::start(move |request| {
        if request.headers.get("authorization") == Some(&basic("user:p:w")) {
            return honest.answer(request);
        }
        Reply::error(401, "UNAUTHORIZED", "who are you")
            .header("WWW-Authenticate", "Basic realm=\"r\"")
    })
    .await;
    assert!(pull(&registry, Some(password("user", "p:w"))).await.is_ok());
    let first = &registry.requests()[0];
    assert!(
        !first.headers.contains_key("authorization"),
        "a password that nobody asked for"
    );
    for credentials in [
        None,
        Some(password("user", "no")),
        Some(Credentials::RegistryToken("t".to_owned())),
    ] {
        let error = pull(&registry, credentials).await.unwrap_err();
        assert!(
            matches!(&error, PullError::Unauthorized(words) if words.contains("who are you")),
            "{error}"
        );
    }
}
