//! Exec, attach and port-forward: the real crictl over SPDY and WebSocket, for both kinds of pods.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Stdio};
use std::sync::{Arc, Mutex};

use podvisor_proto::cri;
use podvisor_tests::certificates::Authority;
use podvisor_tests::crictl::{Ran, container, shell};
use podvisor_tests::daemon::{Daemon, Options};
use podvisor_tests::registry::busybox;
use podvisor_tests::{eventually, http, logs, output_in_time};
use serde_json::{Value, json};
use tonic::Code;

const TRANSPORTS: [&str; 2] = ["spdy", "websocket"];

/// A daemon with a pod of this handler that has a container which only waits; its id.
fn with_container(handler: &'static str) -> (Daemon, String) {
    let daemon = Daemon::start();
    daemon.pull(&busybox());
    let pod = daemon.pod("streams").by_handler(handler);
    let id = daemon.run_pod(&pod);
    let container = daemon.create_started(&id, &pod, &shell("c", &busybox(), "exec sleep 10000"));
    (daemon, container)
}

/// Runs crictl with this as its standard input.
fn with_input(daemon: &Daemon, args: &[&str], input: &[u8]) -> Ran {
    let mut child = daemon
        .crictl_command(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("crictl can be executed");
    let mut stdin = child.stdin.take().expect("a pipe");
    let input = input.to_vec();
    // A command may end without having read all.
    let writing = std::thread::spawn(move || drop(stdin.write_all(&input)));
    let output = output_in_time(child);
    writing.join().expect("written");
    Ran {
        code: output.status.code().unwrap_or(-1),
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

fn exec_works(handler: &'static str) {
    let (daemon, container) = with_container(handler);
    for transport in TRANSPORTS {
        let exec = |options: &[&str], script: &str, input: &[u8]| {
            let command = ["exec", "--transport", transport];
            let args = [&command[..], options, &[&container, "sh", "-c", script]].concat();
            with_input(&daemon, &args, input)
        };
        let ran = exec(&[], "echo out; echo err >&2", b"");
        assert_eq!(
            (ran.stdout.as_str(), ran.stderr.as_str()),
            ("out\n", "err\n"),
            "{transport}"
        );
        let ran = exec(&[], "echo last; exit 3", b"");
        assert!(
            ran.stderr.contains("exit code 3"),
            "{transport}: {}",
            ran.stderr
        );
        assert_eq!(
            (ran.stdout.as_str(), ran.code),
            ("last\n", 1),
            "{transport}"
        );
        let ran = daemon.crictl(&[
            "exec",
            "--transport",
            transport,
            &container,
            "/no/such/program",
        ]);
        assert!(
            ran.code != 0 && ran.stderr.contains("/no/such/program"),
            "{}",
            ran.stderr
        );

        // Both ways, far more than any buffer, to the last byte; also when standard output is closed long before.
        let input = "0123456789abcde\n".repeat(128 * 1024).into_bytes();
        let ran = exec(&["-i"], "cat", &input);
        assert!(
            ran.stdout.as_bytes() == input,
            "{transport}: {} bytes",
            ran.stdout.len()
        );
        let ran = exec(&["-i"], "exec >&-; cat > /tmp/file", &input);
        assert_eq!(ran.code, 0, "{}", ran.stderr);
        assert_eq!(
            daemon.exec(&container, &["wc", "-c", "/tmp/file"]),
            "2097152 /tmp/file"
        );

        // Who does not read to the end is no reason to wait for.
        let ran = exec(&["-i"], "head -c 4", &input);
        assert_eq!(ran.stdout, "0123");
        // A process in the background has the streams and is not waited for.
        let ran = exec(&[], "sleep 1000 & echo started", b"");
        assert_eq!(ran.stdout, "started\n");
    }
    // What a client that goes away has left.
    let mut client =
        daemon.crictl_spawn(&["exec", &container, "sh", "-c", "echo runs; exec sleep 4321"]);
    let mut first = [0; 5];
    client
        .stdout
        .as_mut()
        .expect("a pipe")
        .read_exact(&mut first)
        .expect("output");
    end(client);
    eventually("the command is killed", || {
        (!daemon.exec(&container, &["ps"]).contains("sleep 4321")).then_some(())
    });
}

/// The end of a crictl, without a word: SIGTERM it may take for later.
fn end(mut child: Child) {
    child.kill().expect("it runs");
    child.wait().expect("it is ours");
}

#[test]
fn exec_in_a_vm() {
    exec_works("podvisor");
}

#[test]
fn exec_on_the_host() {
    exec_works("runc");
}

#[test]
fn exec_that_cannot_be() {
    let (daemon, container) = with_container("podvisor");
    let exec = |change: &dyn Fn(&mut cri::ExecRequest)| {
        let mut request = cri::ExecRequest {
            container_id: container.clone(),
            cmd: vec!["true".to_owned()],
            stdout: true,
            ..Default::default()
        };
        change(&mut request);
        daemon.cri().call(async |mut c| c.exec(request).await)
    };
    let url = exec(&|_| {}).expect("a URL").url;
    assert!(url.starts_with("http://127.0.0.1:"), "{url}");
    let code = |answer: Result<_, tonic::Status>| answer.expect_err("a refusal").code();
    assert_eq!(code(exec(&|r| r.stdout = false)), Code::InvalidArgument);
    assert_eq!(
        code(exec(&|r| (r.tty, r.stderr) = (true, true))),
        Code::InvalidArgument
    );
    assert_eq!(code(exec(&|r| r.cmd.clear())), Code::InvalidArgument);
    assert_eq!(
        code(exec(&|r| r.container_id = "0".repeat(64))),
        Code::NotFound
    );
    daemon.cri().stop_container(&container);
    assert_eq!(code(exec(&|_| {})), Code::FailedPrecondition);
}

/// A crictl with a terminal of its own.
struct Typist {
    child: Child,
    master: File,
    /// All that was on the screen.
    screen: Arc<Mutex<String>>,
}

impl Typist {
    fn start(daemon: &Daemon, args: &[&str]) -> Self {
        let size = nix::pty::Winsize {
            ws_row: 33,
            ws_col: 111,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        let pty = nix::pty::openpty(Some(&size), None).expect("a terminal");
        let end = || Stdio::from(pty.slave.try_clone().expect("a descriptor"));
        let mut command = daemon.crictl_command(args);
        let child = command.stdin(end()).stdout(end()).stderr(end()).spawn();
        let child = child.expect("crictl can be executed");
        drop(command);
        let master = File::from(pty.master);
        let screen = Arc::new(Mutex::new(String::new()));
        let (mut reader, shown) = (
            master.try_clone().expect("a descriptor"),
            Arc::clone(&screen),
        );
        std::thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(count @ 1..) = reader.read(&mut bytes) {
                let text = String::from_utf8_lossy(&bytes[..count]);
                shown.lock().expect("no panic").push_str(&text);
            }
        });
        Self {
            child,
            master,
            screen,
        }
    }

    fn types(&mut self, text: &str) {
        self.master.write_all(text.as_bytes()).expect("typed");
    }

    /// Waits until this is on the screen.
    fn sees(&self, text: &str) {
        eventually(text, || {
            self.screen
                .lock()
                .expect("no panic")
                .contains(text)
                .then_some(())
        });
    }

    fn ends(mut self) {
        assert!(self.child.wait().expect("it is ours").success());
    }
}

impl Drop for Typist {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("the screen: {:?}", self.screen.lock());
        }
    }
}

