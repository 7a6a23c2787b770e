//! From what a user types to a sandbox.

use std::io;
use std::path::Path;

use podvisor_proto::cri;

use crate::client::{self, ClientError, Daemon};

/// Why a word names no single pod.
#[derive(Debug, thiserror::Error)]
pub enum ResolveError {
    /// No pod has this id, name or `namespace/name`.
    #[error("no pod {0:?}: `podvisor ps` lists them")]
    Unknown(String),
    /// A prefix or name of several.
    #[error("{word:?} is the beginning or the name of {count} pods: give more of the id")]
    Ambiguous {
        /// What was typed.
        word: String,
        /// How many it could be.
        count: usize,
    },
    /// podvisord did not answer.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// The run directory cannot be read.
    #[error("cannot read {path}: {source}")]
    RunDir {
        /// The directory of the sandboxes.
        path: String,
        /// What the kernel said.
        source: io::Error,
    },
}

/// The sandbox with an id, a unique beginning of an id, a pod name or `namespace/name`.
///
/// When podvisord does not run, ids are looked up in the run directory: pods and their monitors
/// live on without it.
pub async fn resolve(socket: &Path, run_dir: &Path, word: &str) -> Result<String, ResolveError> {
    let pods = match Daemon::connect(socket).await {
        Ok(mut daemon) => list(&mut daemon)
            .await?
            .into_iter()
            .map(|pod| {
                let metadata = pod.metadata.unwrap_or_default();
                Candidate {
                    id: pod.id,
                    name: metadata.name,
                    namespace: metadata.namespace,
                }
            })
            .collect(),
        Err(ClientError::NotRunning(_) | ClientError::Stopped(_)) => in_run_dir(run_dir)?,
        Err(error) => return Err(error.into()),
    };
    pick(&pods, word)
}

/// All sandboxes podvisord knows.
pub async fn list(daemon: &mut Daemon) -> Result<Vec<cri::PodSandbox>, ClientError> {
    Ok(daemon
        .runtime
        .list_pod_sandbox(client::within(
            client::CALL,
            cri::ListPodSandboxRequest { filter: None },
        ))
        .await
        .map_err(client::failed("ListPodSandbox"))?
        .into_inner()
        .items)
}

#[derive(Debug, Default)]
struct Candidate {
    id: String,
    name: String,
    namespace: String,
}

fn in_run_dir(run_dir: &Path) -> Result<Vec<Candidate>, ResolveError> {
    let path = run_dir.join("sandboxes");
    let entries = match std::fs::read_dir(&path) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(source) => {
            return Err(ResolveError::RunDir {
                path: path.display().to_string(),
                source,
            });
        }
    };
    Ok(entries
        .filter_map(Result::ok)
        .filter_map(|entry| entry.file_name().into_string().ok())
        .map(|id| Candidate {
            id,
            ..Candidate::default()
        })
        .collect())
}

fn pick(pods: &[Candidate], word: &str) -> Result<String, ResolveError> {
    // Exact names win: a pod may be called "cafe", which is also the beginning of an id.
    let exact = |pod: &&Candidate| {
        pod.id == word
            || (!pod.name.is_empty()
                && (pod.name == word || format!("{}/{}", pod.namespace, pod.name) == word))
    };
    let mut found: Vec<&Candidate> = pods.iter().filter(exact).collect();
    if found.is_empty() && !word.is_empty() {
        found = pods.iter().filter(|pod| pod.id.starts_with(word)).collect();
    }
    match found.as_slice() {
        [pod] => Ok(pod.id.clone()),
        [] => Err(ResolveError::Unknown(word.to_owned())),
        several => Err(ResolveError::Ambiguous {
            word: word.to_owned(),
            count: several.len(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pods() -> Vec<Candidate> {
        [
            ("cafe01", "web", "a"),
            ("cafe02", "web", "b"),
            ("dead00", "cafe", "a"),
        ]
        .map(|(id, name, namespace)| Candidate {
            id: id.into(),
            name: name.into(),
            namespace: namespace.into(),
        })
        .into()
    }

    #[test]
    fn ids_prefixes_and_names_resolve() {
        let pods = pods();
        assert_eq!(pick(&pods, "cafe02").unwrap(), "cafe02");
        assert_eq!(pick(&pods, "de").unwrap(), "dead00");
        assert_eq!(pick(&pods, "b/web").unwrap(), "cafe02");
        assert_eq!(pick(&pods, "cafe").unwrap(), "dead00");
    }

    #[test]
    fn unknown_and_ambiguous_words_are_errors() {
        let pods = pods();
        assert!(matches!(
            pick(&pods, "web"),
            Err(ResolveError::Ambiguous { count: 2, .. })
        ));
        assert!(matches!(
            pick(&pods, "cafe0"),
            Err(ResolveError::Ambiguous { count: 2, .. })
        ));
        assert!(matches!(pick(&pods, "x"), Err(ResolveError::Unknown(_))));
        assert!(matches!(pick(&pods, ""), Err(ResolveError::Unknown(_))));
    }

    #[tokio::test]
    async fn without_a_daemon_the_run_directory_answers() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(dir.path().join("sandboxes/abc123")).unwrap();
        let socket = dir.path().join("podvisor.sock");
        assert_eq!(resolve(&socket, dir.path(), "abc").await.unwrap(), "abc123");
    }
}
