//! A tokenizer whose output is at most a small multiple of the text. A `tokenizer.json` of a few
//! kilobytes can say that a letter becomes two, over and over: each of its parts is checked when it
//! is read and, where that does not suffice, before it processes a text.

use std::{ops::ControlFlow, sync::OnceLock};

use serde::{Deserialize, Deserializer, de::Error as _};
use serde_json::Value;
use tokenizers::{
    Decoder, DecoderWrapper, Encoding, Model, ModelWrapper, NormalizedString, Normalizer,
    NormalizerWrapper, OffsetReferential, OffsetType, PostProcessor, PostProcessorWrapper,
    PreTokenizedString, PreTokenizer, PreTokenizerWrapper, Result, TokenizerImpl,
    normalizers::{Precompiled, Replace},
    processors::template::TemplateProcessing,
    utils::SysRegex,
};

/// A tokenizer with bounded parts.
pub(super) type Bounded =
    TokenizerImpl<ModelWrapper, Normalizers, PreTokenizers, Processor, Decoders>;

/// Maximum growth of a text in bytes: a factor, then a constant. Spaces written as `▁` are three
/// times as long, bytes written as letters twice.
const GROWTH: usize = 8;
const SLACK: usize = 64;
/// Maximum growth of a text by Unicode normalization, lower-casing and the like: U+FDFA becomes
/// eleven times as long.
const UNICODE: usize = 12;
/// Maximum number of normalizers, and of pre-tokenizers, in sequence.
const PARTS: usize = 64;
/// Maximum number of tokens added to a text.
const ADDED: usize = 256;
/// Maximum length in bytes of the unknown token, and of a prefix or suffix of a part of a word.
const NAME: usize = 256;
/// Length in bytes of the pieces in which a text is normalized to measure its growth.
const PIECE: usize = 1 << 12;

/// The tokenizer in the bytes of a `tokenizer.json`.
///
/// # Errors
/// If it is broken, or could make too much of a text.
pub(super) fn read(bytes: &[u8]) -> std::result::Result<Bounded, String> {
    let mut tokenizer: Bounded = serde_json::from_slice(bytes).map_err(|e| e.to_string())?;
    check_model(tokenizer.get_model())?;
    check(&tokenizer)?;
    // Padding and truncation left over from training would shorten the text.
    tokenizer.with_padding(None);
    tokenizer.with_truncation(None).map_err(|e| e.to_string())?;
    Ok(tokenizer)
}

/// Checks whether a text that the tokenizer processed, or a token, became too long.
///
/// # Errors
/// If one did.
pub(super) fn check(tokenizer: &Bounded) -> std::result::Result<(), String> {
    let problem = tokenizer.get_normalizer().and_then(|normalizers| normalizers.problem.get());
    problem.map_or(Ok(()), |problem| Err(problem.clone()))
}

fn grows(part: &str) -> String {
    format!(
        "its {part} expand a text to more than {GROWTH} times its size; download the file from the \
         model's publisher"
    )
}

/// Maximum length in bytes of a text of `length` bytes after processing.
fn most(length: usize) -> usize {
    length.saturating_mul(GROWTH).saturating_add(SLACK)
}

/// Normalizers in sequence.
#[derive(Debug)]
pub(super) struct Normalizers {
    parts: Vec<Part>,
    /// Why a text was not normalized. The library drops the errors of normalizers.
    problem: OnceLock<String>,
}

/// A normalizer that is not a sequence.
#[derive(Debug)]
struct Part {
    normalizer: NormalizerWrapper,
    /// Pattern that it replaces, if any.
    pattern: Option<Pattern>,
}

#[derive(Debug)]
enum Pattern {
    Text(String),
    Regex(SysRegex),
}

impl<'de> Deserialize<'de> for Normalizers {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        let value = Value::deserialize(deserializer)?;
        check_charsmaps(&value).map_err(D::Error::custom)?;
        let mut parts = Vec::new();
        let whole = serde_json::from_value(value).map_err(D::Error::custom)?;
        flatten(whole, &mut parts).map_err(D::Error::custom)?;
        if parts.len() > PARTS {
            return Err(D::Error::custom(format!("more than {PARTS} normalizers")));
        }
        Ok(Self { parts, problem: OnceLock::new() })
    }
}

