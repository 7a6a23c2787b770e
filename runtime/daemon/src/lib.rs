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
//! | [`handlers`]     | who runs a pod's containers: a VM's agent, or an OCI runtime          |
//! | [`host`]         | what pods of the host's own have: root file systems, files            |
//! | [`confinement`]  | AppArmor and SELinux                                                  |
//! | [`volumes`]      | what of the node's files a container sees                             |
//! | [`vm_size`]      | vCPUs and memory of a pod's VM                                        |
//! | [`guest_config`] | what the guest is told of its pod                                     |
//! | [`ids`]          | ids, prefixes, names that only one object may hold                    |
//! | [`cgroup`]       | the pod's cgroup on the host                                          |
//! | [`inventory`]    | what a sandbox has on the host, found by name                         |
//! | [`mountinfo`]    | the host's mount table                                               |
//! | [`pidfd`]        | processes, held without the danger of reused pids                     |
//! | [`resources`]    | new limits for containers, and the CPUs that a pod runs on            |
//! | `heap`           | freed memory goes back to the node                                    |
//! | [`config`]       | the configuration file                                                |
//! | [`metrics`]      | what is counted, for Prometheus                                       |
//! | [`trace`]        | where the time of an RPC goes, as OpenTelemetry spans                 |
//! | [`error`]        | what can go wrong, and its gRPC code                                  |
//! | [`backend`]      | what VMs run on: our VMM or QEMU, KVM or software                     |
//! | [`server`]       | from a configuration to a served socket                               |

pub mod backend;
pub mod cgroup;
pub mod config;
mod confinement;
pub mod container;
pub mod daemon;
pub mod error;
pub mod events;
pub mod guest_config;
pub mod handlers;
mod heap;
pub mod host;
pub mod ids;
pub mod inventory;
pub mod metrics;
pub mod monitor;
pub mod mountinfo;
pub mod pidfd;
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
