//! The OCI runtime spec of a container, from what the CRI asks and what its image says.
//!
//! The agent adds what only the guest knows: the root file system, the user's numbers, the cgroup,
//! and the paths of the namespaces that the pod's containers share (agent.proto, CreateContainer). On the
//! host it is the monitor that adds them.

mod capabilities;
pub mod devices;
mod host;
mod namespaces;
pub mod resources;
pub mod seccomp;
pub mod signal;
mod user;

use oci_spec::image::ImageConfiguration;
use oci_spec::runtime::{
    LinuxBuilder, LinuxCapabilitiesBuilder, Mount, MountBuilder, PosixRlimit, PosixRlimitBuilder,
    PosixRlimitType, ProcessBuilder, RootBuilder, Spec, SpecBuilder, UserBuilder,
};
use podvisor_proto::{agent, cri};

use crate::confinement::{self, Confinement};
use crate::error::{Error, Result};
use crate::host::HostPod;
use crate::user_namespace;

const DEFAULT_PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Limits of a container's processes: what they have on a node whose containerd is started by systemd. The
/// guest kernel's own (1024 files) are those of a machine from another time.
const RLIMITS: [(PosixRlimitType, u64); 3] = [
    (PosixRlimitType::RlimitNofile, 1 << 20),
    (PosixRlimitType::RlimitNproc, u64::MAX),
    (PosixRlimitType::RlimitCore, u64::MAX),
];

/// A container's spec, and what goes with it.
#[derive(Debug)]
pub struct ContainerSpec {
    /// Without root, user, cgroup and namespace paths.
    pub spec: Spec,
    /// To be resolved in the guest.
    pub user: agent::User,
    /// Whether its /dev has all that the guest's has.
    pub guest_devices: bool,
}

/// What a container is made of besides its own configuration.
#[derive(Debug)]
pub struct Surroundings<'a> {
    /// Its pod's.
    pub sandbox: &'a cri::PodSandboxConfig,
    /// Its image's.
    pub image: &'a ImageConfiguration,
    /// See [`seccomp::profile`].
    pub seccomp: Option<seccomp::Profile>,
    /// See [`devices::of`].
    pub devices: devices::Devices,
    /// Id of the container whose processes it sees (pid mode TARGET).
    pub target: Option<&'a str>,
    /// Of its pod on the host; none: it is in a VM.
    pub host_pod: Option<&'a HostPod>,
}

/// The security context, or what the CRI means by none.
pub fn security(config: &cri::ContainerConfig) -> cri::LinuxContainerSecurityContext {
    config
        .linux
        .as_ref()
        .and_then(|linux| linux.security_context.clone())
        .unwrap_or_default()
}

