//! Tokenises a long text in pieces. A tokenizer takes about sixty times the memory of its text, so
//! a whole evaluation text would take gigabytes.
//!
//! A token may depend on the text around it, so pieces overlap, and are joined where both have the
//! same tokens for a while before and after.

use std::ops::Range;

/// Bytes of a piece, without the overlaps with its neighbours.
const PIECE: usize = 1 << 18;
/// Bytes before and after a join that are in both pieces.
const SHARED: usize = 1 << 13;
/// Number of tokens before and after a join that must be the same in both pieces.
const AGREED: usize = 64;
/// Maximum bytes of a text that is tokenised at once.
pub(super) const MOST: usize = 1 << 21;

/// A token id, and its bytes in the text.
pub(super) type Token = (u32, Range<usize>);

/// The ids of a text's tokens, from those of its pieces; `None` if no two pieces agree within
/// [`MOST`] bytes.
///
/// # Errors
/// The errors of `encode`.
pub(super) fn ids<E>(
    text: &str,
    mut encode: impl FnMut(&str) -> Result<Vec<Token>, E>,
) -> Result<Option<Vec<u32>>, E> {
    let mut tokens_of = |piece: Range<usize>| {
        let mut tokens = encode(&text[piece.clone()])?;
        tokens.iter_mut().for_each(|(_, at)| *at = at.start + piece.start..at.end + piece.start);
        Ok(tokens)
    };
    let mut ids = Vec::with_capacity(text.len() / 3);
    // The piece, its tokens, and the byte from which its tokens are still to be taken.
    let mut piece = 0..boundary(text, PIECE + SHARED);
    let (mut tokens, mut from) = (tokens_of(piece.clone())?, 0);
    for join in (PIECE..text.len()).step_by(PIECE) {
        let next = boundary(text, join - SHARED)..boundary(text, join + PIECE + SHARED);
        let more = tokens_of(next.clone())?;
        if agree(&tokens, &more, join) {
            ids.extend(tokens[at(&tokens, from)..at(&tokens, join)].iter().map(|(id, _)| *id));
            (piece, tokens, from) = (next, more, join);
        } else {
            // The join may be in a long word, such as a line of dashes: the pieces are merged.
            piece.end = next.end;
            if piece.len() > MOST {
                return Ok(None);
            }
            tokens = tokens_of(piece.clone())?;
        }
    }
    ids.extend(tokens[at(&tokens, from)..].iter().map(|(id, _)| *id));
    Ok(Some(ids))
}

/// The last character boundary up to this byte.
pub(super) fn boundary(text: &str, byte: usize) -> usize {
    let byte = byte.min(text.len());
    (0..=byte).rev().find(|&byte| text.is_char_boundary(byte)).unwrap_or(0)
}

/// The index of the first token that starts at this byte or after it.
fn at(tokens: &[Token], byte: usize) -> usize {
    tokens.iter().position(|(_, at)| at.start >= byte).unwrap_or(tokens.len())
}

/// Whether two pieces have the same tokens around a byte.
fn agree(before: &[Token], after: &[Token], join: usize) -> bool {
    let around = |tokens: &'_ [Token]| {
        let middle = at(tokens, join);
        Some(tokens.get(middle.checked_sub(AGREED)?..middle + AGREED)?.to_vec())
    };
    around(before).is_some_and(|tokens| Some(tokens) == around(after))
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use proptest::prelude::*;

    use super::*;

    /// A token a word, which ends with its spaces: the more words before it in the text up to a
    /// line's end, the higher its number, so that a piece's first line is wrong.
    fn words(text: &str) -> Result<Vec<Token>, Infallible> {
        let (mut tokens, mut start, mut number) = (Vec::new(), 0, 0);
        for word in text.split_inclusive([' ', '\n']) {
            number += 1;
            tokens.push((number, start..start + word.len()));
            start += word.len();
            if word.ends_with('\n') {
                number = 0;
            }
        }
        Ok(tokens)
    }

    fn whole(text: &str) -> Vec<u32> {
        words(text).unwrap().into_iter().map(|(id, _)| id).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(20))]

        #[test]
        fn pieces_have_the_tokens_of_the_whole(
            line in prop::collection::vec("[a-zé€]{1,9}", 1..90),
            length in 1..6 * PIECE,
            dashes in 0..PIECE,
        ) {
            let line = line.join(" ") + "\n";
            let mut text = line.repeat(length / line.len() + 1);
            text.insert_str(text.len() / line.len() / 2 * line.len(), &"-".repeat(dashes));
            prop_assert_eq!(ids(&text, words).unwrap().unwrap(), whole(&text));
        }
    }

    #[test]
    fn a_word_without_end_is_not_tokenised() {
        assert_eq!(ids(&"-".repeat(MOST * 2), words).unwrap(), None);
        let text = "-".repeat(MOST / 2) + &" a b\n".repeat(PIECE);
        assert_eq!(ids(&text, words).unwrap().unwrap(), whole(&text));
    }
}
