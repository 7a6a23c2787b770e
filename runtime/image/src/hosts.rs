//! Which hosts to ask for an image: containerd's `certs.d/HOST/hosts.toml`.
//!
//! Format: <https://github.com/containerd/containerd/blob/main/docs/hosts.md>. For the registry `HOST` the first of
//! these directories that exists is used: `HOST_PORT_`, `HOST:PORT` (or `HOST`), `_default`. Its hosts are asked in
//! the order of the file, and then the registry itself: `server` if the file has it, else the name in the reference.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use reqwest::Url;
use reqwest::header::{HeaderMap, HeaderName, HeaderValue};
use toml::{Table, Value};
use tracing::warn;

use crate::registry::Clients;

/// What Docker Hub is called in references, and the host that serves it.
const DOCKER_HUB: &str = "docker.io";
const DOCKER_HUB_HOST: &str = "registry-1.docker.io";

/// The registry configuration of this node, and connections to registries. Files are read at each pull, so that a
/// change needs no restart. Clones share connections.
///
/// The process must have installed a rustls `CryptoProvider` before the first pull.
#[derive(Debug, Clone, Default)]
pub struct Registries {
    dir: Option<PathBuf>,
    pub(crate) clients: Arc<Clients>,
}

/// A host that may have an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Host {
    /// Where the registry's API is, without a slash at the end: `https://registry-1.docker.io/v2`.
    pub(crate) base: String,
    /// Manifests by digest, and blobs, may be asked for here.
    pub(crate) pull: bool,
    /// Tags may be asked for here.
    pub(crate) resolve: bool,
    pub(crate) headers: HeaderMap,
    pub(crate) tls: Tls,
    /// A mirror is told which registry is meant: `?ns=docker.io`.
    pub(crate) namespace: Option<String>,
}

/// How to check a host, and what to show it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub(crate) struct Tls {
    pub(crate) skip_verify: bool,
    /// PEM files that are trusted beside the system's.
    pub(crate) ca: Vec<PathBuf>,
    /// PEM files of a certificate and its key; without the second, the first has both.
    pub(crate) client: Option<(PathBuf, Option<PathBuf>)>,
}

/// Why the configuration of a registry cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum HostsError {
    #[error("{path}: {source}", path = path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("{path}: {source}", path = path.display())]
    Toml {
        path: PathBuf,
        source: Box<toml::de::Error>,
    },
    #[error("{path}: {what}", path = path.display())]
    Invalid { path: PathBuf, what: String },
}

impl Registries {
    /// Reads `dir/HOST/hosts.toml`, and `dir/_default/hosts.toml` for hosts without one.
    pub fn new(dir: impl Into<PathBuf>) -> Self {
        Self {
            dir: Some(dir.into()),
            clients: Arc::default(),
        }
    }

    /// The hosts to ask for an image of `registry`, in this order. Reads files: blocks.
    pub(crate) fn hosts(&self, registry: &str) -> Result<Vec<Host>, HostsError> {
        let directory = self
            .dir
            .as_deref()
            .and_then(|dir| host_directory(dir, registry));
        let Some(directory) = directory else {
            return Ok(vec![default_host(registry)]);
        };
        let path = directory.join("hosts.toml");
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let tls = docker_style_tls(&directory)?;
                return Ok(vec![Host {
                    tls,
                    ..default_host(registry)
                }]);
            }
            Err(source) => return Err(HostsError::Read { path, source }),
        };
        parse(&text, &path, registry)
    }
}

fn host_directory(dir: &Path, registry: &str) -> Option<PathBuf> {
    // A colon is awkward in a file name: "host:5000" may be "host_5000_".
    let with_port = registry
        .rsplit_once(':')
        .map(|(host, port)| format!("{host}_{port}_"));
    let names = with_port
        .as_deref()
        .into_iter()
        .chain([registry, "_default"]);
    names.map(|name| dir.join(name)).find(|path| path.is_dir())
}

fn default_host(registry: &str) -> Host {
    let host = if registry == DOCKER_HUB {
        DOCKER_HUB_HOST
    } else {
        registry
    };
    let scheme = if is_loopback(host) && !host.ends_with(":443") {
        "http"
    } else {
        "https"
    };
    Host {
        base: format!("{scheme}://{host}/v2"),
        pull: true,
        resolve: true,
        headers: HeaderMap::new(),
        tls: Tls::default(),
        namespace: None,
    }
}

