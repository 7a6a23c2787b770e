//! Every API of podvisor, as generated code.
//!
//! | module      | definition                  | spoken between                              |
//! |-------------|-----------------------------|---------------------------------------------|
//! | [`cri`]     | `cri/v1/cri.proto`          | kubelet, crictl, the CLI → podvisord        |
//! | [`control`] | `control/v1/control.proto`  | the CLI → podvisord                         |
//! | [`monitor`] | `monitor/v1/monitor.proto`  | podvisord, the CLI → podvisor-monitor       |
//! | [`agent`]   | `agent/v1/agent.proto`      | podvisor-monitor → podvisor-agent           |
//!
//! The definitions carry the documentation; `generate/` writes `src/generated/`. Two messages are not generated: [`list`].

pub mod list;

/// Generated code, nested as the protobuf packages are.
#[allow(missing_docs, unused_qualifications, clippy::all, clippy::pedantic)]
mod packages {
    pub mod runtime_v1 {
        include!("generated/runtime.v1.rs");
        pub type ListPodSandboxResponse = crate::list::List<PodSandbox>;
        pub type ListContainersResponse = crate::list::List<Container>;
    }
    pub mod control {
        pub mod v1 {
            include!("generated/podvisor.control.v1.rs");
        }
    }
    pub mod monitor {
        pub mod v1 {
            include!("generated/podvisor.monitor.v1.rs");
        }
    }
    pub mod agent {
        pub mod v1 {
            include!("generated/podvisor.agent.v1.rs");
        }
    }
}

pub use packages::agent::v1 as agent;
pub use packages::control::v1 as control;
pub use packages::monitor::v1 as monitor;
pub use packages::runtime_v1 as cri;

/// Bytes that JSON has as text.
#[cfg(feature = "json")]
fn bytes_of_text<'de, D: serde::Deserializer<'de>>(from: D) -> Result<Vec<u8>, D::Error> {
    <String as serde::Deserialize>::deserialize(from).map(String::into_bytes)
}
