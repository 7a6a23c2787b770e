//! What podvisord tells of itself: health checks, conditions, the verbose part of Status.

use podvisor_proto::cri;
use podvisor_tests::cri::Cri;
use podvisor_tests::daemon::{Daemon, Network, Options};
use serde_json::Value;
use tonic::Code;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus::{self, NotServing, Serving};

fn request(service: &str) -> HealthCheckRequest {
    HealthCheckRequest {
        service: service.into(),
    }
}

fn check(cri: &Cri, service: &str) -> ServingStatus {
    let answer = cri.call_health(async |mut c| c.check(request(service)).await);
    answer.expect("Check").status()
}

#[test]
fn liveness_and_readiness() {
    let mut daemon = Daemon::start_with(&Options {
        network: None,
        ..Options::default()
    });
    let cri = daemon.cri();
    for service in [
        "",
        "liveness",
        "runtime.v1.RuntimeService",
        "runtime.v1.ImageService",
    ] {
        assert_eq!(check(&cri, service), Serving, "{service}");
    }
    assert_eq!(check(&cri, "readiness"), NotServing, "no network");
    daemon.write_cni(Network::Bridge);
    assert_eq!(check(&cri, "readiness"), Serving);
    let unknown = cri.call_health(async |mut c| c.check(request("x")).await);
    assert_eq!(unknown.expect_err("no service").code(), Code::NotFound);

    let watch = cri.call_health(async |mut c| c.watch(request("")).await);
    let mut watch = watch.expect("Watch");
    let mut next = || {
        let answer = cri.next(&mut watch).expect("no error");
        answer.map(|answer| answer.status())
    };
    assert_eq!(next(), Some(Serving));
    daemon.stop();
    assert_eq!((next(), next()), (Some(NotServing), None));
    daemon.restart();
}

#[test]
fn status_tells_what_an_operator_asks() {
    let daemon = Daemon::start();
    let cri = daemon.cri();
    let status = || {
        let request = cri::StatusRequest { verbose: true };
        let answer = cri.call(async |mut c| c.status(request).await);
        answer.expect("Status")
    };
    let about = |status: &cri::StatusResponse| -> Value {
        serde_json::from_str(&status.info["podvisor"]).expect("JSON")
    };
    let first = status();
    let conditions = first.status.clone().expect("a status").conditions;
    let types: Vec<_> = conditions.iter().map(|c| c.r#type.as_str()).collect();
    assert_eq!(types, ["RuntimeReady", "NetworkReady"]);
    assert!(conditions.iter().all(|c| c.status), "{conditions:?}");
    let names: Vec<_> = first.runtime_handlers.iter().map(|h| &h.name).collect();
    assert_eq!(names, ["", "podvisor", "runc"]);
    let in_vm = first.runtime_handlers[1].features.expect("features");
    assert!(in_vm.user_namespaces && in_vm.recursive_read_only_mounts);
    assert!(first.features.expect("features").supplemental_groups_policy);
    let told = about(&first);
    assert_eq!(told["pid"], daemon.pid().as_raw());
    assert_eq!(told["handlers"]["podvisor"]["runs"], "VMs");
    assert_eq!(told["handlers"]["runc"]["runs"], "on the node");
    for key in ["version", "vmm", "nodeKernel", "network", "guest"] {
        assert!(!told[key].is_null(), "{key}: {told}");
    }
    assert!(told["warnings"].is_array());
    let config: Value = serde_json::from_str(&first.info["config"]).expect("JSON");
    assert!(config["vm"].is_object());

    let update = |pod_cidr: &str| {
        let request = cri::UpdateRuntimeConfigRequest {
            runtime_config: Some(cri::RuntimeConfig {
                network_config: Some(cri::NetworkConfig {
                    pod_cidr: pod_cidr.into(),
                }),
            }),
        };
        cri.call(async |mut c| c.update_runtime_config(request).await)
    };
    update("10.1.0.0/16,fd00:1::/64").expect("both families");
    update("").expect("nothing to tell");
    let error = update("10.1.0.0").expect_err("no CIDR");
    assert_eq!(error.code(), Code::InvalidArgument, "{error}");
    let told = about(&status());
    assert_eq!(told["podCIDR"], "10.1.0.0/16,fd00:1::/64");
}
