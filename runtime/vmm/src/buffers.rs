//! A descriptor chain as slices of guest memory.