/// Whether a host, with or without a port, is this machine: there a registry without TLS is the rule.
pub(crate) fn is_loopback(host: &str) -> bool {
    let name = match host.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((address, _)) => address,
        None => host.split_once(':').map_or(host, |(name, _)| name),
    };
    name == "localhost"
        || name
            .parse::<std::net::IpAddr>()
            .is_ok_and(|address| address.is_loopback())
}

/// A directory without hosts.toml may have certificates as Docker wants them: `*.crt` to trust, and one
/// `NAME.cert` with `NAME.key` to show.
fn docker_style_tls(directory: &Path) -> Result<Tls, HostsError> {
    let read_error = |source| HostsError::Read {
        path: directory.to_owned(),
        source,
    };
    let mut tls = Tls::default();
    let mut paths = Vec::new();
    for entry in fs::read_dir(directory).map_err(read_error)? {
        paths.push(entry.map_err(read_error)?.path());
    }
    paths.sort();
    for path in paths {
        match path.extension().and_then(|extension| extension.to_str()) {
            Some("crt") => tls.ca.push(path),
            Some("cert") if tls.client.is_none() => {
                tls.client = Some((path.clone(), Some(path.with_extension("key"))));
            }
            _ => {}
        }
    }
    Ok(tls)
}

fn parse(text: &str, path: &Path, registry: &str) -> Result<Vec<Host>, HostsError> {
    let invalid = |what| HostsError::Invalid {
        path: path.to_owned(),
        what,
    };
    let file: Table = text.parse().map_err(|source| HostsError::Toml {
        path: path.to_owned(),
        source: Box::new(source),
    })?;
    let directory = path.parent().unwrap_or(path);
    let mut hosts = Vec::new();
    if let Some(mirrors) = file.get("host") {
        // The table keeps the order of the file (toml's feature preserve_order).
        for (url, options) in table(mirrors, "host").map_err(invalid)? {
            let options = table(options, url).map_err(invalid)?;
            let host = parse_host(url, options, directory, registry);
            hosts.push(host.map_err(|what| invalid(format!("host {url:?}: {what}")))?);
        }
    }
    let default = default_host(registry);
    let server = match file.get("server") {
        Some(server) => string(server, "server").map_err(invalid)?,
        None => default.base.strip_suffix("/v2").unwrap_or(&default.base),
    };
    let server = parse_host(server, &file, directory, registry)
        .map_err(|what| invalid(format!("server: {what}")))?;
    if !hosts.contains(&server) {
        hosts.push(server);
    }
    Ok(hosts)
}

fn parse_host(
    url: &str,
    options: &Table,
    directory: &Path,
    registry: &str,
) -> Result<Host, String> {
    let url = if url.contains("://") {
        url.to_owned()
    } else {
        format!("https://{url}")
    };
    let url = Url::parse(&url).map_err(|error| error.to_string())?;
    if !matches!(url.scheme(), "http" | "https") {
        return Err(format!("unknown scheme {:?}", url.scheme()));
    }
    let name = url.host_str().ok_or("no host")?;
    let name = if name == DOCKER_HUB {
        DOCKER_HUB_HOST
    } else {
        name
    };
    let authority = url
        .port()
        .map_or_else(|| name.to_owned(), |port| format!("{name}:{port}"));
    let is_registry =
        authority == registry || (registry == DOCKER_HUB && authority == DOCKER_HUB_HOST);

    let mut host = Host {
        namespace: (!is_registry).then(|| registry.to_owned()),
        ..default_host(registry)
    };
    let mut override_path = false;
    for (key, value) in options {
        match key.as_str() {
            "capabilities" => {
                let list = strings(value, key)?;
                if let Some(unknown) = list
                    .iter()
                    .find(|item| !matches!(item.as_str(), "pull" | "resolve" | "push"))
                {
                    return Err(format!("unknown capability {unknown:?}"));
                }
                let has = |wanted: &str| list.is_empty() || list.iter().any(|item| item == wanted);
                (host.pull, host.resolve) = (has("pull"), has("resolve"));
            }
            "skip_verify" => host.tls.skip_verify = boolean(value, key)?,
            "override_path" => override_path = boolean(value, key)?,
            "ca" => {
                host.tls.ca = strings(value, key)?
                    .iter()
                    .map(|file| directory.join(file))
                    .collect();
            }
            "client" => host.tls.client = client(value, directory)?,
            "header" => host.headers = headers(table(value, key)?)?,
            // The file's own keys stand beside those of its server.
            "server" | "host" => {}
            _ => warn!(directory = %directory.display(), key, "unknown key in hosts.toml"),
        }
    }
    let path = url.path().trim_end_matches('/');
    let suffix = if override_path || path.ends_with("/v2") {
        ""
    } else {
        "/v2"
    };
    host.base = format!("{}://{authority}{path}{suffix}", url.scheme());
    Ok(host)
}

