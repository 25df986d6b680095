//! A model's tokenizer.

use std::path::{Path, PathBuf};

use tokenizers::Tokenizer;

use super::Error;

/// A model's tokenizer, as its `tokenizer.json` describes it.
pub struct Tokens {
    path: PathBuf,
    tokenizer: Tokenizer,
    vocabulary: usize,
}

impl Tokens {
    /// The tokenizer of the checkpoint in `dir`, whose model knows `vocabulary` tokens.
    ///
    /// # Errors
    /// If there is none, or it is damaged.
    pub fn open(dir: &Path, vocabulary: usize) -> Result<Self, Error> {
        let path = dir.join("tokenizer.json");
        let wrong = |problem: String| Error::Tokenizer { path: path.clone(), problem };
        if !path.is_file() {
            return Err(wrong(
                "not there; text needs the model's tokenizer beside its weights".into(),
            ));
        }
        let mut tokenizer = Tokenizer::from_file(&path).map_err(|e| wrong(e.to_string()))?;
        // What a training setup left in the file would cut the text short.
        tokenizer.with_padding(None);
        tokenizer.with_truncation(None).map_err(|e| wrong(e.to_string()))?;
        Ok(Self { path, tokenizer, vocabulary })
    }

    /// The tokens of a text, without special ones.
    ///
    /// # Errors
    /// If the tokenizer fails, or gives a token that the model does not know.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, Error> {
        let encoding = self
            .tokenizer
            .encode_fast(text, false)
            .map_err(|e| Error::Tokenizer { path: self.path.clone(), problem: e.to_string() })?;
        let ids = encoding.get_ids().to_vec();
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
