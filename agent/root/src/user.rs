//! Who a process runs as, by the image's own `/etc/passwd` and `/etc/group`. The rules are those that
//! Docker and containerd share: `user[:group]`, each a name or a number; a number needs no entry.

use std::io::{self, BufRead, BufReader, Read};

use podvisor_proto::agent::{ResolvedUser, User};

use crate::in_root::Root;

/// Most that is read of either file. An image's file is the image author's, not ours.
const FILE_LIMIT: u64 = 16 * 1024 * 1024;
/// Longest line; a longer one is cut, which loses members at its end.
const LINE_LIMIT: u64 = 256 * 1024;
/// Most supplementary groups of a process (`NGROUPS_MAX`, setgroups(2)).
const GROUPS_LIMIT: usize = 65536;
/// Highest id that passwd(5) tools agree on.
const ID_LIMIT: u32 = i32::MAX as u32;

/// Why a user is not known.
#[derive(Debug, thiserror::Error)]
pub enum UserError {
    /// A name without an entry.
    #[error("unable to find user {0}: no matching entries in passwd file")]
    NoUser(String),
    /// A name without an entry.
    #[error("unable to find group {0}: no matching entries in group file")]
    NoGroup(String),
    /// A number that is no id.
    #[error("{0}: uids and gids must be in range 0-{ID_LIMIT}")]
    Range(String),
    /// The image lists more groups than the kernel takes.
    #[error("more than {GROUPS_LIMIT} supplementary groups")]
    TooManyGroups,
    /// A file cannot be read.
    #[error("cannot read the image's user database")]
    Read(#[from] io::Error),
}

/// A user, and what a login would know of it.
#[derive(Debug, PartialEq, Eq)]
pub struct Account {
    /// Ids.
    pub ids: ResolvedUser,
    /// Home directory; `/` when the user has no entry.
    pub home: String,
}

/// Finds `wanted` in the files of `root`.
pub fn resolve(root: &Root, wanted: &User) -> Result<Account, UserError> {
    resolve_in(
        || root.open_file("etc/passwd"),
        || root.open_file("etc/group"),
        wanted,
    )
}

/// One line of passwd(5), as far as it matters here.
#[derive(Clone, Debug)]
struct PasswdEntry {
    name: String,
    uid: u32,
    gid: u32,
    home: String,
}

fn resolve_in<R: Read>(
    passwd: impl FnOnce() -> io::Result<Option<R>>,
    group: impl FnOnce() -> io::Result<Option<R>>,
    wanted: &User,
) -> Result<Account, UserError> {
    let (user, group_name) = match wanted.name.split_once(':') {
        Some((user, group)) => (user, group),
        None => (wanted.name.as_str(), ""),
    };
    let user = if user.is_empty() { "0" } else { user };
    let number = parse_id(user)?;

    let mut entry = None;
    each_line(passwd()?, |line| {
        let found = parse_passwd(line)
            .filter(|candidate| candidate.name == user || Some(candidate.uid) == number);
        // The first match counts, as in getpwnam(3).
        entry = entry.take().or(found);
        entry.is_none()
    })?;
    let (uid, entry_gid) = match (&entry, number) {
        (Some(entry), _) => (entry.uid, entry.gid),
        (None, Some(uid)) => (uid, 0),
        (None, None) => return Err(UserError::NoUser(user.to_owned())),
    };

    let group_number = parse_id(group_name)?;
    let mut named_gid = None;
    let mut memberships = Vec::new();
    each_line(group()?, |line| {
        let mut fields = line.split(':');
        let (Some(name), _, Some(gid)) = (fields.next(), fields.next(), fields.next()) else {
            return true;
        };
        let Ok(gid) = gid.trim().parse::<u32>() else {
            return true;
        };
        if named_gid.is_none() && !group_name.is_empty() && name == group_name {
            named_gid = Some(gid);
        }
        let is_member = wanted.merge_image_groups
            && entry.as_ref().is_some_and(|entry| {
                fields
                    .next()
                    .is_some_and(|members| members.trim().split(',').any(|m| m == entry.name))
            });
        if is_member && memberships.len() <= GROUPS_LIMIT {
            memberships.push(gid);
        }
        true
    })?;
    let gid = match wanted.gid {
        Some(gid) => gid,
        None if group_name.is_empty() => entry_gid,
        None => named_gid
            .or(group_number)
            .ok_or_else(|| UserError::NoGroup(group_name.to_owned()))?,
    };

    // The primary group comes first in the list, as containerd has it.
    let mut groups = vec![gid];
    groups.extend(memberships);
    groups.extend(&wanted.supplemental_groups);
    let mut seen = std::collections::HashSet::new();
    groups.retain(|group| seen.insert(*group));
    if groups.len() > GROUPS_LIMIT {
        return Err(UserError::TooManyGroups);
    }
    Ok(Account {
        ids: ResolvedUser {
            uid,
            gid,
            supplemental_groups: groups,
        },
        home: entry
            .map(|entry| entry.home)
            .filter(|home| home.starts_with('/'))
            .unwrap_or_else(|| "/".to_owned()),
    })
}

/// A number within the range of ids; none for what is not a number.
fn parse_id(text: &str) -> Result<Option<u32>, UserError> {
    if text.is_empty() || !text.bytes().all(|byte| byte.is_ascii_digit()) {
        return Ok(None);
    }
    match text.parse::<u32>() {
        Ok(id) if id <= ID_LIMIT => Ok(Some(id)),
        _ => Err(UserError::Range(text.to_owned())),
    }
}

fn parse_passwd(line: &str) -> Option<PasswdEntry> {
    let mut fields = line.split(':');
    let name = fields.next().filter(|name| !name.is_empty())?;
    let uid = fields.nth(1)?.trim().parse().ok()?;
    let gid = fields.next()?.trim().parse().ok()?;
    let home = fields.nth(1).unwrap_or_default();
    Some(PasswdEntry {
        name: name.to_owned(),
        uid,
        gid,
        home: home.to_owned(),
    })
}

/// Calls `visit` for each line until it returns false. Lines that are not UTF-8 are made so.
fn each_line<R: Read>(
    file: Option<R>,
    mut visit: impl FnMut(&str) -> bool,
) -> Result<(), UserError> {
    let Some(file) = file else {
        return Ok(());
    };
    let mut reader = BufReader::new(file.take(FILE_LIMIT));
    let mut line = Vec::new();
    loop {
        line.clear();
        if reader
            .by_ref()
            .take(LINE_LIMIT)
            .read_until(b'\n', &mut line)?
            == 0
        {
            return Ok(());
        }
        let whole = line.ends_with(b"\n") || (line.len() as u64) < LINE_LIMIT;
        if !whole {
            reader.skip_until(b'\n')?;
        }
        let text = String::from_utf8_lossy(&line);
        let text = text.trim();
        if !text.is_empty() && !text.starts_with('#') && !visit(text) {
            return Ok(());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PASSWD: &str = "# comment\nroot:x:0:0:root:/root:/bin/sh\n\nbroken\nweb:x:33:34:www:/var/www:/bin/false\nnohome:x:1002:1002\nweb:x:99:99::/second:\n";
    const GROUP: &str =
        "root:x:0:\nwww:x:34:web\nextra:x:50000:root,web\nbad:x:many:web\nempty:x:7:\n";

    fn find(name: &str, merge: bool) -> Result<Account, UserError> {
        find_with(&User {
            name: name.to_owned(),
            merge_image_groups: merge,
            ..User::default()
        })
    }

    fn find_with(user: &User) -> Result<Account, UserError> {
        resolve_in(
            || Ok(Some(PASSWD.as_bytes())),
            || Ok(Some(GROUP.as_bytes())),
            user,
        )
    }

    fn ids(name: &str, merge: bool) -> (u32, u32, Vec<u32>) {
        let ids = find(name, merge).unwrap().ids;
        (ids.uid, ids.gid, ids.supplemental_groups)
    }

    #[test]
    fn names_numbers_and_groups() {
        assert_eq!(ids("", true), (0, 0, vec![0, 50000]));
        assert_eq!(ids("web", true), (33, 34, vec![34, 50000]));
        assert_eq!(ids("33", true), (33, 34, vec![34, 50000]));
        assert_eq!(ids("web", false), (33, 34, vec![34]));
        assert_eq!(ids("web:extra", false), (33, 50000, vec![50000]));
        assert_eq!(ids("web:7", false), (33, 7, vec![7]));
        assert_eq!(ids("4242", true), (4242, 0, vec![0]));
        assert_eq!(ids("4242:4343", true), (4242, 4343, vec![4343]));
        assert_eq!(ids(":7", true).1, 7);
    }

    #[test]
    fn homes() {
        assert_eq!(find("", false).unwrap().home, "/root");
        assert_eq!(find("web", false).unwrap().home, "/var/www");
        assert_eq!(find("nohome", false).unwrap().home, "/");
        assert_eq!(find("4242", false).unwrap().home, "/");
    }

    #[test]
    fn the_pod_overrides_the_image() {
        let account = find_with(&User {
            name: "web:www".to_owned(),
            gid: Some(5),
            supplemental_groups: vec![5, 6, 50000],
            merge_image_groups: true,
        })
        .unwrap();
        assert_eq!(account.ids.gid, 5);
        assert_eq!(account.ids.supplemental_groups, [5, 34, 50000, 6]);
    }

    #[test]
    fn errors() {
        assert!(matches!(find("nobody", true), Err(UserError::NoUser(_))));
        assert!(matches!(find("web:none", true), Err(UserError::NoGroup(_))));
        assert!(matches!(find("4294967296", true), Err(UserError::Range(_))));
        assert!(matches!(
            find("1:2147483648", true),
            Err(UserError::Range(_))
        ));
    }

    #[test]
    fn an_image_without_files_has_numbers_only() {
        let none = || Ok(None::<&[u8]>);
        let user = |name: &str| User {
            name: name.to_owned(),
            merge_image_groups: true,
            ..User::default()
        };
        assert_eq!(resolve_in(none, none, &user("7:8")).unwrap().ids.gid, 8);
        assert!(resolve_in(none, none, &user("web")).is_err());
    }

    #[test]
    fn an_overlong_line_ends_at_its_newline() {
        let passwd = format!(
            "{}\nweb:x:33:34::/w:\n",
            "x".repeat(LINE_LIMIT as usize * 2)
        );
        let account = resolve_in(
            || Ok(Some(passwd.as_bytes())),
            || Ok(None),
            &User {
                name: "web".to_owned(),
                ..User::default()
            },
        );
        assert_eq!(account.unwrap().ids.uid, 33);
    }

    proptest! {
        #[test]
        fn any_files_and_any_user_end_well(
            passwd in proptest::collection::vec(any::<u8>(), 0..400),
            group in proptest::collection::vec(any::<u8>(), 0..400),
            name in ".{0,12}",
            merge: bool,
        ) {
            let user = User { name, merge_image_groups: merge, ..User::default() };
            let _ = resolve_in(|| Ok(Some(&passwd[..])), || Ok(Some(&group[..])), &user);
        }

        #[test]
        fn an_entry_is_found_by_name_and_by_number(
            entries in proptest::collection::btree_map(1_u32..60000, ("[a-z]{1,8}", 0_u32..60000), 1..20),
            pick in any::<prop::sample::Index>(),
        ) {
            let entries: Vec<_> = entries.into_iter().collect();
            let lines: Vec<String> = entries
                .iter()
                .map(|(uid, (name, gid))| format!("{name}:x:{uid}:{gid}::/home/{uid}:/bin/sh"))
                .collect();
            let passwd = lines.join("\n");
            let (uid, (name, _)) = pick.get(&entries);
            let resolve = |name: String| {
                let user = User { name, ..User::default() };
                resolve_in(|| Ok(Some(passwd.as_bytes())), || Ok(None), &user).unwrap()
            };
            // By name: the first of that name. By number: numbers are unique here.
            let first = entries.iter().find(|(_, (other, _))| other == name).unwrap();
            prop_assert_eq!(resolve(name.clone()).ids.uid, first.0);
            prop_assert_eq!(resolve(name.clone()).home, format!("/home/{}", first.0));
            prop_assert_eq!(resolve(uid.to_string()).ids.uid, *uid);
        }

        #[test]
        fn groups_are_the_memberships_without_repetition(
            groups in proptest::collection::vec((0_u32..50, any::<bool>()), 0..40),
        ) {
            let lines: Vec<String> = groups
                .iter()
                .enumerate()
                .map(|(index, (gid, member))| {
                    format!("g{index}:x:{gid}:other,{}", if *member { "web,z" } else { "webber" })
                })
                .collect();
            let text = lines.join("\n");
            let user = User {
                name: "web".to_owned(),
                merge_image_groups: true,
                ..User::default()
            };
            let found = resolve_in(
                || Ok(Some(PASSWD.as_bytes())),
                || Ok(Some(text.as_bytes())),
                &user,
            ).unwrap().ids.supplemental_groups;
            let mut expected = vec![34];
            for (gid, member) in groups {
                if member && !expected.contains(&gid) {
                    expected.push(gid);
                }
            }
            prop_assert_eq!(found, expected);
        }
    }
}
