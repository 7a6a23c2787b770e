//! One plugin, run once.

use std::ffi::OsStr;
use std::future::{Future, pending};
use std::io;
use std::path::Path;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use serde::Deserialize;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::pipe;
use tokio::process::{Child, ChildStdin, Command};
use tokio::time::timeout;

/// Results are a few hundred bytes.
const MAX_STDOUT_BYTES: usize = 1 << 20;

/// What is kept of stderr, from its end.
const MAX_STDERR_BYTES: usize = 4 << 10;

/// What a pipe holds, pipe(7).
const PIPE_BYTES: usize = 64 << 10;

/// A killed process is gone at once, unless the kernel itself hangs.
const REAP_TIMEOUT: Duration = Duration::from_secs(5);

/// What a plugin is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verb {
    Add,
    Check,
    Del,
}

impl Verb {
    /// `CNI_COMMAND`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Add => "ADD",
            Self::Check => "CHECK",
            Self::Del => "DEL",
        }
    }
}

/// A plugin's parameters, but for the configuration on its stdin.
#[derive(Debug, Clone, Copy)]
pub struct Call<'a> {
    pub program: &'a Path,
    pub verb: Verb,
    pub container_id: &'a str,
    /// Empty when the namespace is gone (DEL only).
    pub netns: &'a OsStr,
    pub interface: &'a str,
    pub args: &'a str,
    /// Where plugins find plugins that they delegate to.
    pub plugin_path: &'a OsStr,
    pub timeout: Duration,
}

/// Why a run gave no result.
#[derive(Debug, PartialEq, Eq)]
pub enum Failure {
    Refused { code: u32, message: String },
    Broken(String),
    Timeout,
    Cancelled,
}

/// The error object of the spec.
#[derive(Deserialize)]
struct ErrorObject {
    #[serde(default)]
    code: u32,
    msg: String,
    #[serde(default)]
    details: String,
}

/// Runs a plugin with `config` on its stdin, and gives its stdout.
///
/// The plugin leads a process group of its own, which is killed whole when time is up, when
/// `cancelled` ends, or when the plugin writes more than any result can be; it is gone when this
/// returns. Children that outlive a plugin that ended by itself are left alone, and not waited
/// for, even when they hold its stdout: daemons are started this way.
pub async fn run(
    call: &Call<'_>,
    config: &[u8],
    cancelled: impl Future<Output = ()>,
) -> Result<Vec<u8>, Failure> {
    let mut child = spawn(call).map_err(|e| Failure::Broken(format!("cannot be run: {e}")))?;
    let (stdin, stdout, stderr) = match pipes(&mut child) {
        Ok(pipes) => pipes,
        Err(e) => {
            kill(&mut child).await;
            return Err(Failure::Broken(format!("its pipes: {e}")));
        }
    };
    let mut stdout = Output::new(stdout, Keep::First(MAX_STDOUT_BYTES));
    let mut stderr = Output::new(stderr, Keep::Last(MAX_STDERR_BYTES));

    let ended = tokio::select! {
        status = child.wait() => {
            status.map_err(|e| Failure::Broken(format!("cannot be waited for: {e}")))
        }
        failure = talk(stdin, config, &mut stdout, &mut stderr) => Err(failure),
        () = tokio::time::sleep(call.timeout) => Err(Failure::Timeout),
        () = cancelled => Err(Failure::Cancelled),
    };
    match ended {
        Ok(status) => {
            stdout.take_the_rest()?;
            stderr.take_the_rest()?;
            judge(status, stdout.bytes, &stderr.bytes)
        }
        Err(failure) => {
            kill(&mut child).await;
            Err(failure)
        }
    }
}

fn spawn(call: &Call<'_>) -> io::Result<Child> {
    // The rest of the environment is ours (PATH for iptables, proxies): as with other runtimes.
    Command::new(call.program)
        .env("CNI_COMMAND", call.verb.as_str())
        .env("CNI_CONTAINERID", call.container_id)
        .env("CNI_NETNS", call.netns)
        .env("CNI_IFNAME", call.interface)
        .env("CNI_ARGS", call.args)
        .env("CNI_PATH", call.plugin_path)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .kill_on_drop(true)
        .spawn()
}

fn pipes(child: &mut Child) -> io::Result<(ChildStdin, pipe::Receiver, pipe::Receiver)> {
    let none = io::ErrorKind::BrokenPipe;
    let stdin = child.stdin.take().ok_or(none)?;
    let stdout = child.stdout.take().ok_or(none)?.into_owned_fd()?;
    let stderr = child.stderr.take().ok_or(none)?.into_owned_fd()?;
    let receiver = pipe::Receiver::from_owned_fd;
    Ok((stdin, receiver(stdout)?, receiver(stderr)?))
}

