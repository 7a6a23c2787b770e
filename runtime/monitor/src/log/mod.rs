//! CRI log files: [`format`] makes records, [`sink`] writes them to a file that can be exchanged,
//! [`pump`] moves a container's streams into it.

pub mod format;
pub mod pump;
pub mod sink;

pub use pump::Pump;
pub use sink::LogSink;
