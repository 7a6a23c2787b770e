//! Containers of the host's own, kept with any OCI runtime: runc, crun, runsc. For pods that no VM can
//! hold. A pod's monitor uses it as it would an agent in a guest; podvisord mounts the root file systems.
//!
//! - [`runtime`]: the runtime's commands
//! - [`process`]: a process that the runtime has left to us, until its end
//! - [`children`]: the children of this process: the runtime's commands, containers, orphans
//! - [`stdio`]: the streams of a process
//! - [`pause`]: the first process of a pid namespace that the containers of a pod share
//! - [`rootfs`]: image layers and a writable one, mounted on the host
//! - [`mount`]: system calls for mounts
//!
//! An OCI runtime starts a container and is gone: what it started becomes a child of the nearest
//! *subreaper* (prctl(2)), which the monitor makes itself. So exits are read from the kernel, as a
//! parent does, and nothing polls.

pub mod children;
pub mod mount;
pub mod pause;
pub mod process;
pub mod rootfs;
pub mod runtime;
pub mod stdio;
