//! The options of `podvisor run`, and the CRI messages they become.

use std::path::Path;

use podvisor_proto::cri;

use crate::image::Pull;

/// The container's log below the pod's log directory.
pub const LOG_PATH: &str = "container/0.log";
/// Period of a CPU limit, microseconds: the kernel's and the kubelet's default.
const CPU_PERIOD_US: i64 = 100_000;

/// Options of `podvisor run`.
///
/// The exit code is the container's; 128 when its command could not be started, 125 when podvisor
/// itself failed, 128 + N when signal N came before the container ran.
#[derive(Debug, clap::Args)]
pub struct RunArgs {
    /// Name of the pod [default: run-XXXXXXXX]
    #[arg(long)]
    pub name: Option<String>,
    /// Remove the pod at the end: the default
    #[arg(long, conflicts_with = "keep")]
    rm: bool,
    /// Leave the pod and its log in place at the end
    #[arg(long)]
    pub keep: bool,
    /// Set an environment variable; KEY alone takes the value from here
    #[arg(short, long = "env", value_name = "KEY[=VALUE]")]
    env: Vec<String>,
    /// Working directory in the container
    #[arg(short, long, value_name = "DIR")]
    workdir: Option<String>,
    /// User to run as: UID, UID:GID or a name that the image knows
    #[arg(short, long, value_name = "USER", value_parser = parse_user)]
    user: Option<User>,
    /// Memory of the pod: 256M, 1G … [default: podvisord's]
    #[arg(long, value_name = "SIZE", value_parser = parse_memory)]
    memory: Option<i64>,
    /// CPUs of the pod: 2, 0.5 … [default: podvisord's]
    #[arg(long, value_name = "N", value_parser = parse_cpus)]
    cpus: Option<f64>,
    /// Make a port of the container reachable on the host
    #[arg(short, long, value_name = "HOST:CONTAINER[/udp]", value_parser = parse_port)]
    port: Vec<cri::PortMapping>,
    /// Runtime handler [default: podvisord's]
    #[arg(
        long,
        value_name = "NAME",
        default_value = "",
        hide_default_value = true
    )]
    pub handler: String,
    /// When to pull the image
    #[arg(long, value_enum, value_name = "WHEN", default_value_t = Pull::Missing)]
    pub pull: Pull,
    /// Say nothing but what the container writes
    #[arg(short, long)]
    pub quiet: bool,
    /// Show how long each phase of the start took, even with --quiet
    #[arg(long)]
    pub timeline: bool,
    /// Image to run
    pub image: String,
    /// Arguments for the image's entry point, or the command when it has none
    #[arg(
        trailing_var_arg = true,
        allow_hyphen_values = true,
        value_name = "CMD"
    )]
    pub command: Vec<String>,
}

/// Who a container's process is.
#[derive(Debug, Clone, PartialEq, Eq)]
enum User {
    Ids { uid: i64, gid: Option<i64> },
    Name(String),
}