fn flatten(normalizer: NormalizerWrapper, parts: &mut Vec<Part>) -> Result<()> {
    let pattern = match normalizer {
        NormalizerWrapper::Sequence(sequence) => {
            return sequence.into_iter().try_for_each(|of| flatten(of, parts));
        }
        NormalizerWrapper::Replace(ref replace) => Some(Pattern::of(replace)?),
        _ => None,
    };
    parts.push(Part { normalizer, pattern });
    Ok(())
}

/// Checks the SentencePiece tables, whose reader allocates as much as their first number says.
fn check_charsmaps(value: &Value) -> std::result::Result<(), &'static str> {
    match value {
        Value::Array(values) => values.iter().try_for_each(check_charsmaps),
        Value::Object(fields) => fields.iter().try_for_each(|(name, value)| match value.as_str() {
            Some(map) if name == "precompiled_charsmap" => match first_number(map) {
                Some(trie) if trie as usize <= map.len() => Ok(()),
                _ => Err("a precompiled_charsmap that is shorter than it says"),
            },
            _ => check_charsmaps(value),
        }),
        _ => Ok(()),
    }
}

/// The first four bytes of a Base64 text as a little-endian number.
fn first_number(text: &str) -> Option<u32> {
    let sextet = |letter: &u8| {
        Some(u64::from(match letter {
            b'A'..=b'Z' => letter - b'A',
            b'a'..=b'z' => letter - b'a' + 26,
            b'0'..=b'9' => letter - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            _ => return None,
        }))
    };
    let first = text.as_bytes().get(..6)?;
    let bits = first.iter().try_fold(0, |bits, letter| Some(bits << 6 | sextet(letter)?))?;
    Some(((bits >> 4) as u32).swap_bytes())
}

impl Normalizers {
    fn try_normalize(&self, text: &mut NormalizedString) -> std::result::Result<(), String> {
        let most = most(text.get().len());
        for part in &self.parts {
            if part.length(text.get(), most) > most {
                return Err(grows("normalizers"));
            }
            part.normalizer.normalize(text).map_err(|e| e.to_string())?;
        }
        Ok(())
    }
}

impl Normalizer for Normalizers {
    fn normalize(&self, text: &mut NormalizedString) -> Result<()> {
        if self.problem.get().is_none()
            && let Err(problem) = self.try_normalize(text)
        {
            self.problem.get_or_init(|| problem);
        }
        Ok(())
    }
}

impl Part {
    /// Maximum length in bytes of the normalized text; any number above `most` if it exceeds
    /// `most`.
    fn length(&self, text: &str, most: usize) -> usize {
        match (&self.normalizer, &self.pattern) {
            (NormalizerWrapper::Replace(replace), Some(pattern)) => {
                pattern.replaced(text, replace.content.len(), most)
            }
            (NormalizerWrapper::Prepend(prepend), _) => text.len() + prepend.prepend.len(),
            (NormalizerWrapper::Precompiled(map), _) => mapped(map, text, most),
            _ => self.by_letters(text, most),
        }
    }

    /// The same for a normalizer that works letter by letter.
    fn by_letters(&self, text: &str, most: usize) -> usize {
        let longest = text.len().saturating_mul(UNICODE);
        if longest <= most {
            return longest;
        }
        sum(pieces(text), most, |piece| {
            let mut piece = NormalizedString::from(piece);
            // If it fails here, it fails on the text as well.
            let _ = self.normalizer.normalize(&mut piece);
            piece.get().len()
        })
    }
}

/// Sums until the sum exceeds `most`.
fn sum<T>(items: impl Iterator<Item = T>, most: usize, mut of: impl FnMut(T) -> usize) -> usize {
    let mut items = items;
    let sum = items.try_fold(0_usize, |sum, item| match sum.saturating_add(of(item)) {
        sum if sum > most => ControlFlow::Break(sum),
        sum => ControlFlow::Continue(sum),
    });
    match sum {
        ControlFlow::Break(sum) | ControlFlow::Continue(sum) => sum,
    }
}

/// Splits a text into pieces of about [`PIECE`] bytes.
fn pieces(text: &str) -> impl Iterator<Item = &str> {
    let mut rest = text;
    std::iter::from_fn(move || {
        let end = rest.len().min(PIECE);
        let end = (end..=rest.len()).find(|&end| rest.is_char_boundary(end))?;
        let (piece, after) = rest.split_at(end);
        rest = after;
        (!piece.is_empty()).then_some(piece)
    })
}