/// Builds the spec.
///
/// # Errors
/// INVALID_ARGUMENT with the field that contradicts the CRI, FAILED_PRECONDITION for what a VM cannot give,
/// UNIMPLEMENTED for what this release does not do.
pub fn build(
    config: &cri::ContainerConfig,
    surroundings: Surroundings<'_>,
) -> Result<ContainerSpec> {
    refuse_unsupported(config)?;
    let security = security(config);
    if security.privileged && !sandbox_is_privileged(surroundings.sandbox) {
        return Err(Error::Invalid {
            field: "config.linux.security_context.privileged",
            problem: "the sandbox is not privileged".into(),
        });
    }
    let confinement = match surroundings.host_pod {
        None => {
            confinement::in_vm(&security, surroundings.sandbox).map(|()| Confinement::default())?
        }
        Some(_) => confinement::on_host(&security)?,
    };
    let namespaces = match surroundings.host_pod {
        None => {
            let users = user_namespace::of_pod(surroundings.sandbox)?;
            namespaces::of(&security, users.as_ref(), surroundings.target)?
        }
        Some(host_pod) => namespaces::on_host(&security, surroundings.target, host_pod)?,
    };
    let image = surroundings.image.config().clone().unwrap_or_default();
    let resources = config
        .linux
        .as_ref()
        .and_then(|linux| linux.resources.clone())
        .unwrap_or_default();
    let capabilities = capabilities::of(&security)?;
    let cwd = [
        config.working_dir.as_str(),
        image.working_dir().as_deref().unwrap_or(""),
    ]
    .into_iter()
    .find(|dir| !dir.is_empty())
    .unwrap_or("/")
    .to_owned();
    if !cwd.starts_with('/') {
        return Err(Error::Invalid {
            field: "config.working_dir",
            problem: format!("{cwd:?} is not absolute"),
        });
    }
    let process = ProcessBuilder::default()
        .terminal(config.tty)
        .user(
            UserBuilder::default()
                .uid(0u32)
                .gid(0u32)
                .build()
                .map_err(build_error)?,
        )
        .args(args(
            config,
            image.entrypoint().as_deref().unwrap_or_default(),
            image.cmd().as_deref().unwrap_or_default(),
        )?)
        .env(env(config, image.env().as_deref().unwrap_or_default())?)
        .cwd(cwd)
        .no_new_privileges(security.no_new_privs && !security.privileged)
        .capabilities(
            LinuxCapabilitiesBuilder::default()
                .bounding(capabilities.granted.clone())
                .effective(capabilities.granted.clone())
                .permitted(capabilities.granted.clone())
                .inheritable(capabilities.ambient.clone())
                .ambient(capabilities.ambient)
                .build()
                .map_err(build_error)?,
        )
        .rlimits(rlimits()?)
        .oom_score_adj(resources.oom_score_adj as i32)
        .build()
        .map_err(build_error)?;
    let mut limits = resources::of(&resources)?;
    limits.set_devices(Some(surroundings.devices.rules));
    let mut linux = LinuxBuilder::default()
        .namespaces(namespaces)
        .resources(limits)
        .devices(surroundings.devices.nodes)
        .masked_paths(hidden(&security, "masked_paths", &security.masked_paths)?)
        .readonly_paths(hidden(
            &security,
            "readonly_paths",
            &security.readonly_paths,
        )?);
    if let Some(profile) = surroundings.seccomp {
        linux = linux.seccomp(profile.resolve(&capabilities.granted)?);
    }
    let mut spec = SpecBuilder::default()
        .version("1.0.2")
        .root(
            RootBuilder::default()
                .path("rootfs")
                .readonly(security.readonly_rootfs)
                .build()
                .map_err(build_error)?,
        )
        .process(process)
        .mounts(mounts(security.privileged)?)
        .linux(linux.build().map_err(build_error)?)
        .build()
        .map_err(build_error)?;
    if let Some(host_pod) = surroundings.host_pod {
        host::adapt(
            &mut spec,
            config,
            surroundings.sandbox,
            host_pod,
            confinement,
        );
    }
    Ok(ContainerSpec {
        spec,
        user: user::of(&security, image.user().as_deref().unwrap_or(""))?,
        guest_devices: security.privileged,
    })
}

fn rlimits() -> Result<Vec<PosixRlimit>> {
    let limit = |(kind, number): (PosixRlimitType, u64)| {
        PosixRlimitBuilder::default()
            .typ(kind)
            .soft(number)
            .hard(number)
            .build()
            .map_err(build_error)
    };
    RLIMITS.into_iter().map(limit).collect()
}

/// Masked or read-only paths; a privileged container has none.
fn hidden(
    security: &cri::LinuxContainerSecurityContext,
    field: &str,
    paths: &[String],
) -> Result<Vec<String>> {
    if security.privileged {
        return Ok(Vec::new());
    }
    match paths.iter().find(|path| !path.starts_with('/')) {
        Some(path) => Err(Error::Invalid {
            field: "config.linux.security_context",
            problem: format!("{field}: {path:?} is not absolute"),
        }),
        None => Ok(paths.to_vec()),
    }
}

fn refuse_unsupported(config: &cri::ContainerConfig) -> Result<()> {
    let unsupported = |field, what: &str| {
        Err(Error::Unsupported {
            field,
            what: what.into(),
        })
    };
    if !config.cdi_devices.is_empty() {
        return unsupported("config.CDI_devices", "a CDI device");
    }
    Ok(())
}

