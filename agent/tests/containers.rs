//! Containers of a real agent, on this machine.

mod support;

use podvisor_proto::agent::event::Kind;
use podvisor_proto::agent::{
    ConfigureNetworkRequest, CreateContainerRequest, ExecRequest, HelloRequest, Interface, Route,
    SignalRequest, StartContainerRequest, Stdio,
};
use serde_json::json;
use support::local::{self, SCRATCH};
use support::{PATIENCE, read, sandbox, spec};
use tokio::io::AsyncReadExt;
use tokio::time::timeout;
use tonic::Code;

#[tokio::test]
async fn a_container_runs_as_its_spec_says() {
    let mut guest = local::start().await;
    let hello = guest
        .client
        .hello(HelloRequest { version: 1 })
        .await
        .unwrap();
    assert!(hello.into_inner().memory_total_bytes > 0);
    let refused = guest.client.hello(HelloRequest { version: 2 }).await;
    assert_eq!(refused.unwrap_err().code(), Code::FailedPrecondition);

    let script = "echo $GREETING $HOME; pwd; hostname; id; cat /etc/hosts /etc/resolv.conf; ulimit -n; \
        grep -E 'CapEff|CapBnd|NoNewPrivs|Seccomp:' /proc/self/status; ps | wc -l; mkdir /x; \
        echo written > /tmp/file && cat /tmp/file; (echo 1 > /proc/sys/kernel/ctrl-alt-del) 2>&1; cat /proc/self/cgroup; \
        echo through > /dev/stderr; exit 7";
    let (out, err, code) = guest.run("c1", &spec(&["sh", "-c", script]), "").await;
    let expected = "hello /root\n/work/deep\npod-1\n\
        uid=0(root) gid=0 groups=0\n\
        192.0.2.2 pod-1\nnameserver 192.0.2.1\n99\n\
        CapEff:\t00000000000004e1\nCapBnd:\t00000000000004e1\n\
        NoNewPrivs:\t0\nSeccomp:\t2\n";
    assert!(out.starts_with(expected), "{out}\n{err}");
    let rest = &out[expected.len()..];
    assert!(rest.contains("written\n"), "{rest}");
    assert!(rest.contains("Read-only file system"), "{rest}");
    assert!(rest.ends_with("0::/\n"), "{rest}");
    assert!(
        err.contains("mkdir: can't create directory '/x': Operation not supported"),
        "{err}"
    );
    assert!(err.ends_with("through\n"), "{err}");
    assert_eq!(code, 7);
    // Nothing is in the writable layer but what the container wrote, and its working directory.
    let upper = "/run/podvisor/scratch/c1/upper";
    let written = guest.enter(&["find", upper, "-mindepth", "1", "-printf", "%P\n"]);
    let mut written: Vec<&str> = written.lines().collect();
    written.sort_unstable();
    assert_eq!(written, ["tmp", "tmp/file", "work", "work/deep"]);
    assert_eq!(guest.remove("c1").await, [guest.layer]);
}

