//! A node as podvisor sees it: what podvisord and the command line both need to know of it.
//!
//! | module        | what it holds                                                            |
//! |---------------|--------------------------------------------------------------------------|
//! | [`config`]    | the configuration file                                                   |
//! | [`backend`]   | what VMs run on: our VMM or QEMU, KVM or software                        |
//! | [`handlers`]  | who runs a pod's containers: a VM's agent, or an OCI runtime             |
//! | [`inventory`] | what a sandbox has on the host, found by name                            |
//! | [`cgroup`]    | the pod's cgroup on the host                                             |
//! | [`mountinfo`] | the host's mount table                                                   |
//! | [`pidfd`]     | processes, held without the danger of reused pids                        |

pub mod backend;
pub mod cgroup;
pub mod config;
pub mod handlers;
pub mod inventory;
pub mod mountinfo;
pub mod pidfd;
