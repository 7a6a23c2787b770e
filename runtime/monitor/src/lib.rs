//! podvisor-monitor: keeper of one pod. This library is what its callers need to start it and to
//! talk to it; the keeper itself is the binary (`main.rs` has the map of it).
//!
//! - [`agent_calls`]: what each RPC took of the agent's time
//! - [`launcher`]: starts the process with its inherited file descriptors
//! - [`fd_socket`]: hands it file descriptors later, beside its gRPC socket
//! - [`fd_table`]: the monitor's end of that
//! - [`snapshots`]: what it tells who follows its pod

pub mod agent_calls;
pub mod fd_socket;
pub mod fd_table;
pub mod launcher;
pub mod snapshots;