impl RunArgs {
    /// The pod: one container's worth of resources, with a pid namespace per container, so that the
    /// command is PID 1 as in other engines.
    pub fn sandbox_config(&self, uid: &str, log_directory: &Path) -> cri::PodSandboxConfig {
        let name = self
            .name
            .clone()
            .unwrap_or_else(|| format!("run-{}", uid.get(..8).unwrap_or(uid)));
        cri::PodSandboxConfig {
            hostname: name.clone(),
            metadata: Some(cri::PodSandboxMetadata {
                name,
                uid: uid.to_owned(),
                namespace: "default".to_owned(),
                attempt: 0,
            }),
            log_directory: log_directory.to_string_lossy().into_owned(),
            port_mappings: self.port.clone(),
            linux: Some(cri::LinuxPodSandboxConfig {
                resources: self.resources(),
                security_context: Some(cri::LinuxSandboxSecurityContext {
                    namespace_options: Some(namespaces()),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    /// The container, from the image with id `image_id`.
    pub fn container_config(&self, image_id: &str) -> cri::ContainerConfig {
        let mut security = cri::LinuxContainerSecurityContext {
            namespace_options: Some(namespaces()),
            ..Default::default()
        };
        match &self.user {
            Some(User::Ids { uid, gid }) => {
                security.run_as_user = Some(cri::Int64Value { value: *uid });
                security.run_as_group = gid.map(|value| cri::Int64Value { value });
            }
            Some(User::Name(name)) => security.run_as_username.clone_from(name),
            None => {}
        }
        cri::ContainerConfig {
            metadata: Some(cri::ContainerMetadata {
                name: "container".to_owned(),
                attempt: 0,
            }),
            image: Some(cri::ImageSpec {
                image: image_id.to_owned(),
                user_specified_image: self.image.clone(),
                ..Default::default()
            }),
            args: self.command.clone(),
            working_dir: self.workdir.clone().unwrap_or_default(),
            envs: self.env.iter().filter_map(|word| variable(word)).collect(),
            log_path: LOG_PATH.to_owned(),
            linux: Some(cri::LinuxContainerConfig {
                resources: self.resources(),
                security_context: Some(security),
            }),
            ..Default::default()
        }
    }

    fn resources(&self) -> Option<cri::LinuxContainerResources> {
        if self.memory.is_none() && self.cpus.is_none() {
            return None;
        }
        Some(cri::LinuxContainerResources {
            memory_limit_in_bytes: self.memory.unwrap_or(0),
            cpu_period: self.cpus.map_or(0, |_| CPU_PERIOD_US),
            cpu_quota: self
                .cpus
                .map_or(0, |cpus| (cpus * CPU_PERIOD_US as f64).round() as i64),
            ..Default::default()
        })
    }
}

fn namespaces() -> cri::NamespaceOption {
    cri::NamespaceOption {
        pid: cri::NamespaceMode::Container.into(),
        ..Default::default()
    }
}

/// `KEY=VALUE`, or `KEY` with the value it has here; unset here is unset there.
fn variable(word: &str) -> Option<cri::KeyValue> {
    use std::os::unix::ffi::OsStringExt;
    let (key, value) = match word.split_once('=') {
        Some((key, value)) => (key, value.as_bytes().to_vec()),
        None => (word, std::env::var_os(word)?.into_vec()),
    };
    Some(cri::KeyValue {
        key: key.to_owned(),
        value,
    })
}

fn parse_user(word: &str) -> Result<User, String> {
    let id = |text: &str| {
        text.parse::<u32>()
            .map(i64::from)
            .map_err(|_| format!("{text:?} is no id"))
    };
    if word.is_empty() {
        return Err("empty".to_owned());
    }
    match word.split_once(':') {
        Some((uid, gid)) => Ok(User::Ids {
            uid: id(uid)?,
            gid: Some(id(gid)?),
        }),
        None => Ok(match id(word) {
            Ok(uid) => User::Ids { uid, gid: None },
            Err(_) => User::Name(word.to_owned()),
        }),
    }
}

/// Bytes; K, M, G and Ki, Mi, Gi all count in 1024, as with docker's `--memory`.
pub fn parse_memory(word: &str) -> Result<i64, String> {
    let digits = word.trim_end_matches(|letter: char| letter.is_ascii_alphabetic());
    let shift = match word[digits.len()..].to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "ki" | "kb" | "kib" => 10,
        "m" | "mi" | "mb" | "mib" => 20,
        "g" | "gi" | "gb" | "gib" => 30,
        unit => return Err(format!("unknown unit {unit:?}: K, M or G")),
    };
    digits
        .parse::<i64>()
        .ok()
        .filter(|&count| count > 0)
        .and_then(|count| count.checked_mul(1 << shift))
        .ok_or_else(|| "not a size: 256M, 1G …".to_owned())
}

fn parse_cpus(word: &str) -> Result<f64, String> {
    match word.parse::<f64>() {
        Ok(cpus) if (0.01..=1024.0).contains(&cpus) => Ok(cpus),
        _ => Err("not a number of CPUs: 0.5, 2 …".to_owned()),
    }
}

fn parse_port(word: &str) -> Result<cri::PortMapping, String> {
    let (ports, protocol) = match word.split_once('/') {
        None | Some((_, "tcp")) => (word.trim_end_matches("/tcp"), cri::Protocol::Tcp),
        Some((ports, "udp")) => (ports, cri::Protocol::Udp),
        Some((ports, "sctp")) => (ports, cri::Protocol::Sctp),
        Some((_, other)) => return Err(format!("unknown protocol {other:?}: tcp, udp or sctp")),
    };
    let port = |text: &str| match text.parse::<u16>() {
        Ok(port) if port > 0 => Ok(i32::from(port)),
        _ => Err(format!("{text:?} is no port")),
    };
    let (host, container) = ports
        .rsplit_once(':')
        .ok_or("HOST:CONTAINER, or IP:HOST:CONTAINER")?;
    let (host_ip, host_port) = host.rsplit_once(':').unwrap_or(("", host));
    let host_ip = host_ip.trim_start_matches('[').trim_end_matches(']');
    if !host_ip.is_empty() && host_ip.parse::<std::net::IpAddr>().is_err() {
        return Err(format!("{host_ip:?} is no address"));
    }
    Ok(cri::PortMapping {
        protocol: protocol.into(),
        container_port: port(container)?,
        host_port: port(host_port)?,
        host_ip: host_ip.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        run: RunArgs,
    }

    fn args(words: &[&str]) -> RunArgs {
        Line::try_parse_from([&["run"], words].concat())
            .map_err(|error| error.to_string())
            .unwrap()
            .run
    }

    #[test]
    fn options_become_a_pod_and_a_container() {
        let args = args(&[
            "--name",
            "web",
            "-e",
            "A=b=c",
            "-w",
            "/tmp",
            "-u",
            "7:8",
            "--memory",
            "256M",
            "--cpus",
            "1.5",
            "-p",
            "127.0.0.1:8080:80",
            "busybox",
            "httpd",
            "-f",
        ]);
        let pod = args.sandbox_config("0123456789", Path::new("/logs"));
        assert_eq!(pod.metadata.as_ref().unwrap().name, "web");
        assert_eq!(pod.log_directory, "/logs");
        assert_eq!(pod.port_mappings[0].host_ip, "127.0.0.1");
        let resources = pod.linux.unwrap().resources.unwrap();
        assert_eq!(resources.memory_limit_in_bytes, 256 << 20);
        assert_eq!(
            (resources.cpu_quota, resources.cpu_period),
            (150_000, 100_000)
        );

        let container = args.container_config("sha256:1");
        assert_eq!(container.args, ["httpd", "-f"]);
        assert!(container.command.is_empty());
        assert_eq!(container.working_dir, "/tmp");
        assert_eq!(
            (container.envs[0].key.as_str(), &container.envs[0].value[..]),
            ("A", &b"b=c"[..])
        );
        let security = container.linux.unwrap().security_context.unwrap();
        assert_eq!(security.run_as_user.unwrap().value, 7);
        assert_eq!(security.run_as_group.unwrap().value, 8);
        let image = container.image.unwrap();
        assert_eq!(
            (image.image.as_str(), image.user_specified_image.as_str()),
            ("sha256:1", "busybox")
        );
    }

    #[test]
    fn nothing_is_limited_unless_asked() {
        let args = args(&["busybox"]);
        let pod = args.sandbox_config("0123456789", Path::new("/logs"));
        assert_eq!(pod.metadata.unwrap().name, "run-01234567");
        assert!(pod.linux.unwrap().resources.is_none());
        assert!(args.container_config("x").envs.is_empty());
    }

    #[test]
    fn users_are_ids_or_a_name() {
        assert_eq!(parse_user("5"), Ok(User::Ids { uid: 5, gid: None }));
        assert_eq!(parse_user("www"), Ok(User::Name("www".into())));
        assert!(parse_user("5:staff").is_err());
        assert!(parse_user("").is_err());
    }

    #[test]
    fn sizes() {
        assert_eq!(parse_memory("64"), Ok(64));
        assert_eq!(parse_memory("1gib"), Ok(1 << 30));
        for word in ["", "M", "-1M", "0", "1T", "1.5G", "9223372036854775807G"] {
            assert!(parse_memory(word).is_err(), "{word}");
        }
    }

    #[test]
    fn ports() {
        let port = parse_port("53:5353/udp").unwrap();
        assert_eq!((port.host_port, port.container_port), (53, 5353));
        assert_eq!(port.protocol(), cri::Protocol::Udp);
        assert_eq!(parse_port("[::1]:80:8080/tcp").unwrap().host_ip, "::1");
        for word in ["80", "0:80", "80:70000", "a:80", "80:80/icmp", "x:80:80"] {
            assert!(parse_port(word).is_err(), "{word}");
        }
    }

    #[test]
    fn cpus() {
        assert!(parse_cpus("0").is_err());
        assert!(parse_cpus("NaN").is_err());
        assert_eq!(parse_cpus("0.5"), Ok(0.5));
    }

    #[test]
    fn rm_and_keep_exclude_each_other() {
        assert!(Line::try_parse_from(["run", "--rm", "--keep", "busybox"]).is_err());
        assert!(!args(&["--rm", "busybox"]).keep);
    }
}