#[tokio::test]
async fn a_container_sees_what_its_spec_lets_it_see() {
    let mut guest = local::start().await;
    let script = "ls -l /dev | grep -c '^c'; ls /dev/fd/0; cat /dev/zero | head -c 2 | wc -c; \
        echo gone > /dev/null; wc -c < /proc/version; ls /proc/irq | wc -l; ls /proc/bus | wc -l; \
        echo x > /etc/x; echo x > /proc/bus/x; stat -c '%a %t,%T %u' /dev/own/fuse; cat /data/file; \
        echo y > /data/file; grep -c ' /proc/irq tmpfs ro' /proc/mounts; ls -l /proc/self/fd/0";
    let mut narrow = spec(&["sh", "-c", script]);
    narrow["root"]["readonly"] = json!(true);
    narrow["linux"]["maskedPaths"] = json!([
        "/proc/version",
        "/proc/irq",
        "/proc/bus",
        "/proc/no-such-file"
    ]);
    narrow["linux"]["devices"] = json!([
        { "path": "/dev/own/fuse", "type": "c", "major": 10, "minor": 229, "fileMode": 0o640, "uid": 33 }
    ]);
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("file"), "from outside\n").unwrap();
    narrow["mounts"].as_array_mut().unwrap().push(json!(
        { "destination": "/tmp/../data", "type": "none", "source": directory.path(), "options": ["bind", "ro"] }
    ));
    let refused = guest.create("c0", &narrow, "").await;
    assert!(refused.is_ok());
    let error = guest.start_quietly("c0").await.unwrap_err();
    assert!(error.message().contains("mounting /tmp/../data"), "{error}");
    guest.remove("c0").await;

    let mounts = narrow["mounts"].as_array_mut().unwrap();
    mounts.last_mut().unwrap()["destination"] = json!("/data");
    let (out, err, _) = guest.run("c1", &narrow, "").await;
    // Six devices and a directory of its own, tty and ptmx among the links.
    assert_eq!(
        out.lines().collect::<Vec<_>>()[..9],
        [
            "6",
            "/dev/fd/0",
            "2",
            "0",
            "0",
            "0",
            "640 a,e5 33",
            "from outside",
            "1"
        ],
        "{out}\n{err}"
    );
    assert!(out.contains("/dev/null"), "{out}");
    for path in ["/etc/x", "/proc/bus/x", "/data/file"] {
        assert!(
            err.contains(&format!("can't create {path}: Read-only file system")),
            "{path}: {err}"
        );
    }
}

#[tokio::test]
async fn users_come_from_the_image_and_may_open_their_streams() {
    let mut guest = local::start().await;
    let script = "id; echo again > /dev/stdout; echo $HOME";
    let mut private = spec(&["sh", "-c", script]);
    private["process"]["noNewPrivileges"] = json!(true);
    let (out, err, code) = guest.run("c1", &private, "web").await;
    assert_eq!(
        (out.as_str(), err.as_str(), code),
        (
            "uid=33(web) gid=34(www) groups=34(www),500(extra)\nagain\n/srv\n",
            "",
            0
        )
    );
    assert_eq!(
        guest.create("c2", &spec(&["id"]), "web:500").await.unwrap(),
        [33, 500, 500]
    );
    let unknown = guest
        .create("c3", &spec(&["id"]), "nobody")
        .await
        .unwrap_err();
    assert_eq!(unknown.code(), Code::InvalidArgument);
    assert_eq!(
        unknown.message(),
        "unable to find user nobody: no matching entries in passwd file"
    );
    // It left nothing: the id is free.
    guest.create("c3", &spec(&["id"]), "").await.unwrap();
}

#[tokio::test]
async fn an_owners_program_runs_and_what_is_no_program_fails_with_words() {
    let mut guest = local::start().await;
    assert_eq!(guest.run("c0", &spec(&["own"]), "").await.0, "own\n");
    for (id, program, words) in [
        (
            "c1",
            "nothing",
            "exec: \"nothing\": executable file not found in $PATH",
        ),
        (
            "c2",
            "/no/such",
            "exec: \"/no/such\": stat /no/such: no such file or directory",
        ),
        (
            "c3",
            "/etc/plain",
            "exec: \"/etc/plain\": permission denied",
        ),
    ] {
        guest.create(id, &spec(&[program]), "").await.unwrap();
        let error = guest.start_quietly(id).await.unwrap_err();
        assert_eq!(
            (error.code(), error.message()),
            (Code::FailedPrecondition, words)
        );
        guest.remove(id).await;
    }
}

