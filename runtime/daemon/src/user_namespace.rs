//! The user namespace of a pod: what the CRI may ask for. The agent makes it, in the VM.

use podvisor_proto::cri::{self, NamespaceMode};

use crate::error::{Error, Result};

/// What a pod asks for: the one map of its users, which is that of its groups; none, when it asks for no user namespace.
///
/// # Errors
/// INVALID_ARGUMENT for what the CRI does not have.
pub fn of_pod(config: &cri::PodSandboxConfig) -> Result<Option<cri::IdMapping>> {
    let linux = config.linux.as_ref();
    let context = linux.and_then(|linux| linux.security_context.as_ref());
    let options = context.and_then(|context| context.namespace_options.as_ref());
    match options.and_then(|options| options.userns_options.as_ref()) {
        Some(users) => parse(users),
        None => Ok(None),
    }
}

/// Refuses a container that asks for another one than its pod's.
///
/// # Errors
/// INVALID_ARGUMENT.
pub fn check_container(options: &cri::NamespaceOption, pod: Option<&cri::IdMapping>) -> Result<()> {
    let Some(users) = &options.userns_options else {
        return Ok(());
    };
    let wanted = parse(users)?;
    // Mode POD and no map says nothing that the pod has not said.
    let says_nothing = wanted.is_none() && users.mode() == NamespaceMode::Pod;
    if says_nothing || wanted.as_ref() == pod {
        Ok(())
    } else {
        invalid("not the sandbox's".into())
    }
}

fn parse(users: &cri::UserNamespace) -> Result<Option<cri::IdMapping>> {
    let is_mapped = !users.uids.is_empty() || !users.gids.is_empty();
    match users.mode() {
        NamespaceMode::Pod if !is_mapped => return Ok(None),
        NamespaceMode::Pod => {}
        NamespaceMode::Node if is_mapped => return invalid("mode NODE has no mappings".into()),
        NamespaceMode::Node => return Ok(None),
        mode => {
            return invalid(format!(
                "the mode is POD or NODE, not {}",
                mode.as_str_name()
            ));
        }
    }
    for (field, mappings) in [("uids", &users.uids), ("gids", &users.gids)] {
        match mappings.as_slice() {
            [one] if one.container_id != 0 => {
                return invalid(format!("{field}: id 0 is not mapped"));
            }
            [one] => check(one).or_else(|problem| invalid(format!("{field}: {problem}")))?,
            more => return invalid(format!("{field}: {} mappings, not one", more.len())),
        }
    }
    if users.uids != users.gids {
        return invalid("uids and gids are mapped differently".into());
    }
    Ok(users.uids.first().copied())
}

/// Refuses what no kernel takes for a line of a map.
///
/// # Errors
/// The reason.
pub fn check(mapping: &cri::IdMapping) -> std::result::Result<(), &'static str> {
    // The highest number is no id (`(uid_t) -1`, credentials(7)).
    let ends = |first: u32| first.checked_add(mapping.length).is_some();
    if mapping.length == 0 {
        Err("nothing is mapped")
    } else if ends(mapping.host_id) && ends(mapping.container_id) {
        Ok(())
    } else {
        Err("ids end at 4294967294")
    }
}

fn invalid<T>(problem: String) -> Result<T> {
    Err(Error::Invalid {
        field: "config.linux.security_context.namespace_options.userns_options",
        problem,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use NamespaceMode::{Container, Node, Pod, Target};

    fn map(host_id: u32, container_id: u32, length: u32) -> cri::IdMapping {
        cri::IdMapping {
            host_id,
            container_id,
            length,
        }
    }

    fn users(mode: NamespaceMode, ids: Vec<cri::IdMapping>) -> cri::UserNamespace {
        cri::UserNamespace {
            mode: mode as i32,
            uids: ids.clone(),
            gids: ids,
        }
    }

    #[test]
    fn mappings_of_pods_are_checked() {
        let good = map(100_000, 0, 65536);
        assert_eq!(parse(&users(Pod, vec![])).unwrap(), None);
        assert_eq!(parse(&users(Node, vec![])).unwrap(), None);
        assert_eq!(parse(&users(Pod, vec![good])).unwrap(), Some(good));
        let mut different = users(Pod, vec![good]);
        different.gids = vec![map(200_000, 0, 65536)];
        for bad in [
            different,
            users(Pod, vec![map(1, 0, 1000), map(1001, 1000, 1000)]),
            users(Pod, vec![map(100_000, 1, 65536)]),
            users(Pod, vec![map(100_000, 0, 0)]),
            users(Pod, vec![map(u32::MAX, 0, 1)]),
            users(Pod, vec![map(1, 0, u32::MAX)]),
            users(Node, vec![good]),
            users(Container, vec![good]),
            users(Target, vec![]),
        ] {
            let result = parse(&bad);
            assert!(matches!(result, Err(Error::Invalid { .. })), "{bad:?}");
        }
    }

    #[test]
    fn a_container_has_its_pods() {
        let pod = map(100_000, 0, 65536);
        let check = |users: Option<cri::UserNamespace>, pod: Option<&cri::IdMapping>| {
            let options = cri::NamespaceOption {
                userns_options: users,
                ..Default::default()
            };
            check_container(&options, pod).is_ok()
        };
        for (wanted, with, without) in [
            (None, true, true),
            (Some(users(Pod, vec![])), true, true),
            (Some(users(Pod, vec![pod])), true, false),
            (Some(users(Pod, vec![map(1, 0, 65536)])), false, false),
            (Some(users(Node, vec![])), false, true),
        ] {
            assert_eq!(check(wanted.clone(), Some(&pod)), with, "{wanted:?}");
            assert_eq!(check(wanted.clone(), None), without, "{wanted:?}");
        }
    }
}
