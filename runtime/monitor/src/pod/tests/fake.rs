//! An agent that only pretends.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use podvisor_proto::agent::agent_server::Agent as AgentService;
use podvisor_proto::agent::{self as api, Stdio, event};
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;
use tokio::sync::watch;
use tonic::codegen::BoxStream;
use tonic::{Request, Response, Status};

/// What the fake agent does is decided by the first word of a process's arguments, or of a
/// container's spec: "true", "sleep", "hold" (ends, but its streams stay open), "missing", "lost"
/// (no answer), "early" (ends before the answer to its start).
#[derive(Default)]
pub struct FakeGuest {
    pub streams: Mutex<HashMap<Vec<u8>, UnixStream>>,
    pub arrived: watch::Sender<()>,
    events: watch::Sender<Vec<event::Kind>>,
    specs: Mutex<HashMap<String, String>>,
    pub signals: Mutex<Vec<api::SignalRequest>>,
    created: Mutex<Vec<api::CreateContainerRequest>>,
    held: Mutex<Vec<UnixStream>>,
}

impl FakeGuest {
    async fn stream(&self, token: &[u8]) -> Option<UnixStream> {
        if token.is_empty() {
            return None;
        }
        let mut arrived = self.arrived.subscribe();
        loop {
            if let Some(stream) = self.streams.lock().expect("streams").remove(token) {
                return Some(stream);
            }
            arrived.changed().await.expect("the guest lives");
        }
    }

    pub fn push(&self, kind: event::Kind) {
        self.events.send_modify(|events| events.push(kind));
    }

    pub fn exit(&self, container_id: &str, exec_id: &str, code: u32) {
        self.push(event::Kind::Exit(api::Exit {
            container_id: container_id.to_owned(),
            exec_id: exec_id.to_owned(),
            code,
            time_ns: 0,
        }));
    }

    async fn run(
        self: &Arc<Self>,
        container_id: &str,
        exec_id: &str,
        program: &str,
        stdio: Stdio,
    ) -> Result<(), Status> {
        let stdout = self.stream(&stdio.stdout).await;
        let stderr = self.stream(&stdio.stderr).await;
        let stdin = self.stream(&stdio.stdin).await;
        self.held.lock().expect("held").extend(stdin);
        let mut stdout = stdout.expect("every process has standard output");
        match program {
            "missing" => return Err(Status::internal("no such file: missing")),
            "lost" => std::future::pending().await,
            "early" => {
                self.exit(container_id, exec_id, 3);
                // The event goes first.
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            "true" => {
                stdout.write_all(b"out\n").await?;
                if let Some(mut stderr) = stderr {
                    stderr.write_all(b"err\n").await?;
                }
                self.exit(container_id, exec_id, 0);
            }
            "hold" => {
                stdout.write_all(b"held\n").await?;
                self.held.lock().expect("held").push(stdout);
                self.exit(container_id, exec_id, 0);
            }
            _ => {
                let mut held = self.held.lock().expect("held");
                held.push(stdout);
                held.extend(stderr);
            }
        }
        Ok(())
    }
}

#[derive(Clone)]
pub struct FakeAgent(pub Arc<FakeGuest>);

#[tonic::async_trait]
impl AgentService for FakeAgent {
    async fn hello(
        &self,
        _request: Request<api::HelloRequest>,
    ) -> Result<Response<api::HelloResponse>, Status> {
        Ok(Response::new(api::HelloResponse {
            version: 1,
            agent_version: "fake".to_owned(),
            // Lies: longer ago than the VM's start.
            ready_ns: u64::MAX,
            init_started_ns: u64::MAX,
            ..api::HelloResponse::default()
        }))
    }

    async fn configure_sandbox(
        &self,
        request: Request<api::ConfigureSandboxRequest>,
    ) -> Result<Response<api::ConfigureSandboxResponse>, Status> {
        let request = request.into_inner();
        assert_eq!(request.scratch.map(|s| s.length), Some(4096));
        assert!(request.time_ns > 0);
        Ok(Response::new(api::ConfigureSandboxResponse {}))
    }

    async fn create_container(
        &self,
        request: Request<api::CreateContainerRequest>,
    ) -> Result<Response<api::CreateContainerResponse>, Status> {
        let request = request.into_inner();
        let spec = String::from_utf8(request.spec.clone()).expect("a word");
        if spec == "no user" {
            return Err(Status::invalid_argument("unknown user"));
        }
        if spec == "huge" {
            // More than the monitor takes as one answer.
            let user = api::ResolvedUser {
                supplemental_groups: vec![u32::MAX; 1 << 20],
                ..api::ResolvedUser::default()
            };
            let user = Some(user);
            return Ok(Response::new(api::CreateContainerResponse { user }));
        }
        if spec == "chatty" {
            return Err(Status::internal("\x1b[31m".repeat(1000)));
        }
        let mut specs = self.0.specs.lock().expect("specs");
        specs.insert(request.id.clone(), spec);
        self.0.created.lock().expect("created").push(request);
        Ok(Response::new(api::CreateContainerResponse::default()))
    }

    async fn start_container(
        &self,
        request: Request<api::StartContainerRequest>,
    ) -> Result<Response<api::StartContainerResponse>, Status> {
        let api::StartContainerRequest { id, stdio } = request.into_inner();
        let program = self.0.specs.lock().expect("specs")[&id].clone();
        self.0
            .run(&id, "", &program, stdio.unwrap_or_default())
            .await?;
        Ok(Response::new(api::StartContainerResponse { pid: 42 }))
    }

    async fn remove_container(
        &self,
        request: Request<api::RemoveContainerRequest>,
    ) -> Result<Response<api::RemoveContainerResponse>, Status> {
        let id = request.into_inner().id;
        let mut created = self.0.created.lock().expect("created");
        let released = created
            .iter()
            .filter(|request| request.id == id)
            .flat_map(|request| request.layers.clone())
            .collect();
        created.retain(|request| request.id != id);
        Ok(Response::new(api::RemoveContainerResponse { released }))
    }

    async fn exec(
        &self,
        request: Request<api::ExecRequest>,
    ) -> Result<Response<api::ExecResponse>, Status> {
        let request = request.into_inner();
        let stdio = request.stdio.unwrap_or_default();
        self.0
            .run(
                &request.container_id,
                &request.exec_id,
                &request.args[0],
                stdio,
            )
            .await?;
        Ok(Response::new(api::ExecResponse { pid: 43 }))
    }

    async fn signal(
        &self,
        request: Request<api::SignalRequest>,
    ) -> Result<Response<api::SignalResponse>, Status> {
        let request = request.into_inner();
        if request.signal == 9 {
            // Streams end with their process.
            self.0.held.lock().expect("held").clear();
            self.0.exit(&request.container_id, &request.exec_id, 137);
        }
        self.0.signals.lock().expect("signals").push(request);
        Ok(Response::new(api::SignalResponse {}))
    }

    async fn events(
        &self,
        request: Request<api::EventsRequest>,
    ) -> Result<Response<BoxStream<api::Event>>, Status> {
        let after = request.into_inner().after as usize;
        let start = (self.0.events.subscribe(), after);
        let events = futures_util::stream::unfold(start, |(mut events, next)| async move {
            let all = events.wait_for(|all| all.len() > next).await.ok()?;
            let event = api::Event {
                sequence: next as u64 + 1,
                kind: Some(all[next].clone()),
            };
            drop(all);
            Some((Ok(event), (events, next + 1)))
        });
        Ok(Response::new(Box::pin(events)))
    }
}
