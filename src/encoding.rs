//! Detects the encoding of a text by its first bytes. Barber reads UTF-8, with or without a byte
//! order mark.

use std::io;

/// The byte order mark of UTF-8, which is no part of the text.
const MARK: &[u8] = &[0xef, 0xbb, 0xbf];
/// The error of a text in UTF-16 or UTF-32.
pub(crate) const WIDE: &str =
    "text in UTF-16 or UTF-32; save it as UTF-8, as `iconv -f UTF-16 -t UTF-8` does";

/// Removes the byte order mark from the start of a text.
///
/// # Errors
/// If the text is UTF-16 or UTF-32.
pub(crate) fn unmark(text: &mut Vec<u8>) -> io::Result<()> {
    if is_wide(text) {
        return Err(io::Error::new(io::ErrorKind::InvalidData, WIDE));
    }
    if text.starts_with(MARK) {
        text.drain(..MARK.len());
    }
    Ok(())
}

/// Number of bytes of a text's byte order mark.
pub(crate) fn mark(start: &[u8]) -> usize {
    if start.starts_with(MARK) { MARK.len() } else { 0 }
}

/// Whether a text is UTF-16 or UTF-32: by its byte order mark, or because every other byte of its
/// first letters is zero.
pub(crate) fn is_wide(start: &[u8]) -> bool {
    let marked = start.starts_with(&[0xff, 0xfe]) || start.starts_with(&[0xfe, 0xff]);
    let pairs = || start.chunks_exact(2).take(16);
    let zeros = |place: usize| pairs().all(|pair| pair[place] == 0 && pair[1 - place] != 0);
    marked || (start.len() >= 4 && (zeros(0) || zeros(1)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_are_removed_and_wide_text_is_refused() {
        let unmarked = |text: &[u8]| {
            let mut text = text.to_vec();
            unmark(&mut text).map(|()| text)
        };
        assert_eq!(unmarked(b"\xef\xbb\xbf{}").unwrap(), b"{}");
        assert_eq!(unmarked("é, x".as_bytes()).unwrap(), "é, x".as_bytes());
        assert_eq!(unmarked(b"").unwrap(), b"");
        for wide in [&b"\xff\xfea\0"[..], b"\xfe\xff\0a", b"a\0b\0", b"\0a\0b\0c"] {
            assert!(unmarked(wide).unwrap_err().to_string().contains("UTF-16"), "{wide:?}");
        }
    }
}
