//! Finds and executes a program, with the words that Docker and containerd use when that fails.

use std::convert::Infallible;
use std::ffi::{CString, NulError};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags};
use nix::unistd::{AccessFlags, execve, faccessat};

use super::message::FailureKind;
use super::process::Failure;
use crate::spec::DEFAULT_PATH;

/// Replaces this process by the program `arguments[0]`. Returns only if that fails.
pub fn execute(arguments: &[String], environment: &[String]) -> Failure {
    match try_execute(arguments, environment) {
        Ok(never) => match never {},
        Err(message) => Failure {
            kind: FailureKind::Program,
            message,
        },
    }
}

fn try_execute(arguments: &[String], environment: &[String]) -> Result<Infallible, String> {
    let name = arguments.first().ok_or("no command")?;
    // The last one counts, as in most shells.
    let search = environment
        .iter()
        .rev()
        .find_map(|entry| entry.strip_prefix("PATH="))
        .unwrap_or(DEFAULT_PATH);
    let program = find(name, search)?;
    let strings = |texts: &[String]| {
        texts
            .iter()
            .map(|text| CString::new(text.as_str()))
            .collect::<Result<Vec<_>, NulError>>()
            .map_err(|_| format!("exec: {name:?}: an argument contains NUL"))
    };
    let path = CString::new(program.as_os_str().as_bytes())
        .map_err(|_| format!("exec: {name:?}: the name contains NUL"))?;
    let error = match execve(&path, &strings(arguments)?, &strings(environment)?) {
        Ok(never) => match never {},
        Err(error) => error,
    };
    Err(format!("exec {}: {}", program.display(), words(error)))
}

/// The file that `name` means: itself when it has a slash, otherwise the first executable of that name
/// in the directories of `search`.
fn find(name: &str, search: &str) -> Result<PathBuf, String> {
    if name.contains('/') {
        return match check(Path::new(name)) {
            Ok(()) => Ok(PathBuf::from(name)),
            Err(Errno::ENOENT) => Err(format!(
                "exec: {name:?}: stat {name}: no such file or directory"
            )),
            Err(error) => Err(format!("exec: {name:?}: {}", words(error))),
        };
    }
    search
        .split(':')
        .map(|directory| {
            let directory = if directory.is_empty() { "." } else { directory };
            Path::new(directory).join(name)
        })
        .find(|candidate| !name.is_empty() && check(candidate).is_ok())
        .ok_or_else(|| format!("exec: {name:?}: executable file not found in $PATH"))
}

/// Whether this process may execute the file.
fn check(path: &Path) -> nix::Result<()> {
    let metadata = std::fs::metadata(path)
        .map_err(|error| Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO)))?;
    if metadata.is_dir() {
        return Err(Errno::EISDIR);
    }
    faccessat(AT_FDCWD, path, AccessFlags::X_OK, AtFlags::AT_EACCESS)
}

fn words(error: Errno) -> String {
    error.desc().to_lowercase()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn file(directory: &Path, name: &str, mode: u32) -> PathBuf {
        let path = directory.join(name);
        std::fs::write(&path, "").unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
        path
    }

    #[test]
    fn a_name_is_searched_a_path_is_not() {
        let (first, second) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let search = format!("{}::{}", first.path().display(), second.path().display());
        file(first.path(), "plain", 0o644);
        std::fs::create_dir(first.path().join("tool")).unwrap();
        let tool = file(second.path(), "tool", 0o700);
        assert_eq!(find("tool", &search).unwrap(), tool);
        assert_eq!(find(tool.to_str().unwrap(), "").unwrap(), tool);
        assert_eq!(
            find("plain", &search).unwrap_err(),
            "exec: \"plain\": executable file not found in $PATH"
        );
        assert!(find("", &search).is_err());
    }

    #[test]
    fn words_are_those_that_people_know() {
        let directory = tempfile::tempdir().unwrap();
        let plain = file(directory.path(), "plain", 0o644);
        let plain = plain.to_str().unwrap();
        assert_eq!(
            find("/no/such", "").unwrap_err(),
            "exec: \"/no/such\": stat /no/such: no such file or directory"
        );
        assert_eq!(
            find(plain, "").unwrap_err(),
            format!("exec: {plain:?}: permission denied")
        );
        let path = directory.path().to_str().unwrap();
        assert_eq!(
            find(path, "").unwrap_err(),
            format!("exec: {path:?}: is a directory")
        );
        let no_program = file(directory.path(), "no-program", 0o755);
        let no_program = no_program.to_str().unwrap().to_owned();
        assert_eq!(
            try_execute(std::slice::from_ref(&no_program), &[]).unwrap_err(),
            format!("exec {no_program}: exec format error")
        );
    }
}