/// Maximum length in bytes of a text after a SentencePiece table. The table replaces letters, and
/// groups of letters of up to five bytes, by the entry of the shortest known prefix.
fn mapped(map: &Precompiled, text: &str, most: usize) -> usize {
    sum(text.char_indices(), most, |(at, letter)| {
        let end = (at + letter.len_utf8()..=at + 5).rev().find(|&end| text.is_char_boundary(end));
        let group = end.map_or("", |end| &text[at..end]);
        map.transform(group).map_or(0, str::len).max(letter.len_utf8())
    })
}

impl Pattern {
    fn of(replace: &Replace) -> Result<Self> {
        #[derive(Deserialize)]
        enum Written {
            String(String),
            Regex(String),
        }
        let written = serde_json::to_value(replace)?["pattern"].take();
        Ok(match serde_json::from_value(written)? {
            Written::String(text) => Self::Text(text),
            Written::Regex(regex) => Self::Regex(SysRegex::new(&regex)?),
        })
    }

    /// Length in bytes of the text with each match replaced by `content` bytes.
    fn replaced(&self, text: &str, content: usize, most: usize) -> usize {
        let matches = match self {
            Self::Text(pattern) => text.len() / pattern.len().max(1) + 1,
            Self::Regex(_) => text.len() + 1,
        };
        let longest = text.len().saturating_add(matches.saturating_mul(content));
        if longest <= most {
            return longest;
        }
        match self {
            Self::Text(pattern) => {
                let matches = text.matches(pattern.as_str()).count();
                let removed = matches * pattern.len();
                (text.len() - removed).saturating_add(matches.saturating_mul(content))
            }
            Self::Regex(regex) => {
                let (matches, removed) = regex
                    .find_iter(text)
                    .fold((0_usize, 0), |sum, at| (sum.0 + 1, sum.1 + at.1 - at.0));
                (text.len() - removed).saturating_add(matches.saturating_mul(content))
            }
        }
    }
}

/// Pre-tokenizers in sequence.
#[derive(Debug)]
pub(super) struct PreTokenizers(Vec<PreTokenizerWrapper>);

impl<'de> Deserialize<'de> for PreTokenizers {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        fn flatten(part: PreTokenizerWrapper, parts: &mut Vec<PreTokenizerWrapper>) {
            match part {
                PreTokenizerWrapper::Sequence(sequence) => {
                    sequence.into_iter().for_each(|part| flatten(part, parts));
                }
                part => parts.push(part),
            }
        }
        let mut parts = Vec::new();
        flatten(PreTokenizerWrapper::deserialize(deserializer)?, &mut parts);
        if parts.len() > PARTS {
            return Err(D::Error::custom(format!("more than {PARTS} pre-tokenizers")));
        }
        Ok(Self(parts))
    }
}

impl PreTokenizer for PreTokenizers {
    fn pre_tokenize(&self, text: &mut PreTokenizedString) -> Result<()> {
        for part in &self.0 {
            // One pre-tokenizer alone makes the text at most eight times as long.
            part.pre_tokenize(text)?;
            let splits = text.get_splits(OffsetReferential::Original, OffsetType::Byte);
            let length: usize = splits.iter().map(|(split, _, _)| split.len()).sum();
            let original = splits.iter().map(|(_, (_, end), _)| *end).max();
            if length > most(original.unwrap_or(0)) {
                return Err(grows("pre-tokenizers").into());
            }
        }
        Ok(())
    }
}

/// Adds special tokens.
#[derive(Debug)]
pub(super) struct Processor(PostProcessorWrapper);

impl<'de> Deserialize<'de> for Processor {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        let processor = PostProcessorWrapper::deserialize(deserializer)?;
        check_processor(&processor).map_err(D::Error::custom)?;
        Ok(Self(processor))
    }
}

fn check_processor(processor: &PostProcessorWrapper) -> std::result::Result<(), String> {
    match processor {
        PostProcessorWrapper::Sequence(parts) => {
            parts.as_ref().iter().try_for_each(check_processor)
        }
        PostProcessorWrapper::Template(template) => check_template(template),
        _ => Ok(()),
    }
}

/// Checks that a template contains each text once, and few other tokens.
fn check_template(template: &TemplateProcessing) -> std::result::Result<(), String> {
    let written = serde_json::to_value(template).map_err(|e| e.to_string())?;
    let texts = |name: &str| {
        let pieces = written[name].as_array().map_or(&[][..], Vec::as_slice);
        pieces.iter().filter(|piece| piece.get("Sequence").is_some()).count()
    };
    let added = template.get_added_single().max(template.get_added_pair());
    let said = written["special_tokens"].to_string().len();
    if texts("single") > 1 || texts("pair") > 2 {
        return Err("its post_processor has a text more than once".into());
    }
    if added > ADDED || said > ADDED * ADDED {
        return Err(format!("its post_processor adds more than {ADDED} tokens"));
    }
    Ok(())
}

