//! podvisor vmm.
