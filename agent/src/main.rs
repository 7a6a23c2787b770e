//! podvisor-agent: PID 1 of the guest. It turns the requests of the pod's monitor into containers.
//!
//! One binary, two programs. As PID 1 it is a single-threaded tokio runtime that must never block;
//! what needs `fork` runs in the *launcher*, the same binary executed again, which has no runtime
//! and no second thread.
//!
//! | module            | subject                                                                  |
//! |-------------------|--------------------------------------------------------------------------|
//! | [`init`]          | PID 1's life                                                             |
//! | [`guest`]         | what PID 1 makes of the guest's kernel                                   |
//! | [`server`]        | the connection to the host and the API on it                             |
//! | [`service`]       | the API's calls, and which gRPC code an error becomes                    |
//! | [`events`]        | exits and other news, numbered                                           |
//! | [`reaper`]        | collects every child                                                     |
//! | [`socket`]        | vsock (and unix) stream sockets                                          |
//! | [`streams`]       | byte streams from the host, matched to processes by token                |
//! | [`relay`]         | bytes between a process and its streams                                  |
//! | [`stdio`]         | pipes and terminals of one process                                       |
//! | [`fd`]            | file descriptors without blocking                                        |
//! | [`sandbox`]       | what all containers of the pod share                                     |
//! | [`sysctl`]        | kernel parameters                                                        |
//! | [`network`]       | interfaces, addresses, routes                                            |
//! | [`disk`]          | segments of the pod's disk as partitions, layers mounted once            |
//! | [`mount`]         | mounts by file descriptors, mount options                                |
//! | [`image_volume`]  | images as volumes                                                        |
//! | [`rootfs`]        | a container's root: layers under an overlay                              |
//! | [`user_namespace`]| which ids of the guest a pod's users are                                 |
//! | [`oci`]           | the OCI runtime spec, as far as the agent carries it out                 |
//! | [`spec`]          | fills in what the OCI spec leaves to the guest                           |
//! | [`cgroup`]        | control groups of containers and execs                                   |
//! | [`resources`]     | limits of a container                                                    |
//! | [`memory`]        | memory that the VM is given while it runs                                |
//! | [`device_filter`] | which devices a container may use                                        |
//! | [`watch`]         | news from control groups: out of memory, empty                           |
//! | [`container`]     | the table of containers and their life                                   |
//! | [`launcher`]      | the re-executed, single-threaded process that forks containers and execs |
//! | [`kmsg`]          | log lines, to the kernel's log                                           |
// The guest's initramfs has no /dev/null, and Rust's own start-up aborts when it cannot open it for a
// missing stdin. So `main` is C's.
#![cfg_attr(not(test), no_main)]

mod cgroup;
mod container;
mod device_filter;
mod disk;
mod events;
mod fd;
mod guest;
mod guest_devices;
mod image_volume;
mod init;
mod kmsg;
mod launcher;
mod memory;
mod mount;
mod network;
mod oci;
mod port_forward;
mod reaper;
mod relay;
mod resources;
mod rootfs;
mod sandbox;
mod seccomp;
mod server;
mod service;
mod socket;
mod spec;
mod stdio;
mod streams;
mod sysctl;
mod user_namespace;
mod watch;

/// First argument of the re-executed launcher.
const LAUNCHER: &str = "launcher";

/// C's entry point. Arguments come through `std::env`, which glibc fills in before.
#[cfg(not(test))]
// SAFETY: the only `main` of the program, with C's signature.
#[unsafe(no_mangle)]
extern "C" fn main() -> libc::c_int {
    run()
}

/// Dispatches on the first argument; the result is the exit status.
#[cfg_attr(test, allow(dead_code))]
fn run() -> libc::c_int {
    let arguments: Vec<String> = std::env::args_os()
        .skip(1)
        .map(|argument| argument.to_string_lossy().into_owned())
        .collect();
    if arguments.first().is_some_and(|first| first == LAUNCHER) {
        return launcher::process::run();
    }
    init::run(&arguments)
}