fn sandbox_is_privileged(sandbox: &cri::PodSandboxConfig) -> bool {
    sandbox
        .linux
        .as_ref()
        .and_then(|linux| linux.security_context.as_ref())
        .is_some_and(|context| context.privileged)
}

fn args(
    config: &cri::ContainerConfig,
    entrypoint: &[String],
    cmd: &[String],
) -> Result<Vec<String>> {
    let args = match (config.command.is_empty(), config.args.is_empty()) {
        (false, _) => [config.command.as_slice(), &config.args].concat(),
        (true, false) => [entrypoint, &config.args].concat(),
        (true, true) => [entrypoint, cmd].concat(),
    };
    if args.is_empty() {
        return Err(Error::Invalid {
            field: "config.command",
            problem: "neither the container nor its image names a command".into(),
        });
    }
    if args.iter().any(|arg| arg.contains('\0')) {
        return Err(Error::Invalid {
            field: "config.args",
            problem: "a NUL byte".into(),
        });
    }
    Ok(args)
}

/// The image's variables, then the pod's, each name once; a PATH if nobody set one.
fn env(config: &cri::ContainerConfig, image: &[String]) -> Result<Vec<String>> {
    let mut env: Vec<String> = Vec::with_capacity(image.len() + config.envs.len() + 1);
    let mut places = std::collections::HashMap::new();
    let mut set = |entry: String| {
        let name = entry.split('=').next().unwrap_or_default().to_owned();
        if let Some(&place) = places.get(&name) {
            env[place] = entry;
        } else {
            places.insert(name, env.len());
            env.push(entry);
        }
    };
    set(DEFAULT_PATH.to_owned());
    for entry in image {
        set(entry.clone());
    }
    for variable in &config.envs {
        let value = String::from_utf8(variable.value.clone()).map_err(|_| Error::Unsupported {
            field: "config.envs",
            what: format!("a value of {} that is not UTF-8", variable.key),
        })?;
        if variable.key.is_empty() || variable.key.contains(['=', '\0']) || value.contains('\0') {
            return Err(Error::Invalid {
                field: "config.envs",
                problem: format!("{:?} is no name for a variable", variable.key),
            });
        }
        set(format!("{}={value}", variable.key));
    }
    Ok(env)
}

fn mounts(privileged: bool) -> Result<Vec<Mount>> {
    let mount = |destination: &str, kind: &str, source: &str, options: &[&str]| {
        MountBuilder::default()
            .destination(destination)
            .typ(kind)
            .source(source)
            .options(options.iter().map(|&o| o.to_owned()).collect::<Vec<_>>())
            .build()
            .map_err(build_error)
    };
    let access = if privileged { "rw" } else { "ro" };
    Ok(vec![
        mount("/proc", "proc", "proc", &["nosuid", "noexec", "nodev"])?,
        mount(
            "/dev",
            "tmpfs",
            "tmpfs",
            &["nosuid", "strictatime", "mode=755", "size=65536k"],
        )?,
        mount(
            "/dev/pts",
            "devpts",
            "devpts",
            &[
                "nosuid",
                "noexec",
                "newinstance",
                "ptmxmode=0666",
                "mode=0620",
                "gid=5",
            ],
        )?,
        mount(
            "/dev/mqueue",
            "mqueue",
            "mqueue",
            &["nosuid", "noexec", "nodev"],
        )?,
        // The guest's own: one for all containers of the pod, as they share IPC.
        mount(
            "/dev/shm",
            "bind",
            "/dev/shm",
            &["rbind", "rprivate", "nosuid", "noexec", "nodev"],
        )?,
        mount(
            "/sys",
            "sysfs",
            "sysfs",
            &["nosuid", "noexec", "nodev", access],
        )?,
        mount(
            "/sys/fs/cgroup",
            "cgroup",
            "cgroup",
            &["nosuid", "noexec", "nodev", "relatime", access],
        )?,
    ])
}

