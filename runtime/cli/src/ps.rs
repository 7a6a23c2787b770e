//! `podvisor ps`: pods and their containers.

use podvisor_proto::cri;
use serde::Serialize;

use crate::client::{self, ClientError, Daemon};
use crate::text::{self, Table};
use crate::{Context, Output, pods};

/// A pod, as `ps` reports it.
#[derive(Debug, Serialize)]
struct Pod {
    id: String,
    namespace: String,
    name: String,
    state: &'static str,
    /// Nanoseconds since the epoch.
    created_at: i64,
    ips: Vec<String>,
    handler: String,
    containers: Vec<Container>,
}

/// A container, as `ps` reports it.
#[derive(Debug, Serialize)]
struct Container {
    id: String,
    name: String,
    attempt: u32,
    state: &'static str,
    created_at: i64,
    image: String,
}

/// Lists everything podvisord knows, newest first.
pub async fn ps(context: &Context) -> anyhow::Result<()> {
    let mut daemon = Daemon::connect(&context.socket).await?;
    let pods = collect(&mut daemon).await?;
    match context.output {
        Output::Text => print!("{}", render(&pods)),
        Output::Json => println!("{}", serde_json::to_string_pretty(&pods)?),
    }
    Ok(())
}

async fn collect(daemon: &mut Daemon) -> Result<Vec<Pod>, ClientError> {
    let sandboxes = pods::list(daemon).await?;
    let mut containers = daemon
        .runtime
        .list_containers(client::within(
            client::CALL,
            cri::ListContainersRequest { filter: None },
        ))
        .await
        .map_err(client::failed("ListContainers"))?
        .into_inner()
        .items;
    containers.sort_by_key(|container| container.created_at);

    let mut pods = Vec::with_capacity(sandboxes.len());
    for sandbox in sandboxes {
        let ips = match addresses(daemon, &sandbox.id).await {
            // Removed since it was listed.
            Err(error) if error.is_not_found() => continue,
            result => result?,
        };
        let own = containers
            .iter()
            .filter(|container| container.pod_sandbox_id == sandbox.id);
        let own = own.map(container).collect();
        pods.push(pod(sandbox, ips, own));
    }
    pods.sort_by_key(|pod| std::cmp::Reverse(pod.created_at));
    Ok(pods)
}

async fn addresses(daemon: &mut Daemon, id: &str) -> Result<Vec<String>, ClientError> {
    let request = cri::PodSandboxStatusRequest {
        pod_sandbox_id: id.to_owned(),
        verbose: false,
    };
    let network = daemon
        .runtime
        .pod_sandbox_status(client::within(client::CALL, request))
        .await
        .map_err(client::failed("PodSandboxStatus"))?
        .into_inner()
        .status
        .and_then(|status| status.network)
        .unwrap_or_default();
    let additional = network.additional_ips.into_iter().map(|ip| ip.ip);
    Ok(std::iter::once(network.ip)
        .chain(additional)
        .filter(|ip| !ip.is_empty())
        .collect())
}

fn pod(sandbox: cri::PodSandbox, ips: Vec<String>, containers: Vec<Container>) -> Pod {
    let state = match sandbox.state() {
        cri::PodSandboxState::SandboxReady => "ready",
        cri::PodSandboxState::SandboxNotready => "not ready",
    };
    let metadata = sandbox.metadata.unwrap_or_default();
    Pod {
        id: sandbox.id,
        namespace: metadata.namespace,
        name: metadata.name,
        state,
        created_at: sandbox.created_at,
        ips,
        handler: sandbox.runtime_handler,
        containers,
    }
}

fn container(container: &cri::Container) -> Container {
    let state = match container.state() {
        cri::ContainerState::ContainerCreated => "created",
        cri::ContainerState::ContainerRunning => "running",
        cri::ContainerState::ContainerExited => "exited",
        cri::ContainerState::ContainerUnknown => "unknown",
    };
    let metadata = container.metadata.clone().unwrap_or_default();
    let image = container.image.clone().unwrap_or_default();
    Container {
        id: container.id.clone(),
        name: metadata.name,
        attempt: metadata.attempt,
        state,
        created_at: container.created_at,
        // What the user asked for says more than the id it became.
        image: if image.user_specified_image.is_empty() {
            image.image
        } else {
            image.user_specified_image
        },
    }
}

fn render(pods: &[Pod]) -> String {
    let mut table = Table::new(&["ID", "NAME", "STATE", "AGE", "IP / IMAGE"]);
    for pod in pods {
        table.row([
            text::short_id(&pod.id).to_owned(),
            format!("{}/{}", pod.namespace, pod.name),
            pod.state.to_owned(),
            text::age(pod.created_at),
            pod.ips.join(", "),
        ]);
        for container in &pod.containers {
            table.row([
                format!("  {}", text::short_id(&container.id)),
                format!("  {}", container.name),
                container.state.to_owned(),
                text::age(container.created_at),
                container.image.clone(),
            ]);
        }
    }
    table.render()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn containers_stand_under_their_pod() {
        let sandbox = cri::PodSandbox {
            id: "a".repeat(64),
            metadata: Some(cri::PodSandboxMetadata {
                name: "web".into(),
                namespace: "default".into(),
                ..Default::default()
            }),
            state: cri::PodSandboxState::SandboxNotready.into(),
            ..Default::default()
        };
        let inner = container(&cri::Container {
            id: "b".repeat(64),
            metadata: Some(cri::ContainerMetadata {
                name: "nginx".into(),
                attempt: 1,
            }),
            image: Some(cri::ImageSpec {
                image: "sha256:1".into(),
                user_specified_image: "nginx:1".into(),
                ..Default::default()
            }),
            state: cri::ContainerState::ContainerRunning.into(),
            ..Default::default()
        });
        let text = render(&[pod(sandbox, vec!["10.0.0.2".into()], vec![inner])]);
        let lines: Vec<&str> = text.lines().collect();
        assert!(lines[1].starts_with("aaaaaaaaaaaaa  ") && lines[1].contains("default/web"));
        assert!(lines[1].contains("not ready") && lines[1].ends_with("10.0.0.2"));
        assert!(lines[2].starts_with("  bbbbbbbbbbbbb ") && lines[2].contains("  nginx"));
        assert!(lines[2].contains("running") && lines[2].ends_with("nginx:1"));
    }
}
