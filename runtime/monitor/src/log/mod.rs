//! CRI log files: [`format`] makes records, [`sink`] writes them to a file that can be exchanged,
//! [`pump`] moves a container's streams into it, and shows them to [`taps`].

pub mod format;
pub mod pump;
pub mod sink;
pub mod taps;

pub use pump::Pump;
pub use sink::LogSink;
