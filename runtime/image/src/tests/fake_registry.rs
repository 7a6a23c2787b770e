//! An HTTP server on loopback that answers as a test says.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

#[derive(Debug, Clone)]
pub(super) struct Request {
    pub(super) method: String,
    /// With the query.
    pub(super) path: String,
    /// Names in lower case.
    pub(super) headers: HashMap<String, String>,
    pub(super) body: String,
}

/// What to do with a request.
#[derive(Debug, Clone)]
pub(super) struct Reply {
    pub(super) status: u16,
    pub(super) headers: Vec<(String, String)>,
    pub(super) body: Vec<u8>,
    pub(super) end: End,
}

/// How an answer ends.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum End {
    /// All of it is sent.
    Whole,
    /// Nothing is sent, and the connection stays.
    Silent,
    /// Stops after so many bytes of the body, and the connection stays.
    Stall(usize),
    /// Closes the connection after so many bytes of the body.
    Cut(usize),
}

impl Reply {
    pub(super) fn ok(content_type: &str, body: &[u8]) -> Self {
        let headers = vec![("Content-Type".to_owned(), content_type.to_owned())];
        Self {
            status: 200,
            headers,
            body: body.to_vec(),
            end: End::Whole,
        }
    }

    pub(super) fn error(status: u16, code: &str, message: &str) -> Self {
        let body = format!(r#"{{"errors":[{{"code":"{code}","message":"{message}"}}]}}"#);
        Self {
            status,
            ..Self::ok("application/json", body.as_bytes())
        }
    }

    pub(super) fn header(mut self, name: &str, value: &str) -> Self {
        self.headers.push((name.to_owned(), value.to_owned()));
        self
    }

    pub(super) fn end(self, end: End) -> Self {
        Self { end, ..self }
    }

    /// Only what the request's `Range` asks for.
    pub(super) fn ranged(self, request: &Request) -> Self {
        let range = request
            .headers
            .get("range")
            .and_then(|range| range.strip_prefix("bytes=")?.strip_suffix('-'));
        let Some(start) = range.map(|start| start.parse::<usize>().unwrap()) else {
            return self;
        };
        let total = self.body.len();
        let body = self.body[start..].to_vec();
        Self {
            status: 206,
            body,
            ..self
        }
        .header(
            "Content-Range",
            &format!("bytes {start}-{}/{total}", total - 1),
        )
    }
}

pub(super) struct FakeRegistry {
    pub(super) address: String,
    requests: Arc<Mutex<Vec<Request>>>,
    server: JoinHandle<()>,
}

impl Drop for FakeRegistry {
    fn drop(&mut self) {
        self.server.abort();
    }
}

impl FakeRegistry {
    pub(super) async fn start(handler: impl Fn(&Request) -> Reply + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let requests = Arc::new(Mutex::new(Vec::new()));
        let (handler, seen) = (Arc::new(handler), Arc::clone(&requests));
        let server = tokio::spawn(async move {
            while let Ok((connection, _)) = listener.accept().await {
                let (handler, seen) = (Arc::clone(&handler), Arc::clone(&seen));
                tokio::spawn(async move {
                    // A client that went away is no concern of the server's.
                    let _ = serve(connection, &*handler, &seen).await;
                });
            }
        });
        Self {
            address,
            requests,
            server,
        }
    }

    pub(super) fn requests(&self) -> Vec<Request> {
        self.requests.lock().unwrap().clone()
    }

    /// How many requests had this in their path.
    pub(super) fn count(&self, part: &str) -> usize {
        self.requests()
            .iter()
            .filter(|request| request.path.contains(part))
            .count()
    }
}

async fn serve(
    connection: TcpStream,
    handler: &(impl Fn(&Request) -> Reply + Send + Sync),
    seen: &Mutex<Vec<Request>>,
) -> std::io::Result<()> {
    let mut connection = BufReader::new(connection);
    let mut line = String::new();
    connection.read_line(&mut line).await?;
    let mut words = line.split(' ').map(str::to_owned);
    let (method, path) = (
        words.next().unwrap_or_default(),
        words.next().unwrap_or_default(),
    );
    let mut headers = HashMap::new();
    loop {
        line.clear();
        connection.read_line(&mut line).await?;
        let Some((name, value)) = line.trim().split_once(": ") else {
            break;
        };
        headers.insert(name.to_ascii_lowercase(), value.to_owned());
    }
    let length = headers
        .get("content-length")
        .map_or(0, |length| length.parse().unwrap());
    let mut body = vec![0; length];
    connection.read_exact(&mut body).await?;
    let request = Request {
        method,
        path,
        headers,
        body: String::from_utf8(body).unwrap(),
    };
    let reply = handler(&request);
    seen.lock().unwrap().push(request);

    let mut head = format!("HTTP/1.1 {} X\r\nConnection: close\r\n", reply.status);
    let length = ("Content-Length".to_owned(), reply.body.len().to_string());
    for (name, value) in reply.headers.iter().chain([&length]) {
        head.extend([name, ": ", value, "\r\n"]);
    }
    let sent = match reply.end {
        End::Silent => return std::future::pending().await,
        End::Whole => reply.body.len(),
        End::Stall(sent) | End::Cut(sent) => sent.min(reply.body.len()),
    };
    connection.write_all(head.as_bytes()).await?;
    connection.write_all(b"\r\n").await?;
    connection.write_all(&reply.body[..sent]).await?;
    connection.flush().await?;
    if matches!(reply.end, End::Stall(_)) {
        return std::future::pending().await;
    }
    connection.shutdown().await
}