impl PostProcessor for Processor {
    fn added_tokens(&self, is_pair: bool) -> usize {
        self.0.added_tokens(is_pair)
    }

    fn process_encodings(&self, encodings: Vec<Encoding>, special: bool) -> Result<Vec<Encoding>> {
        self.0.process_encodings(encodings, special)
    }
}

/// Decoders in sequence, each with the pattern that it replaces, if any.
#[derive(Debug)]
pub(super) struct Decoders(Vec<(DecoderWrapper, Option<Pattern>)>);

impl<'de> Deserialize<'de> for Decoders {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        fn flatten(
            decoder: &DecoderWrapper,
            parts: &mut Vec<(DecoderWrapper, Option<Pattern>)>,
        ) -> Result<()> {
            let pattern = match decoder {
                DecoderWrapper::Sequence(sequence) => {
                    return sequence.get_decoders().iter().try_for_each(|of| flatten(of, parts));
                }
                DecoderWrapper::Replace(replace) => Some(Pattern::of(replace)?),
                _ => None,
            };
            parts.push((decoder.clone(), pattern));
            Ok(())
        }
        let mut parts = Vec::new();
        flatten(&DecoderWrapper::deserialize(deserializer)?, &mut parts)
            .map_err(D::Error::custom)?;
        if parts.len() > PARTS {
            return Err(D::Error::custom(format!("more than {PARTS} decoders")));
        }
        Ok(Self(parts))
    }
}

impl Decoder for Decoders {
    fn decode_chain(&self, mut tokens: Vec<String>) -> Result<Vec<String>> {
        let length = |tokens: &[String]| tokens.iter().map(String::len).sum::<usize>();
        let most = most(length(&tokens) + tokens.len());
        for (decoder, pattern) in &self.0 {
            if let (DecoderWrapper::Replace(replace), Some(pattern)) = (decoder, pattern) {
                let replaced =
                    |token: &String| pattern.replaced(token, replace.content.len(), most);
                if sum(tokens.iter(), most, replaced) > most {
                    return Err(grows("decoders").into());
                }
            }
            // Every other decoder adds a letter to a token, or at most doubles its bytes.
            tokens = decoder.decode_chain(tokens)?;
            if length(&tokens) > most {
                return Err(grows("decoders").into());
            }
        }
        Ok(tokens)
    }
}

