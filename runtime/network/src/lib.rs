//! podvisor network.