#[tokio::test]
async fn repeated_calls_get_the_same_answer() {
    let mut guest = local::start().await;
    guest
        .client
        .configure_sandbox(sandbox(SCRATCH))
        .await
        .unwrap();
    let mut other = sandbox(SCRATCH);
    other.hostname = "pod-2".to_owned();
    let refused = guest.client.configure_sandbox(other).await.unwrap_err();
    assert_eq!(refused.code(), Code::AlreadyExists);

    let sleeper = spec(&["sleep", "1000"]);
    guest.create("c1", &sleeper, "").await.unwrap();
    guest.create("c1", &sleeper, "").await.unwrap();
    let different = guest.create("c1", &spec(&["true"]), "").await.unwrap_err();
    assert_eq!(different.code(), Code::AlreadyExists);
    let pid = guest.start_quietly("c1").await.unwrap();
    assert_eq!(guest.start_quietly("c1").await.unwrap(), pid);

    let exec = ExecRequest {
        container_id: "c1".to_owned(),
        exec_id: "e1".to_owned(),
        args: vec!["false".to_owned()],
        ..ExecRequest::default()
    };
    let first = guest
        .client
        .exec(exec.clone())
        .await
        .unwrap()
        .into_inner()
        .pid;
    assert_eq!(guest.exit_code("c1", "e1").await, 1);
    let again = guest
        .client
        .exec(exec.clone())
        .await
        .unwrap()
        .into_inner()
        .pid;
    assert_eq!(first, again);
    let other = ExecRequest {
        cwd: "/".to_owned(),
        ..exec
    };
    assert_eq!(
        guest.client.exec(other).await.unwrap_err().code(),
        Code::AlreadyExists
    );

    assert_eq!(guest.remove("c1").await, [guest.layer]);
    assert_eq!(guest.remove("c1").await, []);
    assert_eq!(
        guest.start_quietly("c1").await.unwrap_err().code(),
        Code::NotFound
    );
}

#[tokio::test]
async fn an_exec_has_the_containers_limits() {
    let mut guest = local::start().await;
    guest
        .create("c1", &spec(&["sleep", "1000"]), "web")
        .await
        .unwrap();
    guest.start_quietly("c1").await.unwrap();
    let script = "id -u; id -G; pwd; ulimit -n; grep -E 'CapEff|CapBnd|Seccomp:' /proc/self/status; mkdir /tmp/x; \
        echo $GREETING; ls /proc/self/fd | wc -l; exit 3";
    let (out, err, code) = guest.exec("c1", "e1", &["sh", "-c", script]).await.unwrap();
    // A user that is not root has no effective capabilities after execve(2), whatever is permitted.
    let expected = "33\n34 500\n/work/deep\n99\nCapEff:\t0000000000000000\nCapBnd:\t00000000000004e1\nSeccomp:\t2\nhello\n4\n";
    assert_eq!((out.as_str(), code), (expected, 3), "{err}");
    assert!(err.contains("Operation not supported"), "{err}");

    let missing = guest.exec("c1", "e2", &["nothing"]).await.unwrap_err();
    assert_eq!(missing.code(), Code::FailedPrecondition);
    assert_eq!(
        missing.message(),
        "exec: \"nothing\": executable file not found in $PATH"
    );
    let unknown = guest.exec("c2", "e1", &["true"]).await.unwrap_err();
    assert_eq!(unknown.code(), Code::NotFound);
    guest.remove("c1").await;
}

#[tokio::test]
async fn signals_reach_one_process_or_all() {
    let mut guest = local::start().await;
    let handler = "trap 'exit 9' TERM; echo ready; while true; do sleep 0.1; done";
    guest
        .create("c1", &spec(&["sh", "-c", handler]), "")
        .await
        .unwrap();
    let (stdout, mut output) = guest.stream(1).await;
    let stdio = Stdio {
        stdout,
        ..Stdio::default()
    };
    let request = StartContainerRequest {
        id: "c1".to_owned(),
        stdio: Some(stdio),
    };
    guest.client.start_container(request).await.unwrap();
    let mut ready = [0; 6];
    timeout(PATIENCE, output.read_exact(&mut ready))
        .await
        .unwrap()
        .unwrap();

    // An exec that left its session: only its control group knows what belongs to it.
    let (stdout, mut output) = guest.stream(5).await;
    let exec = ExecRequest {
        container_id: "c1".to_owned(),
        exec_id: "e1".to_owned(),
        args: ["sh", "-c", "sh -c 'sleep 1000' & echo started; sleep 1000"]
            .map(str::to_owned)
            .to_vec(),
        stdio: Some(Stdio {
            stdout,
            ..Stdio::default()
        }),
        ..ExecRequest::default()
    };
    guest.client.exec(exec).await.unwrap();
    let mut started = [0; 8];
    timeout(PATIENCE, output.read_exact(&mut started))
        .await
        .unwrap()
        .unwrap();
    let mut signal = SignalRequest {
        container_id: "c1".to_owned(),
        exec_id: "e1".to_owned(),
        signal: 9,
        all: true,
    };
    guest.client.signal(signal.clone()).await.unwrap();
    assert_eq!(guest.exit_code("c1", "e1").await, 137);
    // All who had the stream are gone.
    assert_eq!(read(&mut output).await, "");

    signal.exec_id = String::new();
    signal.signal = 15;
    signal.all = false;
    guest.client.signal(signal.clone()).await.unwrap();
    assert_eq!(guest.exit_code("c1", "").await, 9);
    guest.client.signal(signal.clone()).await.unwrap();
    signal.signal = 0x1_0009;
    assert_eq!(
        guest.client.signal(signal).await.unwrap_err().code(),
        Code::InvalidArgument
    );
}

