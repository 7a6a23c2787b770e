//! The agent as PID 1 of a VM: what only the guest's kernel has.

mod support;

use podvisor_proto::agent::event::Kind;
use podvisor_proto::agent::{ConfigureNetworkRequest, HelloRequest, Interface, ShutdownRequest};
use serde_json::json;
use support::{spec, vm};
use tonic::Code;

#[tokio::test]
async fn a_pod_lives_and_ends() {
    let Some(mut vm) = vm::boot().await else {
        return;
    };
    let guest = &mut vm.guest;
    let hello = guest
        .client
        .hello(HelloRequest { version: 1 })
        .await
        .unwrap()
        .into_inner();
    assert!(hello.ready_ns > hello.init_started_ns && hello.init_started_ns > 0);
    assert!(hello.memory_available_bytes > 0);

    // The clock is the host's, and a container is what its spec says here too.
    let script = "date +%s; cat /proc/self/cgroup; ls /dev/fd/ > /dev/null && echo fd; cat /proc/1/comm; true";
    let (out, err, code) = guest.run("c1", &spec(&["sh", "-c", script]), "").await;
    let lines: Vec<&str> = out.lines().collect();
    let seconds: u64 = lines[0].parse().unwrap();
    let now = std::time::UNIX_EPOCH.elapsed().unwrap().as_secs();
    assert!(now.abs_diff(seconds) < 60, "{seconds} is not {now}");
    assert_eq!(lines[1..], ["0::/", "fd", "sh"], "{err}");
    assert_eq!(code, 0);

    guest
        .create("c2", &spec(&["sleep", "1000"]), "")
        .await
        .unwrap();
    guest.start_quietly("c2").await.unwrap();
    let (out, _, code) = guest
        .exec("c2", "e1", &["sh", "-c", "echo hi; exit 5"])
        .await
        .unwrap();
    assert_eq!((out.as_str(), code), ("hi\n", 5));
    assert_eq!(guest.remove("c2").await, []);
    assert_eq!(guest.remove("c1").await, [guest.layer]);

    let request = ConfigureNetworkRequest {
        interfaces: vec![Interface {
            name: "eth0".to_owned(),
            ..Interface::default()
        }],
        routes: Vec::new(),
    };
    let missing = guest.client.configure_network(request).await.unwrap_err();
    assert_eq!(missing.code(), Code::NotFound);

    guest
        .create("c3", &spec(&["sleep", "1000"]), "")
        .await
        .unwrap();
    guest.start_quietly("c3").await.unwrap();
    guest.client.shutdown(ShutdownRequest {}).await.unwrap();
    let ended = guest.exec("c3", "e2", &["true"]).await;
    assert!(ended.is_err(), "nothing runs after the answer");
    assert!(
        !vm.console.text().contains("panic"),
        "{}",
        vm.console.text()
    );
}

#[tokio::test]
async fn a_kill_for_want_of_memory_is_told_before_the_exit() {
    let Some(mut vm) = vm::boot().await else {
        return;
    };
    let guest = &mut vm.guest;
    let mut hog = spec(&["dd", "if=/dev/zero", "of=/dev/null", "bs=40M", "count=1"]);
    hog["linux"]["resources"] = json!({ "memory": { "limit": 16 << 20 } });
    guest.create("c1", &hog, "").await.unwrap();
    guest.start_quietly("c1").await.unwrap();
    assert_eq!(guest.exit_code("c1", "").await, 137);
    let oom = guest
        .event(|event| matches!(event.kind, Some(Kind::OutOfMemory(_))))
        .await;
    let exit = guest
        .event(|event| matches!(event.kind, Some(Kind::Exit(_))))
        .await;
    assert!(oom.sequence < exit.sequence);
    assert_eq!(guest.remove("c1").await, [guest.layer]);
}

#[tokio::test]
async fn limits_are_the_cgroups() {
    let Some(mut vm) = vm::boot().await else {
        return;
    };
    let guest = &mut vm.guest;
    let script = "cd /sys/fs/cgroup; cat memory.max cpu.max cpu.weight pids.max";
    let mut limited = spec(&["sh", "-c", script]);
    limited["linux"]["resources"] = json!({
        "memory": { "limit": 32 << 20 },
        "cpu": { "shares": 1024, "quota": 20000, "period": 100_000 },
        "pids": { "limit": 50 },
    });
    let (out, err, _) = guest.run("c1", &limited, "").await;
    assert_eq!(out, "33554432\n20000 100000\n100\n50\n", "{err}");
}

#[tokio::test]
async fn the_agent_dials_again_and_has_forgotten_nothing() {
    let Some(mut vm) = vm::boot().await else {
        return;
    };
    let guest = &mut vm.guest;
    guest.create("c1", &spec(&["false"]), "").await.unwrap();
    guest
        .create("c2", &spec(&["sleep", "1000"]), "")
        .await
        .unwrap();
    let pid = guest.start_quietly("c2").await.unwrap();
    vm.reconnect().await;
    let guest = &mut vm.guest;
    guest
        .client
        .hello(HelloRequest { version: 1 })
        .await
        .unwrap();
    assert_eq!(guest.start_quietly("c2").await.unwrap(), pid);
    guest.start_quietly("c1").await.unwrap();
    assert_eq!(guest.exit_code("c1", "").await, 1);
    vm.reconnect().await;
    assert_eq!(vm.guest.exit_code("c1", "").await, 1);
}
