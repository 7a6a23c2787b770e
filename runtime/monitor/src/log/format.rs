//! Turns bytes of a stream into records of the CRI log format:
//! `<RFC 3339 time, nanoseconds> <stdout|stderr> <P|F> <content>\n`, one for each line.
//!
//! `F` ends a line. A line longer than [`MAX_CONTENT`] is cut into `P` records and a last `F`. What
//! is left without a newline at the end of the stream is a `P` record (containerd does the same;
//! the kubelet reads these rules from `pkg/kubelet/kuberuntime/logs`).

use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Longest content of a record, bytes.
pub const MAX_CONTENT: usize = 16 * 1024;

/// [`Formatter::push`] returns once the batch has reached this size, bytes.
const BATCH_SIZE: usize = 64 * 1024;

/// Length of a timestamp: `2006-01-02T15:04:05.000000000Z`.
const TIMESTAMP_LENGTH: usize = 30;

/// Which of a process's streams a record belongs to. A terminal's one stream is `Stdout`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stream {
    /// Standard output, or the terminal.
    Stdout,
    /// Standard error.
    Stderr,
}

impl Stream {
    fn name(self) -> &'static [u8] {
        match self {
            Stream::Stdout => b"stdout",
            Stream::Stderr => b"stderr",
        }
    }
}

/// Formats one stream. Keeps the line that has not ended yet, at most [`MAX_CONTENT`] bytes.
pub struct Formatter {
    stream: Stream,
    line: Vec<u8>,
}

impl Formatter {
    /// A formatter at the start of a line.
    pub fn new(stream: Stream) -> Self {
        Self {
            stream,
            line: Vec::new(),
        }
    }

    /// Consumes `input`, which was read at `time`, and appends the records it completes to `batch`.
    /// Returns when the input is consumed or the batch is full: write the batch out and call again
    /// until `input` is empty. (A record is 40 bytes longer than its content: input of nothing but
    /// newlines would otherwise make a batch of 40 times its size.)
    pub fn push(&mut self, input: &mut &[u8], time: SystemTime, batch: &mut Vec<u8>) {
        let timestamp = timestamp(time);
        while !input.is_empty() && batch.len() < BATCH_SIZE {
            let room = MAX_CONTENT - self.line.len();
            // One byte beyond the room, for a newline there ends the line without a cut.
            let window = &input[..input.len().min(room + 1)];
            if let Some(end) = window.iter().position(|&byte| byte == b'\n') {
                self.record(&timestamp, b'F', &input[..end], batch);
                *input = &input[end + 1..];
            } else if window.len() > room {
                self.record(&timestamp, b'P', &input[..room], batch);
                *input = &input[room..];
            } else {
                self.line.extend_from_slice(window);
                *input = &[];
            }
        }
    }

    /// Ends the stream: what is left of the last line becomes a `P` record.
    pub fn finish(&mut self, time: SystemTime, batch: &mut Vec<u8>) {
        if !self.line.is_empty() {
            self.record(&timestamp(time), b'P', &[], batch);
        }
    }

    /// Appends one record: the line so far and `rest`.
    fn record(&mut self, timestamp: &[u8], tag: u8, rest: &[u8], batch: &mut Vec<u8>) {
        batch.extend_from_slice(timestamp);
        batch.push(b' ');
        batch.extend_from_slice(self.stream.name());
        batch.extend_from_slice(&[b' ', tag, b' ']);
        batch.extend_from_slice(&self.line);
        batch.extend_from_slice(rest);
        batch.push(b'\n');
        self.line.clear();
    }
}

/// The layout that kubelets write and read, in UTC.
fn timestamp(time: SystemTime) -> [u8; TIMESTAMP_LENGTH] {
    // A clock before 1970 is not worth an error in a log line.
    let since_epoch = time.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
    let seconds = since_epoch.as_secs();
    let (year, month, day) = civil_from_days(seconds / 86_400);
    let second_of_day = seconds % 86_400;

    let mut text = *b"0000-00-00T00:00:00.000000000Z";
    put_digits(&mut text[0..4], year);
    put_digits(&mut text[5..7], month);
    put_digits(&mut text[8..10], day);
    put_digits(&mut text[11..13], second_of_day / 3600);
    put_digits(&mut text[14..16], second_of_day / 60 % 60);
    put_digits(&mut text[17..19], second_of_day % 60);
    put_digits(&mut text[20..29], u64::from(since_epoch.subsec_nanos()));
    text
}

/// Fills `field` with the last digits of `value`.
fn put_digits(field: &mut [u8], mut value: u64) {
    for digit in field.iter_mut().rev() {
        *digit = b'0' + (value % 10) as u8;
        value /= 10;
    }
}

