//! The end-to-end tests. One program, so that all of them share one registry and the machine's CPUs.

mod bad_host;
mod bad_images;
mod bad_input;
mod cli;
mod confinement;
mod containers;
mod events;
mod health;
mod host_pods;
mod images;
mod metrics;
mod network;
mod pods;
mod pulls;
mod resources;
mod restart;
mod security;
mod stats;
mod stop;
mod streaming;
mod traces;
mod user_namespaces;
mod volumes;
