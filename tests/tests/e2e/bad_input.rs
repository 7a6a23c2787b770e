//! Bad input: an error with the right code, and nothing left behind.

use std::process::Command;
use std::time::Duration;

use podvisor_proto::cri::{self, ContainerState};
use podvisor_tests::cri::sandbox_config;
use podvisor_tests::crictl::{container, shell, with_pod};
use podvisor_tests::daemon::Daemon;
use podvisor_tests::machine::Backend;
use podvisor_tests::registry::busybox;
use podvisor_tests::{eventually, finished};
use serde_json::json;
use tonic::{Code, Status};

fn assert_code<T: std::fmt::Debug>(result: Result<T, Status>, code: Code) -> String {
    let error = result.expect_err("bad input");
    assert_eq!(error.code(), code, "{error}");
    assert!(!error.message().is_empty());
    error.message().to_owned()
}

#[test]
fn unknown_ids() {
    let daemon = Daemon::start();
    let cri = daemon.cri();
    for id in [&"0".repeat(64), "0123", "no-such-id", "../../etc", "ü"] {
        let pod_sandbox_id = id.to_owned();
        let container_id = id.to_owned();
        // What asks for something that must be there.
        let request = cri::PodSandboxStatusRequest {
            pod_sandbox_id: pod_sandbox_id.clone(),
            verbose: true,
        };
        assert_code(
            cri.call(async |mut c| c.pod_sandbox_status(request).await),
            Code::NotFound,
        );
        assert_code(cri.try_status(id), Code::NotFound);
        assert_code(cri.start_container(id), Code::NotFound);
        assert_code(cri.exec(id, &["true"], Duration::ZERO), Code::NotFound);
        let request = cri::ReopenContainerLogRequest {
            container_id: container_id.clone(),
        };
        assert_code(
            cri.call(async |mut c| c.reopen_container_log(request).await),
            Code::NotFound,
        );
        let request = cri::CreateContainerRequest {
            pod_sandbox_id: pod_sandbox_id.clone(),
            config: Some(cri::ContainerConfig {
                metadata: Some(cri::ContainerMetadata {
                    name: "c".into(),
                    attempt: 0,
                }),
                image: Some(podvisor_tests::cri::image_spec(&busybox())),
                ..Default::default()
            }),
            sandbox_config: Some(cri::PodSandboxConfig::default()),
        };
        assert_code(
            cri.call(async |mut c| c.create_container(request).await),
            Code::NotFound,
        );

        // What takes away succeeds when there is nothing.
        cri.remove_pod(id);
        let request = cri::StopContainerRequest {
            container_id: container_id.clone(),
            timeout: 1,
        };
        cri.call(async |mut c| c.stop_container(request).await)
            .expect("StopContainer");
        let request = cri::RemoveContainerRequest {
            container_id: container_id.clone(),
        };
        cri.call(async |mut c| c.remove_container(request).await)
            .expect("RemoveContainer");
        let request = cri::RemoveImageRequest {
            image: Some(podvisor_tests::cri::image_spec("no-such-image:latest")),
        };
        cri.call_image(async |mut c| c.remove_image(request).await)
            .expect("RemoveImage");

        // A status of no image is no error.
        let request = cri::ImageStatusRequest {
            image: Some(podvisor_tests::cri::image_spec("no-such-image")),
            verbose: false,
        };
        let answer = cri.call_image(async |mut c| c.image_status(request).await);
        assert_eq!(answer.expect("ImageStatus").image, None);

        // A filter that nothing matches.
        let filter = cri::ContainerFilter {
            id: container_id,
            ..Default::default()
        };
        let request = cri::ListContainersRequest {
            filter: Some(filter),
        };
        let answer = cri.call(async |mut c| c.list_containers(request).await);
        assert_eq!(answer.expect("ListContainers").items, vec![]);
    }
    daemon.assert_nothing_left();
}

