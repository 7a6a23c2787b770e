//! The streaming server of a CRI runtime: Exec, Attach and PortForward, over SPDY/3.1 and WebSocket.
//!
//! The CRI's calls answer with a URL; the client (a kubelet, crictl) connects there and upgrades the connection to one
//! of the two protocols. This crate knows nothing of containers: a [`Backend`] starts what a URL stands for and gives
//! byte streams.
//!
//! - [`server`]: the listener, HTTP; [`negotiate`]: which protocol a connection becomes
//! - [`tokens`]: what URLs stand for: single-use, short-lived
//! - [`backend`]: what the caller implements
//! - [`remote_command`]: an exec or attach session, whatever the protocol
//! - [`port_forward`]: the connections of a port-forward, whatever the protocol
//! - [`wire`]: what the protocols have in common: the queue of frames to a client, and the end of idle sessions
//! - [`spdy`]: frames, compressed headers, streams
//! - [`websocket`]: handshake, frames, channels, and a byte stream of binary messages
//!
//! Back-pressure goes from end to end: bytes are read from one side when the other has taken those before, and every
//! queue between them is short. Neither client of these protocols keeps to flow-control windows (kubectl's SPDY ignores
//! them, WebSocket has none), so a stream whose reader is slow holds up the client's whole connection.

pub mod backend;
mod negotiate;
mod port_forward;
mod remote_command;
pub mod server;
pub mod spdy;
pub mod tokens;
pub mod websocket;
pub mod wire;

#[cfg(test)]
mod tests;

pub use backend::{Attach, Backend, Duplex, Exec, PortForward, Session, Size, Streams};
pub use server::{Config, Server};
pub use tokens::TooMany;
