//! A model's tokenizer.

use std::{
    cell::OnceCell,
    path::{Path, PathBuf},
};

use bytesize::ByteSize;
use tokenizers::Tokenizer;

use super::{
    Error,
    pieces::{self, MOST, Token},
};
use crate::{checkpoint::check_inside, guard::guarded, limits};

/// A model's tokenizer, as its `tokenizer.json` describes it; read when it is first needed.
pub struct Tokens {
    path: PathBuf,
    tokenizer: OnceCell<Tokenizer>,
    vocabulary: usize,
    special: bool,
}

impl Tokens {
    /// The tokenizer of the checkpoint in `dir`, whose model knows `vocabulary` tokens. With
    /// `special`, each text gets the special tokens that the tokenizer adds, such as one that
    /// begins it.
    pub fn of(dir: &Path, vocabulary: usize, special: bool) -> Self {
        let path = dir.join("tokenizer.json");
        Self { path, tokenizer: OnceCell::new(), vocabulary, special }
    }

    fn open(&self) -> Result<Tokenizer, Error> {
        let wrong = |problem: String| Error::Tokenizer { path: self.path.clone(), problem };
        if !self.path.is_file() {
            return Err(wrong(
                "not there; text needs the model's tokenizer beside its weights".into(),
            ));
        }
        let dir = self.path.parent().unwrap_or(Path::new(""));
        check_inside(dir, &self.path).map_err(|e| wrong(e.to_string()))?;
        let bytes = limits::read(&self.path, limits::TOKENIZER)
            .map_err(|e| Error::Io { path: self.path.clone(), source: e })?;
        let read = guarded(|| Tokenizer::from_bytes(&bytes)).map_err(wrong)?;
        let mut tokenizer = read.map_err(|e| wrong(e.to_string()))?;
        // What a training setup left in the file would cut the text short.
        tokenizer.with_padding(None);
        tokenizer.with_truncation(None).map_err(|e| wrong(e.to_string()))?;
        Ok(tokenizer)
    }

    /// The number of tokens that the model knows.
    pub fn vocabulary(&self) -> usize {
        self.vocabulary
    }

    /// The tokens of a text.
    ///
    /// # Errors
    /// If there is no tokenizer, it is damaged or fails, or gives a token that the model does not
    /// know.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, Error> {
        let tokenizer = match self.tokenizer.get() {
            Some(tokenizer) => tokenizer,
            None => {
                let opened = self.open()?;
                self.tokenizer.get_or_init(|| opened)
            }
        };
        let wrong = |problem: String| Error::Tokenizer { path: self.path.clone(), problem };
        let ids = if text.len() <= MOST {
            let encoding = guarded(|| tokenizer.encode_fast(text, self.special)).map_err(wrong)?;
            encoding.map_err(|e| wrong(e.to_string()))?.get_ids().to_vec()
        } else {
            let tokens = |piece: &str| -> Result<Vec<Token>, Error> {
                let encoding = guarded(|| tokenizer.encode(piece, self.special)).map_err(wrong)?;
                let encoding = encoding.map_err(|e| wrong(e.to_string()))?;
                let places = encoding.get_offsets().iter().map(|(start, end)| *start..*end);
                Ok(encoding.get_ids().iter().copied().zip(places).collect())
            };
            pieces::ids(text, tokens)?.ok_or_else(|| {
                let most = ByteSize(MOST as u64);
                wrong(format!("finds no end of a word in {most} of the text; break it into lines"))
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
        assert!(
            error.ends_with("finds no end of a word in 2.0 MiB of the text; break it into lines")
        );
    }
}
