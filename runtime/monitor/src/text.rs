//! Text that comes from the guest, made fit for messages and logs.

/// At most `length` bytes of `text`, without control characters except line breaks and tabs: what
/// the guest says ends up on terminals.
pub fn from_guest(text: &str, length: usize) -> String {
    let printable = |c: &char| !c.is_control() || matches!(c, '\n' | '\t');
    text[..text.floor_char_boundary(length)]
        .chars()
        .filter(printable)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escapes_go_and_length_is_kept() {
        assert_eq!(from_guest("a\x1b[31mb\r\n\tc\0", 100), "a[31mb\n\tc");
        assert_eq!(from_guest("häh", 2), "h");
        assert_eq!(from_guest("", 0), "");
    }
}