fn a_terminal_works(handler: &'static str) {
    let (daemon, container) = with_container(handler);
    for transport in TRANSPORTS {
        let mut shell = Typist::start(
            &daemon,
            &["exec", "-it", "--transport", transport, &container, "sh"],
        );
        shell.types("echo a$((1 + 1))b; test -t 0 && echo $TERM\n");
        shell.sees("a2b");
        shell.sees("xterm");
        // The size has a stream of its own, which may come after what is typed.
        shell.types("until stty size | grep '^33 1''11'; do sleep 0.2; done\n");
        shell.sees("33 111");
        // Interrupts what runs, not the shell.
        shell.types("sleep 5000\n");
        eventually("it sleeps", || {
            daemon
                .exec(&container, &["ps"])
                .contains("sleep 5000")
                .then_some(())
        });
        shell.types("\x03");
        shell.types("echo c$((1 + 2))d; exit\n");
        shell.sees("c3d");
        shell.ends();
    }
}

#[test]
fn a_terminal_in_a_vm() {
    a_terminal_works("podvisor");
}

#[test]
fn a_terminal_on_the_host() {
    a_terminal_works("runc");
}

/// What a crictl prints.
struct Onlooker {
    child: Child,
    seen: Arc<Mutex<String>>,
}

impl Onlooker {
    fn start(daemon: &Daemon, args: &[&str]) -> Self {
        let mut command = daemon.crictl_command(args);
        let child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
        let mut child = child.expect("crictl can be executed");
        let mut stdout = child.stdout.take().expect("a pipe");
        let seen = Arc::new(Mutex::new(String::new()));
        let shown = Arc::clone(&seen);
        std::thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(count @ 1..) = stdout.read(&mut bytes) {
                let text = String::from_utf8_lossy(&bytes[..count]);
                shown.lock().expect("no panic").push_str(&text);
            }
        });
        Self { child, seen }
    }

    fn types(&mut self, text: &str) {
        let stdin = self.child.stdin.as_mut().expect("a pipe");
        stdin.write_all(text.as_bytes()).expect("typed");
    }

    fn sees(&self, text: &str) {
        eventually(text, || {
            self.seen
                .lock()
                .expect("no panic")
                .contains(text)
                .then_some(())
        });
    }
}

