//! podvisord as a library.

pub mod cgroup;
pub mod config;
pub mod inventory;
pub mod mountinfo;
pub mod pidfd;