/// One file with certificate and key, or a list of such files or of pairs of files. The first one is used.
fn client(value: &Value, directory: &Path) -> Result<Option<(PathBuf, Option<PathBuf>)>, String> {
    let first = match value {
        Value::Array(list) => match list.first() {
            Some(first) => first,
            None => return Ok(None),
        },
        single => single,
    };
    let files = strings(first, "client")?;
    match files.as_slice() {
        [both] => Ok(Some((directory.join(both), None))),
        [certificate, key] if key.is_empty() => Ok(Some((directory.join(certificate), None))),
        [certificate, key] => Ok(Some((
            directory.join(certificate),
            Some(directory.join(key)),
        ))),
        _ => Err("client: a file, or a pair of certificate and key, expected".to_owned()),
    }
}

fn headers(table: &Table) -> Result<HeaderMap, String> {
    let mut headers = HeaderMap::new();
    for (name, value) in table {
        let header = HeaderName::try_from(name.as_str())
            .map_err(|error| format!("header {name:?}: {error}"))?;
        for value in strings(value, name)? {
            let value = HeaderValue::try_from(value)
                .map_err(|error| format!("header {name:?}: {error}"))?;
            headers.append(header.clone(), value);
        }
    }
    Ok(headers)
}

fn table<'a>(value: &'a Value, key: &str) -> Result<&'a Table, String> {
    value
        .as_table()
        .ok_or_else(|| format!("{key}: a table expected"))
}

fn string<'a>(value: &'a Value, key: &str) -> Result<&'a str, String> {
    value
        .as_str()
        .ok_or_else(|| format!("{key}: a string expected"))
}

fn boolean(value: &Value, key: &str) -> Result<bool, String> {
    value
        .as_bool()
        .ok_or_else(|| format!("{key}: true or false expected"))
}