/// Days since 1970-01-01 to (year, month, day) in the proleptic Gregorian calendar. Years begin in
/// March here, so that the leap day is a year's last (Howard Hinnant, `chrono`-Compatible Low-Level
/// Date Algorithms).
fn civil_from_days(days: u64) -> (u64, u64, u64) {
    let days = days + 719_468;
    let era = days / 146_097;
    let day_of_era = days % 146_097;
    let year_of_era =
        (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 {
        shifted_month + 3
    } else {
        shifted_month - 9
    };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    (year, month, day)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Formats `chunks` as reads of one stream, and its end.
    fn format(chunks: &[&[u8]]) -> Vec<u8> {
        let mut formatter = Formatter::new(Stream::Stdout);
        let mut out = Vec::new();
        for chunk in chunks {
            let mut input = *chunk;
            while !input.is_empty() {
                let mut batch = Vec::new();
                formatter.push(&mut input, UNIX_EPOCH, &mut batch);
                assert!(batch.len() < BATCH_SIZE + MAX_CONTENT + 64);
                out.append(&mut batch);
            }
        }
        formatter.finish(UNIX_EPOCH, &mut out);
        out
    }

    /// Reads records as a log reader does: (tag, content).
    fn parse(log: &[u8]) -> Vec<(u8, Vec<u8>)> {
        let prefix = b"1970-01-01T00:00:00.000000000Z stdout ";
        assert!(log.is_empty() || log.ends_with(b"\n"));
        log.split_inclusive(|&byte| byte == b'\n')
            .map(|record| {
                let rest = record.strip_prefix(prefix).expect("timestamp and stream");
                assert_eq!(rest[1], b' ');
                (rest[0], rest[2..rest.len() - 1].to_vec())
            })
            .collect()
    }

    #[test]
    fn lines_are_full_records() {
        assert_eq!(
            format(&[b"one\ntw", b"o\n\nthree\r\n"]),
            b"1970-01-01T00:00:00.000000000Z stdout F one\n\
              1970-01-01T00:00:00.000000000Z stdout F two\n\
              1970-01-01T00:00:00.000000000Z stdout F \n\
              1970-01-01T00:00:00.000000000Z stdout F three\r\n"
        );
    }

    #[test]
    fn unterminated_end_is_partial() {
        assert_eq!(
            parse(&format(&[b"prompt> "])),
            [(b'P', b"prompt> ".to_vec())]
        );
        assert_eq!(parse(&format(&[b"line\n"])).len(), 1);
        assert!(format(&[]).is_empty());
    }

    #[test]
    fn a_line_of_the_limit_is_not_cut_and_one_byte_more_is() {
        let mut line = vec![b'x'; MAX_CONTENT];
        line.push(b'\n');
        assert_eq!(parse(&format(&[&line])), [(b'F', vec![b'x'; MAX_CONTENT])]);
        // The same when the newline comes with a later read.
        assert_eq!(
            parse(&format(&[&line[..MAX_CONTENT], b"\n"])),
            [(b'F', vec![b'x'; MAX_CONTENT])]
        );
        line.insert(0, b'y');
        let records = parse(&format(&[&line]));
        assert_eq!(records.len(), 2);
        assert_eq!(records[0].0, b'P');
        assert_eq!(records[0].1.len(), MAX_CONTENT);
        assert_eq!(records[1], (b'F', b"x".to_vec()));
    }

    #[test]
    fn timestamps() {
        let text = |seconds, nanoseconds| {
            let time = UNIX_EPOCH + Duration::new(seconds, nanoseconds);
            String::from_utf8(timestamp(time).to_vec()).expect("ASCII")
        };
        assert_eq!(text(0, 1), "1970-01-01T00:00:00.000000001Z");
        assert_eq!(text(951_782_400, 0), "2000-02-29T00:00:00.000000000Z");
        assert_eq!(
            text(1_795_255_625, 999_999_999),
            "2026-11-21T10:07:05.999999999Z"
        );
    }

    proptest! {
        /// Whatever the reads were, joining the records gives the stream back.
        #[test]
        fn content_survives(
            chunks in prop::collection::vec(
                prop_oneof![
                    // Short lines and the neighbourhood of the limit, in any order.
                    prop::collection::vec(prop_oneof![Just(b'\n'), any::<u8>()], 0..64),
                    (MAX_CONTENT - 2..MAX_CONTENT + 3).prop_map(|length| vec![b'z'; length]),
                ],
                0..12,
            )
        ) {
            let slices: Vec<&[u8]> = chunks.iter().map(Vec::as_slice).collect();
            let mut joined = Vec::new();
            for (tag, content) in parse(&format(&slices)) {
                prop_assert!(content.len() <= MAX_CONTENT);
                joined.extend_from_slice(&content);
                if tag == b'F' {
                    joined.push(b'\n');
                }
            }
            prop_assert_eq!(joined, chunks.concat());
        }

        /// The calendar agrees with the C library's.
        #[test]
        fn calendar(seconds in 0_u64..253_402_300_800) {
            let mut expected = std::mem::MaybeUninit::<libc::tm>::uninit();
            let time = seconds as libc::time_t;
            // SAFETY: both pointers are valid for the call, which fills `expected` and returns it.
            let expected = unsafe {
                assert!(!libc::gmtime_r(&raw const time, expected.as_mut_ptr()).is_null());
                expected.assume_init()
            };
            prop_assert_eq!(
                civil_from_days(seconds / 86_400),
                (
                    (expected.tm_year + 1900) as u64,
                    (expected.tm_mon + 1) as u64,
                    expected.tm_mday as u64,
                )
            );
        }
    }
}
