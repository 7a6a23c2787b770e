//! The server with a scripted client and processes that are none.

mod http;
mod spdy;
mod websocket;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;

use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};

use crate::backend::{Attach, Backend, Duplex, Exec, Session, Size, Streams};
use crate::spdy::frame::{self, FLAG_FIN, HEADER, Header, kind};
use crate::spdy::headers;
use crate::{Config, Server};

/// Runs "processes": `cat` (stdin to stdout), `yes` (output without end), `exit CODE`, `size` (prints the sizes of its
/// terminal), `refused`.
#[derive(Clone)]
struct Fake {
    /// A permit for each session that was dropped before its end.
    killed: Arc<Semaphore>,
}

struct Killed(Option<Arc<Semaphore>>);

impl Killed {
    fn disarm(&mut self) {
        self.0 = None;
    }
}

impl Drop for Killed {
    fn drop(&mut self) {
        if let Some(killed) = &self.0 {
            killed.add_permits(1);
        }
    }
}

impl Backend for Fake {
    async fn exec(&self, exec: Exec) -> Result<Session, String> {
        let (stdin, mut process_stdin) = duplex(1000);
        let (stdout, mut process_stdout) = duplex(1000);
        let (stderr, mut process_stderr) = duplex(1000);
        let (resize, mut sizes) = watch::channel(Size::default());
        let args = exec.args.clone();
        if args[0] == "refused" {
            return Err("no such program".to_owned());
        }
        let process = tokio::spawn(async move {
            match args[0].as_str() {
                "cat" => {
                    let _ = tokio::io::copy(&mut process_stdin, &mut process_stdout).await;
                }
                "yes" => while process_stdout.write_all(b"y\n").await.is_ok() {},
                "exit" => {
                    process_stdout.write_all(b"out").await.unwrap();
                    process_stderr.write_all(b"err").await.unwrap();
                    return args[1].parse().unwrap();
                }
                "size" => {
                    sizes.changed().await.unwrap();
                    let Size { width, height } = *sizes.borrow();
                    let text = format!("{width}x{height}");
                    process_stdout.write_all(text.as_bytes()).await.unwrap();
                }
                other => panic!("{other}"),
            }
            0
        });
        let mut killed = Killed(Some(Arc::clone(&self.killed)));
        Ok(Session {
            stdin: exec.streams.stdin.then(|| Box::new(stdin) as _),
            stdout: Some(Box::new(stdout)),
            stderr: Some(Box::new(stderr)),
            resize,
            ended: Box::pin(async move {
                let code = process.await.unwrap();
                killed.disarm();
                Ok(code)
            }),
        })
    }

    async fn attach(&self, attach: Attach) -> Result<Session, String> {
        let Attach {
            container_id,
            streams,
        } = attach;
        let args = vec!["cat".to_owned()];
        self.exec(Exec {
            container_id,
            args,
            streams,
        })
        .await
    }

    async fn port_forward(&self, _: &str, port: u16) -> Result<Box<dyn Duplex>, String> {
        if port != 7 {
            return Err(format!("port {port}: connection refused"));
        }
        let (ours, process) = duplex(1000);
        tokio::spawn(async move {
            let (mut reader, mut writer) = tokio::io::split(process);
            let _ = tokio::io::copy(&mut reader, &mut writer).await;
            let _ = writer.shutdown().await;
        });
        Ok(Box::new(ours))
    }
}

/// For property tests.
fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
        .block_on(future)
}

struct Rig {
    server: Server<Fake>,
    killed: Arc<Semaphore>,
    address: SocketAddr,
}

async fn rig() -> Rig {
    rig_with(Config::default()).await
}

async fn rig_with(config: Config) -> Rig {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let killed = Arc::new(Semaphore::new(0));
    let fake = Fake {
        killed: Arc::clone(&killed),
    };
    let server = Server::new(fake, address, config);
    tokio::spawn(server.clone().serve(listener));
    Rig {
        server,
        killed,
        address,
    }
}

fn exec(args: &[&str], stdin: bool, terminal: bool) -> Exec {
    Exec {
        container_id: "container".to_owned(),
        args: args.iter().map(|&arg| arg.to_owned()).collect(),
        streams: Streams {
            stdin,
            stdout: true,
            stderr: !terminal,
            terminal,
        },
    }
}

