//! The errors of texts and tokenizers.

use std::{io, path::PathBuf};

use crate::records;

/// An error of a text or a tokenizer: what is wrong, where, and what to do.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "each variant's message says what it is")]
pub enum Error {
    #[error("{}: {source}", path.display())]
    Io { path: PathBuf, source: io::Error },
    #[error(transparent)]
    Records(#[from] records::Error),
    #[error("{}: {problem}", path.display())]
    Tokenizer { path: PathBuf, problem: String },
    #[error(
        "{}: gives token {id}, but the model's vocabulary has {vocabulary} tokens: \
         it belongs to another model",
        path.display()
    )]
    Vocabulary { path: PathBuf, id: u32, vocabulary: usize },
    #[error("{}: {problem}", path.display())]
    TokenIds { path: PathBuf, problem: String },
    #[error(
        "{}: too little text: {found} tokens, and {wanted} are needed; \
         give a longer text or ask for less",
        path.display()
    )]
    TooShort { path: PathBuf, found: usize, wanted: String },
    #[error(
        "{}: {found} {} longer than {length} tokens, and {count} are needed; \
         give more documents, or ask for fewer or shorter samples",
        path.display(),
        if *found == 1 { "document" } else { "documents" }
    )]
    FewDocuments { path: PathBuf, found: usize, count: usize, length: usize },
}
