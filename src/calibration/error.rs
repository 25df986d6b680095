//! The ways in which texts and tokenizers can be wrong.

use std::{io, path::PathBuf};

/// What is wrong with a text or a tokenizer, where, and what to do.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "each variant's message says what it is")]
pub enum Error {
    #[error("{}: {source}", path.display())]
    Io { path: PathBuf, source: io::Error },
    #[error("{}: not UTF-8 text from byte {byte} on", path.display())]
    NotText { path: PathBuf, byte: usize },
    #[error("{}: {problem}", path.display())]
    Tokenizer { path: PathBuf, problem: String },
    #[error(
        "{}: gives token {id}, but the model's vocabulary has {vocabulary} tokens: \
         it belongs to another model",
        path.display()
    )]
    Vocabulary { path: PathBuf, id: u32, vocabulary: usize },
    #[error("{}, line {line}: {problem}", path.display())]
    Line { path: PathBuf, line: usize, problem: String },
    #[error("{}: {problem}", path.display())]
    TokenIds { path: PathBuf, problem: String },
    #[error(
        "{}: too little text: {found} tokens, and {wanted} are needed; \
         give a longer text or ask for less",
        path.display()
    )]
    TooShort { path: PathBuf, found: usize, wanted: String },
}