impl Rig {
    /// Sends the head of a request, returns that of the answer.
    async fn request(&self, url: &str, headers: &[(&str, &str)]) -> (TcpStream, String) {
        use std::fmt::Write as _;
        let path = url
            .split_once("//")
            .map_or(url, |(_, rest)| &rest[rest.find('/').unwrap()..]);
        let mut head = format!("POST {path} HTTP/1.1\r\nHost: here\r\n");
        for (name, value) in headers {
            write!(head, "{name}: {value}\r\n").unwrap();
        }
        head.push_str("\r\n");
        let mut stream = TcpStream::connect(self.address).await.unwrap();
        stream.write_all(head.as_bytes()).await.unwrap();
        let mut answer = Vec::new();
        while !answer.ends_with(b"\r\n\r\n") {
            answer.push(stream.read_u8().await.unwrap());
        }
        (stream, String::from_utf8(answer).unwrap().to_lowercase())
    }

    async fn spdy(&self, url: &str, protocol: &str) -> SpdyClient {
        let headers = [
            ("Connection", "Upgrade"),
            ("Upgrade", "SPDY/3.1"),
            ("X-Stream-Protocol-Version", protocol),
        ];
        let (stream, answer) = self.request(url, &headers).await;
        assert!(answer.starts_with("http/1.1 101 "), "{answer}");
        assert!(
            answer.contains("connection: upgrade\r\nupgrade: spdy/3.1\r\n"),
            "{answer}"
        );
        SpdyClient::new(stream)
    }
}

/// A client of SPDY.
struct SpdyClient<T = TcpStream> {
    stream: T,
    deflate: headers::Writer,
    inflate: headers::Reader,
    next_id: u32,
    /// By stream: bytes, and whether they are all.
    received: HashMap<u32, (Vec<u8>, bool)>,
}

impl<T: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin> SpdyClient<T> {
    fn new(stream: T) -> Self {
        Self {
            stream,
            deflate: headers::Writer::default(),
            inflate: headers::Reader::default(),
            next_id: 1,
            received: HashMap::new(),
        }
    }

    async fn send(&mut self, frame: &[u8]) {
        self.stream.write_all(frame).await.unwrap();
        self.stream.flush().await.unwrap();
    }

    fn syn_stream(&mut self, headers: &[(&str, &str)]) -> (u32, Vec<u8>) {
        let id = self.next_id;
        self.next_id += 2;
        let block = self.deflate.write(headers);
        let frame = frame::control(kind::SYN_STREAM, &[&id.to_be_bytes(), &[0; 6], &block]);
        (id, frame)
    }

    async fn open(&mut self, headers: &[(&str, &str)]) -> u32 {
        let (id, frame) = self.syn_stream(headers);
        self.send(&frame).await;
        id
    }

    /// Opens the streams of a command.
    async fn streams<const N: usize>(&mut self, kinds: [&str; N]) -> [u32; N] {
        let mut ids = [0; N];
        for (id, kind) in ids.iter_mut().zip(kinds) {
            *id = self.open(&[("streamtype", kind)]).await;
        }
        ids
    }

    async fn data(&mut self, id: u32, bytes: &[u8], fin: bool) {
        let mut room = [0; 16];
        let mut frame = frame::data_header(&mut room, id, bytes.len(), fin).to_vec();
        frame.extend_from_slice(bytes);
        self.send(&frame).await;
    }

    /// The next frame; None at the end.
    async fn frame(&mut self) -> Option<(Header, Vec<u8>)> {
        let mut header = [0; HEADER];
        self.stream.read_exact(&mut header).await.ok()?;
        let header = Header::parse(header);
        let (Header::Data { length, .. } | Header::Control { length, .. }) = header;
        let mut payload = vec![0; length as usize];
        self.stream.read_exact(&mut payload).await.ok()?;
        match header {
            Header::Data { id, flags, .. } => {
                let (bytes, ended) = self.received.get_mut(&id).expect("data before the reply");
                assert!(!*ended, "data after the end");
                bytes.extend_from_slice(&payload);
                *ended = flags & FLAG_FIN != 0;
            }
            Header::Control {
                kind: kind::SYN_REPLY,
                ..
            } => {
                let id = u32::from_be_bytes(payload[..4].try_into().unwrap());
                self.inflate.read(&payload[4..]).unwrap();
                self.received.insert(id, (Vec::new(), false));
            }
            Header::Control { .. } => {}
        }
        Some((header, payload))
    }

    /// Reads until a control frame of this kind; its payload.
    async fn control(&mut self, wanted: u16) -> Option<Vec<u8>> {
        loop {
            let (header, payload) = self.frame().await?;
            if matches!(header, Header::Control { kind, .. } if kind == wanted) {
                return Some(payload);
            }
        }
    }

    /// Reads until a stream has ended.
    async fn text(&mut self, id: u32) -> String {
        while !self.received.get(&id).is_some_and(|(_, ended)| *ended) {
            self.frame().await.expect("the connection has ended");
        }
        String::from_utf8(self.received[&id].0.clone()).unwrap()
    }
}
