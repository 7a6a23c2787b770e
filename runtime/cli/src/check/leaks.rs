//! `podvisor check --leaks`: what this instance has on the host that no sandbox owns.

use std::collections::HashSet;
use std::path::Path;
use std::process::ExitCode;

use podvisor_node::inventory::{self, Places, Resource};
use serde_json::json;

use crate::client::{self, ClientError, Daemon};
use crate::{Context, Output, pods};

/// Prints a line for each leak; the exit code is 1 if there is one.
pub async fn leaks(context: &Context) -> anyhow::Result<ExitCode> {
    let config = &context.config;
    let places = Places {
        run_dir: config.run_dir.clone(),
        data_dir: config.data_dir.clone(),
        cni_cache_dir: config.data_dir.join("cni"),
    };
    // Before and after the owners are asked for: what is made or removed meanwhile is no leak.
    let before = scan(places.clone()).await?;
    let owners = owners(context, &before).await?;
    let after = scan(places).await?;
    let leaks = leaks_of(before, &after, &owners);
    match context.output {
        Output::Text => leaks.iter().for_each(|leak| println!("{leak}")),
        Output::Json => println!("{}", serde_json::to_string_pretty(&json(&leaks))?),
    }
    Ok(ExitCode::from(u8::from(!leaks.is_empty())))
}

/// The sandboxes that podvisord knows; while it is away, those of `found` whose monitor listens.
async fn owners(context: &Context, found: &[Resource]) -> Result<HashSet<String>, ClientError> {
    match Daemon::connect(&context.socket).await {
        Ok(mut daemon) => {
            let pods = pods::list(&mut daemon).await?;
            Ok(pods.into_iter().map(|pod| pod.id).collect())
        }
        Err(ClientError::NotRunning(_) | ClientError::Stopped(_)) => {
            Ok(with_monitor(&context.config.run_dir, found).await)
        }
        Err(error) => Err(error),
    }
}

async fn with_monitor(run_dir: &Path, found: &[Resource]) -> HashSet<String> {
    let ids: HashSet<&str> = found
        .iter()
        .map(|resource| resource.sandbox_id.as_str())
        .collect();
    let mut alive = HashSet::new();
    for id in ids {
        if !id.is_empty() && client::monitor(run_dir, id).await.is_ok() {
            alive.insert(id.to_owned());
        }
    }
    alive
}

async fn scan(places: Places) -> anyhow::Result<Vec<Resource>> {
    Ok(tokio::task::spawn_blocking(move || inventory::scan(&places)).await??)
}

fn leaks_of(
    mut before: Vec<Resource>,
    after: &[Resource],
    owners: &HashSet<String>,
) -> Vec<Resource> {
    before.retain(|found| !owners.contains(&found.sandbox_id) && after.contains(found));
    before
}

fn json(leaks: &[Resource]) -> serde_json::Value {
    leaks
        .iter()
        .map(|leak| {
            json!({
                "sandbox_id": leak.sandbox_id,
                "path": leak.path,
                "what": leak.to_string(),
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use nix::sys::stat::{Mode, SFlag, mknod};
    use podvisor_node::inventory::Kind;

    use super::*;

    fn resource(sandbox_id: &str) -> Resource {
        Resource {
            kind: Kind::Netns,
            sandbox_id: sandbox_id.into(),
            path: format!("/run/podvisor/netns/{sandbox_id}").into(),
        }
    }

    #[test]
    fn what_has_an_owner_or_goes_away_is_no_leak() {
        let owners = HashSet::from(["a".to_owned()]);
        let before = vec![resource("a"), resource("b"), resource("c"), resource("")];
        // "c" was being removed, "d" came since.
        let after = ["a", "b", "d", ""].map(resource);
        let leaks = leaks_of(before, &after, &owners);
        assert_eq!(leaks, [resource("b"), resource("")]);
        assert_eq!(json(&leaks)[0]["sandbox_id"], "b");
    }

    #[tokio::test]
    async fn without_a_daemon_a_listening_monitor_owns_its_sandbox() {
        let dir = tempfile::tempdir().unwrap();
        let sandbox = dir.path().join("sandboxes/a");
        std::fs::create_dir_all(&sandbox).unwrap();
        let _listener = tokio::net::UnixListener::bind(sandbox.join("monitor.sock")).unwrap();
        // Of a monitor that died. Closing a listener would not do: whatever another test forks
        // meanwhile holds a copy of it until it executes.
        let dead = dir.path().join("sandboxes/b");
        std::fs::create_dir_all(&dead).unwrap();
        mknod(
            &dead.join("monitor.sock"),
            SFlag::S_IFSOCK,
            Mode::S_IRWXU,
            0,
        )
        .unwrap();
        let found = [resource("a"), resource("b"), resource("c"), resource("")];
        assert_eq!(
            with_monitor(dir.path(), &found).await,
            HashSet::from(["a".to_owned()])
        );
    }
}
