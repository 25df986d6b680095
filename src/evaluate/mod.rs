//! Judging a model: perplexity.

mod perplexity;

pub use perplexity::{Perplexity, logits, perplexity};