#[tokio::test]
async fn containers_may_share_the_pods_processes() {
    let mut guest = local::start().await;
    let shared = |args: &[&str]| {
        let mut spec = spec(args);
        spec["linux"]["namespaces"][1]["path"] = json!("pod");
        spec
    };
    guest
        .create("c1", &shared(&["sh", "-c", "sleep 4321 & sleep 1234"]), "")
        .await
        .unwrap();
    guest.start_quietly("c1").await.unwrap();
    let list = shared(&[
        "sh",
        "-c",
        "while ! ps | grep -q '[s]leep 4321'; do sleep 0.1; done; ps",
    ]);
    let (out, err, _) = guest.run("c2", &list, "").await;
    assert!(out.contains("sleep 1234"), "{out}{err}");
    // The end of the first process is the end of all of its container, here too.
    let kill = SignalRequest {
        container_id: "c1".to_owned(),
        signal: 9,
        ..SignalRequest::default()
    };
    guest.client.signal(kill).await.unwrap();
    assert_eq!(guest.exit_code("c1", "").await, 137);
    let gone = shared(&[
        "sh",
        "-c",
        "while ps | grep -q '[s]leep 4321'; do sleep 0.1; done; ps",
    ]);
    let (out, _, _) = guest.run("c3", &gone, "").await;
    assert!(!out.contains("sleep 1234"), "{out}");
}

#[tokio::test]
async fn layers_are_shared_and_released_by_the_last() {
    let mut guest = local::start().await;
    guest
        .create("c1", &spec(&["sleep", "1000"]), "")
        .await
        .unwrap();
    guest
        .create(
            "c2",
            &spec(&["sh", "-c", "touch /bin/mine; ls /bin/mine"]),
            "",
        )
        .await
        .unwrap();
    guest.start_quietly("c1").await.unwrap();
    guest.start_quietly("c2").await.unwrap();
    assert_eq!(guest.exit_code("c2", "").await, 0);
    let (_, err, _) = guest.exec("c1", "e1", &["ls", "/bin/mine"]).await.unwrap();
    assert!(err.contains("No such file"), "{err}");
    assert_eq!(guest.remove("c1").await, []);
    assert_eq!(guest.remove("c2").await, [guest.layer]);
}

#[tokio::test]
async fn events_come_once_each_and_in_order() {
    let mut guest = local::start().await;
    for id in ["c1", "c2", "c3"] {
        guest.create(id, &spec(&["true"]), "").await.unwrap();
        guest.start_quietly(id).await.unwrap();
        assert_eq!(guest.exit_code(id, "").await, 0);
    }
    let event = guest.event(|event| event.sequence == 3).await;
    assert!(
        matches!(event.kind, Some(Kind::Exit(exit)) if exit.container_id == "c3" && exit.time_ns > 0)
    );
}

