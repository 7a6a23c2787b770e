//! What containers use, read from files of the kernel. The agent uses it in the guest, a monitor for the containers of
//! the host's own, podvisord for what a pod costs the host.
//!
//! - [`cgroup`]: control groups, of version 2 and 1
//! - [`processes`]: processes of a control group and what they have open
//! - [`network`]: interfaces of a network namespace
//! - [`writable`]: the size of writable layers
//!
//! A file that is not there, or says what it did not say so far, counts as 0: a number less is better than none at all.

pub mod cgroup;
pub mod network;
pub mod processes;
pub mod writable;