/// The builders only fail when a required field is missing: a mistake here, not of the caller.
fn build_error(error: oci_spec::OciSpecError) -> Error {
    Error::Io {
        context: "OCI spec".into(),
        source: std::io::Error::other(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use oci_spec::image::{ConfigBuilder, ImageConfigurationBuilder, RootFsBuilder};

    pub(super) fn image() -> ImageConfiguration {
        ImageConfigurationBuilder::default()
            .architecture("amd64")
            .os("linux")
            .rootfs(
                RootFsBuilder::default()
                    .typ("layers")
                    .diff_ids(Vec::<String>::new())
                    .build()
                    .unwrap(),
            )
            .config(
                ConfigBuilder::default()
                    .entrypoint(vec!["/entry".to_owned()])
                    .cmd(vec!["one".to_owned()])
                    .env(vec!["A=image".to_owned(), "B=image".to_owned()])
                    .working_dir("/work")
                    .user("1002:33")
                    .stop_signal("SIGUSR1")
                    .build()
                    .unwrap(),
            )
            .build()
            .unwrap()
    }

    fn with(context: cri::LinuxContainerSecurityContext) -> cri::ContainerConfig {
        cri::ContainerConfig {
            linux: Some(cri::LinuxContainerConfig {
                security_context: Some(context),
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    fn try_build(config: &cri::ContainerConfig) -> Result<ContainerSpec> {
        let surroundings = Surroundings {
            sandbox: &cri::PodSandboxConfig::default(),
            image: &image(),
            seccomp: None,
            devices: devices::Devices::default(),
            target: None,
            host_pod: None,
        };
        build(config, surroundings)
    }

    fn process(config: &cri::ContainerConfig) -> oci_spec::runtime::Process {
        let built = try_build(config).unwrap();
        built.spec.process().clone().unwrap()
    }

    #[test]
    fn command_and_args_follow_the_cri() {
        let mut config = cri::ContainerConfig::default();
        let args = |config: &_| process(config).args().clone().unwrap();
        assert_eq!(args(&config), ["/entry", "one"]);
        config.args = vec!["two".into()];
        assert_eq!(args(&config), ["/entry", "two"]);
        config.command = vec!["/cmd".into()];
        assert_eq!(args(&config), ["/cmd", "two"]);
        config.args.clear();
        assert_eq!(args(&config), ["/cmd"]);
    }

    #[test]
    fn the_pods_environment_wins_and_keeps_its_place() {
        let config = cri::ContainerConfig {
            envs: vec![
                cri::KeyValue {
                    key: "B".into(),
                    value: b"pod=x".to_vec(),
                },
                cri::KeyValue {
                    key: "C".into(),
                    value: b"".to_vec(),
                },
            ],
            ..Default::default()
        };
        let env = process(&config).env().clone().unwrap();
        assert_eq!(env, [DEFAULT_PATH, "A=image", "B=pod=x", "C="]);
    }

    #[test]
    fn users_come_from_the_pod_then_the_image() {
        let user = |context| try_build(&with(context)).map(|b| b.user);
        let context = cri::LinuxContainerSecurityContext::default();
        assert_eq!(user(context.clone()).unwrap().name, "1002:33");
        let mut named = context.clone();
        named.run_as_username = "web".into();
        assert_eq!(user(named.clone()).unwrap().name, "web");
        named.run_as_user = Some(cri::Int64Value { value: 7 });
        assert!(matches!(user(named), Err(Error::Invalid { .. })));
        let mut group = context;
        group.run_as_group = Some(cri::Int64Value { value: 7 });
        assert!(matches!(user(group.clone()), Err(Error::Invalid { .. })));
        group.run_as_user = Some(cri::Int64Value { value: -1 });
        assert!(matches!(user(group), Err(Error::Invalid { .. })));
    }

    #[test]
    fn a_privileged_container_needs_a_privileged_sandbox() {
        let context = cri::LinuxContainerSecurityContext {
            privileged: true,
            ..Default::default()
        };
        let error = try_build(&with(context)).unwrap_err();
        assert!(error.to_string().contains("privileged"), "{error}");
    }
}
