//! Takes samples from a source: text, documents, or token ids.

use std::{collections::BinaryHeap, path::Path};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{
    Error, Extent, Tokens,
    document::{Text, documents},
    places,
    tokens::check_vocabulary,
};
use crate::{
    limits,
    random::SplitMix64,
    records::{self, Form, records},
};

/// The segments of the text that become calibration samples.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Selection {
    /// Segments at random places of the whole text.
    #[default]
    Random,
    /// Consecutive segments of the whole text, from its start.
    Sequential,
    /// A random segment of each of some random documents that are longer than a segment, as
    /// SparseGPT and Wanda sample C4.
    Documents,
    /// Documents tokenised one by one and packed end to end, from the first.
    Packed,
}

/// The requested samples: number, length and selection.
#[derive(Clone, Copy, Debug)]
pub struct Samples {
    /// Number of samples for statistics.
    pub count: usize,
    /// Number of held-out samples after them, which have no token in common with them.
    pub held_out: usize,
    /// Number of tokens of a sample.
    pub sequence_length: usize,
    /// Seed of the random places.
    pub seed: u64,
    /// The selection of segments.
    pub selection: Selection,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct TokenIds {
    token_ids: Vec<Vec<u32>>,
}

/// The calibration samples of a source, the held-out ones last: a JSON file `{"token_ids": [[…],
/// …]}`, whose rows are used as they are, a file of documents, or any other file as one text. No
/// token of the source is both in a held-out sample and in another one.
///
/// # Errors
/// If the source cannot be read, is not of its form, or is too short.
pub fn samples(source: &Text, wanted: Samples, tokens: &Tokens) -> Result<Vec<Vec<u32>>, Error> {
    let Samples { held_out, sequence_length: length, seed, selection, .. } = wanted;
    let count = wanted.count + held_out;
    if let Some(rows) = token_ids(&source.path, count, tokens.vocabulary())? {
        return Ok(rows);
    }
    let too_short =
        |found: usize, wanted: String| Error::TooShort { path: source.path.clone(), found, wanted };
    match selection {
        Selection::Sequential => {
            let ids = tokens.encode(&source.read()?)?;
            if ids.len() / length < count {
                return Err(too_short(ids.len(), format!("{count} × {length}")));
            }
            Ok(ids.chunks_exact(length).take(count).map(<[u32]>::to_vec).collect())
        }
        Selection::Random => {
            let ids = tokens.encode(&source.read()?)?;
            let places = places::places(ids.len(), &wanted).ok_or_else(|| {
                let least = places::least(&wanted);
                too_short(
                    ids.len(),
                    match held_out {
                        0 => format!("at least {least}"),
                        _ => format!("at least {least}, half of them for the held-out samples,"),
                    },
                )
            })?;
            Ok(places.into_iter().map(|start| ids[start..start + length].to_vec()).collect())
        }
        Selection::Documents => {
            // Every document draws a number, and the lowest win. One pass holds only the samples,
            // and tokenises few other documents.
            let mut random = SplitMix64::new(seed);
            let mut chosen = BinaryHeap::new();
            for document in documents(source)? {
                let (document, draw) = (document?, (random.bits(), random.bits()));
                let worst = chosen.peek().map(|(draw, _)| *draw);
                let loses = chosen.len() == count && worst.is_some_and(|worst| draw >= worst);
                // A token has at least one byte.
                if loses || document.len() <= length {
                    continue;
                }
                let ids = tokens.encode(&document)?;
                if ids.len() > length {
                    let start = SplitMix64::new(draw.1).below(ids.len() - length);
                    chosen.push((draw, ids[start..start + length].to_vec()));
                    if chosen.len() > count {
                        chosen.pop();
                    }
                }
            }
            if chosen.len() < count {
                let path = source.path.clone();
                return Err(Error::FewDocuments { path, found: chosen.len(), count, length });
            }
            Ok(chosen.into_sorted_vec().into_iter().map(|(_, ids)| ids).collect())
        }
        Selection::Packed => {
            let mut packed: Vec<u32> = Vec::new();
            for document in documents(source)? {
                packed.extend(tokens.encode(&document?)?);
                if packed.len() >= count * length {
                    break;
                }
            }
            if packed.len() < count * length {
                return Err(too_short(packed.len(), format!("{count} × {length}")));
            }
            Ok(packed.chunks_exact(length).take(count).map(<[u32]>::to_vec).collect())
        }
    }
}

/// Number and lengths of the samples that [`samples`] gives; does not read texts.
///
/// # Errors
/// If the source has token ids that are malformed or too few.
pub fn extent(source: &Text, wanted: Samples, vocabulary: usize) -> Result<Extent, Error> {
    let Samples { held_out, sequence_length, .. } = wanted;
    let count = wanted.count + held_out;
    Ok(match token_ids(&source.path, count, vocabulary)? {
        Some(rows) => Extent::of_samples(&rows, held_out),
        None => Extent::of_equal(wanted.count, held_out, sequence_length),
    })
}

/// The rows of token ids, if the file is a JSON object with token ids; otherwise `None`.
fn token_ids(
    source: &Path,
    count: usize,
    vocabulary: usize,
) -> Result<Option<Vec<Vec<u32>>>, Error> {
    // `.json` is also common for JSON Lines and lists of records.
    let named = source.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("json"));
    if !named || Form::of(source) != Form::Json {
        return Ok(None);
    }
    let record = match records(source, None)?.next() {
        Some(Ok(record)) if !record.fields.contains_key("token_ids") => return Ok(None),
        Some(Err(error @ records::Error::Io { .. })) => return Err(error.into()),
        Some(Err(error)) => Some(error),
        _ => None,
    };
    let wrong = |problem: String| Error::TokenIds { path: source.to_owned(), problem };
    let bytes = limits::read(source, limits::TOKEN_IDS)
        .map_err(|e| Error::Io { path: source.to_owned(), source: e })?;
    let TokenIds { token_ids: mut rows } = serde_json::from_slice(&bytes).map_err(|e| {
        wrong(match &record {
            None => format!("expected {{\"token_ids\": [[…], …]}}: {e}"),
            Some(error) => format!(
                "expected JSON Lines, a list of objects, or {{\"token_ids\": [[…], …]}}: {error}"
            ),
        })
    })?;
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
    Ok(Some(rows))
}

