//! Where the tokens come from: text, JSON Lines with a text field, or token ids.

use std::{fs, path::Path};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Error, Tokens, tokens::check_vocabulary};
use crate::random::SplitMix64;

/// Which segments of the text are the calibration samples.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Selection {
    /// Segments at random places, which the seed decides.
    #[default]
    Random,
    /// Consecutive segments from the start.
    Sequential,
}

/// How many samples of what length are wanted, and which.
#[derive(Clone, Copy, Debug)]
pub struct Samples {
    /// The number of samples.
    pub count: usize,
    /// Tokens of each.
    pub sequence_length: usize,
    /// What decides the random places.
    pub seed: u64,
    /// Which segments.
    pub selection: Selection,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct TokenIds {
    token_ids: Vec<Vec<u32>>,
}

#[derive(Deserialize)]
struct Document {
    text: String,
}

/// The calibration samples of a source: a `.json` file `{"token_ids": [[…], …]}` whose rows are
/// used as they are, a `.jsonl` file with a `text` per line, or any other file as plain text.
///
/// # Errors
/// If the source cannot be read, is not of its form, or is too short.
pub fn samples(
    source: &Path,
    wanted: Samples,
    model: &Path,
    vocabulary: usize,
) -> Result<Vec<Vec<u32>>, Error> {
    let Samples { count, sequence_length: length, seed, selection } = wanted;
    if source.extension().is_some_and(|e| e == "json") {
        return token_ids(source, count, vocabulary);
    }
    let ids = Tokens::open(model, vocabulary)?.encode(&text(source)?)?;
    let too_short =
        |wanted: String| Error::TooShort { path: source.to_owned(), found: ids.len(), wanted };
    match selection {
        Selection::Sequential => {
            if ids.len() / length < count {
                return Err(too_short(format!("{count} × {length}")));
            }
            Ok(ids.chunks_exact(length).take(count).map(<[u32]>::to_vec).collect())
        }
        Selection::Random => {
            let places = (ids.len() + 1).saturating_sub(length);
            if places == 0 {
                return Err(too_short(format!("at least {length}")));
            }
            let mut random = SplitMix64::new(seed);
            let mut segment = || {
                let start = random.below(places);
                ids[start..start + length].to_vec()
            };
            Ok((0..count).map(|_| segment()).collect())
        }
    }
}

fn token_ids(source: &Path, count: usize, vocabulary: usize) -> Result<Vec<Vec<u32>>, Error> {
    let wrong = |problem: String| Error::TokenIds { path: source.to_owned(), problem };
    let text = read(source)?;
    let TokenIds { token_ids: mut rows } = serde_json::from_str(&text)
        .map_err(|e| wrong(format!("expected {{\"token_ids\": [[…], …]}}: {e}")))?;
    if rows.len() < count {
        return Err(Error::TooShort {
            path: source.to_owned(),
            found: rows.iter().map(Vec::len).sum(),
            wanted: format!("{count} rows (there are {})", rows.len()),
        });
    }
    rows.truncate(count);
    for (i, row) in rows.iter().enumerate() {
        if row.is_empty() {
            return Err(wrong(format!("row {i} of `token_ids` is empty")));
        }
        check_vocabulary(source, row, vocabulary)?;
    }
    Ok(rows)
}

/// The segments of a text for an evaluation: consecutive, from the start, at most `limit`. The
/// rest at the end is left out, unless the text is shorter than one segment.
///
/// # Errors
/// If the text cannot be read or has not two tokens: there would be nothing to predict.
pub fn segments(
    path: &Path,
    sequence_length: usize,
    limit: Option<usize>,
    model: &Path,
    vocabulary: usize,
) -> Result<Vec<Vec<u32>>, Error> {
    let ids = Tokens::open(model, vocabulary)?.encode(&text(path)?)?;
    if ids.len() < 2 {
        let (found, wanted) = (ids.len(), "at least 2".into());
        return Err(Error::TooShort { path: path.to_owned(), found, wanted });
    }
    if ids.len() < sequence_length {
        return Ok(vec![ids]);
    }
    let whole = ids.chunks_exact(sequence_length).map(<[u32]>::to_vec);
    Ok(whole.take(limit.unwrap_or(usize::MAX)).collect())
}

fn text(path: &Path) -> Result<String, Error> {
    let text = read(path)?;
    if path.extension().is_none_or(|e| e != "jsonl") {
        return Ok(text);
    }
    let mut documents = Vec::new();
    for (i, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let document: Document = serde_json::from_str(line).map_err(|e| Error::Line {
            path: path.to_owned(),
            line: i + 1,
            problem: format!("expected an object with a `text` field: {e}"),
        })?;
        documents.push(document.text);
    }
    Ok(documents.join("\n\n"))
}

fn read(path: &Path) -> Result<String, Error> {
    let bytes = fs::read(path).map_err(|source| Error::Io { path: path.to_owned(), source })?;
    String::from_utf8(bytes)
        .map_err(|e| Error::NotText { path: path.to_owned(), byte: e.utf8_error().valid_up_to() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::PathBuf;

    fn file(dir: &Path, name: &str, contents: &[u8]) -> PathBuf {
        let path = dir.join(name);
        fs::write(&path, contents).unwrap();
        path
    }

    const WANTED: Samples =
        Samples { count: 2, sequence_length: 3, seed: 0, selection: Selection::Sequential };

    /// A tokenizer with a token per word `w0` … `w9`.
    fn model(dir: &Path) {
        let words: serde_json::Map<_, _> = (0..10).map(|i| (format!("w{i}"), i.into())).collect();
        let tokenizer = serde_json::json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": [],
            "normalizer": null, "pre_tokenizer": {"type": "WhitespaceSplit"},
            "post_processor": null, "decoder": null,
            "model": {"type": "WordLevel", "vocab": words, "unk_token": "w0"}
        });
        file(dir, "tokenizer.json", tokenizer.to_string().as_bytes());
    }

    #[test]
    fn sequential_segments_start_at_the_start() {
        let dir = tempfile::tempdir().unwrap();
        model(dir.path());
        let text = file(dir.path(), "text.txt", b"w1 w2 w3 w4 w5 w6 w7");
        let found = samples(&text, WANTED, dir.path(), 10).unwrap();
        assert_eq!(found, [[1, 2, 3], [4, 5, 6]]);
        let error = samples(&text, Samples { count: 3, ..WANTED }, dir.path(), 10).unwrap_err();
        assert!(error.to_string().contains("7 tokens, and 3 × 3"), "{error}");
        let error = samples(&text, WANTED, dir.path(), 7).unwrap_err();
        assert!(matches!(error, Error::Vocabulary { id: 7, vocabulary: 7, .. }), "{error}");
        assert_eq!(segments(&text, 3, None, dir.path(), 10).unwrap(), [[1, 2, 3], [4, 5, 6]]);
        assert_eq!(segments(&text, 3, Some(1), dir.path(), 10).unwrap(), [[1, 2, 3]]);
        assert_eq!(segments(&text, 30, None, dir.path(), 10).unwrap()[0].len(), 7);
    }

    #[test]
    fn random_segments_depend_on_the_seed_alone() {
        let dir = tempfile::tempdir().unwrap();
        model(dir.path());
        let text = file(dir.path(), "text.txt", b"w1 w2 w3 w4 w5 w6 w7 w8 w9 w1 w2 w3");
        let random = |seed| {
            let wanted = Samples { selection: Selection::Random, seed, count: 8, ..WANTED };
            samples(&text, wanted, dir.path(), 10).unwrap()
        };
        assert_eq!(random(5), random(5));
        assert_ne!(random(5), random(6));
        for segment in random(5) {
            assert_eq!((segment[0] % 9 + 1, segment[1] % 9 + 1), (segment[1], segment[2]));
        }
    }

    #[test]
    fn json_lines_are_documents() {
        let dir = tempfile::tempdir().unwrap();
        model(dir.path());
        let lines = file(
            dir.path(),
            "c.jsonl",
            b"{\"text\": \"w1 w2\", \"id\": 1}\n\n{\"text\": \"w3\"}\n",
        );
        let wanted = Samples { count: 1, ..WANTED };
        assert_eq!(samples(&lines, wanted, dir.path(), 10).unwrap(), [[1, 2, 3]]);
        let bad = file(dir.path(), "bad.jsonl", b"{\"text\": \"w1\"}\n{\"txt\": \"w2\"}\n");
        let error = samples(&bad, wanted, dir.path(), 10).unwrap_err().to_string();
        assert!(error.contains("line 2") && error.contains("text"), "{error}");
    }

    #[test]
    fn token_ids_are_used_as_they_are() {
        let dir = tempfile::tempdir().unwrap();
        let ids = file(dir.path(), "c.json", b"{\"token_ids\": [[1, 2], [3], [4]]}");
        assert_eq!(samples(&ids, WANTED, dir.path(), 10).unwrap(), [vec![1, 2], vec![3]]);
        for (contents, expected) in [
            (&b"{\"token_ids\": [[1]]}"[..], "2 rows (there are 1)"),
            (b"{\"token_ids\": [[1], []]}", "row 1"),
            (b"{\"token_ids\": [[1], [99]]}", "99"),
            (b"{\"ids\": []}", "token_ids"),
            (b"\xff", "byte 0"),
        ] {
            let path = file(dir.path(), "bad.json", contents);
            let error = samples(&path, WANTED, dir.path(), 10).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn a_missing_tokenizer_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let text = file(dir.path(), "text.txt", b"w1");
        let error = samples(&text, WANTED, dir.path(), 10).unwrap_err().to_string();
        assert!(error.contains("tokenizer.json"), "{error}");
    }
}