/// Attaches, and waits until it shows: what `tick` prints comes only when it is asked for.
fn attached(daemon: &Daemon, options: &[&str], container: &str, tick: &dyn Fn()) -> Onlooker {
    let onlooker = Onlooker::start(daemon, &[&["attach"], options, &[container]].concat());
    eventually("it is attached", || {
        tick();
        onlooker
            .seen
            .lock()
            .expect("no panic")
            .contains("tick")
            .then_some(())
    });
    onlooker
}

fn attach_works(handler: &'static str) {
    let mut daemon = Daemon::start();
    daemon.pull(&busybox());
    let pod = daemon.pod("attach").by_handler(handler);
    let id = daemon.run_pod(&pod);
    // Prints what it reads, and a tick for each file.
    let script = "(while :; do rm /tmp/tick 2>/dev/null && echo tick; sleep 0.05; done) & t=$!; \
                  while read line; do echo got $line; done; echo end of input; kill $t; exit 5";
    let mut config = shell("c", &busybox(), script);
    config["stdin"] = json!(true);
    config["stdin_once"] = json!(true);
    let container = daemon.create_started(&id, &pod, &config);
    let tick = |daemon: &Daemon| {
        daemon.exec(&container, &["touch", "/tmp/tick"]);
    };
    let looks_on = attached(&daemon, &["--transport", "websocket"], &container, &|| {
        tick(&daemon);
    });
    let mut first = attached(&daemon, &["-i"], &container, &|| tick(&daemon));
    first.types("one\n");
    first.sees("got one");
    looks_on.sees("got one");

    // Clients go with podvisord, the container's input stays.
    daemon.kill();
    first.child.wait().expect("it is ours");
    daemon.restart();
    end(looks_on.child);
    let mut second = attached(&daemon, &["-i"], &container, &|| tick(&daemon));
    second.types("two\n");
    second.sees("got two");

    // Who never reads holds up neither the log nor the others.
    let mut stuck = daemon.crictl_spawn(&["attach", &container]);
    let load = "for i in $(seq 100); do touch /tmp/tick; sleep 0.01; done";
    daemon.exec(&container, &["sh", "-c", load]);
    second.types("three\n");
    second.sees("got three");
    stuck.kill().expect("it is ours");
    stuck.wait().expect("it is ours");

    // The first that ends its input ends the container's (stdin_once).
    drop(second.child.stdin.take());
    second.sees("end of input");
    assert!(second.child.wait().expect("it is ours").success());
    assert_eq!(daemon.cri().wait_exit(&container).exit_code, 5);
    assert_eq!(
        logs::stdout(&pod.log("c"))
            .iter()
            .filter(|line| *line != "tick")
            .collect::<Vec<_>>(),
        ["got one", "got two", "got three", "end of input"]
    );
}