/// The segments of a text for an evaluation: consecutive, from the start, at most `limit`. An
/// incomplete segment at the end is dropped, unless it is the only one.
///
/// # Errors
/// If the text cannot be read, or has less than two tokens, so that there is nothing to predict.
pub fn segments(
    text: &Text,
    sequence_length: usize,
    limit: Option<usize>,
    tokens: &Tokens,
) -> Result<Vec<Vec<u32>>, Error> {
    let ids = tokens.encode(&text.read()?)?;
    if ids.len() < 2 {
        let (found, wanted) = (ids.len(), "at least 2".into());
        return Err(Error::TooShort { path: text.path.clone(), found, wanted });
    }
    if ids.len() < sequence_length {
        return Ok(vec![ids]);
    }
    let whole = ids.chunks_exact(sequence_length).map(<[u32]>::to_vec);
    Ok(whole.take(limit.unwrap_or(usize::MAX)).collect())
}

#[cfg(test)]
mod tests {
    use std::{fs, path::PathBuf};

    use super::*;

    fn file(dir: &Path, name: &str, contents: &[u8]) -> PathBuf {
        let path = dir.join(name);
        fs::write(&path, contents).unwrap();
        path
    }

    const WANTED: Samples = Samples {
        count: 2,
        held_out: 0,
        sequence_length: 3,
        seed: 0,
        selection: Selection::Sequential,
    };

    /// A tokenizer with a token per word `w0` … `w9`, and `w9` before each text.
    fn tokens(dir: &Path, vocabulary: usize, special: bool) -> Tokens {
        let words: serde_json::Map<_, _> = (0..10).map(|i| (format!("w{i}"), i.into())).collect();
        let first = serde_json::json!({"SpecialToken": {"id": "w9", "type_id": 0}});
        let text = serde_json::json!({"Sequence": {"id": "A", "type_id": 0}});
        let tokenizer = serde_json::json!({
            "version": "1.0", "truncation": null, "padding": null,
            "added_tokens": [{"id": 9, "content": "w9", "single_word": false, "lstrip": false,
                "rstrip": false, "normalized": false, "special": true}],
            "normalizer": null, "pre_tokenizer": {"type": "WhitespaceSplit"},
            "post_processor": {"type": "TemplateProcessing", "single": [first, text], "pair": [],
                "special_tokens": {"w9": {"id": "w9", "ids": [9], "tokens": ["w9"]}}},
            "decoder": null,
            "model": {"type": "WordLevel", "vocab": words, "unk_token": "w0"}
        });
        file(dir, "tokenizer.json", tokenizer.to_string().as_bytes());
        Tokens::of(dir, vocabulary, special)
    }

    fn take(
        path: &Path,
        selection: Selection,
        count: usize,
        tokens: &Tokens,
    ) -> Result<Vec<Vec<u32>>, Error> {
        samples(&Text::from(path), Samples { selection, count, ..WANTED }, tokens)
    }

