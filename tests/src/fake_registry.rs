//! A registry that asks for tokens, hangs, fails or lies, as a test tells it to.

use std::collections::BTreeMap;
use std::io::{BufReader, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use crate::http::{self, Request};
use crate::oci::{self, Image};

/// What to answer.
#[derive(Debug, Clone)]
pub enum Answer {
    /// As a registry does.
    Honest,
    /// A status code with a body: an error in the words of the registry.
    Status(u16, String),
    /// Nothing, ever; the connection stays open.
    Hang,
    /// The head of the honest answer and the first bytes of its body, then nothing, ever.
    Stall(usize),
    /// The honest answer, one byte of its body another.
    Corrupt,
    /// The first bytes of the honest answer's body, then the end of the connection.
    Cut(usize),
}

type Script = dyn Fn(&Request, usize) -> Answer + Send + Sync;

/// A registry with one image, any name, any tag.
pub struct FakeRegistry {
    /// "127.0.0.1:PORT", the first part of its images' names.
    pub host: String,
    shared: Arc<Shared>,
}

struct Shared {
    host: String,
    blobs: BTreeMap<String, Vec<u8>>,
    /// Manifests by digest.
    manifests: BTreeMap<String, (&'static str, Vec<u8>)>,
    /// Digest of what a tag means.
    tagged: String,
    /// User and password whose token is wanted.
    token_for: Option<(String, String)>,
    script: Box<Script>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// "METHOD PATH" of every request, in order.
    requests: Vec<String>,
    connections: Vec<TcpStream>,
    ended: bool,
}

/// The token that the server hands out.
const TOKEN: &str = "a-token-of-the-test";

impl FakeRegistry {
    /// Answers as `script` says for a request and the number of requests to the same path before it.
    pub fn start(
        image: &Image,
        script: impl Fn(&Request, usize) -> Answer + Send + Sync + 'static,
    ) -> Self {
        Self::start_with(image, None, script)
    }

    /// Wants a bearer token, and gives it to `(user, password)`.
    pub fn with_tokens(image: &Image, user: &str, password: &str) -> Self {
        Self::start_with(image, Some((user.into(), password.into())), |_, _| {
            Answer::Honest
        })
    }

    fn start_with(
        image: &Image,
        token_for: Option<(String, String)>,
        script: impl Fn(&Request, usize) -> Answer + Send + Sync + 'static,
    ) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("loopback has free ports");
        let host = listener.local_addr().expect("it is bound").to_string();
        let all = image.parts.iter().cloned();
        let all = all.chain([(image.media_type, image.manifest.clone())]);
        let shared = Arc::new(Shared {
            host: host.clone(),
            blobs: image.blobs.clone(),
            manifests: all.map(|m| (oci::digest(&m.1), m)).collect(),
            tagged: image.digest(),
            token_for,
            script: Box::new(script),
            state: Mutex::default(),
        });
        let server = shared.clone();
        thread::spawn(move || {
            for connection in listener.incoming() {
                let Ok(connection) = connection else { return };
                let mut state = server.state();
                if state.ended {
                    return;
                }
                state
                    .connections
                    .push(connection.try_clone().expect("descriptors are left"));
                let server = server.clone();
                // An error is a client that went away.
                thread::spawn(move || drop(server.serve(connection)));
            }
        });
        Self { host, shared }
    }

    /// The full name of an image here.
    pub fn name(&self, image: &str) -> String {
        format!("{}/{image}", self.host)
    }

    /// "METHOD PATH" of every request so far.
    pub fn requests(&self) -> Vec<String> {
        self.shared.state().requests.clone()
    }

    /// How many requests had a path that contains `part`.
    pub fn count(&self, part: &str) -> usize {
        let requests = self.requests();
        requests
            .iter()
            .filter(|request| request.contains(part))
            .count()
    }
}

impl Drop for FakeRegistry {
    fn drop(&mut self) {
        let mut state = self.shared.state();
        state.ended = true;
        for connection in &state.connections {
            let _ = connection.shutdown(Shutdown::Both);
        }
        drop(state);
        // Wakes the thread that accepts, which then sees `ended`.
        let _ = TcpStream::connect(&self.host);
    }
}

/// An honest answer.
struct Honest {
    status: u16,
    headers: Vec<(&'static str, String)>,
    body: Vec<u8>,
}

impl Honest {
    fn new(status: u16, media_type: &str, body: &[u8]) -> Self {
        Self {
            status,
            headers: vec![("Content-Type", media_type.into())],
            body: body.into(),
        }
    }

    fn with(mut self, header: &'static str, value: &str) -> Self {
        self.headers.push((header, value.into()));
        self
    }
}

impl Shared {
    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn serve(&self, connection: TcpStream) -> std::io::Result<()> {
        let mut out = connection.try_clone()?;
        let mut requests = BufReader::new(connection);
        while let Some(request) = Request::read(&mut requests)? {
            let line = format!("{} {}", request.method, request.path);
            let mut state = self.state();
            let before = state.requests.iter().filter(|old| **old == line).count();
            state.requests.push(line);
            drop(state);
            let mut honest = self.honest(&request);
            match (self.script)(&request, before) {
                Answer::Honest => write(&mut out, &request, &honest, usize::MAX)?,
                Answer::Status(status, body) => {
                    let said = Honest::new(status, "application/json", body.as_bytes());
                    write(&mut out, &request, &said, usize::MAX)?;
                }
                Answer::Hang => hang(),
                Answer::Stall(bytes) => {
                    write(&mut out, &request, &honest, bytes)?;
                    hang();
                }
                Answer::Corrupt => {
                    let middle = honest.body.len() / 2;
                    honest.body[middle] ^= 1;
                    write(&mut out, &request, &honest, usize::MAX)?;
                }
                Answer::Cut(bytes) => {
                    write(&mut out, &request, &honest, bytes)?;
                    return out.shutdown(Shutdown::Both);
                }
            }
        }
        Ok(())
    }

    fn honest(&self, request: &Request) -> Honest {
        // Some clients try OAuth 2, a POST, first.
        if request.path == "/token" && request.method == "GET" {
            return self.token(request);
        }
        let authorized = self.token_for.is_none()
            || request.header("authorization") == Some(&format!("Bearer {TOKEN}"));
        if !authorized {
            let challenge = format!(
                "Bearer realm=\"http://{}/token\",service=\"podvisor-test\",scope=\"repository:{}:pull\"",
                self.host,
                repository(&request.path)
            );
            return error(401, "UNAUTHORIZED").with("WWW-Authenticate", &challenge);
        }
        let parts: Vec<&str> = request.path.split('/').collect();
        match parts[..] {
            ["", "v2", ""] => Honest::new(200, "application/json", b"{}"),
            ["", "v2", .., "manifests", reference] => {
                let tagged = !reference.starts_with("sha256:");
                let digest = if tagged { &self.tagged } else { reference };
                match self.manifests.get(digest) {
                    Some((media_type, manifest)) => {
                        Honest::new(200, media_type, manifest).with("Docker-Content-Digest", digest)
                    }
                    None => error(404, "MANIFEST_UNKNOWN"),
                }
            }
            ["", "v2", .., "blobs", digest] => match self.blobs.get(digest) {
                Some(blob) => Honest::new(200, "application/octet-stream", blob)
                    .with("Docker-Content-Digest", digest),
                None => error(404, "BLOB_UNKNOWN"),
            },
            _ => error(404, "NOT_FOUND"),
        }
    }

    fn token(&self, request: &Request) -> Honest {
        let wanted = self.token_for.as_ref();
        let known = wanted.is_some_and(|(user, password)| {
            request.header("authorization") == Some(&http::basic(user, password))
        });
        let complete = request.query.contains("service=podvisor-test")
            && request.query.contains("scope=repository");
        if known && complete {
            let body = format!("{{\"token\":\"{TOKEN}\",\"expires_in\":300}}");
            Honest::new(200, "application/json", body.as_bytes())
        } else {
            error(401, "UNAUTHORIZED")
        }
    }
}

/// `library/busybox` of `/v2/library/busybox/manifests/latest`.
fn repository(path: &str) -> String {
    let parts: Vec<&str> = path.split('/').collect();
    parts
        .get(2..parts.len().saturating_sub(2))
        .unwrap_or_default()
        .join("/")
}

/// An error as registries write it.
fn error(status: u16, code: &str) -> Honest {
    let body = format!("{{\"errors\":[{{\"code\":\"{code}\",\"message\":\"the test says no\"}}]}}");
    Honest::new(status, "application/json", body.as_bytes())
}

/// Until the process of the tests ends: the thread costs nothing, and the connection is closed when
/// its registry is dropped.
fn hang() -> ! {
    loop {
        thread::park_timeout(Duration::MAX);
    }
}

/// Writes an answer, at most `limit` bytes of its body.
fn write(
    out: &mut TcpStream,
    request: &Request,
    answer: &Honest,
    limit: usize,
) -> std::io::Result<()> {
    let mut head = format!("HTTP/1.1 {} It says\r\n", answer.status);
    for (name, value) in &answer.headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    head.push_str(&format!("Content-Length: {}\r\n\r\n", answer.body.len()));
    out.write_all(head.as_bytes())?;
    if request.method != "HEAD" {
        out.write_all(&answer.body[..answer.body.len().min(limit)])?;
    }
    out.flush()
}