#[test]
fn attach_in_a_vm() {
    attach_works("podvisor");
}

#[test]
fn attach_on_the_host() {
    attach_works("runc");
}

fn an_attached_terminal_works(handler: &'static str) {
    let daemon = Daemon::start();
    daemon.pull(&busybox());
    let pod = daemon.pod("terminal").by_handler(handler);
    let id = daemon.run_pod(&pod);
    let mut config = container("c", &busybox(), &["sh"]);
    for key in ["stdin", "tty"] {
        config[key] = json!(true);
    }
    let container = daemon.create_started(&id, &pod, &config);
    let attach = |transport| {
        Typist::start(
            &daemon,
            &["attach", "-it", "--transport", transport, &container],
        )
    };
    let mut first = attach("spdy");
    // What is typed before it is attached waits in the terminal. The size may come after it.
    first.types("x=7; until stty size | grep '^33 1''11'; do sleep 0.2; done\n");
    first.sees("33 111");
    first.child.kill().expect("it is ours");
    first.child.wait().expect("it is ours");
    let mut second = attach("websocket");
    second.types("echo a${x}b; exit 4\n");
    second.sees("a7b");
    second.ends();
    assert_eq!(daemon.cri().wait_exit(&container).exit_code, 4);
}

#[test]
fn an_attached_terminal_in_a_vm() {
    an_attached_terminal_works("podvisor");
}

#[test]
fn an_attached_terminal_on_the_host() {
    an_attached_terminal_works("runc");
}

/// Has a server behind a port that is forwarded to say `text` back; None when nothing comes.
fn ask(port: u16, text: &str) -> Option<String> {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).ok()?;
    let length = text.len();
    let head = format!("POST /cgi-bin/echo HTTP/1.0\r\nContent-Length: {length}\r\n\r\n");
    stream.write_all(head.as_bytes()).ok()?;
    stream.write_all(text.as_bytes()).ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    let (_, body) = answer
        .split_once("\n\n")
        .or_else(|| answer.split_once("\r\n\r\n"))?;
    Some(body.to_owned())
}