/// Checks that no token has a name much longer than its text: each token stores a copy.
fn check_model(model: &ModelWrapper) -> std::result::Result<(), String> {
    let (names, bpe) = match model {
        ModelWrapper::BPE(bpe) => {
            let names = [&bpe.unk_token, &bpe.continuing_subword_prefix, &bpe.end_of_word_suffix];
            (names.map(Option::as_deref), Some(bpe))
        }
        ModelWrapper::WordPiece(model) => {
            let prefix = &model.continuing_subword_prefix;
            ([Some(model.unk_token.as_str()), Some(prefix.as_str()), None], None)
        }
        ModelWrapper::WordLevel(model) => ([Some(model.unk_token.as_str()), None, None], None),
        ModelWrapper::Unigram(_) => ([None; 3], None),
    };
    if names.into_iter().flatten().any(|name| name.len() > NAME) {
        return Err(format!("an unknown token's name, or an affix, of more than {NAME} bytes"));
    }
    let vocabulary = bpe.map(|bpe| (bpe, bpe.get_vocab()));
    let longer = vocabulary.iter().flat_map(|(bpe, tokens)| {
        tokens.iter().filter(move |(token, id)| {
            bpe.id_to_token(**id).is_some_and(|name| name.len() > most(token.len()))
        })
    });
    match longer.map(|(_, id)| *id).min() {
        Some(id) => Err(format!("two tokens of very different lengths have the id {id}")),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;
    use crate::catch_panic::catch_panic;

    /// A tokenizer of letters, with these parts.
    fn tokenizer(normalizer: Value, pre_tokenizer: Value, processor: Value) -> Vec<u8> {
        let vocab = json!({ "?": 0, "e": 1, "<s>": 2 });
        let model = json!({ "type": "BPE", "vocab": vocab, "merges": [], "unk_token": "?" });
        json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": [],
            "normalizer": normalizer, "pre_tokenizer": pre_tokenizer,
            "post_processor": processor, "decoder": null, "model": model
        })
        .to_string()
        .into_bytes()
    }

    /// How many tokens a text has, or why it has none.
    fn count(file: &[u8], text: &str) -> std::result::Result<usize, String> {
        catch_panic(|| {
            let tokenizer = read(file)?;
            let encoding = tokenizer.encode_fast(text, true).map_err(|e| e.to_string())?;
            check(&tokenizer).map(|()| encoding.len())
        })?
    }

    fn replace(pattern: Value, content: &str) -> Value {
        json!({ "type": "Replace", "pattern": pattern, "content": content })
    }

    fn sequence(normalizers: Vec<Value>) -> Value {
        json!({ "type": "Sequence", "normalizers": normalizers })
    }

    #[test]
    fn what_grows_is_refused() {
        let text = "eeee the tree sees ".repeat(100);
        let long = "e".repeat(3000);
        let double = |pattern: Value| sequence(vec![replace(pattern, "ee"); 40]);
        let bytes = json!({ "type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true,
            "use_regex": true });
        for (normalizer, pre_tokenizer) in [
            (double(json!({ "String": "e" })), Value::Null),
            (double(json!({ "Regex": "e" })), Value::Null),
            (sequence(vec![double(json!({ "String": "e" })); 1]), Value::Null),
            (replace(json!({ "String": "e" }), &long), Value::Null),
            (replace(json!({ "String": "" }), &long), Value::Null),
            (replace(json!({ "Regex": "(?=e)" }), &long), Value::Null),
            (json!({ "type": "Prepend", "prepend": "e".repeat(30_000) }), Value::Null),
            (sequence(vec![json!({ "type": "ByteLevel" }); 40]), Value::Null),
            (Value::Null, json!({ "type": "Sequence", "pretokenizers": vec![bytes; 40] })),
        ] {
            let file = tokenizer(normalizer.clone(), pre_tokenizer, Value::Null);
            let error = count(&file, &text).unwrap_err();
            assert!(error.contains("more than 8 times"), "{normalizer}: {error}");
        }
        let parts = sequence(vec![json!({ "type": "NFC" }); 65]);
        let error = count(&tokenizer(parts, Value::Null, Value::Null), "e").unwrap_err();
        assert!(error.contains("more than 64 normalizers"), "{error}");
    }

    #[test]
    fn the_text_of_tokens_is_bounded() {
        let decoded = |decoders: Vec<Value>| {
            let mut file: Value =
                serde_json::from_slice(&tokenizer(Value::Null, Value::Null, Value::Null)).unwrap();
            file["decoder"] = json!({ "type": "Sequence", "decoders": decoders });
            let tokenizer = read(file.to_string().as_bytes())?;
            tokenizer.decode(&[1; 40], true).map_err(|e| e.to_string())
        };
        let double = replace(json!({ "String": "e" }), "ee");
        assert_eq!(decoded(vec![double.clone(), json!({ "type": "Fuse" })]), Ok("e".repeat(80)));
        assert!(
            decoded(vec![double; 40])
                .unwrap_err()
                .contains("decoders expand a text to more than 8 times")
        );
        let long = replace(json!({ "Regex": "e" }), &"e".repeat(3000));
        assert!(
            decoded(vec![long])
                .unwrap_err()
                .contains("decoders expand a text to more than 8 times")
        );
    }

    #[test]
    fn a_table_is_as_long_as_it_says() {
        // The size of its trie is 2³² − 4; AAAA would be none at all.
        for map in ["/P///w==", "AAA"] {
            let normalizer = json!({ "type": "Precompiled", "precompiled_charsmap": map });
            let parts = sequence(vec![normalizer]);
            let error = count(&tokenizer(parts, Value::Null, Value::Null), "e").unwrap_err();
            assert!(error.contains("precompiled_charsmap"), "{error}");
        }
        assert_eq!(first_number("/P///w=="), Some(0xffff_fffc));
        assert_eq!(first_number("BAAAAA=="), Some(4));
    }

    #[test]
    fn special_tokens_are_few() {
        let text = json!({ "Sequence": { "id": "A", "type_id": 0 } });
        let other = json!({ "Sequence": { "id": "B", "type_id": 0 } });
        let special = json!({ "SpecialToken": { "id": "<s>", "type_id": 0 } });
        let template = |single: &[&Value], ids: usize| {
            let tokens = json!({ "<s>": {
                "id": "<s>", "ids": vec![2; ids], "tokens": vec!["<s>"; ids] } });
            let template = json!({ "type": "TemplateProcessing", "single": single,
                "pair": [text, other], "special_tokens": tokens });
            let sequence = json!({ "type": "Sequence", "processors": [template] });
            count(&tokenizer(Value::Null, Value::Null, sequence), "eee")
        };
        assert_eq!(template(&[&special, &text, &special], 1), Ok(5));
        assert!(template(&[&text, &text], 1).unwrap_err().contains("more than once"));
        assert!(template(&[&special, &text], 257).unwrap_err().contains("more than 256"));
        assert!(template(&[&special; 300], 1).unwrap_err().contains("more than 256"));
    }

    #[test]
    fn names_are_short() {
        let long = "?".repeat(3000);
        let model = |model: Value| {
            let mut file: Value =
                serde_json::from_slice(&tokenizer(Value::Null, Value::Null, Value::Null)).unwrap();
            file["model"] = model;
            count(file.to_string().as_bytes(), "xx")
        };
        for name in [
            json!({ "type": "BPE", "vocab": { &long: 0 }, "merges": [], "unk_token": long }),
            json!({ "type": "WordLevel", "vocab": { &long: 0 }, "unk_token": long }),
            json!({ "type": "WordPiece", "vocab": { &long: 0 }, "unk_token": long,
                "continuing_subword_prefix": "", "max_input_chars_per_word": 9 }),
        ] {
            assert!(model(name).unwrap_err().contains("of more than 256 bytes"));
        }
        let twice = json!({ "type": "BPE", "vocab": { "x": 0, &long: 0 }, "merges": [] });
        // Which of the two a number stands for is up to a hash.
        if let Err(error) = model(twice) {
            assert!(error.contains("very different lengths"), "{error}");
        }
    }

    #[test]
    fn usual_parts_do_their_work() {
        let replaced = sequence(vec![
            json!({ "type": "Prepend", "prepend": "▁" }),
            replace(json!({ "String": " " }), "▁"),
        ]);
        let file = tokenizer(replaced, Value::Null, Value::Null);
        assert_eq!(count(&file, "e  e"), Ok(5));
        let forms = ["NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents"];
        let forms = forms.map(|name| json!({ "type": name }));
        let file = tokenizer(sequence(forms.to_vec()), Value::Null, Value::Null);
        // A letter that becomes eighteen, among others.
        let text = format!("{}\u{fdfa}", "e".repeat(100));
        assert_eq!(count(&file, &text), Ok(118));
        let error = count(&file, &"\u{fdfa}".repeat(5000)).unwrap_err();
        assert!(error.contains("more than 8 times"), "{error}");
    }

    fn normalizers() -> impl Strategy<Value = Value> {
        let pattern = prop_oneof![
            "[e ]{0,2}".prop_map(|text| json!({ "String": text })),
            prop::sample::select(vec!["e*", "(?=e)", ".", "e|ee", "^", "\\s+"])
                .prop_map(|regex| json!({ "Regex": regex })),
        ];
        let names = vec!["NFC", "NFD", "NFKC", "NFKD", "Lowercase", "ByteLevel", "Nmt"];
        let part = prop_oneof![
            (pattern, "[e ▁]{0,40}").prop_map(|(pattern, content)| replace(pattern, &content)),
            "[e▁]{0,40}".prop_map(|text| json!({ "type": "Prepend", "prepend": text })),
            prop::sample::select(names).prop_map(|name| json!({ "type": name })),
        ];
        prop::collection::vec(part, 0..9).prop_map(sequence)
    }

    proptest! {
        /// However the parts are put together, a text becomes no more than its multiple.
        #[test]
        fn growth_is_bounded(normalizer in normalizers(), text in "[e é▁\u{fdfa}]{0,60}") {
            let value = normalizer.to_string();
            let Ok(normalizers) = serde_json::from_str::<Normalizers>(&value) else {
                return Ok(());
            };
            let mut normalized = NormalizedString::from(text.as_str());
            // The library panics at some patterns that match nothing at a text's end.
            let Ok(checked) = catch_panic(|| normalizers.try_normalize(&mut normalized)) else {
                return Ok(());
            };
            prop_assert!(normalized.get().len() <= most(text.len()), "{value}");
            if checked.is_ok() {
                let whole: NormalizerWrapper = serde_json::from_str(&value).unwrap();
                let mut expected = NormalizedString::from(text.as_str());
                whole.normalize(&mut expected).unwrap();
                prop_assert_eq!(normalized.get(), expected.get());
            }
        }
    }
}
