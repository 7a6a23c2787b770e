//! podvisord as a library.
