//! CRI log files: `TIMESTAMP STREAM TAG CONTENT`, a line each.

use std::fs;
use std::path::Path;

use crate::eventually;

/// A line of a log file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Line {
    /// RFC 3339, nanoseconds.
    pub time: String,
    /// "stdout" or "stderr".
    pub stream: String,
    /// The record ends a line of the container's ("F"), or not ("P").
    pub full: bool,
    /// What the container wrote, without the line's end.
    pub content: String,
}

/// Parses a log file and fails on anything that a kubelet would not understand.
pub fn read(path: &Path) -> Vec<Line> {
    let text =
        fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    assert!(
        text.is_empty() || text.ends_with('\n'),
        "{}: the last record has no end",
        path.display()
    );
    text.lines().map(parse).collect()
}

fn parse(line: &str) -> Line {
    let parts: Vec<&str> = line.splitn(4, ' ').collect();
    let [time, stream, tag, content] = parts[..] else {
        panic!("not a CRI log line: {line:?}");
    };
    assert!(is_time(time), "not RFC 3339 with nanoseconds: {time:?}");
    assert!(["stdout", "stderr"].contains(&stream), "{line:?}");
    assert!(["F", "P"].contains(&tag), "{line:?}");
    Line {
        time: time.into(),
        stream: stream.into(),
        full: tag == "F",
        content: content.into(),
    }
}

/// `2006-01-02T15:04:05.000000000Z07:00`, the layout that kubelets write.
fn is_time(text: &str) -> bool {
    let shape: String = text
        .chars()
        .map(|c| if c.is_ascii_digit() { '0' } else { c })
        .collect();
    let Some(zone) = shape.strip_prefix("0000-00-00T00:00:00.000000000") else {
        return false;
    };
    ["Z", "+00:00", "-00:00"].contains(&zone)
}

/// The lines that the container wrote to `stream`, put together again.
pub fn stream(path: &Path, stream: &str) -> Vec<String> {
    let mut lines = Vec::new();
    let mut open = String::new();
    for line in read(path).into_iter().filter(|line| line.stream == stream) {
        open.push_str(&line.content);
        if line.full {
            lines.push(std::mem::take(&mut open));
        }
    }
    if !open.is_empty() {
        lines.push(open);
    }
    lines
}

/// Lines of standard output.
pub fn stdout(path: &Path) -> Vec<String> {
    stream(path, "stdout")
}

/// Fails with the first line that differs: logs can be long.
pub fn assert_same(lines: &[String], wanted: &[String]) {
    let differs = lines
        .iter()
        .zip(wanted)
        .position(|(line, other)| line != other);
    let at = differs.unwrap_or(lines.len().min(wanted.len()));
    let short = |lines: &[String]| {
        let line = lines.get(at).map_or("the end", |line| line.as_str());
        format!("{:.100} ({} bytes)", line, line.len())
    };
    assert!(
        differs.is_none() && lines.len() == wanted.len(),
        "line {at} of {}: {}, wanted: {}",
        lines.len(),
        short(lines),
        short(wanted)
    );
}

/// The numbers from 1 to `last`, a line each: what `seq` writes.
pub fn seq(last: usize) -> Vec<String> {
    (1..=last).map(|number| number.to_string()).collect()
}

/// Waits until a line of standard output is `wanted`.
pub fn wait_for(path: &Path, wanted: &str) {
    eventually(&format!("{wanted:?} in {}", path.display()), || {
        let text = fs::read_to_string(path).unwrap_or_default();
        text.lines()
            .any(|line| line.ends_with(&format!(" F {wanted}")))
            .then_some(())
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times() {
        assert!(is_time("2026-11-21T10:00:00.000000001Z"));
        assert!(is_time("2026-11-21T10:00:00.000000001+02:00"));
        assert!(!is_time("2026-11-21T10:00:00.1Z"));
        assert!(!is_time("2026-11-21 10:00:00.000000001Z"));
        assert!(!is_time("2026-11-21T10:00:00.000000001"));
    }

    #[test]
    #[should_panic(expected = "not a CRI log line")]
    fn a_line_without_tag() {
        parse("2026-11-21T10:00:00.000000001Z stdout");
    }
}
