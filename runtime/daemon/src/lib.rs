//! podvisord as a library.
//!
//! A request's way: [`services`] turn CRI messages into calls of [`daemon::Daemon`], whose methods are
//! spread over
//!
//! | module        | what it decides                                                          |
//! |---------------|--------------------------------------------------------------------------|
//! | [`sandbox`]   | RunPodSandbox, Stop, Remove: the VM and all that the host keeps for it   |
//! | [`container`] | CreateContainer to Remove, ExecSync, logs                                |
//! | [`streaming`] | Exec, Attach, PortForward: their URLs, and what clients then get           |
//! | [`reconcile`] | what was there before this process; orphans                              |
//!
//! and who use
//!
//! | module           | what it holds                                                         |
//! |------------------|-----------------------------------------------------------------------|
//! | [`pod`]          | pods and containers in memory: lists are answered from here           |
//! | [`stats`]         | what pods and containers use                                          |
//! | [`events`]       | what becomes of them, told to subscribers                              |
//! | [`store`]        | what was asked, on disk                                               |
//! | [`monitor`]      | the keeper of one pod: start it, find it, call it, see it die         |
//! | [`spec`]         | the OCI spec of a container                                           |
//! | [`host`]         | what pods of the host's own have: root file systems, files            |
//! | [`confinement`]  | AppArmor and SELinux                                                  |
//! | [`volumes`]      | what of the node's files a container sees                             |
//! | [`vm_size`]      | vCPUs and memory of a pod's VM                                        |
//! | [`guest_config`] | what the guest is told of its pod                                     |
//! | [`ids`]          | ids, prefixes, names that only one object may hold                    |
//! | [`resources`]    | new limits for containers, and the CPUs that a pod runs on            |
//! | `heap`           | freed memory goes back to the node                                    |
//! | [`metrics`]      | what is counted, for Prometheus                                       |
//! | [`trace`]        | where the time of an RPC goes, as OpenTelemetry spans                 |
//! | [`error`]        | what can go wrong, and its gRPC code                                  |
//! | [`server`]       | from a configuration to a served socket                               |
//!
//! The configuration, handlers, and what of podvisor's own is on the node are in [`podvisor_node`].

mod confinement;
pub mod container;
pub mod daemon;
pub mod error;
pub mod events;
pub mod guest_config;
mod heap;
pub mod host;
pub mod ids;
pub mod metrics;
pub mod monitor;
pub mod pod;
pub mod reconcile;
pub mod resources;
pub mod sandbox;
pub mod server;
pub mod services;
pub mod spec;
pub mod stats;
pub mod store;
pub mod streaming;
pub mod trace;
pub mod user_namespace;
mod vm_size;
pub mod volumes;
