//! podvisord as a library.

pub mod config;
