//! Who a container runs as: what the guest resolves against the image's own files.

use podvisor_proto::{agent, cri};

use crate::error::{Error, Result};

/// The user that a security context, or else the image, names.
///
/// # Errors
/// INVALID_ARGUMENT: ids that are none, a group without a user, two users.
pub fn of(security: &cri::LinuxContainerSecurityContext, image: &str) -> Result<agent::User> {
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