/// Feeds the plugin and reads it. Ends only when it says more than it may.
async fn talk(
    mut stdin: ChildStdin,
    config: &[u8],
    stdout: &mut Output,
    stderr: &mut Output,
) -> Failure {
    let feed = async move {
        // A plugin need not read it all; what comes of that is in its exit status.
        let _ = stdin.write_all(config).await;
        Ok(())
    };
    match tokio::try_join!(feed, stdout.read(), stderr.read()) {
        Err(failure) => failure,
        Ok(_) => pending().await,
    }
}

async fn kill(child: &mut Child) {
    if let Some(pid) = child.id() {
        // The child is not reaped yet, so the group is still its own.
        let _ = killpg(Pid::from_raw(pid as i32), Signal::SIGKILL);
    }
    // When even this fails, tokio reaps it whenever it ends.
    let _ = timeout(REAP_TIMEOUT, child.wait()).await;
}

fn judge(status: ExitStatus, stdout: Vec<u8>, stderr: &[u8]) -> Result<Vec<u8>, Failure> {
    if status.success() {
        return Ok(stdout);
    }
    if let Ok(error) = serde_json::from_slice::<ErrorObject>(&stdout) {
        let message = if error.details.is_empty() {
            error.msg
        } else {
            format!("{}; {}", error.msg, error.details)
        };
        return Err(Failure::Refused {
            code: error.code,
            message,
        });
    }
    let said = if stderr.is_empty() {
        &stdout[..stdout.len().min(MAX_STDERR_BYTES)]
    } else {
        stderr
    };
    let said = String::from_utf8_lossy(said);
    Err(Failure::Broken(match said.trim() {
        "" => format!("{status}, without a word"),
        said => format!("{status}: {said}"),
    }))
}

/// Which part is kept of an output.
#[derive(Clone, Copy)]
enum Keep {
    /// More than these bytes is a failure.
    First(usize),
    /// The end of it.
    Last(usize),
}

struct Output {
    pipe: pipe::Receiver,
    bytes: Vec<u8>,
    keep: Keep,
}

impl Output {
    fn new(pipe: pipe::Receiver, keep: Keep) -> Self {
        Self {
            pipe,
            bytes: Vec::new(),
            keep,
        }
    }

    /// Until end of file. What was read is kept when this future is dropped.
    async fn read(&mut self) -> Result<(), Failure> {
        let mut buffer = [0; 4096];
        loop {
            // Not `try_read`: this one yields now and then to whoever else the task waits for.
            match self.pipe.read(&mut buffer).await {
                Ok(0) | Err(_) => return Ok(()),
                Ok(n) => self.keep(&buffer[..n])?,
            }
        }
    }

    /// What the plugin wrote before it ended; nothing is waited for.
    fn take_the_rest(&mut self) -> Result<(), Failure> {
        let mut buffer = [0; 4096];
        // No more than a pipe holds: somebody may still be writing.
        for _ in 0..PIPE_BYTES / buffer.len() {
            // Not `try_read`: it believes what the last look at epoll said.
            match nix::unistd::read(&self.pipe, &mut buffer) {
                Ok(0) | Err(_) => break,
                Ok(n) => self.keep(&buffer[..n])?,
            }
        }
        Ok(())
    }