#[test]
fn ambiguous_ids() {
    let (daemon, pod, id) = with_pod("ambiguous");
    let cri = daemon.cri();
    // Of 17 ids, two begin with the same of 16 digits.
    let mut ids: Vec<String> = (0..17)
        .map(|n| {
            daemon.create(
                &id,
                &pod,
                &container(&format!("c{n}"), &busybox(), &["true"]),
            )
        })
        .collect();
    ids.sort();
    let twin = ids.windows(2).find(|pair| pair[0][..1] == pair[1][..1]);
    let prefix = &twin.expect("a pair")[0][..1];
    let message = assert_code(cri.try_status(prefix), Code::InvalidArgument);
    assert!(
        message.contains("ambiguous") || message.contains("more than one"),
        "{message}"
    );
    // Nothing is stopped or removed by a name that fits two.
    let request = cri::RemoveContainerRequest {
        container_id: prefix.into(),
    };
    assert_code(
        cri.call(async |mut c| c.remove_container(request).await),
        Code::InvalidArgument,
    );
    let request = cri::StopContainerRequest {
        container_id: prefix.into(),
        timeout: 0,
    };
    assert_code(
        cri.call(async |mut c| c.stop_container(request).await),
        Code::InvalidArgument,
    );
    assert_eq!(cri.containers().len(), 17);
    assert_eq!(
        cri.status(&ids[0][..40]).id,
        ids[0],
        "a prefix of one is its name"
    );
    assert_eq!(daemon.leaks(), "");
}

#[test]
fn names_that_are_taken() {
    let (daemon, pod, id) = with_pod("twice");
    let message = daemon.try_run_pod(&pod).failed("AlreadyExists");
    assert!(message.contains(&id), "who has it: {message}");
    let config = container("c", &busybox(), &["true"]);
    let first = daemon.create(&id, &pod, &config);
    let message = daemon
        .try_create(&id, &pod, &config)
        .failed("AlreadyExists");
    assert!(message.contains(&first), "who has it: {message}");
    assert_eq!(daemon.leaks(), "");

    // Names come back with what had them.
    daemon.cri().remove_container(&first);
    daemon.create(&id, &pod, &config);
    daemon.cri().remove_pod(&id);
    daemon.assert_nothing_left();
    daemon.run_pod(&pod);
}

#[test]
fn the_same_name_at_the_same_time() {
    let daemon = Daemon::start();
    let cri = daemon.cri();
    let request = cri::RunPodSandboxRequest {
        config: Some(sandbox_config("race")),
        runtime_handler: String::new(),
    };
    let results = std::thread::scope(|scope| {
        let calls: Vec<_> = (0..4)
            .map(|_| {
                let (cri, request) = (&cri, request.clone());
                scope.spawn(move || cri.call(async |mut c| c.run_pod_sandbox(request).await))
            })
            .collect();
        calls
            .into_iter()
            .map(|call| call.join().expect("no panic"))
            .collect::<Vec<_>>()
    });
    let (won, lost): (Vec<_>, Vec<_>) = results.into_iter().partition(Result::is_ok);
    assert_eq!(won.len(), 1, "{lost:?}");
    for result in lost {
        assert_code(result, Code::AlreadyExists);
    }
    assert_eq!(cri.pods().len(), 1);
    assert_eq!(daemon.leaks(), "");
}

#[test]
fn what_is_missing() {
    let (daemon, _, id) = with_pod("missing");
    let cri = daemon.cri();
    let run = |config: Option<cri::PodSandboxConfig>, handler: &str| {
        let request = cri::RunPodSandboxRequest {
            config,
            runtime_handler: handler.into(),
        };
        cri.call(async |mut c| c.run_pod_sandbox(request).await)
    };
    assert_code(run(None, ""), Code::InvalidArgument);
    assert_code(
        run(Some(cri::PodSandboxConfig::default()), ""),
        Code::InvalidArgument,
    );
    assert_code(run(Some(sandbox_config("")), ""), Code::InvalidArgument);
    let message = assert_code(
        run(Some(sandbox_config("x")), "no-such-handler"),
        Code::InvalidArgument,
    );
    assert!(message.contains("no-such-handler"), "{message}");

    let create = |config: Option<cri::ContainerConfig>| {
        let request = cri::CreateContainerRequest {
            pod_sandbox_id: id.clone(),
            config,
            sandbox_config: Some(sandbox_config("missing")),
        };
        cri.call(async |mut c| c.create_container(request).await)
    };
    let whole = cri::ContainerConfig {
        metadata: Some(cri::ContainerMetadata {
            name: "c".into(),
            attempt: 0,
        }),
        image: Some(podvisor_tests::cri::image_spec(&busybox())),
        ..Default::default()
    };
    assert_code(create(None), Code::InvalidArgument);
    assert_code(
        create(Some(cri::ContainerConfig {
            metadata: None,
            ..whole.clone()
        })),
        Code::InvalidArgument,
    );
    let nameless = Some(cri::ContainerMetadata::default());
    assert_code(
        create(Some(cri::ContainerConfig {
            metadata: nameless,
            ..whole.clone()
        })),
        Code::InvalidArgument,
    );
    assert_code(
        create(Some(cri::ContainerConfig {
            image: None,
            ..whole.clone()
        })),
        Code::InvalidArgument,
    );
    let absent = Some(podvisor_tests::cri::image_spec("no-such-image:latest"));
    let message = assert_code(
        create(Some(cri::ContainerConfig {
            image: absent,
            ..whole.clone()
        })),
        Code::NotFound,
    );
    assert!(message.contains("no-such-image"), "{message}");
    // Ids that are empty name nothing, and not everything.
    assert_code(cri.try_status(""), Code::InvalidArgument);
    assert_code(cri.start_container(""), Code::InvalidArgument);
    assert_code(cri.stop_pod(""), Code::InvalidArgument);
    assert_eq!(cri.containers(), vec![]);
    assert_eq!(cri.pods().len(), 1);
    assert_eq!(daemon.leaks(), "");
}