#[tokio::test]
async fn devices_are_those_of_the_spec() {
    let mut guest = local::start().await;
    let script = "mknod /tmp/zero c 1 5 && head -c 3 /tmp/zero | wc -c; mknod /tmp/loop b 7 0 && echo made; \
        cat /tmp/loop > /dev/null";
    let mut restricted = spec(&["sh", "-c", script]);
    for set in ["bounding", "effective", "permitted"] {
        restricted["process"]["capabilities"][set] = json!(["CAP_MKNOD", "CAP_DAC_OVERRIDE"]);
    }
    restricted["linux"]["resources"] = json!({ "devices": [{ "allow": false, "access": "rwm" }] });
    let (out, err, code) = guest.run("c1", &restricted, "").await;
    assert_eq!((out.as_str(), code), ("3\nmade\n", 1), "{err}");
    assert!(err.contains("Operation not permitted"), "{err}");
}

#[tokio::test]
async fn an_image_without_layers_is_an_empty_root() {
    let mut guest = local::start().await;
    guest.layer.length = 0;
    let malformed = guest.create("c1", &spec(&["sh"]), "").await.unwrap_err();
    assert_eq!(malformed.code(), Code::InvalidArgument);
    let empty = CreateContainerRequest {
        id: "c1".to_owned(),
        spec: spec(&["sh"]).to_string().into_bytes(),
        ..CreateContainerRequest::default()
    };
    guest.client.create_container(empty).await.unwrap();
    let error = guest.start_quietly("c1").await.unwrap_err();
    assert_eq!(
        error.message(),
        "exec: \"sh\": executable file not found in $PATH"
    );
    assert_eq!(guest.remove("c1").await, []);
}

#[tokio::test]
async fn the_network_becomes_as_it_was_made_outside() {
    let mut guest = local::start().await;
    guest.enter(&[
        "ip", "link", "add", "eth0", "type", "veth", "peer", "name", "far",
    ]);
    guest.enter(&["ip", "link", "set", "far", "up"]);
    let request = ConfigureNetworkRequest {
        interfaces: vec![Interface {
            name: "eth0".to_owned(),
            mac: "02:00:00:aa:bb:cc".to_owned(),
            mtu: 1400,
            addresses: vec!["10.1.2.3/24".to_owned(), "fd00::3/64".to_owned()],
        }],
        routes: [
            ("0.0.0.0/0", "169.254.1.1"),
            ("::/0", "fd00::1"),
            ("192.0.2.0/24", ""),
            ("198.51.100.0/24", "10.1.2.1"),
        ]
        .map(|(destination, gateway)| Route {
            destination: destination.to_owned(),
            gateway: gateway.to_owned(),
            interface: String::new(),
        })
        .to_vec(),
    };
    // Twice: the second time changes nothing.
    for _ in 0..2 {
        guest
            .client
            .configure_network(request.clone())
            .await
            .unwrap();
        let link = guest.enter(&["ip", "-o", "link", "show", "eth0"]);
        assert!(
            link.contains("mtu 1400") && link.contains("02:00:00:aa:bb:cc"),
            "{link}"
        );
        assert!(link.contains(",UP"), "{link}");
        let addresses = guest.enter(&["ip", "-o", "address", "show", "eth0"]);
        assert!(
            addresses.contains("10.1.2.3/24 brd 10.1.2.255"),
            "{addresses}"
        );
        assert!(
            addresses.contains("fd00::3/64") && addresses.contains("nodad"),
            "{addresses}"
        );
        let routes = guest.enter(&["ip", "route"]);
        assert!(
            routes.contains("default via 169.254.1.1 dev eth0") && routes.contains("onlink"),
            "{routes}"
        );
        assert!(routes.contains("192.0.2.0/24 dev eth0"), "{routes}");
        assert!(
            routes.contains("198.51.100.0/24 via 10.1.2.1 dev eth0"),
            "{routes}"
        );
        let routes = guest.enter(&["ip", "-6", "route"]);
        assert!(routes.contains("default via fd00::1 dev eth0"), "{routes}");
        assert!(
            guest
                .enter(&["ip", "link", "show", "lo"])
                .contains("LOOPBACK,UP")
        );
    }
    let mut wrong = request;
    wrong.routes[0].gateway = "fd00::1".to_owned();
    wrong.interfaces[0].mac = "02:00".to_owned();
    let refused = guest.client.configure_network(wrong).await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument);
}