    #[test]
    fn sequential_segments_start_at_the_start() {
        let dir = tempfile::tempdir().unwrap();
        let plain = tokens(dir.path(), 10, false);
        let text = file(dir.path(), "text.txt", b"w1 w2 w3 w4 w5 w6 w7");
        let sequential = |count, tokens: &Tokens| take(&text, Selection::Sequential, count, tokens);
        assert_eq!(sequential(2, &plain).unwrap(), [[1, 2, 3], [4, 5, 6]]);
        let special = tokens(dir.path(), 10, true);
        assert_eq!(sequential(2, &special).unwrap(), [[9, 1, 2], [3, 4, 5]]);
        let error = sequential(3, &plain).unwrap_err();
        assert!(error.to_string().contains("7 tokens, and 3 × 3"), "{error}");
        let error = sequential(2, &tokens(dir.path(), 7, false)).unwrap_err();
        assert!(matches!(error, Error::Vocabulary { id: 7, vocabulary: 7, .. }), "{error}");
        let text = Text::from(text.as_path());
        assert_eq!(segments(&text, 3, None, &plain).unwrap(), [[1, 2, 3], [4, 5, 6]]);
        assert_eq!(segments(&text, 3, Some(1), &plain).unwrap(), [[1, 2, 3]]);
        assert_eq!(segments(&text, 30, None, &plain).unwrap()[0].len(), 7);
    }

    #[test]
    fn random_segments_depend_on_the_seed_alone() {
        let dir = tempfile::tempdir().unwrap();
        let tokens = tokens(dir.path(), 10, false);
        let text = file(dir.path(), "text.txt", b"w1 w2 w3 w4 w5 w6 w7 w8 w9 w1 w2 w3");
        let random = |seed| {
            let wanted = Samples { selection: Selection::Random, seed, count: 8, ..WANTED };
            samples(&Text::from(text.as_path()), wanted, &tokens).unwrap()
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
        let plain = tokens(dir.path(), 10, false);
        let lines =
            b"{\"text\": \"w1 w2\", \"id\": 1}\n\n{\"text\": \"w3\"}\n{\"text\": \"w4 w5 w6 w7\"}";
        for name in ["c.jsonl", "c.json"] {
            let path = file(dir.path(), name, lines);
            let found = take(&path, Selection::Sequential, 2, &plain).unwrap();
            assert_eq!(found, [[1, 2, 3], [4, 5, 6]]);
            let special = tokens(dir.path(), 10, true);
            let packed = take(&path, Selection::Packed, 3, &special).unwrap();
            assert_eq!(packed, [[9, 1, 2], [9, 3, 9], [4, 5, 6]]);
            for seed in 0..5 {
                let wanted = Samples { count: 1, seed, selection: Selection::Documents, ..WANTED };
                let found = samples(&Text::from(path.as_path()), wanted, &plain).unwrap();
                // The end of a document is never in a segment, as in Wanda's code.
                assert_eq!(found, [[4, 5, 6]]);
            }
            let error = take(&path, Selection::Documents, 2, &plain).unwrap_err().to_string();
            assert!(error.contains("1 document longer than 3 tokens, and 2"), "{error}");
        }
        let path = file(dir.path(), "d.jsonl", lines);
        let named = Text { field: Some("body".into()), ..Text::from(path.as_path()) };
        let error = samples(&named, WANTED, &plain).unwrap_err().to_string();
        assert!(error.contains("d.jsonl, line 1: no field `body`"), "{error}");
        let first =
            Text { documents: Some(2), join: Some(" w8 ".into()), ..Text::from(path.as_path()) };
        assert_eq!(segments(&first, 4, None, &plain).unwrap(), [[1, 2, 8, 3]]);
    }

    #[test]
    fn a_missing_tokenizer_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let text = file(dir.path(), "text.txt", b"w1");
        let tokens = Tokens::of(dir.path(), 10, true);
        let error = take(&text, Selection::Random, 1, &tokens).unwrap_err().to_string();
        assert!(error.contains("tokenizer.json"), "{error}");
    }

    #[test]
    fn token_ids_are_used_as_they_are() {
        let dir = tempfile::tempdir().unwrap();
        let tokens = tokens(dir.path(), 10, true);
        let ids = file(dir.path(), "c.json", b"{\"token_ids\": [[1, 2], [3], [4]]}");
        let found = take(&ids, Selection::Random, 2, &tokens).unwrap();
        assert_eq!(found, [vec![1, 2], vec![3]]);
        let wanted = Samples { count: 1, held_out: 1, ..WANTED };
        let found = extent(&Text::from(ids.as_path()), wanted, 10).unwrap();
        let expected = Extent { samples: 1, held_out: 1, shortest: 1, longest: 2, tokens: 3 };
        assert_eq!(found, expected);
        let text = file(dir.path(), "c.txt", b"");
        let found = extent(&Text::from(text.as_path()), wanted, 10).unwrap();
        assert_eq!(found, Extent { shortest: 3, longest: 3, tokens: 6, ..expected });
        for (contents, expected) in [
            (&b"{\"token_ids\": [[1]]}"[..], "2 rows (there are 1)"),
            (b"{\"token_ids\": [[1], []]}", "row 1"),
            (b"{\"token_ids\": [[1], [99]]}", "99"),
            (b"{\"ids\": []}", "no field `text`"),
            (b"[[1]]", "token_ids"),
        ] {
            let path = file(dir.path(), "bad.json", contents);
            let error = take(&path, Selection::Random, 2, &tokens).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }
}