#[test]
fn what_is_in_the_wrong_state() {
    let (daemon, pod, id) = with_pod("states");
    let cri = daemon.cri();
    let created = daemon.create(&id, &pod, &shell("c", &busybox(), "sleep 1000"));
    assert_code(
        cri.exec(&created, &["true"], Duration::ZERO),
        Code::FailedPrecondition,
    );
    cri.start_container(&created).expect("created");
    assert_code(cri.start_container(&created), Code::FailedPrecondition);
    daemon.crictl(&["stop", &created]).ok();
    assert_code(cri.start_container(&created), Code::FailedPrecondition);
    assert_code(
        cri.exec(&created, &["true"], Duration::ZERO),
        Code::FailedPrecondition,
    );

    let waiting = daemon.create(&id, &pod, &shell("w", &busybox(), "true"));
    daemon.cri().stop_pod(&id).expect("StopPodSandbox");
    let ran = daemon.try_create(&id, &pod, &shell("d", &busybox(), "true"));
    ran.failed("FailedPrecondition");
    assert_code(cri.start_container(&waiting), Code::FailedPrecondition);
    assert_eq!(cri.containers().len(), 2);
    assert_eq!(daemon.leaks(), "");
}

#[test]
fn commands_that_cannot_be_executed() {
    let (daemon, pod, id) = with_pod("commands");
    let cri = daemon.cri();
    for (name, command, reason) in [
        ("missing", "/no/such/command", "no such file"),
        ("in-path", "no-such-command", "no-such-command"),
        ("directory", "/etc", "/etc"),
        ("data", "/etc/passwd", "permission denied"),
    ] {
        let config = container(name, &busybox(), &[command, "argument"]);
        let container = daemon.create(&id, &pod, &config);
        let error = cri
            .start_container(&container)
            .expect_err("cannot be executed");
        let message = error.message().to_lowercase();
        assert!(message.contains(reason), "{name}: {error}");
        let status = cri.status(&container);
        assert_eq!(
            status.state(),
            ContainerState::ContainerExited,
            "{status:?}"
        );
        assert_eq!(
            (status.exit_code, status.reason.as_str()),
            (128, "StartError")
        );
        assert!(status.message.to_lowercase().contains(reason), "{status:?}");
        assert!(status.finished_at >= status.created_at, "{status:?}");
        daemon.cri().remove_container(&container);
    }
    // The pod is as good as before.
    let fine = daemon.create_started(&id, &pod, &shell("fine", &busybox(), "exit 0"));
    assert_eq!(cri.wait_exit(&fine).exit_code, 0);
    assert_eq!(daemon.leaks(), "");
}

#[test]
fn users_that_do_not_exist() {
    let (daemon, pod, id) = with_pod("users");
    let with = |context: serde_json::Value| {
        let mut config = container("c", &busybox(), &["true"]);
        config["linux"] = json!({"security_context": context});
        daemon.try_create(&id, &pod, &config)
    };
    let ran = with(json!({"run_as_username": "no-such-user"}));
    assert_ne!(ran.code, 0);
    assert!(ran.stderr.contains("no-such-user"), "{}", ran.stderr);
    with(json!({"run_as_group": {"value": 5}})).failed("InvalidArgument");
    with(json!({"run_as_user": {"value": 1}, "run_as_username": "user"})).failed("InvalidArgument");
    with(json!({"capabilities": {"add_capabilities": ["NO_SUCH"]}})).failed("InvalidArgument");
    // What only a privileged pod may have.
    with(json!({"privileged": true})).failed("InvalidArgument");
    assert_eq!(daemon.cri().containers(), vec![]);
    assert_eq!(daemon.leaks(), "");
}

