//! The OCI runtime spec of a container, from what the CRI asks and what its image says.
//!
//! The agent adds what only the guest knows: the root file system, the user's numbers, the cgroup,
//! and the paths of the namespaces that the pod's containers share (agent.proto, CreateContainer).

mod capabilities;
pub mod signal;

use std::collections::HashSet;

use oci_spec::image::ImageConfiguration;
use oci_spec::runtime::{
    LinuxBuilder, LinuxCapabilitiesBuilder, LinuxNamespace, LinuxNamespaceBuilder,
    LinuxNamespaceType, LinuxResources, Mount, MountBuilder, ProcessBuilder, RootBuilder, Spec,
    SpecBuilder, UserBuilder,
};
use podvisor_proto::{agent, cri};

use crate::error::{Error, Result};

/// Namespace path that the agent replaces by the pod's own.
const POD: &str = "pod";

const DEFAULT_PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// A container's spec, and who it runs as.
#[derive(Debug)]
pub struct ContainerSpec {
    /// Without root, user, cgroup and namespace paths.
    pub spec: Spec,
    /// To be resolved in the guest.
    pub user: agent::User,
}

/// Builds the spec.
///
/// # Errors
/// INVALID_ARGUMENT with the field that contradicts the CRI, UNIMPLEMENTED for what this release
/// does not do.
pub fn build(
    config: &cri::ContainerConfig,
    sandbox: &cri::PodSandboxConfig,
    image: &ImageConfiguration,
) -> Result<ContainerSpec> {
    refuse_unsupported(config)?;
    let security = config
        .linux
        .as_ref()
        .and_then(|linux| linux.security_context.clone())
        .unwrap_or_default();
    if security.privileged && !sandbox_is_privileged(sandbox) {
        return Err(Error::Invalid {
            field: "config.linux.security_context.privileged",
            problem: "the sandbox is not privileged".into(),
        });
    }
    let image = image.config().clone().unwrap_or_default();
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
                .bounding(capabilities.clone())
                .effective(capabilities.clone())
                .permitted(capabilities)
                .inheritable(HashSet::new())
                .ambient(HashSet::new())
                .build()
                .map_err(build_error)?,
        )
        .build()
        .map_err(build_error)?;
    let (masked, readonly) = if security.privileged {
        (Vec::new(), Vec::new())
    } else {
        (
            security.masked_paths.clone(),
            security.readonly_paths.clone(),
        )
    };
    let linux = LinuxBuilder::default()
        .namespaces(namespaces(&security)?)
        .resources(resources(config)?)
        .masked_paths(masked)
        .readonly_paths(readonly)
        .build()
        .map_err(build_error)?;
    let spec = SpecBuilder::default()
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
        .linux(linux)
        .build()
        .map_err(build_error)?;
    Ok(ContainerSpec {
        spec,
        user: user(&security, image.user().as_deref().unwrap_or(""))?,
    })
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
    let Some(security) = config
        .linux
        .as_ref()
        .and_then(|linux| linux.security_context.as_ref())
    else {
        return Ok(());
    };
    let seccomp = security
        .seccomp
        .as_ref()
        .map(cri::SecurityProfile::profile_type);
    if seccomp.is_some_and(|kind| kind != cri::security_profile::ProfileType::Unconfined)
        && !security.privileged
    {
        return unsupported(
            "config.linux.security_context.seccomp",
            "a seccomp profile other than Unconfined",
        );
    }
    if security.apparmor.as_ref().is_some_and(|profile| {
        profile.profile_type() == cri::security_profile::ProfileType::Localhost
    }) || !security.apparmor_profile_is_default()
    {
        return unsupported(
            "config.linux.security_context.apparmor",
            "an AppArmor profile in a VM",
        );
    }
    if security.selinux_options.is_some() {
        return unsupported(
            "config.linux.security_context.selinux_options",
            "an SELinux label in a VM",
        );
    }
    Ok(())
}

/// The deprecated AppArmor field, read apart so that the deprecation warns nobody else.
trait DeprecatedAppArmor {
    fn apparmor_profile_is_default(&self) -> bool;
}