fn port_forward_works(handler: &'static str, linux: &Value) {
    let daemon = Daemon::start();
    daemon.pull(&busybox());
    let pod = daemon
        .pod("ports")
        .by_handler(handler)
        .with("linux", linux.clone());
    let id = daemon.run_pod(&pod);
    // In the pod's loopback interface alone.
    let script = "mkdir -p /www/cgi-bin; cd /www/cgi-bin; \
                  echo '#!/bin/sh' > echo; echo echo >> echo; echo 'exec cat' >> echo; chmod +x echo; \
                  httpd -p 127.0.0.1:80 -h /www; httpd -p [::1]:81 -h /www; exec sleep 10000";
    let mut config = shell("c", &busybox(), script);
    config["linux"]["security_context"] = linux["security_context"].clone();
    let container = daemon.create_started(&id, &pod, &config);
    // crictl ends with the first connection that is refused.
    eventually("both listen", || {
        let sockets = daemon.exec(&container, &["cat", "/proc/net/tcp", "/proc/net/tcp6"]);
        let listens = |port: &str| sockets.contains(&format!("{port} "));
        (listens(":0050") && listens(":0051")).then_some(())
    });
    for transport in TRANSPORTS {
        let free = || {
            let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
            listener.local_addr().expect("bound").port()
        };
        let ports = [(free(), 80), (free(), 81), (free(), 82)];
        let mut args = vec!["port-forward", "--transport", transport, &id];
        let pairs = ports.map(|(local, remote)| format!("{local}:{remote}"));
        args.extend(pairs.iter().map(String::as_str));
        let client = daemon.crictl_spawn(&args);
        let answer = eventually("the first answer", || ask(ports[0].0, "hello"));
        assert_eq!(answer, "hello");
        // Several at once, and more than any buffer.
        let text = "0123456789abcdef".repeat(16 * 1024);
        std::thread::scope(|scope| {
            for (local, _) in [ports[0], ports[1], ports[0], ports[1]] {
                let text = &text;
                scope.spawn(move || assert!(ask(local, text).as_ref() == Some(text)));
            }
        });
        // Nobody listens there: told, not waited for.
        assert_eq!(ask(ports[2].0, "hello"), None);
        end(client);
    }
}

#[test]
fn ports_in_a_vm() {
    port_forward_works("podvisor", &json!({}));
}

#[test]
fn ports_on_the_host() {
    port_forward_works("runc", &json!({}));
}

#[test]
fn ports_in_a_vm_with_a_user_namespace() {
    let ids = json!([{"host_id": 1_000_000, "container_id": 0, "length": 65536}]);
    let options = json!({"userns_options": {"mode": 0, "uids": ids, "gids": ids}});
    let linux = json!({"security_context": {"namespace_options": options}});
    port_forward_works("podvisor", &linux);
}

#[test]
fn over_tls() {
    let authority = Authority::new();
    let own = authority.issue("server", "DNS:streaming.test");
    let files = [authority.certificate(), &own.certificate, &own.key];
    let [ca, certificate, key] = files.map(|file: &Path| file.display().to_string());
    let daemon = Daemon::start_with(&Options {
        config: vec![
            ("streaming", format!("tls_certificate = \"{certificate}\"")),
            ("streaming", format!("tls_key = \"{key}\"")),
        ],
        ..Options::default()
    });
    daemon.pull(&busybox());
    let pod = daemon.pod("tls");
    let id = daemon.run_pod(&pod);
    let c = daemon.create_started(&id, &pod, &shell("c", &busybox(), "exec sleep 10000"));
    for transport in TRANSPORTS {
        let exec = |name: &str| {
            // crictl wants a certificate of its own as well; the server asks for none.
            let trust = ["--tls-ca", &ca, "--tls-cert", &certificate];
            let args = [
                &["exec", "-i", "--transport", transport][..],
                &trust,
                &["--tls-key", &key, "--tls-sni", name],
                &[&c, "sh", "-c", "wc -c; exit 4"],
            ];
            with_input(&daemon, &args.concat(), &vec![b'x'; 1 << 20])
        };
        let ran = exec("streaming.test");
        assert_eq!(ran.stdout.trim(), "1048576", "{transport}: {}", ran.stderr);
        assert!(ran.stderr.contains("exit code 4"), "{}", ran.stderr);
        // Nobody is taken for this server by another name.
        let ran = exec("other.test");
        assert!(ran.stderr.contains("certificate"), "{}", ran.stderr);
    }
    let request = cri::ExecRequest {
        container_id: c,
        cmd: vec!["true".into()],
        stdout: true,
        ..Default::default()
    };
    let url = daemon.cri().call(async |mut c| c.exec(request).await);
    let url = url.expect("Exec").url;
    let address = url.strip_prefix("https://").expect("TLS");
    let address = address.split('/').next().expect("an address");
    let answer = http::request(address, "GET", "/", &[], &[]);
    assert!(answer.is_err(), "without TLS: {answer:?}");
}