/// A string, or a list of strings.
fn strings(value: &Value, key: &str) -> Result<Vec<String>, String> {
    match value {
        Value::Array(list) => list
            .iter()
            .map(|item| string(item, key).map(str::to_owned))
            .collect(),
        single => Ok(vec![string(single, key)?.to_owned()]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hosts(text: &str, registry: &str) -> Result<Vec<Host>, HostsError> {
        parse(text, Path::new("/etc/certs.d/x/hosts.toml"), registry)
    }

    fn bases(hosts: &[Host]) -> Vec<&str> {
        hosts.iter().map(|host| host.base.as_str()).collect()
    }

    #[test]
    fn order_of_the_file_then_the_server() {
        let hosts = hosts(
            r#"
            server = "https://docker.io"
            [host."https://z.example"]
            capabilities = ["pull", "resolve"]
            [host."http://127.0.0.1:5000"]
            capabilities = ["pull"]
            [host."https://a.example/cache"]
            [host."https://b.example/cache/v2"]
            [host."https://c.example/api/"]
            override_path = true
            [host."d.example:8443"]
            "#,
            "docker.io",
        )
        .unwrap();
        assert_eq!(
            bases(&hosts),
            [
                "https://z.example/v2",
                "http://127.0.0.1:5000/v2",
                "https://a.example/cache/v2",
                "https://b.example/cache/v2",
                "https://c.example/api",
                "https://d.example:8443/v2",
                "https://registry-1.docker.io/v2",
            ]
        );
        assert!(hosts[1].pull && !hosts[1].resolve);
        assert!(hosts[2].pull && hosts[2].resolve);
        assert_eq!(hosts[0].namespace.as_deref(), Some("docker.io"));
        assert_eq!(hosts[6].namespace, None);
    }

    #[test]
    fn every_option() {
        let hosts = hosts(
            r#"
            server = "https://r.example"
            ca = "server.crt"
            skip_verify = true
            future_option = 1
            [host."https://m.example"]
            ca = ["a.crt", "/abs/b.crt"]
            client = [["c.cert", "c.key"], ["d.pem", ""]]
            [host."https://m.example".header]
            x-one = "1"
            x-two = ["2", "3"]
            [host."https://n.example"]
            client = "both.pem"
            "#,
            "r.example",
        )
        .unwrap();
        assert_eq!(
            hosts[0].tls.ca,
            [Path::new("/etc/certs.d/x/a.crt"), Path::new("/abs/b.crt")]
        );
        let in_dir = |name: &str| Path::new("/etc/certs.d/x").join(name);
        assert_eq!(
            hosts[0].tls.client,
            Some((in_dir("c.cert"), Some(in_dir("c.key"))))
        );
        assert_eq!(hosts[0].headers["x-one"], "1");
        assert_eq!(
            hosts[0].headers.get_all("x-two").iter().collect::<Vec<_>>(),
            ["2", "3"]
        );
        assert_eq!(hosts[1].tls.client, Some((in_dir("both.pem"), None)));
        assert_eq!(hosts[2].base, "https://r.example/v2");
        assert!(hosts[2].tls.skip_verify);
        assert_eq!(hosts[2].tls.ca, [in_dir("server.crt")]);
    }

    #[test]
    fn mistakes_are_told_with_the_file() {
        for text in [
            "server = 1",
            "host = 1",
            "[host]\n\"https://a\" = 1",
            "[host.\"https://a\"]\ncapabilities = [\"fly\"]",
            "[host.\"ftp://a\"]",
            "[host.\"https://\"]",
            "[host.\"https://a\".header]\n\"a b\" = \"c\"",
            "[host.\"https://a\"]\nskip_verify = \"yes\"",
            "[host.\"https://a\"]\nclient = [[\"a\", \"b\", \"c\"]]",
            "server = ",
        ] {
            let error = hosts(text, "r.example").unwrap_err().to_string();
            assert!(
                error.starts_with("/etc/certs.d/x/hosts.toml: "),
                "{text}: {error}"
            );
        }
    }

    #[test]
    fn without_a_server_the_registry_itself_is_last() {
        let mirrored = hosts("[host.\"https://m.example\"]", "r.example:444").unwrap();
        assert_eq!(
            bases(&mirrored),
            ["https://m.example/v2", "https://r.example:444/v2"]
        );
        assert_eq!(
            bases(&hosts("", "127.0.0.1:5000").unwrap()),
            ["http://127.0.0.1:5000/v2"]
        );
    }

    #[test]
    fn directories() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| {
            fs::create_dir_all(dir.path().join(name)).unwrap();
            fs::write(dir.path().join(name).join("hosts.toml"), text).unwrap();
        };
        write("_default", "[host.\"https://default.example\"]");
        write("a.example:5000", "[host.\"https://colon.example\"]");
        write("b.example:5000", "[host.\"https://colon.example\"]");
        write("b.example_5000_", "[host.\"https://underscore.example\"]");
        fs::create_dir(dir.path().join("c.example")).unwrap();
        fs::write(dir.path().join("c.example/ca.crt"), "").unwrap();
        fs::write(dir.path().join("c.example/me.cert"), "").unwrap();
        let registries = Registries::new(dir.path());
        let first = |registry: &str| registries.hosts(registry).unwrap()[0].clone();
        assert_eq!(first("a.example:5000").base, "https://colon.example/v2");
        assert_eq!(
            first("b.example:5000").base,
            "https://underscore.example/v2"
        );
        assert_eq!(first("z.example").base, "https://default.example/v2");
        let docker_style = first("c.example");
        assert_eq!(docker_style.base, "https://c.example/v2");
        assert_eq!(docker_style.tls.ca, [dir.path().join("c.example/ca.crt")]);
        assert_eq!(
            docker_style.tls.client.unwrap().1,
            Some(dir.path().join("c.example/me.key"))
        );
    }

    #[test]
    fn http_on_loopback_only() {
        for (registry, base) in [
            ("docker.io", "https://registry-1.docker.io/v2"),
            ("localhost", "http://localhost/v2"),
            ("localhost:5000", "http://localhost:5000/v2"),
            ("127.0.0.1:443", "https://127.0.0.1:443/v2"),
            ("127.8.0.1:5000", "http://127.8.0.1:5000/v2"),
            ("[::1]:5000", "http://[::1]:5000/v2"),
            ("localhost.example", "https://localhost.example/v2"),
            ("10.0.0.1:5000", "https://10.0.0.1:5000/v2"),
        ] {
            assert_eq!(default_host(registry).base, base);
        }
    }
}
