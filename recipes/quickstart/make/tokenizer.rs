//! A tokenizer with a token for each word of the text.

use std::{collections::BTreeSet, error::Error, fs, path::Path};

use serde_json::{Map, Value, json};

/// Writes `tokenizer.json` and its configuration for the words of `text`; returns the number of
/// tokens.
pub(crate) fn write(text: &str, dir: &Path) -> Result<usize, Box<dyn Error>> {
    // The pre-tokenizer's own rule: runs of letters and digits, runs of other characters.
    let words: BTreeSet<&str> = text
        .split_whitespace()
        .flat_map(|word| word.split_inclusive(|c: char| !c.is_alphanumeric()))
        .flat_map(|word| {
            let end = word.trim_end_matches(|c: char| !c.is_alphanumeric()).len();
            [&word[..end], &word[end..]]
        })
        .filter(|word| !word.is_empty())
        .collect();
    let special = ["<unk>", "<s>", "</s>"];
    let ids = special.iter().chain(&words).enumerate();
    let vocabulary: Map<String, Value> =
        ids.map(|(id, word)| ((*word).to_owned(), id.into())).collect();
    let size = vocabulary.len();
    let added: Vec<Value> = special
        .iter()
        .enumerate()
        .map(|(id, content)| {
            json!({
                "id": id, "content": content, "special": true, "normalized": false,
                "single_word": false, "lstrip": false, "rstrip": false
            })
        })
        .collect();
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added,
        "normalizer": null, "pre_tokenizer": { "type": "Whitespace" },
        "post_processor": null, "decoder": null,
        "model": { "type": "WordLevel", "vocab": vocabulary, "unk_token": special[0] }
    });
    let configuration = json!({
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 256,
        "unk_token": special[0], "bos_token": special[1], "eos_token": special[2]
    });
    fs::write(dir.join("tokenizer.json"), format!("{tokenizer:#}\n"))?;
    fs::write(dir.join("tokenizer_config.json"), format!("{configuration:#}\n"))?;
    Ok(size)
}
