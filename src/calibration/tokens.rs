//! A model's tokenizer.

use std::{
    cell::OnceCell,
    path::{Path, PathBuf},
};

use tokenizers::Tokenizer;

use super::Error;
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
        let encoding = guarded(|| tokenizer.encode_fast(text, self.special)).map_err(wrong)?;
        let encoding = encoding.map_err(|e| wrong(e.to_string()))?;
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
