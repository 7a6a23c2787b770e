//! Tables, units, colours, and guest text made safe for a terminal.

use std::borrow::Cow;
use std::io::IsTerminal;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Characters of an id that are shown: as many as crictl shows.
const SHORT_ID: usize = 13;

/// The start of an id, as lists show it.
pub fn short_id(id: &str) -> &str {
    id.get(..SHORT_ID).unwrap_or(id)
}

/// Rows under a header, in columns as wide as their widest cell.
#[derive(Debug)]
pub struct Table {
    right: Vec<bool>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A header's cells; those that begin with `>` head a right-aligned column.
    pub fn new(header: &[&str]) -> Self {
        Self {
            right: header.iter().map(|cell| cell.starts_with('>')).collect(),
            rows: vec![
                header
                    .iter()
                    .map(|cell| cell.trim_start_matches('>').to_owned())
                    .collect(),
            ],
        }
    }

    /// Adds a row.
    pub fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        self.rows.push(cells.into_iter().collect());
    }

    /// The table as lines, without space at their ends.
    pub fn render(&self) -> String {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let widths: Vec<usize> = (0..columns)
            .map(|column| {
                self.rows
                    .iter()
                    .filter_map(|row| row.get(column))
                    .map(|cell| cell.chars().count())
                    .max()
                    .unwrap_or(0)
            })
            .collect();
        let pad = |(column, cell): (usize, &String)| {
            let width = widths[column];
            if self.right.get(column).copied().unwrap_or(false) {
                format!("{cell:>width$}")
            } else {
                format!("{cell:<width$}")
            }
        };
        self.rows
            .iter()
            .map(|row| row.iter().enumerate().map(pad).collect::<Vec<_>>())
            .map(|cells| cells.join("   ").trim_end().to_owned() + "\n")
            .collect()
    }
}

/// Time since a moment in nanoseconds since the epoch, in its largest unit; empty for 0 (not yet).
pub fn age(since_ns: i64) -> String {
    if since_ns <= 0 {
        return String::new();
    }
    let since = UNIX_EPOCH + Duration::from_nanos(since_ns as u64);
    // A clock that was set back gives an age of zero.
    largest_unit(SystemTime::now().duration_since(since).unwrap_or_default())
}

fn largest_unit(duration: Duration) -> String {
    let seconds = duration.as_secs();
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{}m", seconds / 60),
        3600..86400 => format!("{}h", seconds / 3600),
        _ => format!("{}d", seconds / 86400),
    }
}

/// Terminal colours.
#[derive(Debug, Clone, Copy)]
pub enum Colour {
    /// Good.
    Green,
    /// Worth a look.
    Yellow,
    /// Bad.
    Red,
    /// Secondary.
    Dim,
}

/// Colours `text` when `on`.
pub fn paint(text: &str, colour: Colour, on: bool) -> Cow<'_, str> {
    if !on {
        return Cow::Borrowed(text);
    }
    let code = match colour {
        Colour::Green => "32",
        Colour::Yellow => "33",
        Colour::Red => "31",
        Colour::Dim => "2",
    };
    Cow::Owned(format!("\x1b[{code}m{text}\x1b[0m"))
}

/// Whether to colour what goes to `stream`: a terminal, and <https://no-color.org> is not asked for.
pub fn colours(stream: &impl IsTerminal) -> bool {
    stream.is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}

/// Makes bytes that a guest wrote harmless for a terminal: control characters other than line feed
/// and tab, which could move the cursor or start an escape sequence, become `.`; carriage
/// returns go away.
pub fn printable(bytes: &[u8]) -> Vec<u8> {
    bytes
        .iter()
        .filter(|&&byte| byte != b'\r')
        .map(|&byte| match byte {
            b'\n' | b'\t' | 0x20..=0x7e => byte,
            _ => b'.',
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_align_and_lines_have_no_trailing_space() {
        let mut table = Table::new(&["NAME", ">MS"]);
        table.row(["a".into(), "1.5".into()]);
        table.row(["long".into(), String::new()]);
        table.row(["b".into(), "12.25".into()]);
        assert_eq!(
            table.render(),
            "NAME      MS\na        1.5\nlong\nb      12.25\n"
        );
    }

    #[test]
    fn a_table_counts_characters_not_bytes() {
        let mut table = Table::new(&["A", "B"]);
        table.row(["µ".into(), "x".into()]);
        assert_eq!(table.render(), "A   B\nµ   x\n");
    }

    #[test]
    fn ages_show_one_unit() {
        for (seconds, text) in [
            (0, "0s"),
            (59, "59s"),
            (60, "1m"),
            (7199, "1h"),
            (200_000, "2d"),
        ] {
            assert_eq!(largest_unit(Duration::from_secs(seconds)), text);
        }
        assert_eq!(age(0), "");
    }

    #[test]
    fn escape_sequences_of_a_guest_do_not_reach_the_terminal() {
        assert_eq!(printable(b"ok\r\n\x1b[2J\x07\ttab\xc3"), b"ok\n.[2J.\ttab.");
    }

    #[test]
    fn short_ids_do_not_cut_short_text() {
        assert_eq!(short_id("abc"), "abc");
        assert_eq!(short_id(&"f".repeat(64)), "f".repeat(13));
    }
}