#[test]
fn a_client_that_goes_away_while_a_pod_starts() {
    let daemon = Daemon::start();
    let cri = daemon.cri();
    let sandboxes = daemon.instance.run_dir().join("sandboxes");
    let netns = daemon.instance.run_dir().join("netns");
    let begun = || std::fs::read_dir(&sandboxes).is_ok_and(|mut dir| dir.next().is_some());
    let named = || std::fs::read_dir(&netns).is_ok_and(|mut dir| dir.next().is_some());
    let boots = || {
        daemon
            .instance
            .processes()
            .iter()
            .any(|(_, command)| command.contains(Backend::here().vm_process()))
    };
    let moments: [(&str, &dyn Fn() -> bool); 3] = [
        ("a folder", &begun),
        ("a network", &named),
        ("a VM", &boots),
    ];
    for (what, moment) in moments {
        let request = cri::RunPodSandboxRequest {
            config: Some(sandbox_config("gone")),
            runtime_handler: String::new(),
        };
        cri.cancelled(
            move |mut c| async move { c.run_pod_sandbox(request).await },
            || eventually(what, || moment().then_some(())),
        );
        // No call tells when it is undone.
        eventually("the pod is undone", || {
            daemon.pod_resources().is_empty().then_some(())
        });
        assert_eq!(cri.pods(), vec![]);
        daemon.assert_nothing_left();
    }
    // Its name is free.
    daemon.run_pod(&daemon.pod("gone"));
}

#[test]
fn a_client_that_goes_away_during_an_exec() {
    let (daemon, pod, id) = with_pod("exec-gone");
    let container = daemon.create_started(&id, &pod, &shell("c", &busybox(), "sleep 1000"));
    let cri = daemon.cri();
    let request = cri::ExecSyncRequest {
        container_id: container.clone(),
        cmd: ["sh", "-c", "touch /began; sleep 400"]
            .map(String::from)
            .to_vec(),
        timeout: 0,
    };
    let began = || daemon.exec(&container, &["ls", "/"]).contains("began");
    cri.cancelled(
        move |mut c| async move { c.exec_sync(request).await },
        || eventually("the command runs", || began().then_some(())),
    );
    let left = || {
        daemon.exec(
            &container,
            &["sh", "-c", "ps | grep '[s]leep 400' || echo none"],
        )
    };
    eventually("the command is ended", || (left() == "none").then_some(()));
}

#[test]
fn a_second_daemon_on_the_same_state() {
    let daemon = Daemon::start();
    let id = daemon.run_pod(&daemon.pod("first"));
    let second = finished(&mut daemon.command());
    let said = String::from_utf8_lossy(&second.stderr).to_lowercase();
    assert!(!second.status.success(), "{said}");
    assert!(
        said.contains("already") || said.contains("another") || said.contains("lock"),
        "{said}"
    );
    // The first has noticed nothing.
    assert_eq!(daemon.inspect_pod(&id)["state"], "SANDBOX_READY");
    assert_eq!(daemon.leaks(), "");
}

#[test]
fn configurations_that_cannot_work() {
    let daemon = Daemon::start();
    let dir = daemon.instance.dir();
    let refuse = |text: &str, word: &str| {
        let file = dir.join("bad.toml");
        std::fs::write(&file, text).expect("ours");
        let output = finished(
            Command::new(Daemon::binary("podvisord"))
                .arg("--config")
                .arg(&file)
                .arg("--run-dir")
                .arg(dir.join("other-run"))
                .arg("--data-dir")
                .arg(dir.join("other-data")),
        );
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success(), "{said}");
        assert!(said.contains(word), "{said}");
    };
    refuse("run_dri = \"/run/x\"\n", "run_dri");
    refuse("[vm]\nvcpus = 0\n", "vm.vcpus");
    refuse("[vm]\nvcpus = \"two\"\n", "vcpus");
    refuse("[vm\n", "bad.toml");
    assert!(!dir.join("other-data").exists());
}
