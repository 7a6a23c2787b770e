//! podvisor image.
