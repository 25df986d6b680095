//! A model's tokenizer.

use std::{
    cell::OnceCell,
    path::{Path, PathBuf},
};

use bytesize::ByteSize;
use tokenizers::Encoding;

use super::{
    Error,
    bounded::{self, Bounded},
    pieces::{self, MOST, Token, boundary},
};
use crate::{catch_panic::catch_panic, checkpoint::check_inside, limits};

/// Bytes of a text's beginning that is tokenised first, as a test.
const BEGINNING: usize = 1 << 14;

/// A model's tokenizer, from its `tokenizer.json`, which is read on first use.
pub struct Tokens {
    path: PathBuf,
    tokenizer: OnceCell<Bounded>,
    vocabulary: usize,
    special: bool,
}

impl Tokens {
    /// The tokenizer of the checkpoint in `dir`, whose model has `vocabulary` tokens. With
    /// `special`, each text gets the special tokens that the tokenizer adds, such as the one that
    /// begins a text.
    pub fn of(dir: &Path, vocabulary: usize, special: bool) -> Self {
        let path = dir.join("tokenizer.json");
        Self { path, tokenizer: OnceCell::new(), vocabulary, special }
    }

    fn open(&self) -> Result<Bounded, Error> {
        let wrong = |problem: String| Error::Tokenizer { path: self.path.clone(), problem };
        if !self.path.exists() {
            return Err(wrong(
                "missing, and texts need the model's tokenizer: copy it from the model's source, \
                 or write it with transformers' `AutoTokenizer`, `from_pretrained` and \
                 `save_pretrained`"
                    .into(),
            ));
        }
        let dir = self.path.parent().unwrap_or(Path::new(""));
        check_inside(dir, &self.path).map_err(|e| wrong(e.to_string()))?;
        let bytes = limits::read(&self.path, limits::TOKENIZER)
            .map_err(|e| Error::Io { path: self.path.clone(), source: e })?;
        catch_panic(|| bounded::read(&bytes)).map_err(wrong)?.map_err(wrong)
    }

    /// Number of tokens in the model's vocabulary.
    pub fn vocabulary(&self) -> usize {
        self.vocabulary
    }

    fn tokenizer(&self) -> Result<&Bounded, Error> {
        Ok(match self.tokenizer.get() {
            Some(tokenizer) => tokenizer,
            None => {
                let opened = self.open()?;
                self.tokenizer.get_or_init(|| opened)
            }
        })
    }

    /// The text of token ids, without special tokens.
    ///
    /// # Errors
    /// If there is no tokenizer, or it is damaged or fails.
    pub fn decode(&self, ids: &[u32]) -> Result<String, Error> {
        let tokenizer = self.tokenizer()?;
        let wrong = |problem: String| Error::Tokenizer { path: self.path.clone(), problem };
        let text = catch_panic(|| tokenizer.decode(ids, true)).map_err(wrong)?;
        text.map_err(|e| wrong(e.to_string()))
    }

    /// The token ids of a text.
    ///
    /// # Errors
    /// If there is no tokenizer, it is damaged or fails, or gives a token outside the vocabulary.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, Error> {
        let tokenizer = self.tokenizer()?;
        let wrong = |problem: String| Error::Tokenizer { path: self.path.clone(), problem };
        let encode = |text: &str, offsets: bool| -> Result<Encoding, Error> {
            let encode = || match offsets {
                true => tokenizer.encode(text, self.special),
                false => tokenizer.encode_fast(text, self.special),
            };
            let encoding = catch_panic(encode).map_err(wrong)?.map_err(|e| wrong(e.to_string()))?;
            bounded::check(tokenizer).map_err(wrong)?;
            Ok(encoding)
        };
        // A tokenizer that expands a text too much also expands its beginning, in less memory.
        if text.len() > BEGINNING {
            encode(&text[..boundary(text, BEGINNING)], false)?;
        }
        let ids = if text.len() <= MOST {
            encode(text, false)?.get_ids().to_vec()
        } else {
            let tokens = |piece: &str| -> Result<Vec<Token>, Error> {
                let encoding = encode(piece, true)?;
                let places = encoding.get_offsets().iter().map(|(start, end)| *start..*end);
                Ok(encoding.get_ids().iter().copied().zip(places).collect())
            };
            pieces::ids(text, tokens)?.ok_or_else(|| {
                let most = ByteSize(MOST as u64);
                wrong(format!("no word ends within {most} of the text; break it into lines"))
            })?
        };
        check_vocabulary(&self.path, &ids, self.vocabulary)?;
        Ok(ids)
    }
}

pub(super) fn check_vocabulary(path: &Path, ids: &[u32], vocabulary: usize) -> Result<(), Error> {
    match ids.iter().find(|&&id| id as usize >= vocabulary) {
        None => Ok(()),
        Some(&id) => Err(Error::Vocabulary { path: path.to_owned(), id, vocabulary }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_text_has_the_tokens_of_the_whole() {
        let tokens = Tokens::of(Path::new("recipes/quickstart/model"), usize::MAX, true);
        let mut random = crate::random::SplitMix64::new(1);
        let words =
            "it’s a pruned model , whose 1234 weights\n\n are  zero —  HTTP://x.y".split(' ');
        let words: Vec<&str> = words.collect();
        let mut text = String::new();
        while text.len() < 2 * MOST {
            text.push_str(words[random.below(words.len())]);
            text.push_str([" ", "\n", "", "  "][random.below(4)]);
        }
        let whole = tokens.open().unwrap().encode_fast(text.as_str(), true).unwrap();
        assert!(tokens.encode(&text).unwrap() == whole.get_ids());
        let error = tokens.encode(&"x".repeat(2 * MOST)).unwrap_err().to_string();
        assert!(error.ends_with("no word ends within 2.0 MiB of the text; break it into lines"));
    }
}