    fn keep(&mut self, new: &[u8]) -> Result<(), Failure> {
        self.bytes.extend_from_slice(new);
        match self.keep {
            Keep::First(max) if self.bytes.len() > max => {
                Err(Failure::Broken(format!("wrote more than {max} bytes")))
            }
            Keep::Last(max) if self.bytes.len() > max => {
                self.bytes.drain(..self.bytes.len() - max);
                Ok(())
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::path::PathBuf;
    use std::time::Instant;

    /// Longer than any of these plugins needs, so a test that waits for it has failed.
    const LONG: Duration = Duration::from_mins(1);

    struct Script {
        dir: tempfile::TempDir,
        program: PathBuf,
    }

    impl Script {
        /// Written by a process of its own: were the file ever open for writing here, a fork of
        /// another test's thread could inherit it, and the kernel refuses to run a file that
        /// somebody may write.
        fn new(body: &str) -> Self {
            let dir = tempfile::tempdir().unwrap();
            let program = dir.path().join("plugin");
            let text = format!("#!/bin/sh\ncd {}\n{body}\n", dir.path().display());
            let written = std::process::Command::new("/bin/sh")
                .args([
                    "-c",
                    r#"printf %s "$1" > "$2" && chmod 755 "$2""#,
                    "sh",
                    &text,
                ])
                .arg(&program)
                .status();
            assert!(written.unwrap().success());
            Self { dir, program }
        }

        fn call(&self, timeout: Duration) -> Call<'_> {
            Call {
                program: &self.program,
                verb: Verb::Add,
                container_id: "id",
                netns: OsStr::new("/run/n"),
                interface: "eth0",
                args: "IgnoreUnknown=1",
                plugin_path: OsStr::new("/plugins"),
                timeout,
            }
        }

        async fn run(&self, config: &[u8]) -> Result<String, Failure> {
            let stdout = run(&self.call(LONG), config, pending()).await?;
            Ok(String::from_utf8(stdout).unwrap())
        }

        /// The pid that the script wrote as soon as it is there.
        async fn pid(&self, name: &str) -> i32 {
            let path = self.dir.path().join(name);
            let started = Instant::now();
            loop {
                match fs::read_to_string(&path)
                    .ok()
                    .and_then(|t| t.trim().parse().ok())
                {
                    Some(pid) => return pid,
                    None if started.elapsed() > LONG => panic!("no {name}"),
                    None => tokio::time::sleep(Duration::from_millis(1)).await,
                }
            }
        }
    }

    /// Not running any more; it may still be a zombie that waits for its parent.
    fn is_dead(pid: i32) -> bool {
        fs::read_to_string(format!("/proc/{pid}/stat")).map_or(true, |stat| stat.contains(") Z "))
    }

    async fn wait_dead(pid: i32) {
        let started = Instant::now();
        while !is_dead(pid) {
            assert!(started.elapsed() < LONG, "{pid} lives");
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    #[tokio::test]
    async fn parameters_and_configuration_arrive() {
        let script = Script::new(
            r#"echo "$CNI_COMMAND $CNI_CONTAINERID $CNI_NETNS $CNI_IFNAME $CNI_ARGS $CNI_PATH"; cat; echo noise >&2"#,
        );
        // More than a pipe holds.
        let config = "x".repeat(3 * PIPE_BYTES);
        let answer = script.run(config.as_bytes()).await.unwrap();
        let (parameters, echoed) = answer.split_once('\n').unwrap();
        assert_eq!(parameters, "ADD id /run/n eth0 IgnoreUnknown=1 /plugins");
        assert!(echoed == config);
    }

    #[tokio::test]
    async fn a_plugin_need_not_read_its_configuration() {
        let script = Script::new("echo '{}'");
        let config = vec![b'x'; 3 * PIPE_BYTES];
        assert_eq!(script.run(&config).await.unwrap(), "{}\n");
    }

    #[tokio::test]
    async fn refusals_and_crashes() {
        let refused = |code, message: &str| Failure::Refused {
            code,
            message: message.into(),
        };
        let broken = |message: &str| Failure::Broken(message.into());
        for (body, failure) in [
            (
                r#"echo '{"code":11,"msg":"try again"}'; exit 1"#,
                refused(11, "try again"),
            ),
            (
                r#"echo '{"code":7,"msg":"no","details":"at all"}'; exit 2"#,
                refused(7, "no; at all"),
            ),
            ("echo text; exit 3", broken("exit status: 3: text")),
            (
                "echo out; echo ' why ' >&2; exit 3",
                broken("exit status: 3: why"),
            ),
            ("exit 4", broken("exit status: 4, without a word")),
            ("kill -9 $$", broken("signal: 9 (SIGKILL), without a word")),
        ] {
            assert_eq!(Script::new(body).run(b"").await, Err(failure), "{body}");
        }
        let mut script = Script::new("");
        script.program = "/nonexistent/plugin".into();
        assert!(matches!(script.run(b"").await, Err(Failure::Broken(_))));
    }

    #[tokio::test]
    async fn only_the_end_of_stderr_is_kept() {
        let script =
            Script::new("head -c 1000000 /dev/zero | tr '\\0' a >&2; echo the end >&2; exit 1");
        let Err(Failure::Broken(message)) = script.run(b"").await else {
            panic!()
        };
        assert!(message.len() < 2 * MAX_STDERR_BYTES && message.ends_with("the end"));
    }

    #[tokio::test]
    async fn endless_output_ends_the_plugin() {
        let script = Script::new("echo $$ > self; exec cat /dev/zero");
        let failure = script.run(b"").await.unwrap_err();
        assert!(
            matches!(&failure, Failure::Broken(m) if m.contains("wrote more")),
            "{failure:?}"
        );
        assert!(is_dead(script.pid("self").await));
    }

    #[tokio::test]
    async fn time_is_up_for_the_whole_group() {
        let script = Script::new("sleep 1000 & echo $! > child; echo $$ > self; wait");
        let ended = run(&script.call(Duration::from_secs(3)), b"", pending()).await;
        assert_eq!(ended, Err(Failure::Timeout));
        assert!(is_dead(script.pid("self").await));
        wait_dead(script.pid("child").await).await;
    }

    #[tokio::test]
    async fn nobody_waits_any_more() {
        let script = Script::new("echo $$ > self; sleep 1000");
        let cancelled = async {
            script.pid("self").await;
        };
        let ended = run(&script.call(LONG), b"", cancelled).await;
        assert_eq!(ended, Err(Failure::Cancelled));
        assert!(is_dead(script.pid("self").await));
    }

    #[tokio::test]
    async fn a_daemon_left_behind_is_not_waited_for() {
        let script = Script::new("sleep 1000 & echo $! > daemon; echo '{}'");
        assert_eq!(script.run(b"").await.unwrap(), "{}\n");
        let daemon = script.pid("daemon").await;
        assert!(!is_dead(daemon));
        nix::sys::signal::kill(Pid::from_raw(daemon), Signal::SIGKILL).unwrap();
    }
}