impl DeprecatedAppArmor for cri::LinuxContainerSecurityContext {
    #[allow(deprecated)]
    fn apparmor_profile_is_default(&self) -> bool {
        matches!(
            self.apparmor_profile.as_str(),
            "" | "runtime/default" | "unconfined"
        )
    }
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

fn user(security: &cri::LinuxContainerSecurityContext, image: &str) -> Result<agent::User> {
    let invalid = |field, problem: &str| {
        Err(Error::Invalid {
            field,
            problem: problem.into(),
        })
    };
    if security.run_as_user.is_some() && !security.run_as_username.is_empty() {
        return invalid(
            "config.linux.security_context.run_as_username",
            "set together with run_as_user",
        );
    }
    if security.run_as_group.is_some()
        && security.run_as_user.is_none()
        && security.run_as_username.is_empty()
    {
        return invalid(
            "config.linux.security_context.run_as_group",
            "set without a user",
        );
    }
    let number = |field, value: i64| {
        u32::try_from(value).map_err(|_| Error::Invalid {
            field,
            problem: format!("{value} is not an id"),
        })
    };
    let name = match (&security.run_as_user, security.run_as_username.as_str()) {
        (Some(uid), _) => {
            number("config.linux.security_context.run_as_user", uid.value)?.to_string()
        }
        (None, "") => image.to_owned(),
        (None, username) => username.to_owned(),
    };
    Ok(agent::User {
        name,
        gid: security
            .run_as_group
            .as_ref()
            .map(|gid| number("config.linux.security_context.run_as_group", gid.value))
            .transpose()?,
        supplemental_groups: security
            .supplemental_groups
            .iter()
            .map(|gid| number("config.linux.security_context.supplemental_groups", *gid))
            .collect::<Result<_>>()?,
        merge_image_groups: security.supplemental_groups_policy()
            == cri::SupplementalGroupsPolicy::Merge,
    })
}

fn namespaces(security: &cri::LinuxContainerSecurityContext) -> Result<Vec<LinuxNamespace>> {
    let options = security.namespace_options.clone().unwrap_or_default();
    let namespace = |kind: LinuxNamespaceType, shared: bool| {
        let builder = LinuxNamespaceBuilder::default().typ(kind);
        if shared { builder.path(POD) } else { builder }
            .build()
            .map_err(build_error)
    };
    let shared_pids = match options.pid() {
        cri::NamespaceMode::Pod => true,
        cri::NamespaceMode::Container => false,
        cri::NamespaceMode::Node | cri::NamespaceMode::Target => {
            return Err(Error::Unsupported {
                field: "config.linux.security_context.namespace_options.pid",
                what: format!("pid namespace mode {}", options.pid().as_str_name()),
            });
        }
    };
    Ok(vec![
        namespace(LinuxNamespaceType::Mount, false)?,
        namespace(LinuxNamespaceType::Pid, shared_pids)?,
        namespace(LinuxNamespaceType::Ipc, true)?,
        namespace(LinuxNamespaceType::Uts, true)?,
        namespace(LinuxNamespaceType::Cgroup, false)?,
    ])
}

fn resources(config: &cri::ContainerConfig) -> Result<LinuxResources> {
    use oci_spec::runtime::{LinuxCpuBuilder, LinuxMemoryBuilder, LinuxResourcesBuilder};
    let asked = config
        .linux
        .as_ref()
        .and_then(|linux| linux.resources.clone())
        .unwrap_or_default();
    let mut cpu = LinuxCpuBuilder::default();
    if asked.cpu_shares > 0 {
        cpu = cpu.shares(asked.cpu_shares as u64);
    }
    if asked.cpu_quota > 0 {
        cpu = cpu.quota(asked.cpu_quota);
    }
    if asked.cpu_period > 0 {
        cpu = cpu.period(asked.cpu_period as u64);
    }
    let mut memory = LinuxMemoryBuilder::default();
    if asked.memory_limit_in_bytes > 0 {
        memory = memory.limit(asked.memory_limit_in_bytes);
    }
    let mut resources = LinuxResourcesBuilder::default()
        .cpu(cpu.build().map_err(build_error)?)
        .memory(memory.build().map_err(build_error)?);
    if !asked.unified.is_empty() {
        resources = resources.unified(
            asked
                .unified
                .into_iter()
                .collect::<std::collections::HashMap<_, _>>(),
        );
    }
    resources.build().map_err(build_error)
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

    fn sandbox() -> cri::PodSandboxConfig {
        cri::PodSandboxConfig::default()
    }

    fn security(context: cri::LinuxContainerSecurityContext) -> cri::ContainerConfig {
        cri::ContainerConfig {
            linux: Some(cri::LinuxContainerConfig {
                security_context: Some(context),
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    fn process(config: &cri::ContainerConfig) -> oci_spec::runtime::Process {
        let built = build(config, &sandbox(), &image()).unwrap();
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
        let user = |context| build(&security(context), &sandbox(), &image()).map(|b| b.user);
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
        let error = build(&security(context), &sandbox(), &image()).unwrap_err();
        assert!(error.to_string().contains("privileged"), "{error}");
    }

    #[test]
    fn namespaces_are_shared_as_the_pod_says() {
        let pid = |mode: cri::NamespaceMode| {
            let context = cri::LinuxContainerSecurityContext {
                namespace_options: Some(cri::NamespaceOption {
                    pid: mode as i32,
                    ..Default::default()
                }),
                ..Default::default()
            };
            namespaces(&context).map(|list| {
                let pid = list.iter().find(|n| n.typ() == LinuxNamespaceType::Pid);
                pid.unwrap().path().is_some()
            })
        };
        assert!(pid(cri::NamespaceMode::Pod).unwrap());
        assert!(!pid(cri::NamespaceMode::Container).unwrap());
        assert!(pid(cri::NamespaceMode::Target).is_err());
    }
}
